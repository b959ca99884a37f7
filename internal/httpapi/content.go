package httpapi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/task"
)

// What a call carries comes in as one of three fields, and is shown as that one.

// The content types of what a request gives as payload, body and body_base64.
const (
	jsonContent  = "application/json"
	textContent  = "text/plain; charset=utf-8"
	bytesContent = "application/octet-stream"
)

// shownGrowth is how many times its size a body takes while it becomes a part of an
// answer: three, or eight where all of it must be escaped.
const shownGrowth = 8

// includePayload is the value of the query parameter include.
const includePayload = "payload"

// readContent returns what a call is to carry; nothing where no field says so.
// A payload of null is none.
func readContent(payload json.RawMessage, text, encoded *string) (c task.Content, errs task.Errors) {
	add := func(field, message, kind string) {
		errs = append(errs, task.FieldError{Path: []string{field}, Message: message, Kind: kind})
	}
	take := func(field string, body []byte, contentType string) {
		if c.Field != "" {
			add(field, "must not be there together with "+c.Field, "conflict")
			return
		}
		c = task.Content{Body: body, ContentType: contentType, Field: field}
	}
	if payload != nil && string(payload) != "null" {
		take("payload", payload, jsonContent)
	}
	if text != nil {
		take("body", []byte(*text), textContent)
	}
	if encoded != nil {
		body, err := decodeBase64(*encoded)
		if err != nil {
			add("body_base64", err.Error(), "invalid")
		}
		take("body_base64", body, bytesContent)
	}
	return c, errs
}

var errNotBase64 = errors.New("must be base64 of the standard or the URL alphabet, with or without padding, without spaces and line breaks")

// decodeBase64 reads either alphabet of RFC 4648 (§4, §5), with or without its
// padding. Like most readers, and unlike Go's, it allows no line breaks. Where bits
// are left over they must be zero (§3.5): others come from a text that was cut.
func decodeBase64(text string) ([]byte, error) {
	if strings.ContainsAny(text, "\r\n") {
		return nil, errNotBase64
	}
	if len(text)%4 == 0 { // else padding is no padding
		text = strings.TrimSuffix(strings.TrimSuffix(text, "="), "=")
	}
	encoding := base64.RawStdEncoding
	if strings.ContainsAny(text, "-_") {
		encoding = base64.RawURLEncoding
	}
	decoded, err := encoding.Strict().DecodeString(text)
	if err != nil {
		return nil, errNotBase64 // whose own text would say less
	}
	return decoded, nil
}

// contentType is that of the call of t; empty where it has no body.
func contentType(t *task.Task) string {
	if t.BodyBytes == 0 && t.ContentType == "" {
		return ""
	}
	for name, value := range t.Headers {
		if strings.EqualFold(name, "Content-Type") {
			return value
		}
	}
	return t.ContentType
}

// answerWithBody answers with a task and the body of its call.
func (a *API) answerWithBody(w http.ResponseWriter, r *http.Request, id task.ID) error {
	b, tag, err := a.encodeWithBody(r.Context(), id)
	if err != nil {
		return err
	}
	answers := a.Guard.Answers()
	defer answers.Release(len(b))
	if !answers.Reserve(len(b), len(b)) {
		return httpserver.TooManyAnswers()
	}
	w.Header()["Etag"] = []string{tag}
	a.send(w, r, http.StatusOK, b)
	return nil
}

// encodeWithBody returns a task with the body of its call, and its ETag. What the answer is
// made of counts among the answers meanwhile.
func (a *API) encodeWithBody(ctx context.Context, id task.ID) (b []byte, tag string, err error) {
	t, err := a.Store.GetWithBody(ctx, id)
	if err != nil {
		return nil, "", err
	}
	answers, reserved := a.Guard.Answers(), shownGrowth*len(t.Body)
	defer answers.Release(reserved)
	if !answers.Reserve(reserved, reserved) {
		return nil, "", httpserver.TooManyAnswers()
	}
	v := taskView(t)
	v.show(t)
	payload := v.Payload
	v.Payload = nil
	b, err = encode(v)
	if payload != nil { // byte for byte: the encoder would drop its white space
		b = slices.Concat(b[:len(b)-1], []byte(`,"payload":`), payload, []byte("}"))
	}
	return b, etag(t), err
}

// show puts the body of t where it came from. Whatever else is stored is shown as
// base64: it can always be read back.
func (v *Task) show(t *task.Task) {
	switch {
	case t.Body == nil:
	case t.ContentType == jsonContent && jsontext.Value(t.Body).IsValid():
		v.Payload = t.Body
	case t.ContentType != bytesContent && utf8.Valid(t.Body):
		text := string(t.Body)
		v.Body = &text
	default:
		encoded := base64.StdEncoding.EncodeToString(t.Body)
		v.BodyBase64 = &encoded
	}
}

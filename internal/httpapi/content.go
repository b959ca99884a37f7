package httpapi

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"

	"github.com/melodia/orchestrator/internal/task"
)

// What a call carries comes in as one of three fields, and is shown as that one.

// The content types of what a request gives as payload, body and body_base64.
const (
	jsonContent  = "application/json"
	textContent  = "text/plain; charset=utf-8"
	bytesContent = "application/octet-stream"
)

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

package httpapi

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/melodia/orchestrator/internal/task"
)

// jsonAPI is a huma.API that speaks JSON alone. Huma's own choice of a format
// heeds the header Accept, which it cannot read without panicking at times, and
// tells apart media types that differ by case.
type jsonAPI struct{ huma.API }

// Negotiate is part of huma.API.
func (jsonAPI) Negotiate(string) (string, error) { return "application/json", nil }

// Marshal is part of huma.API.
func (jsonAPI) Marshal(w io.Writer, _ string, v any) error { return encodeTo(w, v) }

// Unmarshal is part of huma.API.
func (jsonAPI) Unmarshal(contentType string, data []byte, v any) error {
	if !isJSON(contentType) {
		return huma.ErrUnknownContentType
	}
	return decode(data, v)
}

func isJSON(contentType string) bool {
	if contentType == "application/json" { // nearly always
		return true
	}
	mediaType, _, _ := mime.ParseMediaType(contentType)
	return mediaType == "application/json" || strings.HasSuffix(mediaType, "+json")
}

// encodeTo writes text that is not UTF-8 with U+FFFD in it: an answer that breaks
// off in its middle would be worse.
func encodeTo(w io.Writer, v any) error {
	if t, ok := v.(*Task); ok {
		return writeTask(w, t)
	}
	return json.MarshalWrite(w, v, jsontext.AllowInvalidUTF8(true))
}

// wholeNumbers reads 5.0 and 5e0 as 5: JSON has one kind of number.
var wholeNumbers = json.WithUnmarshalers(json.UnmarshalFunc(func(b []byte, n *int) error {
	f, err := strconv.ParseFloat(string(b), 64)
	if err != nil || f != math.Trunc(f) || math.Abs(f) > 1<<53 {
		return errors.New("not a whole number")
	}
	*n = int(f)
	return nil
}))

// decode reads a body by what RFC 7493 (I-JSON) demands: no member twice, no
// invalid UTF-8, no lone surrogates, nothing behind the value; the standard
// library's package lets all of that pass. What it only advises, to keep numbers
// within a float64, is not demanded of a payload: its numbers are not read.
//
// Its errors are shown to the caller: they say where the mistake is, and
// quote nothing that was sent but member names.
func decode(data []byte, v any) error {
	var err error
	if tree, ok := v.(*any); ok { // for huma to validate
		*tree, err = decodeTree(data)
		escapeNames(*tree)
	} else {
		err = json.Unmarshal(data, v, wholeNumbers, json.RejectUnknownMembers(true))
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, errTooManyMembers) {
		return errTooManyMembers
	}
	var syntax *jsontext.SyntacticError
	if errors.As(err, &syntax) {
		what := "is not valid JSON"
		switch {
		case errors.Is(err, jsontext.ErrDuplicateName):
			what = "has a member twice" + at(syntax.JSONPointer)
		case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
			what = "ends in the middle of its JSON"
		case strings.Contains(syntax.Err.Error(), "UTF-8"), strings.Contains(syntax.Err.Error(), "surrogate"):
			what = "is not valid UTF-8, or has half of a surrogate pair"
		case strings.Contains(syntax.Err.Error(), "max depth"):
			what = "is nested too deeply"
		}
		return fmt.Errorf("The body %s, at byte %d.", what, syntax.ByteOffset) //nolint:staticcheck // a sentence for the caller
	}
	var semantic *json.SemanticError
	if errors.As(err, &semantic) {
		return fmt.Errorf("The body has a value of the wrong kind or out of range%s.", at(semantic.JSONPointer)) //nolint:staticcheck // a sentence for the caller
	}
	return errors.New("The body cannot be read.") //nolint:staticcheck // a sentence for the caller
}

// maxTree is the longest text of a member that is decoded into a tree. No legal
// one but the payload is longer; what is wrong with such a member is found when
// it is decoded into its own type, and by the domain's rules.
const maxTree = 64 << 10

// anyNumbers reads a number into a tree also where it does not fit a float64: as
// infinity, which no field admits. So it is named like any other that is out of
// its field's range.
var anyNumbers = json.WithUnmarshalers(json.UnmarshalFromFunc(func(d *jsontext.Decoder, v *any) error {
	if d.PeekKind() != '0' {
		return errors.ErrUnsupported // then it is read as always
	}
	token, err := d.ReadToken()
	if err != nil {
		return err
	}
	*v, _ = token.Float() // the error says that it is infinity
	return nil
}))

// decodeTree decodes a body into maps, slices and scalars, but for a payload:
// as a tree it would take sixty times the memory of its text, and any JSON is
// legal there, whatever its numbers.
func decodeTree(data []byte) (any, error) {
	if jsontext.Value(data).Kind() != '{' {
		var tree any
		return tree, json.Unmarshal(data, &tree, anyNumbers)
	}
	var members map[string]jsontext.Value
	if err := json.Unmarshal(data, &members); err != nil {
		return nil, err
	}
	if len(members) > maxMembers {
		return nil, errTooManyMembers
	}
	tree := make(map[string]any, len(members))
	for name, value := range members {
		var member any
		var err error
		switch kind := value.Kind(); {
		case name == "payload" && kind != 'n':
			member = true
		case kind == '{' && len(value) > maxTree:
			member, err = outline(value)
		case kind == '[' && len(value) > maxTree:
			member = []any{}
		default:
			err = json.Unmarshal(value, &member, anyNumbers)
		}
		if err != nil {
			return nil, within(err, name)
		}
		tree[name] = member
	}
	return tree, nil
}

// outline decodes an object, but for what its members hold where they are objects or
// lists, and for more members than a request has fields.
func outline(object jsontext.Value) (tree map[string]any, err error) {
	decoder := jsontext.NewDecoder(bytes.NewReader(object))
	if _, err := decoder.ReadToken(); err != nil {
		return nil, err
	}
	tree = make(map[string]any)
	for len(tree) < maxMembers && decoder.PeekKind() != '}' {
		name, err := decoder.ReadToken()
		if err != nil {
			return nil, err
		}
		key := name.String()
		value, err := decoder.ReadValue()
		if err != nil {
			return nil, err
		}
		var member any
		switch value.Kind() {
		case '{':
			member = map[string]any{}
		case '[':
			member = []any{}
		default:
			if err := json.Unmarshal(value, &member, anyNumbers); err != nil {
				return nil, within(err, key)
			}
		}
		tree[key] = member
	}
	return tree, nil
}

// within puts a member's name before the place that err names in its value.
func within(err error, name string) error {
	var semantic *json.SemanticError
	if errors.As(err, &semantic) {
		outer := *semantic
		outer.JSONPointer = jsontext.Pointer("").AppendToken(name) + semantic.JSONPointer
		return &outer
	}
	return err
}

// at writes " at /way/to/the/value", cut where a caller made it very long.
func at(p jsontext.Pointer) string {
	if p == "" {
		return ""
	}
	const most = 100
	s := strconv.QuoteToASCII(string(p))
	s = s[1 : len(s)-1]
	if len(s) > most {
		s = s[:most] + "…"
	}
	return " at " + s
}

// Timestamp is a moment as every answer shows it: UTC, with microseconds. The
// zero Timestamp is null.
type Timestamp time.Time

// MarshalJSONTo is json.MarshalerTo.
func (t Timestamp) MarshalJSONTo(e *jsontext.Encoder) error {
	if time.Time(t).IsZero() {
		return e.WriteToken(jsontext.Null)
	}
	b := append(e.AvailableBuffer(), '"')
	return e.WriteValue(append(task.AppendTime(b, time.Time(t)), '"'))
}

// Schema is huma.SchemaProvider.
func (Timestamp) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeString, Format: "date-time"}
}

package httpapi

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// jsonFormat is how bodies are read and written. Reading follows RFC 7493
// (I-JSON): no member twice, no invalid UTF-8, no lone surrogates, nothing
// behind the value; the standard library's package lets all of that pass.
var jsonFormat = huma.Format{Marshal: encode, Unmarshal: decode}

func encode(w io.Writer, v any) error {
	return json.MarshalWrite(w, v)
}

// decode's errors are shown to the caller: they say where the mistake is, and
// quote nothing that was sent but member names.
func decode(data []byte, v any) error {
	err := json.Unmarshal(data, v)
	if err == nil {
		if tree, ok := v.(*any); ok { // for huma to validate
			escapeNames(*tree)
		}
		return nil
	}
	var syntax *jsontext.SyntacticError
	if errors.As(err, &syntax) {
		what := "is not valid JSON"
		switch {
		case errors.Is(err, jsontext.ErrDuplicateName):
			what = "has a member twice" + at(syntax.JSONPointer)
		case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
			what = "ends in the middle of its JSON"
		case strings.Contains(syntax.Error(), "UTF-8"), strings.Contains(syntax.Error(), "surrogate"):
			what = "is not valid UTF-8, or has half of a surrogate pair"
		case strings.Contains(syntax.Error(), "max depth"):
			what = "is nested too deeply"
		}
		return fmt.Errorf("The body %s, at byte %d.", what, syntax.ByteOffset) //nolint:staticcheck,revive // a sentence for the caller
	}
	var semantic *json.SemanticError
	if errors.As(err, &semantic) {
		return fmt.Errorf("The body has a value of the wrong kind or out of range%s.", at(semantic.JSONPointer)) //nolint:staticcheck,revive // a sentence for the caller
	}
	return errors.New("The body cannot be read.") //nolint:staticcheck,revive // a sentence for the caller
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

// Timestamp is a moment as every answer shows it: UTC, with microseconds.
type Timestamp time.Time

const timestampLayout = "2006-01-02T15:04:05.000000Z"

// MarshalJSON is json.Marshaler.
func (t Timestamp) MarshalJSON() ([]byte, error) {
	b := make([]byte, 0, len(timestampLayout)+2)
	b = append(b, '"')
	b = time.Time(t).UTC().AppendFormat(b, timestampLayout)
	return append(b, '"'), nil
}

// Schema is huma.SchemaProvider.
func (Timestamp) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeString, Format: "date-time"}
}

// timestamp is nil for the zero time.
func timestamp(t time.Time) *Timestamp {
	if t.IsZero() {
		return nil
	}
	return (*Timestamp)(&t)
}

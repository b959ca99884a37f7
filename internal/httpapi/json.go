package httpapi

import (
	"mime"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/melodia/orchestrator/internal/task"
)

func isJSON(contentType string) bool {
	if contentType == "application/json" { // nearly always
		return true
	}
	mediaType, _, _ := mime.ParseMediaType(contentType)
	return mediaType == "application/json" || strings.HasSuffix(mediaType, "+json")
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

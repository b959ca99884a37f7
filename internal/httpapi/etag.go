package httpapi

import (
	"strconv"
	"strings"

	"github.com/melodia/orchestrator/internal/task"
)

// etag is the entity tag (RFC 9110 §8.8.3) of a task in the version that t is.
// It is strong: whatever can change about a task changes one of its parts.
func etag(t *task.Task) string {
	b := make([]byte, 0, 40)
	b = append(b, '"')
	b = strconv.AppendInt(b, t.LastClaim, 10)
	b = append(b, '-')
	b = append(b, t.State...)
	b = append(b, '-')
	b = strconv.AppendInt(b, int64(len(t.Attempts)), 10)
	if !t.CancelRequestedAt.IsZero() {
		b = append(b, "-cancelling"...)
	}
	return string(append(b, '"'))
}

// ifMatch reports whether a header If-Match (RFC 9110 §13.1.1) allows a change of what has
// the tag current: it is empty, it is *, or the tag is on its list. A weak tag
// never is the same, and what is malformed matches nothing.
func ifMatch(header, current string) bool {
	header = strings.Trim(header, " \t")
	if header == "" || header == "*" {
		return true
	}
	for header != "" {
		weak := strings.HasPrefix(header, "W/")
		tag, rest, ok := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(header, "W/"), `"`), `"`)
		if !ok || !strings.HasPrefix(strings.TrimPrefix(header, "W/"), `"`) {
			return false
		}
		if !weak && `"`+tag+`"` == current {
			return true
		}
		rest = strings.TrimLeft(rest, " \t")
		if rest != "" && rest[0] != ',' {
			return false
		}
		header = strings.TrimLeft(rest, ", \t")
	}
	return false
}

package task

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Filter says which tasks are meant: those that match every field that is set.
// The zero Filter means all. Times bound half-open ranges: After is within,
// Before is not, so that ranges which touch share no task.
type Filter struct {
	// States: any of these.
	States []State
	// Labels: all of these.
	Labels map[string]string
	// Host is the target's, as it is written in the URL, on any port.
	Host string
	// URLPrefix is how the URL begins.
	URLPrefix                     string
	CreatedAfter, CreatedBefore   time.Time
	RunAfter, RunBefore           time.Time
	FinishedAfter, FinishedBefore time.Time
	// Reasons: any of these. Only failed tasks have one.
	Reasons []Reason
	// MinAttempts is the least number of attempts that count.
	MinAttempts int
	CreatedBy   string
	Queue       string
	// FlowKey is of any queue where Queue names none.
	FlowKey string
}

// MaxCreatedBy is the longest name of a caller that submits tasks, in bytes.
const MaxCreatedBy = 320

// IsZero reports whether f means all tasks.
func (f *Filter) IsZero() bool {
	return len(f.States) == 0 && len(f.Labels) == 0 && f.Host == "" && f.URLPrefix == "" &&
		f.CreatedAfter.IsZero() && f.CreatedBefore.IsZero() && f.RunAfter.IsZero() && f.RunBefore.IsZero() &&
		f.FinishedAfter.IsZero() && f.FinishedBefore.IsZero() &&
		len(f.Reasons) == 0 && f.MinAttempts == 0 && f.CreatedBy == "" &&
		f.Queue == "" && f.FlowKey == ""
}

// Check returns [Errors] with every rule that f breaks, or nil. Its paths are
// the names of the fields in a request.
func (f *Filter) Check() error {
	var errs Errors
	add := func(message, kind string, path ...string) {
		errs = append(errs, FieldError{Path: path, Message: message, Kind: kind})
	}
	for _, s := range f.States {
		if !slices.Contains(states, s) {
			add("must be any of "+join(states), "enum", "state")
			break
		}
	}
	for _, r := range f.Reasons {
		if !slices.Contains(reasons, r) {
			add("must be any of "+join(reasons), "enum", "reason")
			break
		}
	}
	checkLabels(f.Labels, add)
	if f.Host != "" && (len(f.Host) > MaxURLBytes || checkURL("http://"+f.Host+"/") != "" || strings.ContainsAny(f.Host, "/?#@") || hasPort(f.Host)) {
		add("must be the host of a URL, without scheme, port or path: plays.melodia.app, 10.1.2.3 or [fd00::1]", "invalid", "host")
	}
	switch {
	case len(f.URLPrefix) > MaxURLBytes || !utf8.ValidString(f.URLPrefix) || strings.Contains(f.URLPrefix, "\x00"):
		add("must be the start of a URL, at most 2048 bytes long", "invalid", "url")
	case len(f.CreatedBy) > MaxCreatedBy || !isPlainText(f.CreatedBy):
		add(fmt.Sprintf("must be at most %d bytes long, without control characters", MaxCreatedBy), "invalid", "created_by")
	}
	if f.Queue != "" && !IsQueueName(f.Queue) {
		add(wantQueueName, "invalid", "queue")
	}
	if f.FlowKey != "" && !IsFlowKey(f.FlowKey) {
		add(wantFlowKey, "invalid", "flow_key")
	}
	if f.MinAttempts < 0 || f.MinAttempts > MaxAttemptsLimit {
		add("must be between 1 and 100", "out_of_range", "min_attempts")
	}
	for _, r := range []struct {
		name          string
		after, before time.Time
	}{
		{"created", f.CreatedAfter, f.CreatedBefore},
		{"run", f.RunAfter, f.RunBefore},
		{"finished", f.FinishedAfter, f.FinishedBefore},
	} {
		// The years that a time of the store, and the milliseconds of an ID, can hold.
		for name, t := range map[string]time.Time{r.name + "_after": r.after, r.name + "_before": r.before} {
			if !t.IsZero() && (t.Year() < 1970 || t.Year() > 9998) {
				add("must be between the years 1970 and 9998", "out_of_range", name)
			}
		}
		if !r.after.IsZero() && !r.before.IsZero() && !r.after.Before(r.before) {
			add("must be later than "+r.name+"_after: no task could match", "conflict", r.name+"_before")
		}
	}
	if errs == nil {
		return nil
	}
	slices.SortStableFunc(errs, func(a, b FieldError) int { return slices.Compare(a.Path, b.Path) })
	return errs
}

func hasPort(host string) bool {
	return strings.Contains(host[strings.LastIndex(host, "]")+1:], ":")
}

func join[T ~string](words []T) string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = string(w)
	}
	return strings.Join(out, ", ")
}

// Order is by what tasks are listed, the newest first.
type Order byte

// The orders.
const (
	// ByID is by creation: IDs begin with the moment at which they were made.
	ByID Order = iota + 1
	ByRunAt
	ByFinishedAt
)

// Order returns the order in which the tasks that match f are listed. It
// follows the range that f asks for, so that a listing never has to look at
// what lies outside of it.
func (f *Filter) Order() Order {
	switch {
	case !f.FinishedAfter.IsZero() || !f.FinishedBefore.IsZero():
		return ByFinishedAt
	case !f.RunAfter.IsZero() || !f.RunBefore.IsZero():
		return ByRunAt
	default:
		return ByID
	}
}

// Position is a place in a listing: right behind the task with this key. The
// zero Position is the beginning.
type Position struct {
	// At is the task's RunAt or FinishedAt; zero where the order is [ByID].
	At time.Time
	ID ID
}

// PositionOf returns the place of a task in the listing of f.
func (f *Filter) PositionOf(t *Task) Position {
	p := Position{ID: t.ID}
	switch f.Order() {
	case ByRunAt:
		p.At = t.RunAt
	case ByFinishedAt:
		p.At = t.FinishedAt
	case ByID:
	}
	return p
}

// Cursor writes a position in the listing of f as a word to hand out:
// base64url of the order, microseconds, the id, and a checksum over them and f.
// Whoever changes a cursor, or uses it with another filter, is told so; no more
// is protected.
func (f *Filter) Cursor(p Position) string {
	b := make([]byte, 0, cursorBytes)
	b = append(b, byte(f.Order()))
	micros := int64(0)
	if !p.At.IsZero() {
		micros = p.At.UnixMicro()
	}
	b = binary.BigEndian.AppendUint64(b, uint64(micros)) //nolint:gosec // the same bits come back
	b = append(b, p.ID[:]...)
	b = binary.BigEndian.AppendUint32(b, f.checksum(b))
	return base64.RawURLEncoding.EncodeToString(b)
}

const cursorBytes = 1 + 8 + 16 + 4

// ParseCursor reads what Cursor wrote, or returns [Errors] about "cursor".
func (f *Filter) ParseCursor(s string) (Position, error) {
	invalid := Errors{{
		Path: []string{"cursor"}, Kind: "invalid",
		Message: "must be the next_cursor of an answer to the same filters",
	}}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != cursorBytes || binary.BigEndian.Uint32(b[cursorBytes-4:]) != f.checksum(b[:cursorBytes-4]) {
		return Position{}, invalid
	}
	p := Position{ID: ID(b[9:25])}
	if f.Order() != ByID {
		p.At = time.UnixMicro(int64(binary.BigEndian.Uint64(b[1:9]))).UTC() //nolint:gosec // the bits that Cursor wrote
		if p.At.Year() < 1970 || p.At.Year() > 9998 {                       // a caller can make up a cursor with its checksum
			return Position{}, invalid
		}
	}
	return p, nil
}

// checksum tells cursors of this filter from others.
func (f *Filter) checksum(position []byte) uint32 {
	same := *f
	same.States, same.Reasons = slices.Sorted(slices.Values(f.States)), slices.Sorted(slices.Values(f.Reasons))
	b, err := json.Marshal(same) // the names in a map are sorted
	if err != nil {
		panic(err) // words, numbers and the times that Check admits always encode
	}
	return crc32.Update(crc32.ChecksumIEEE(b), crc32.IEEETable, position)
}

// Count is how many tasks there are of a kind.
type Count struct {
	Tasks int64
	// Exact: they were counted. Otherwise it is an estimate.
	Exact bool
}

package intake

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"maps"
	"slices"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// fingerprintOf is what tells tasks from others that a principal may submit under the same
// key: equal for equal tasks, whatever their ids and their origin. It is stored, so what it
// is made of must not change. A field that a later version adds counts only where it is not
// zero, and behind a tag of its own.
func fingerprintOf(tasks []*task.Task) []byte {
	w := fingerprinter{sha256.New()}
	for _, t := range tasks {
		w.text(t.URL)
		w.text(t.Method)
		w.texts(t.Headers)
		w.text(string(t.Body))
		w.text(t.ContentType)
		w.numbers(int64(t.Timeout), int64(t.Retry.MaxAttempts), int64(t.Retry.MaxRetryDuration), int64(t.Retry.MinBackoff),
			int64(t.Retry.MaxBackoff), int64(t.Retry.MaxDoublings))
		w.flag(t.Retry.RetryClientErrors)
		w.texts(t.Labels)
		w.moment(t.ExpiresAt)
		for _, c := range []*task.Callback{t.OnSuccess, t.OnFailure} {
			w.flag(c != nil)
			if c != nil {
				w.text(c.URL)
				w.texts(c.Headers)
			}
		}
		w.text(t.OIDCAudience)
		w.moment(t.RunAt)
		w.numbers(int64(t.Delay))
		if t.Queue != "" || t.FlowKey != "" || t.Priority != "" {
			w.text("flow")
			w.text(t.Queue)
			w.text(t.FlowKey)
			w.text(string(t.Priority))
		}
	}
	return w.Sum(nil)
}

// fingerprinter writes values so that no two lists of them are written alike.
type fingerprinter struct{ hash.Hash }

func (w fingerprinter) numbers(numbers ...int64) {
	for _, n := range numbers {
		_, _ = w.Write(binary.BigEndian.AppendUint64(nil, uint64(n))) //nolint:gosec // its bits
	}
}

func (w fingerprinter) text(s string) {
	w.numbers(int64(len(s)))
	_, _ = w.Write([]byte(s)) // a hash returns no errors
}

func (w fingerprinter) texts(m map[string]string) {
	w.numbers(int64(len(m)))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		w.text(name)
		w.text(m[name])
	}
}

func (w fingerprinter) flag(set bool) {
	if set {
		w.numbers(1)
	} else {
		w.numbers(0)
	}
}

func (w fingerprinter) moment(t time.Time) { w.numbers(t.Unix(), int64(t.Nanosecond())) }

package deliver

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Headers by which a target that does not answer 2xx says when it wants the call
// again.
const (
	retryHeader  = "Orchestrator-Retry"
	snoozeHeader = "Orchestrator-Snooze"
)

// readWishes notes what an answer other than 2xx asks for. They hold from the
// answer's head on, whatever becomes of its body. What cannot be read is passed over.
func readWishes(o *task.Outcome, resp *http.Response) {
	if resp.StatusCode/100 == 2 {
		return
	}
	o.Never = strings.EqualFold(resp.Header.Get(retryHeader), "never")
	o.Snooze = snooze(resp.Header.Get(snoozeHeader))
}

// snooze reads a number of seconds: digits, perhaps with a fraction behind a
// point. It is capped at [task.MaxSnooze]. Zero, and whatever else there is, asks
// for nothing.
func snooze(value string) time.Duration {
	if strings.Trim(value, "0123456789.") != "" {
		return 0
	}
	seconds, err := strconv.ParseFloat(value, 64)
	switch {
	case seconds >= task.MaxSnooze.Seconds(): // beyond a float64 too
		return task.MaxSnooze
	case err != nil:
		return 0
	}
	return time.Duration(seconds * float64(time.Second))
}

// tellWishes adds to an outcome's error what the target asked for.
func tellWishes(o *task.Outcome) {
	switch {
	case o.Never:
		o.Error += "; the target asks not to be called again"
	case o.Snooze > 0:
		o.Error += "; the target asks to be called again in " + strconv.FormatFloat(o.Snooze.Seconds(), 'f', -1, 64) + " s"
	}
}

package task

import (
	"fmt"
	"math"
	"time"
)

// HiddenAfter is how long a call must have taken for a gateway's answer, or the end of its
// connection, to mean that something on the way ended it and that the target may still be
// working on it. Whatever refuses calls by itself does so sooner; the limits of proxies and servers
// begin at 30 s (gunicorn's timeout).
const HiddenAfter = 20 * time.Second

// Hidden reports whether the outcome of the call at the target is not known, though the call
// has ended: something on the way has a time limit shorter than the task's timeout. The target
// may go on for the rest of that.
func (o *Outcome) Hidden() bool {
	if o.Kind != OutcomeRetryable || o.TimedOut || o.Duration <= HiddenAfter {
		return false
	}
	switch o.StatusCode {
	case 502, 504, 524: // 524 is Cloudflare's: its limit is 100 s
		return true
	}
	return o.StatusCode == 0 && o.Severed
}

// TellHidden adds to Error, where the outcome is hidden, what has most likely happened and
// what helps.
func (o *Outcome) TellHidden() {
	if o.Hidden() {
		o.Error += fmt.Sprintf("; after %d s a proxy or server on the way has most likely cut the call, and the target may still be working on it. "+
			"Usual limits: gunicorn and Google's load balancers 30 s, haproxy 50 s, nginx, Apache httpd and AWS' load balancers 60 s. "+
			"Raise theirs above the task's timeout_seconds, or have the target answer 202 and report its end later (completion)", int(math.Round(o.Duration.Seconds())))
	}
}

// hiddenWait is how long the next attempt waits at least after o: until the target must have
// ended the call of this one.
func (o *Outcome) hiddenWait(timeout time.Duration) time.Duration {
	if !o.Hidden() {
		return 0
	}
	return max(timeout-o.Duration, 0)
}

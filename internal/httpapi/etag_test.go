package httpapi

import (
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Whatever can happen to a task gives it another tag.
func TestETag(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	for name, tk := range map[string]*task.Task{
		"new":                  {State: task.Pending},
		"changed":              {State: task.Pending, LastClaim: 1},
		"claimed":              {State: task.Running, LastClaim: 1},
		"being cancelled":      {State: task.Running, LastClaim: 1, CancelRequestedAt: time.Unix(1, 0)},
		"waiting for a retry":  {State: task.Pending, LastClaim: 1, Attempts: make([]task.Attempt, 1)},
		"cancelled":            {State: task.Cancelled, LastClaim: 1},
		"cancelled in a retry": {State: task.Cancelled, LastClaim: 1, Attempts: make([]task.Attempt, 1)},
		"failed":               {State: task.Failed, LastClaim: 1, Attempts: make([]task.Attempt, 1)},
		"succeeded":            {State: task.Succeeded, LastClaim: 1, Attempts: make([]task.Attempt, 1)},
		"redriven":             {State: task.Pending, LastClaim: 2, Attempts: make([]task.Attempt, 1)},
	} {
		tag := etag(tk)
		if other, ok := seen[tag]; ok {
			t.Errorf("a task that is %s and one that is %s both have the tag %s", name, other, tag)
		}
		seen[tag] = name
		if !ifMatch(tag, tag) {
			t.Errorf("%s does not match itself", tag)
		}
	}
}

func TestIfMatch(t *testing.T) {
	t.Parallel()
	const current = `"1-pending-0"`
	for header, want := range map[string]bool{
		``:                                   true,
		`*`:                                  true,
		` * `:                                true,
		current:                              true,
		`"0-pending-0", "1-pending-0"`:       true,
		`"0-pending-0","1-pending-0"`:        true,
		`"1-pending-0" , "0-pending-0"`:      true,
		`"0-pending-0",, "1-pending-0" ,`:    true,
		`W/"0-pending-0", "1-pending-0"`:     true,
		`"with, comma", "1-pending-0"`:       true,
		`"0-pending-0"`:                      false,
		`W/"1-pending-0"`:                    false, // strong comparison (RFC 9110 §8.8.3.2)
		`1-pending-0`:                        false,
		`"1-pending-0`:                       false,
		`1-pending-0"`:                       false,
		`""`:                                 false,
		`"`:                                  false,
		`W/`:                                 false,
		`W/W/"1-pending-0"`:                  false,
		`"0-pending-0" "1-pending-0"`:        false,
		`"0-pending-0", *`:                   false,
		`"1-PENDING-0"`:                      false,
		`"0-pending-0", "1-pending-0" trash`: true, // it was found before
	} {
		if got := ifMatch(header, current); got != want {
			t.Errorf("ifMatch(%q) = %v, want %v", header, got, want)
		}
	}
}

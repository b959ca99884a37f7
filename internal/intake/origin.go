package intake

import (
	"fmt"

	"github.com/melodia/orchestrator/internal/task"
)

// Origin is who makes a request, and what led to it.
type Origin struct {
	// Principal names who makes the request; empty where principals are not known.
	Principal string
	// Hops is how many calls of tasks led to the request; at most [task.MaxHops].
	Hops int
	// Parent is the task whose call led to the request; zero: none.
	Parent task.ID
	// IsCall says that the request is a call of Parent itself, and not one that the
	// target of Parent makes meanwhile.
	IsCall bool
}

// mark puts the origin into a task.
func (o Origin) mark(t *task.Task) {
	t.CreatedBy, t.Hops, t.ParentID = o.Principal, o.Hops, o.Parent
}

// HopsError says that more calls of tasks led to a request than the settings allow.
// Nothing was stored or carried out.
type HopsError struct {
	// Max is how many may have led to it.
	Max int
}

func (e *HopsError) Error() string {
	return fmt.Sprintf("more than %d calls led to the request", e.Max)
}

// CheckHops returns a [*HopsError] where too many calls led to a request. All that stores,
// redrives or makes tasks asks it; a door asks it before it reads the request's body.
func (in *Intake) CheckHops(hops int) error {
	if in.o.MaxHops > 0 && hops > in.o.MaxHops {
		return &HopsError{in.o.MaxHops}
	}
	return nil
}

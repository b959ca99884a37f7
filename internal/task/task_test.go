package task_test

import (
	"testing"

	"github.com/melodia/orchestrator/internal/task"
)

var states = []task.State{task.Pending, task.Running, task.Succeeded, task.Failed, task.Cancelled}

func TestCanBecome(t *testing.T) {
	t.Parallel()
	legal := map[[2]task.State]bool{
		{task.Pending, task.Running}:   true,
		{task.Pending, task.Cancelled}: true,
		{task.Running, task.Pending}:   true,
		{task.Running, task.Succeeded}: true,
		{task.Running, task.Failed}:    true,
		{task.Running, task.Cancelled}: true,
		{task.Failed, task.Pending}:    true, // redriven
		{task.Cancelled, task.Pending}: true,
	}
	all := append([]task.State{"", "unknown"}, states...)
	for _, from := range all {
		for _, to := range all {
			if got, want := from.CanBecome(to), legal[[2]task.State{from, to}]; got != want {
				t.Errorf("%q.CanBecome(%q) = %t, want %t", from, to, got, want)
			}
		}
	}
}

func TestEnded(t *testing.T) {
	t.Parallel()
	for _, s := range states {
		leads := false // elsewhere than back to the start, by somebody's hand
		for _, next := range states {
			leads = leads || next != task.Pending && s.CanBecome(next)
		}
		if got, want := s.Terminal(), !leads; got != want {
			t.Errorf("%q.Terminal() = %t, want %t", s, got, want)
		}
	}
	if task.State("").Terminal() {
		t.Error(`"".Terminal() = true, want false`)
	}
}

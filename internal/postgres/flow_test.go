package postgres_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

func inQueue(queue, key string, p task.Priority) func(*task.Task) {
	return func(tk *task.Task) { tk.Queue, tk.FlowKey, tk.Priority = queue, key, p }
}

// A task keeps its queue, key and priority through all that can become of it. Its
// callback is a plain task.
func TestTaskOfAQueue(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	check := func(where string, tk *task.Task, queue, key string, p task.Priority) {
		t.Helper()
		if diff := cmp.Diff([]any{queue, key, p}, []any{tk.Queue, tk.FlowKey, tk.Priority}); diff != "" {
			t.Errorf("%s (-want +got):\n%s", where, diff)
		}
	}
	one, normal, plain := withCallbacks(inQueue("mail", "tenant-42", task.High)), newTask(inQueue("mail", "", task.Normal)), newTask()
	if err := s.InsertBatch(t.Context(), &task.Batch{Tasks: []*task.Task{one, normal, plain}}); err != nil {
		t.Fatal(err)
	}
	child := newTask(inQueue("mail", "tenant-42", task.Low), func(tk *task.Task) { tk.ParentID = one.ID })
	insert(t, s, child)
	check("inserted", get(t, s, one.ID), "mail", "tenant-42", task.High)
	check("without a key", get(t, s, normal.ID), "mail", "", task.Normal)
	check("plain", get(t, s, plain.ID), "", "", "")
	check("a child", get(t, s, child.ID), "mail", "tenant-42", task.Low)

	moved := get(t, s, one.ID)
	moved.Queue, moved.FlowKey, moved.Priority = "slow", "", task.Low
	moved, err := s.Change(t.Context(), moved, nil)
	if err != nil {
		t.Fatal(err)
	}
	check("moved", moved, "slow", "", task.Low)
	c, err := s.ClaimOne(t.Context(), worker, one.ID)
	if err != nil {
		t.Fatal(err)
	}
	finish(t, s, c, c.Next(task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404, Error: "no"}, c.At, 0.5))
	check("failed", get(t, s, one.ID), "slow", "", task.Low)
	redriven, err := s.Redrive(t.Context(), one.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	check("redriven", redriven, "slow", "", task.Low)

	pending, err := s.Find(t.Context(), &task.Filter{Labels: map[string]string{"callback_of": one.ID.String()}}, task.Position{}, 10)
	if err != nil || len(pending) != 1 {
		t.Fatalf("Find = %v, %v; want the callback", pending, err)
	}
	check("callback", pending[0], "", "", "")
}

package postgres_test

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// The list of columns names those that the tables have, no more and no less.
func TestColumnsAreThoseOfTheTables(t *testing.T) {
	t.Parallel()
	_, pool := newStore(t)
	tasks, history := postgres.Columns()
	for table, listed := range map[string][]string{"tasks": tasks, "task_history": history} {
		got := query[[]string](t, pool, `SELECT array_agg(attname::text ORDER BY attname) FROM pg_attribute
			WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped`, table)
		if diff := cmp.Diff(slices.Sorted(slices.Values(listed)), got); diff != "" {
			t.Errorf("columns of %s (-listed +in the database):\n%s", table, diff)
		}
	}
}

// An entry in the list is all that a column needs to be inserted, claimed, read,
// changed, moved to the history, redriven, and inherited by a callback.
func TestNewColumn(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	exec(t, pool, "ALTER TABLE tasks ADD COLUMN fingerprint bytea")
	exec(t, pool, "ALTER TABLE task_history ADD COLUMN fingerprint bytea")
	s.AddColumn()
	worker := register(t, s)
	fingerprint := func(table string, id task.ID) string {
		t.Helper()
		return query[string](t, pool, "SELECT COALESCE((SELECT convert_from(fingerprint, 'UTF8') FROM "+table+" WHERE id = $1), '')", [16]byte(id))
	}
	check := func(where, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", where, got, want)
		}
	}
	with := func(value string) func(*task.Task) { return func(tk *task.Task) { tk.Fingerprint = []byte(value) } }

	one := newTask(with("sent"), func(tk *task.Task) { tk.OnFailure = &task.Callback{URL: "https://ends.melodia.app/"} })
	insert(t, s, one)
	check("inserted", fingerprint("tasks", one.ID), "sent")
	inBatch := newTask(with("in a batch"))
	if err := s.InsertBatch(t.Context(), &task.Batch{Tasks: []*task.Task{inBatch}, IdempotencyKey: "key", Fingerprint: []byte{}}); err != nil {
		t.Fatal(err)
	}
	check("inserted in a batch under a key", fingerprint("tasks", inBatch.ID), "in a batch")

	read := get(t, s, one.ID)
	check("read", string(read.Fingerprint), "sent")
	read.Fingerprint = []byte("changed")
	changed, err := s.Change(t.Context(), read, nil)
	if err != nil {
		t.Fatal(err)
	}
	check("changed", string(changed.Fingerprint), "changed")

	for _, c := range claim(t, s, worker, 2) {
		switch c.Task.ID {
		case one.ID:
			check("claimed", string(c.Task.Fingerprint), "changed")
			if matched, calledBack, err := write(s, c, task.Decision{State: task.Failed, Reason: task.ClientError, Counted: true}); !matched || !calledBack || err != nil {
				t.Fatalf("Finish = %v, %v, %v", matched, calledBack, err)
			}
		case inBatch.ID:
			if matched, _, err := write(s, c, succeeded(c)); !matched || err != nil {
				t.Fatalf("Finish = %v, %v", matched, err)
			}
		}
	}
	check("moved to the history with a callback", fingerprint("task_history", one.ID), "changed")
	check("moved to the history without one", fingerprint("task_history", inBatch.ID), "in a batch")
	check("read from the history", string(get(t, s, one.ID).Fingerprint), "changed")
	found, err := s.GetMany(t.Context(), []task.ID{one.ID})
	if err != nil {
		t.Fatal(err)
	}
	check("read in a list", string(found[0].Fingerprint), "changed")
	callback := claimOne(t, s, worker)
	if callback.Task.ID == one.ID {
		t.Fatal("the callback was not stored")
	}
	check("inherited by the callback", string(callback.Task.Fingerprint), "changed")

	redriven, err := s.Redrive(t.Context(), one.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	check("redriven", string(redriven.Fingerprint), "changed")
	cancelled, err := s.Cancel(t.Context(), one.ID)
	if err != nil {
		t.Fatal(err)
	}
	check("cancelled", string(cancelled.Fingerprint), "changed")
	check("moved to the history by a cancellation", fingerprint("task_history", one.ID), "changed")
	if left := query[int](t, pool, "SELECT count(*) FROM tasks WHERE id = $1", [16]byte(one.ID)); left != 0 {
		t.Error("the cancelled task is in both tables")
	}
}

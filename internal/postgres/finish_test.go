package postgres_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// What cannot be written fails alone, also where others of its flush have been
// written by an earlier statement.
func TestFinishTellsWhatStands(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	plain, good, bad := newTask(), withCallbacks(), withCallbacks(func(tk *task.Task) { tk.CreatedBy = "nobody" })
	insert(t, s, plain, good, bad)
	exec(t, pool, "ALTER TABLE tasks ADD CONSTRAINT nobody CHECK (NOT labels ? 'callback_of' OR created_by <> 'nobody')")
	var results []postgres.Result
	want := map[task.ID]bool{plain.ID: true, good.ID: true, bad.ID: false}
	for _, c := range claim(t, s, worker, 3) {
		results = append(results, postgres.Result{ID: c.Task.ID, Claim: c.Number, Decision: succeeded(c)})
	}
	matched, errs, err := s.FinishTogether(t.Context(), results)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range results {
		if wrote := want[r.ID]; matched[i] != wrote || (errs[i] == nil) != wrote {
			t.Errorf("task %d: matched %v, error %v; want %v", i, matched[i], errs[i], wrote)
		}
		if got := get(t, s, r.ID).State; got.Terminal() != want[r.ID] {
			t.Errorf("task %d is %s", i, got)
		}
	}
}

func TestAttemptIsReadAsWritten(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 24, 12, 0, 0, 123456000, time.UTC)
	for _, want := range []task.Attempt{
		{Round: 1, Number: 1, StartedAt: at, Outcome: task.OutcomeSucceeded},
		{Round: 1, Number: 100, StartedAt: at.Truncate(time.Second), Duration: 1, Outcome: task.OutcomeLost, Error: "\"quoted\"\\\n\x1f</script>\u2028"},
		{Round: 3, Number: 2, StartedAt: at.In(time.FixedZone("", 3600)), Duration: 1800 * time.Second, Outcome: task.OutcomeRetryable, StatusCode: 503,
			Error: "the target answered 503", ResponseExcerpt: "später 🎵", RetryAfter: 90 * time.Minute},
		{Round: 1, Number: 2, StartedAt: at, Outcome: task.OutcomeRetryable, Error: "connection refused", NotSent: true},
	} {
		got, err := postgres.DecodeAttempts([]byte(postgres.EncodeAttempt(&want)))
		if diff := cmp.Diff([]task.Attempt{want}, got); err != nil || diff != "" {
			t.Errorf("%v (-written +read):\n%s", err, diff)
		}
	}
}

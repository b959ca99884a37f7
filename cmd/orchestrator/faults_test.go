package main

import (
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// outcome is what the client of one submission knows.
type outcome struct {
	id       string // "" when no answer came
	answered int    // status
}

// trySubmit posts a task and survives that the instance dies meanwhile.
func trySubmit(ctx context.Context, serviceURL, body string) outcome {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, serviceURL+"/enqueue", strings.NewReader(body))
	if err != nil {
		return outcome{}
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return outcome{}
	}
	defer func() { _ = response.Body.Close() }()
	raw, err := io.ReadAll(response.Body)
	if err != nil {
		return outcome{}
	}
	var tk taskJSON
	_ = json.Unmarshal(raw, &tk) // a problem has no id
	return outcome{tk.ID, response.StatusCode}
}

// checkQueue compares the three sources: what clients were answered, what the
// target received, what the tables say. It is modelled on the total-queue
// checker of Jepsen (https://github.com/jepsen-io/jepsen, checker.clj): lost,
// unexpected, duplicated, recovered.
func checkQueue(t *testing.T, databaseURL string, submitted []outcome, calls []call) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	type ended struct {
		state             string
		counted, most     int
		explained, served int // attempts that may have reached the target unseen; calls it got
	}
	tasks := map[string]*ended{}
	rows, err := conn.Query(t.Context(), `SELECT id::text, state, attempt_count, max_attempts,
		(SELECT count(*) FROM jsonb_array_elements(attempts) a WHERE a->>'outcome' IN ('lost', 'interrupted', 'retryable')) FROM task_history`)
	if err != nil {
		t.Fatal(err)
	}
	var id string
	var e ended
	if _, err := pgx.ForEachRow(rows, []any{&id, &e.state, &e.counted, &e.most, &e.explained}, func() error {
		row := e
		tasks[id] = &row
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	unexpected, duplicated, recovered, unanswered := 0, 0, 0, 0
	for _, c := range calls {
		if tk := tasks[c.header.Get("Orchestrator-Task-Id")]; tk != nil {
			tk.served++
		} else {
			unexpected++
		}
	}
	for _, s := range submitted {
		switch {
		case s.answered != http.StatusAccepted:
			unanswered++
		case tasks[s.id] == nil:
			t.Errorf("task %s was accepted and is lost", s.id)
		case tasks[s.id].state != "succeeded" || tasks[s.id].served == 0:
			t.Errorf("task %s ended as %s after %d calls, want succeeded after one at least", s.id, tasks[s.id].state, tasks[s.id].served)
		}
	}
	for id, tk := range tasks {
		if tk.served > 1+tk.explained {
			duplicated++
			t.Errorf("task %s was called %d times, and only %d attempts explain a repeat", id, tk.served, tk.explained)
		}
		if tk.counted > tk.most {
			t.Errorf("task %s counts %d attempts of %d", id, tk.counted, tk.most)
		}
		if tk.explained > 0 {
			recovered++
		}
	}
	if unexpected > 0 {
		t.Errorf("the target got %d calls of tasks that nobody stored", unexpected)
	}
	t.Logf("submitted %d, without an answer %d, stored %d, calls %d, unexpected %d, duplicated %d, recovered %d",
		len(submitted), unanswered, len(tasks), len(calls), unexpected, duplicated, recovered)
}

// kill -9 of instances at random moments: nothing that was accepted is lost, and
// every repeat is explained by an attempt that is recorded as lost.
func TestInstancesThatAreKilled(t *testing.T) {
	t.Parallel()
	const n, kills, callers = 1500, 6, 16
	database := pgtest.URL(t)
	settings := []string{"DATABASE_URL=" + database, "LEASE_DURATION=1s", "POLL_INTERVAL=100ms", "LOG_LEVEL=info"}
	target := newTarget(t, func(_ http.ResponseWriter, r *http.Request, _ int) {
		select { // long enough that a kill hits some calls
		case <-time.After(time.Duration(rand.IntN(20)) * time.Millisecond):
		case <-r.Context().Done():
		}
	})

	var mu sync.Mutex
	instances := []*process{start(t, "serve", settings...), start(t, "serve", settings...), start(t, "serve", settings...)}
	anyURL := func() string {
		mu.Lock()
		defer mu.Unlock()
		return instances[rand.IntN(len(instances))].url
	}
	submitted := make([]outcome, n)
	body := `{"url":"` + target.url + `/killed","retry":{"min_backoff_seconds":0.05,"max_attempts":100}}`
	progress := make(chan struct{}, n)
	next := make(chan int)
	var submitting sync.WaitGroup
	for range callers {
		submitting.Go(func() {
			for i := range next {
				submitted[i] = trySubmit(t.Context(), anyURL(), body)
				progress <- struct{}{}
			}
		})
	}
	submitting.Go(func() {
		defer close(next)
		for i := range n {
			next <- i
		}
	})
	// Each kill comes when some more tasks are on their way.
	for kill := range kills {
		for range n / (kills + 1) {
			<-progress
		}
		victim := rand.IntN(len(instances))
		mu.Lock()
		old := instances[victim]
		mu.Unlock()
		old.stop(syscall.SIGKILL)
		fresh := start(t, "serve", settings...)
		mu.Lock()
		instances[victim] = fresh
		mu.Unlock()
		t.Logf("kill %d hit instance %d", kill+1, victim)
	}
	submitting.Wait()
	awaitEmpty(t, database)
	checkQueue(t, database, submitted, target.got("/killed"))
}

// awaitEmpty waits until every task has ended.
func awaitEmpty(t *testing.T, databaseURL string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	left := ""
	eventually(t, func() bool {
		var live int
		if err := conn.QueryRow(t.Context(), "SELECT count(*), coalesce(string_agg(id || ' ' || state, ', '), '') FROM tasks").Scan(&live, &left); err != nil {
			t.Fatal(err)
		}
		return live == 0
	}, func() string { return "tasks did not end: " + left[:min(len(left), 500)] })
}

// An instance that is stopped for longer than its lease, with a call under way:
// another one carries the task out, the late result changes nothing, and the
// instance goes on working under a new lease.
func TestInstanceThatStalls(t *testing.T) {
	t.Parallel()
	database := pgtest.URL(t)
	settings := []string{"DATABASE_URL=" + database, "LEASE_DURATION=1s", "POLL_INTERVAL=100ms"}
	arrived, release := make(chan struct{}), make(chan struct{})
	target := newTarget(t, func(_ http.ResponseWriter, r *http.Request, nth int) {
		if r.URL.Path == "/stalls" && nth == 1 {
			close(arrived)
			<-release
		}
	})
	stalled := start(t, "serve", settings...)
	tk := stalled.submit("/enqueue", `{"url":"`+target.url+`/stalls"}`)
	<-arrived
	if err := stalled.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	other := start(t, "serve", settings...)
	got := other.await(tk.ID, ended)
	if first, last := got.Attempts[0].Outcome, got.Attempts[len(got.Attempts)-1].Outcome; first != "lost" || last != "succeeded" {
		t.Errorf("the other instance left %s, want a lost attempt and a success", compact(t, got))
	}
	close(release) // the answer lies ready when the instance wakes
	if err := stalled.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		log := strings.Join(stalled.lines(), "\n")
		return strings.Count(log, `"msg":"registered"`) >= 2 &&
			(strings.Contains(log, "late result changed nothing") || strings.Contains(log, "result dropped, the lease was lost"))
	}, func() string { return "the stalled instance did not notice that it had lost its lease" })
	other.stop(syscall.SIGTERM)
	again := stalled.submit("/enqueue", `{"url":"`+target.url+`/afterwards"}`)
	if got := stalled.await(again.ID, ended); got.State != "succeeded" {
		t.Errorf("after waking: %s, want succeeded", compact(t, got))
	}
	if after := stalled.await(tk.ID, ended); len(after.Attempts) != len(got.Attempts) || after.AttemptCount != got.AttemptCount {
		t.Errorf("the late result changed the task: %s", compact(t, after))
	}
	checkQueue(t, database, []outcome{{tk.ID, http.StatusAccepted}}, target.got("/stalls"))
}

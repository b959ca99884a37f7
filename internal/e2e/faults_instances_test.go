//go:build faults

package e2e

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// As TestInstancesThatAreKilled, with many more.
func TestManyTasksWhileInstancesAreKilled(t *testing.T) {
	killInstances(t, 10_000, 20, false)
}

// Instances that are stopped for longer than their lease under load, one after
// the other, again and again.
func TestInstancesThatStallUnderLoad(t *testing.T) {
	const lease, poll = time.Second, 100 * time.Millisecond
	const tasks, stalls = 3000, 6
	database := pgtest.URL(t)
	j := newJournal(t)
	j.answer = func(w http.ResponseWriter, r *http.Request, nth int) {
		for range 10 { // so that each instance holds some calls at any moment
			afterAMoment(w, r, nth)
		}
	}
	j.audit(database)
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	instances := startFleet(t, 3, "DATABASE_URL="+database, "LEASE_DURATION="+lease.String(), "POLL_INTERVAL="+poll.String(), "LOG_LEVEL=info")
	// The clients use the instances that are not stopped.
	var awake atomic.Pointer[process]
	awake.Store(instances.instances[0])
	idle := instances.descriptors()
	var submitting sync.WaitGroup
	submitting.Go(func() {
		j.load(t.Context(), tasks, 8, 300, func() string { return awake.Load().url }, `"retry":{"max_attempts":100}`)
	})
	var victims []string
	for stall := range stalls {
		eventually(t, func() bool { return j.submitted() > tasks*(stall+1)/(stalls+2) }, func() string { return "submissions do not get on" })
		victim := instances.instances[stall%3]
		awake.Store(instances.instances[(stall+1)%3])
		registrations, worker := victim.count(`"msg":"registered"`), victim.worker()
		victims = append(victims, worker)
		if err := victim.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() (reaped bool) {
			if err := conn.QueryRow(t.Context(), "SELECT EXISTS (SELECT FROM audit_workers WHERE id = $1::uuid)", worker).Scan(&reaped); err != nil {
				t.Fatal(err)
			}
			return reaped
		}, func() string { return "no instance took over from a stopped one" })
		if err := victim.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool { return victim.count(`"msg":"registered"`) > registrations }, func() string { return "a stopped instance did not register anew" })
	}
	submitting.Wait()
	f := j.check(database)
	j.checkTakeovers(f, lease, poll)
	if f.failed > 0 {
		t.Errorf("%d tasks failed, though the target refused none", f.failed)
	}
	var held int
	if err := conn.QueryRow(t.Context(), "SELECT count(DISTINCT worker_id) FROM audit WHERE lost AND worker_id = ANY ($1::uuid[])", victims).Scan(&held); err != nil || held != stalls {
		t.Errorf("%d of %d stopped instances held calls (%v), want all", held, stalls, err)
	}
	j.client.CloseIdleConnections()
	instances.wantDescriptors(idle)
}

// worker is the id under which the process registered last.
func (p *process) worker() (id string) {
	p.t.Helper()
	for _, line := range p.lines() {
		var entry struct {
			Msg    string
			Worker string `json:"worker_id"`
		}
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg == "registered" {
			id = entry.Worker
		}
	}
	if id == "" {
		p.t.Fatal("the process has not registered")
	}
	return id
}

// A rolling restart of all instances under load, with calls that outlast the
// grace: each ends with code 0, and what was cut off is not counted as failed.
func TestRollingRestart(t *testing.T) {
	database := pgtest.URL(t)
	j := newJournal(t)
	j.audit(database)
	var stop atomic.Bool
	j.answer = func(w http.ResponseWriter, r *http.Request, nth int) {
		if nth == 1 && r.Header.Get("Orchestrator-Max-Attempts") == "7" {
			<-r.Context().Done() // until it is cut off
			return
		}
		afterAMoment(w, r, nth)
	}
	instances := startFleet(t, 3, "DATABASE_URL="+database, "POLL_INTERVAL=100ms", "LOG_LEVEL=info")
	var submitting sync.WaitGroup
	submitting.Go(func() {
		for !stop.Load() {
			j.load(t.Context(), 50, 8, 200, instances.url, `"timeout_seconds":1800`)
			j.load(t.Context(), 10, 8, 200, instances.url, `"timeout_seconds":1800,"retry":{"max_attempts":1}`)
			hasty, giveUp := context.WithTimeout(t.Context(), time.Millisecond)
			j.submit(hasty, instances.url(), `"timeout_seconds":1800,"retry":{"max_attempts":1}`)
			giveUp()
			j.submit(t.Context(), instances.url(), `"timeout_seconds":1800,"retry":{"max_attempts":7}`)
		}
	})
	restart := func(i int) {
		t.Helper()
		old, took := instances.replace(i, syscall.SIGTERM)
		if code := old.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("instance %d ended with code %d, want 0", i, code)
		}
		t.Logf("instance %d ended after %.2f s", i, took.Seconds())
	}
	for i := range 3 {
		before := j.called()
		eventually(t, func() bool { return j.called() > before+200 }, func() string { return "calls do not get on" })
		restart(i)
	}
	stop.Store(true)
	submitting.Wait()
	// What hangs at the second instances would hang for half an hour.
	for i := range 3 {
		restart(i)
	}
	f := j.check(database)
	if f.repeated == 0 {
		t.Error("no call was cut off")
	}
	if f.failed > 0 {
		t.Errorf("%d tasks failed that were only interrupted", f.failed)
	}
	if f.lostAttempts > 0 {
		t.Errorf("%d attempts were lost, though every instance ended in order", f.lostAttempts)
	}
}

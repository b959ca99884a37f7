package e2e

import (
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// fleet is several instances on one database. Each can be replaced while
// clients go on using the others.
type fleet struct {
	t        *testing.T
	settings []string

	mu        sync.Mutex
	instances []*process
}

func startFleet(t *testing.T, n int, settings ...string) *fleet {
	t.Helper()
	f := &fleet{t: t, settings: settings}
	for range n {
		f.instances = append(f.instances, start(t, "serve", settings...))
	}
	return f
}

// url is that of any instance.
func (f *fleet) url() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.instances[rand.IntN(len(f.instances))].url
}

// replace ends instance i by a signal and starts another in its place. It
// returns the old one, which has ended, and how long that took.
func (f *fleet) replace(i int, signal syscall.Signal) (old *process, took time.Duration) {
	f.t.Helper()
	f.mu.Lock()
	old = f.instances[i]
	f.mu.Unlock()
	took = old.stop(signal)
	fresh := start(f.t, "serve", f.settings...)
	f.mu.Lock()
	f.instances[i] = fresh
	f.mu.Unlock()
	return old, took
}

// descriptors is how many an instance has open that has just begun.
func (f *fleet) descriptors() (most int) {
	for _, p := range f.instances {
		most = max(most, p.ready())
	}
	return most
}

// wantDescriptors waits until no instance has more open than when it had just
// begun, but for connections to the database that came to stay.
func (f *fleet) wantDescriptors(begun int) {
	f.t.Helper()
	for _, p := range f.instances {
		p.wantDescriptors(begun + poolSize)
	}
}

// afterAMoment answers within some milliseconds: long enough that a kill hits calls.
func afterAMoment(_ http.ResponseWriter, r *http.Request, _ int) {
	select {
	case <-time.After(time.Duration(rand.IntN(20)) * time.Millisecond):
	case <-r.Context().Done():
	}
}

// kill -9 of instances at random moments: nothing that was acknowledged is
// lost, every repeat is explained by an attempt that is recorded as lost, and
// what is submitted under a key until it is answered is stored once.
func TestInstancesThatAreKilled(t *testing.T) {
	t.Parallel()
	killInstances(t, 1500, 6, false)
}

// The same, with callbacks: each end has one, and no more.
func TestCallbacksWhileInstancesAreKilled(t *testing.T) {
	t.Parallel()
	killInstances(t, 1000, 4, true)
}

// killInstances kills instances while tasks are acknowledged, so many in all,
// which have callbacks or not.
func killInstances(t *testing.T, tasks, kills int, callBack bool) {
	const lease, poll = time.Second, 100 * time.Millisecond
	database := pgtest.URL(t)
	j := newJournal(t)
	j.answer = afterAMoment
	j.insists = true
	j.audit(database)
	instances := startFleet(t, 3, "DATABASE_URL="+database, "LEASE_DURATION="+lease.String(), "POLL_INTERVAL="+poll.String(), "LOG_LEVEL=info")
	idle := instances.descriptors()
	extra := `"retry":{"max_attempts":100}`
	if callBack {
		extra += "," + j.callbacks()
	}
	var submitting sync.WaitGroup
	submitting.Go(func() {
		for left := tasks; left > 0; left = tasks - j.answered(http.StatusAccepted) {
			j.load(t.Context(), left, 16, 0, instances.url, extra)
		}
	})
	// Each kill comes when some more tasks are on their way.
	for kill := range kills {
		eventually(t, func() bool { return j.answered(http.StatusAccepted) > tasks*(kill+1)/(kills+2) }, func() string { return "submissions do not get on" })
		instances.replace(rand.IntN(3), syscall.SIGKILL)
	}
	submitting.Wait()
	f := j.check(database)
	if want := f.stored - f.callbacks; callBack && f.callbacks != want {
		t.Errorf("%d callbacks are stored, want one for each of %d tasks", f.callbacks, want)
	}
	if f.failed > 0 {
		t.Errorf("%d tasks failed, though the target refused none", f.failed)
	}
	t.Logf("submitted again under their keys: %d tries in vain, %d tasks that were stored by one", j.vain(), f.replayed)
	j.checkTakeovers(f, lease, poll)
	j.client.CloseIdleConnections()
	instances.wantDescriptors(idle)
}

// An instance that is stopped for longer than its lease, with a call under way:
// another one carries the task out, the late result changes nothing, and the
// instance goes on working under a new lease.
func TestInstanceThatStalls(t *testing.T) {
	t.Parallel()
	database := pgtest.URL(t)
	settings := []string{"DATABASE_URL=" + database, "LEASE_DURATION=1s", "POLL_INTERVAL=100ms"}
	arrived, release := make(chan struct{}), make(chan struct{})
	j := newJournal(t)
	j.answer = func(_ http.ResponseWriter, r *http.Request, nth int) {
		if r.Header.Get("Orchestrator-Attempt") == "1" && nth == 1 {
			select {
			case <-arrived: // the task that was submitted last
			default:
				close(arrived)
				<-release
			}
		}
	}
	j.audit(database)
	stalled := start(t, "serve", settings...)
	j.submit(t.Context(), stalled.url, "")
	<-arrived
	if err := stalled.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	other := start(t, "serve", settings...)
	got := other.await(j.submissions[0].id, ended)
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
	j.submit(t.Context(), stalled.url, "")
	if got := stalled.await(j.submissions[1].id, ended); got.State != "succeeded" {
		t.Errorf("after waking: %s, want succeeded", compact(t, got))
	}
	if after := stalled.await(got.ID, ended); len(after.Attempts) != len(got.Attempts) || after.AttemptCount != got.AttemptCount {
		t.Errorf("the late result changed the task: %s", compact(t, after))
	}
	if f := j.check(database); f.repeated != 1 {
		t.Errorf("%d tasks were repeated, want 1", f.repeated)
	}
}

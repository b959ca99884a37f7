package postgres_test

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

const playsHost = "https://plays.melodia.app"

// sameHost compares hosts but for what passes meanwhile.
var sameHost = cmp.Options{
	cmpopts.IgnoreFields(task.Host{}, "Since"),
	cmp.Comparer(func(a, b time.Duration) bool { return (a - b).Abs() < 5*time.Second }),
}

func saveHost(t *testing.T, s *postgres.Store, h task.Host) (stored task.Host, saved bool) {
	t.Helper()
	stored, saved, err := s.SaveHost(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	return stored, saved
}

func wantHosts(t *testing.T, s *postgres.Store, want ...task.Host) {
	t.Helper()
	got, err := s.Hosts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, sameHost, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("hosts (-want +got):\n%s", diff)
	}
}

func TestHosts(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	wantHosts(t, s)

	h := task.Host{Name: playsHost, OpenFor: time.Minute, Opened: 2, Allowed: 1, Doubled: 64, Why: "connection refused"}
	first, saved := saveHost(t, s, h)
	h.Version = first.Version
	if diff := cmp.Diff(h, first, sameHost); !saved || diff != "" {
		t.Errorf("saved %t (-want +got):\n%s", saved, diff)
	}
	if first.Since.IsZero() {
		t.Error("it is not known since when the host is broken")
	}
	wantHosts(t, s, h)

	// A second instance that found out at the same moment learns of the first one's state.
	other := task.Host{Name: playsHost, HeldFor: time.Hour, Allowed: 1, Doubled: 1}
	if stored, saved := saveHost(t, s, other); saved || stored.Version != first.Version || stored.Opened != 2 {
		t.Errorf("a host that is known was stored anew: %t, %+v", saved, stored)
	}
	other.Version, other.Opened = first.Version, 2
	held, saved := saveHost(t, s, other)
	if !saved || held.Version <= first.Version || held.OpenFor != 0 || held.HeldFor < time.Hour-time.Minute || !held.Since.Equal(first.Since) {
		t.Errorf("saved %t: %+v, want the host held for an hour, unhealthy since the same moment", saved, held)
	}
	if stored, saved := saveHost(t, s, h); saved || stored.Version != held.Version {
		t.Errorf("an older version was saved: %t, %+v", saved, stored)
	}

	congested := task.Host{Name: "https://auth.melodia.app", CongestedFor: time.Minute}
	congested, _ = saveHost(t, s, congested)
	wantHosts(t, s, congested, held)
	for _, tt := range []struct {
		behind string
		limit  int
		want   []task.Host
	}{
		{"", 2, []task.Host{congested, held}}, {"", 1, []task.Host{congested}}, {congested.Name, 2, []task.Host{held}}, {held.Name, 2, nil},
	} {
		got, err := s.SomeHosts(t.Context(), tt.behind, tt.limit)
		if diff := cmp.Diff(tt.want, got, sameHost, cmpopts.EquateEmpty()); err != nil || diff != "" {
			t.Errorf("%d behind %q (-want +got): %v\n%s", tt.limit, tt.behind, err, diff)
		}
	}

	healthy := task.Host{Name: playsHost, Version: first.Version}
	if _, saved := saveHost(t, s, healthy); saved {
		t.Error("an older version made the host healthy")
	}
	healthy.Version = held.Version
	if stored, saved := saveHost(t, s, healthy); !saved || stored.Version != 0 {
		t.Errorf("a healthy host is stored: %t, %+v", saved, stored)
	}
	wantHosts(t, s, congested)
	if stored, saved := saveHost(t, s, other); saved || stored.Version != 0 {
		t.Errorf("a host was saved that was made healthy meanwhile: %t, %+v", saved, stored)
	}

	if err := s.CloseHost(t.Context(), congested.Name); err != nil {
		t.Error(err)
	}
	if err := s.CloseHost(t.Context(), congested.Name); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("closing a healthy host: %v, want %v", err, task.ErrNotFound)
	}
	wantHosts(t, s)
}

// Rows of hosts that are over are not shown, take no part, and go with the next one.
func TestHostsThatAreOver(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	saveHost(t, s, task.Host{Name: "https://a.melodia.app", CongestedFor: time.Minute})
	saveHost(t, s, task.Host{Name: "https://b.melodia.app", OpenFor: time.Minute, Opened: 1, Allowed: 1, Doubled: 64})
	c, _ := saveHost(t, s, task.Host{Name: "https://c.melodia.app", HeldFor: time.Hour, Allowed: 1, Doubled: 1})
	age(t, pool, "2 minutes")
	if got, err := s.Hosts(t.Context()); err != nil || len(got) != 2 || got[0].OpenFor != 0 || got[0].Allowed != 1 || got[1].Name != c.Name {
		t.Errorf("hosts %+v, %v; want the recovering one and the one that is held", got, err)
	}
	age(t, pool, "12 minutes")
	c.HeldFor -= 14 * time.Minute
	wantHosts(t, s, c)

	// b is new again, and a is gone.
	if b, saved := saveHost(t, s, task.Host{Name: "https://b.melodia.app", OpenFor: time.Minute, Opened: 1, Allowed: 1, Doubled: 64}); !saved || b.Opened != 1 {
		t.Errorf("saved %t: %+v, want a host that broke for the first time", saved, b)
	}
	var names []string
	if err := pool.QueryRow(t.Context(), "SELECT array_agg(name ORDER BY name) FROM hosts").Scan(&names); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"https://b.melodia.app", c.Name}, names); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}
}

// age moves all that is stored of hosts into the past.
func age(t *testing.T, pool *pgxpool.Pool, by string) {
	t.Helper()
	if _, err := pool.Exec(t.Context(), `UPDATE hosts SET changed_at = changed_at - $1::interval, congested_until = congested_until - $1::interval,
		held_until = held_until - $1::interval, open_until = open_until - $1::interval`, by); err != nil {
		t.Fatal(err)
	}
}

// The next look for due tasks begins at the very first one all the same.
func TestHoldBackLeavesTheLookFromTheBeginning(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	back := make(chan time.Time, 1)
	s.LookBack(back)
	back <- time.Time{}
	if _, _, err := s.HoldBack(t.Context(), []string{playsHost}); err != nil {
		t.Fatal(err)
	}
	if len(back) != 1 {
		t.Error("HoldBack used the look from the beginning up")
	}
}

func TestHoldBack(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	lanes := make(map[string]string)
	store := func(url, lane string, delay time.Duration) {
		n := newTask(func(t *task.Task) { t.URL, t.Delay = url, delay })
		insert(t, s, n)
		lanes[n.ID.String()] = lane
	}
	const host, port = "https://plays.melodia.app", "http://127.0.0.1:8081"
	for range 3 {
		store(host+"/plays?id=1", " "+host, 0)
		store(host, " "+host, 0)
		store(host+"?id=1", " "+host, 0)
		store(port+"/x", " "+port, 0)
	}
	store(host+":8443/plays", "", 0)
	store(host+".example/plays", "", 0)
	store("https://auth.melodia.app/?u="+host+"/", "", 0)
	store(port+"0/x", "", 0)
	store(host+"/later", "", time.Hour)

	if moved, more, err := s.HoldBack(t.Context(), nil); len(moved) != 0 || more || err != nil {
		t.Errorf("HoldBack of no host = %v, %t, %v", moved, more, err)
	}
	moved, more, err := s.HoldBack(t.Context(), []string{host, port, "https://other.melodia.app"})
	if diff := cmp.Diff(map[string]int{host: 9, port: 3}, moved); diff != "" || more || err != nil {
		t.Errorf("HoldBack: %t, %v, tasks by host (-want +got):\n%s", more, err, diff)
	}
	rows, err := pool.Query(t.Context(), "SELECT id::text, COALESCE(lane, ''), state, claim FROM tasks")
	if err != nil {
		t.Fatal(err)
	}
	var id, lane, state string
	var claim int64
	if _, err := pgx.ForEachRow(rows, []any{&id, &lane, &state, &claim}, func() error {
		if waits := state == "waiting"; lane != lanes[id] || waits != (lane != "") || claim != 0 {
			t.Errorf("a task is %s in the lane %q under claim %d, want the lane %q", state, lane, claim, lanes[id])
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if moved, _, err := s.HoldBack(t.Context(), []string{host, port}); len(moved) != 0 || err != nil {
		t.Errorf("HoldBack again = %v, %v; want none", moved, err)
	}
}

// Claims go on beside it, and no task is in both.
func TestHoldBackBesideClaims(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := newID()
	if err := s.Register(t.Context(), worker, "w", 10); err != nil {
		t.Fatal(err)
	}
	exec(t, pool, `INSERT INTO tasks (`+taskColumns+`, run_at) SELECT `+taskValues+`, now() - interval '1 hour' FROM generate_series(1, 8000) n`)
	claimed := make(chan int)
	go func() {
		n := 0
		for range 20 {
			claims, err := s.Claim(t.Context(), worker, 50)
			if err != nil {
				t.Error(err)
			}
			n += len(claims)
		}
		claimed <- n
	}()
	moved := 0
	for more := true; more; {
		n, again, err := s.HoldBack(t.Context(), []string{playsHost})
		if err != nil {
			t.Fatal(err)
		}
		moved, more = moved+n[playsHost], again
	}
	got := <-claimed
	waiting := query[int](t, pool, "SELECT count(*) FROM tasks WHERE state = 'waiting'")
	running := query[int](t, pool, "SELECT count(*) FROM tasks WHERE state = 'running' AND lane IS NULL")
	if waiting != moved || running != got || moved == 0 {
		t.Errorf("%d tasks wait and %d run, want %d that were moved and %d that were claimed", waiting, running, moved, got)
	}
}

func TestHoldBackInLane(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, key_ordered) VALUES ('ordered', true)`)
	exec(t, pool, `INSERT INTO queue_keys (queue, key, version, ordered) VALUES ('ordered', 'free', 1, false)`)
	other := func(tk *task.Task) { tk.URL = "https://auth.melodia.app/" }
	for _, to := range []func(*task.Task){
		inQueue("mail", "", task.Normal), inQueue("mail", "k", task.High), inQueue("ordered", "k", task.Normal), inQueue("ordered", "free", task.Normal),
	} {
		insert(t, s, newTask(to), newTask(to), newTask(to, other))
	}
	for lane, want := range map[task.Lane]int{"mail/": 2, "mail/k": 2, "ordered/k": 0, "ordered/free": 2, "nothing/": 0} {
		if moved, more, err := s.HoldBackInLane(t.Context(), lane, []string{playsHost}); moved[playsHost] != want || more || err != nil {
			t.Errorf("HoldBackInLane of %s = %v, %t, %v; want %d", lane, moved, more, err, want)
		}
		if moved, _, err := s.HoldBackInLane(t.Context(), lane, []string{playsHost}); len(moved) != 0 || err != nil {
			t.Errorf("HoldBackInLane of %s again = %v, %v; want none", lane, moved, err)
		}
	}
	if got, _ := claimLanes(t, s, worker, 10, ask("mail/", "mail/k")...); len(got) != 2 || got[0].Task.URL != "https://auth.melodia.app/" {
		t.Errorf("claimed %d tasks that stayed, want the 2 of the other host", len(got))
	}
	if got, _ := claimLanes(t, s, worker, 10, ask("mail/ "+task.Lane(playsHost), "mail/k "+task.Lane(playsHost))...); len(got) != 4 {
		t.Errorf("claimed %d tasks that were moved, want 4", len(got))
	}
}

package storetest

import (
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

const otherHost = "https://other.example"

// laneTests are the tests of limits.
var laneTests = map[string]func(s *subject){
	"lanes: what is not plain":      testNotPlain,
	"lanes: limits at a time":       testLimits,
	"lanes: rates":                  testRates,
	"lanes: a pause":                testPause,
	"lanes: an order":               testOrder,
	"lanes: priorities":             testPriorities,
	"lanes: hosts":                  testHosts,
	"lanes: permits come back":      testPermits,
	"lanes: a look":                 testLook,
	"lanes: what is held back":      testHoldBack,
	"lanes: in spite of the limits": testInSpite,
	"lanes: what expires":           testExpire,
}

// storeIn stores a task of a lane that is due in delay; options change it before.
func (s *subject) storeIn(lane task.Lane, delay time.Duration, options ...func(*task.Task)) task.ID {
	s.Helper()
	t := s.newTask(delay)
	t.Queue, t.FlowKey, t.HeldHost = lane.Queue(), lane.Key(), lane.Host()
	if t.Queue != "" {
		t.Priority = task.Normal
	}
	for _, option := range options {
		option(t)
	}
	s.must(s.Insert(s.Context(), t))
	return t.ID
}

// ask asks lanes for up to 10 tasks each, and for limit together. Those of which the store
// says that others hold a limit, as it does when it keeps one for the first time, are asked again.
func (s *subject) ask(worker task.ID, limit int, lanes ...task.Lane) ([]*task.Claim, map[task.Lane]task.LaneState) {
	s.Helper()
	asks := make([]task.LaneAsk, len(lanes))
	for i, lane := range lanes {
		asks[i] = task.LaneAsk{Lane: lane, Most: 10}
	}
	return s.askFor(worker, limit, asks...)
}

func (s *subject) askFor(worker task.ID, limit int, asks ...task.LaneAsk) (all []*task.Claim, _ map[task.Lane]task.LaneState) {
	s.Helper()
	byLane := make(map[task.Lane]task.LaneState, len(asks))
	for tries := 0; len(asks) > 0 && tries < 5; tries++ {
		claims, states, err := s.ClaimLanes(s.Context(), worker, asks, nil, limit-len(all))
		s.must(err)
		all = append(all, claims...)
		if len(states) != len(asks) {
			s.Errorf("%d states of %d lanes", len(states), len(asks))
		}
		for _, state := range states {
			byLane[state.Lane] = state
		}
		asks = slices.DeleteFunc(slices.Clone(asks), func(a task.LaneAsk) bool { return byLane[a.Lane].Blocked != task.BlockedByOthers })
	}
	return all, byLane
}

func idsOf(claims []*task.Claim) (ids []task.ID) {
	for _, c := range claims {
		ids = append(ids, c.Task.ID)
	}
	return ids
}

// wantClaimed checks which tasks were claimed, in any order.
func (s *subject) wantClaimed(what string, got []*task.Claim, want ...task.ID) {
	s.Helper()
	sorted := func(ids []task.ID) []task.ID {
		return slices.SortedFunc(slices.Values(ids), func(a, b task.ID) int { return slices.Compare(a[:], b[:]) })
	}
	if diff := cmp.Diff(sorted(want), sorted(idsOf(got))); diff != "" {
		s.Errorf("%s: claimed (-want +got):\n%s", what, diff)
	}
}

// wantState checks what keeps a lane waiting, and for how long: up to least less than most.
func (s *subject) wantState(got task.LaneState, blocked task.Blocked, least, most time.Duration) {
	s.Helper()
	if got.Blocked != blocked || got.Wait < least || got.Wait > most {
		s.Errorf("%s is blocked by %q for %v; want %q, %v to %v", got.Lane, got.Blocked, got.Wait, blocked, least, most)
	}
}

// unknown is a LaneState.Wait of which nothing is known.
const unknown = time.Duration(-1)

func testNotPlain(s *subject) {
	worker := s.register()
	t := s.newTask(0)
	t.Queue, t.Priority = "mail", task.Normal
	if c, err := s.InsertClaimed(s.Context(), worker, t); c != nil || err != nil {
		s.Errorf("a task of a queue was stored as claimed: %v, %v", c, err)
	}
	if _, ok, err := s.NextDue(s.Context()); ok || err != nil {
		s.Errorf("NextDue = %t, %v while only a task of a queue waits", ok, err)
	}
	s.wantClaimed("a claim of plain tasks", s.claim(worker, 10))
	if got, _ := s.ask(s.NewID(), 10, "mail/"); len(got) != 0 {
		s.Errorf("a worker that is not registered claimed %d tasks", len(got))
	}
	got, _ := s.ask(worker, 10, "mail/")
	s.wantClaimed("a claim from its lane", got, t.ID)
	if len(got) == 1 && (got[0].Task.Lane() != "mail/" || got[0].Number != 1) {
		s.Errorf("claimed under number %d from %q, want 1, mail/", got[0].Number, got[0].Task.Lane())
	}
	got, states := s.ask(worker, 10, "mail/")
	s.wantClaimed("an empty lane", got)
	s.wantState(states["mail/"], "", unknown, unknown)
	s.storeIn("mail/", time.Hour)
	got, states = s.ask(worker, 10, "mail/")
	s.wantClaimed("a task that is due later", got)
	s.wantState(states["mail/"], "", 50*time.Minute, time.Hour)
}

func testLimits(s *subject) {
	worker := s.register()
	s.SetQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{
		Limits: task.Limits{MaxConcurrent: 3}, PerKey: task.KeyLimits{Limits: task.Limits{MaxConcurrent: 2}},
	}})
	var a []task.ID
	for range 4 {
		a = append(a, s.storeIn("mail/a", 0))
	}
	b := []task.ID{s.storeIn("mail/b", 0), s.storeIn("mail/b", 0)}
	got, states := s.ask(worker, 10, "mail/a")
	s.wantClaimed("a key with a limit", got, a[0], a[1])
	s.wantState(states["mail/a"], task.BlockedByKey, unknown, unknown)
	more, states := s.ask(worker, 10, "mail/a", "mail/b")
	s.wantClaimed("a queue with a limit", more, b[0])
	s.wantState(states["mail/b"], task.BlockedByQueue, unknown, unknown)
	s.finish(more[0], succeeded(more[0]))
	s.finish(got[0], retried(got[0]))
	more, _ = s.ask(worker, 10, "mail/a", "mail/b")
	s.wantClaimed("two permits that came back, in turn", more, a[2], b[1])

	// As many as are asked for, and no lane more than its part.
	for range 5 {
		s.storeIn("free/", 0)
	}
	got, states = s.ask(worker, 2, "free/")
	s.wantState(states["free/"], "", 0, 0)
	more, states = s.askFor(worker, 10, task.LaneAsk{Lane: "free/", Most: 2})
	s.wantState(states["free/"], "", 0, 0)
	if len(got) != 2 || len(more) != 2 {
		s.Errorf("claimed %d and %d, want 2 each", len(got), len(more))
	}
	// In turns, where the lanes have to share a permit.
	s.SetQueue(task.Queue{Name: "turns", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxConcurrent: 2}}})
	x := s.storeIn("turns/x", 0)
	s.storeIn("turns/x", 0)
	y := s.storeIn("turns/y", 0)
	got, _ = s.ask(worker, 10, "turns/x", "turns/y")
	s.wantClaimed("lanes that share a limit", got, x, y)
}

func testRates(s *subject) {
	worker := s.register()
	s.SetQueue(task.Queue{Name: "rated", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxPerSecond: 0.01, Burst: 2}}})
	s.SetQueue(task.Queue{Name: "keys", QueueSettings: task.QueueSettings{PerKey: task.KeyLimits{Limits: task.Limits{MaxPerSecond: 0.01}}}})
	var rated []task.ID
	for range 3 {
		rated = append(rated, s.storeIn("rated/", 0))
	}
	got, states := s.ask(worker, 10, "rated/")
	s.wantClaimed("a burst", got, rated[0], rated[1])
	s.wantState(states["rated/"], task.BlockedByQueue, 50*time.Second, 100*time.Second)
	for _, c := range got {
		s.finish(c, succeeded(c)) // gives no permit back
	}
	got, states = s.ask(worker, 10, "rated/")
	s.wantClaimed("after the burst", got)
	s.wantState(states["rated/"], task.BlockedByQueue, 50*time.Second, 100*time.Second)
	k := s.storeIn("keys/k", 0)
	s.storeIn("keys/k", 0)
	other := s.storeIn("keys/other", 0)
	got, states = s.ask(worker, 10, "keys/k", "keys/other")
	s.wantClaimed("keys with a rate", got, k, other)
	s.wantState(states["keys/k"], task.BlockedByKey, 50*time.Second, 100*time.Second)
}

func testPause(s *subject) {
	worker := s.register()
	s.SetQueue(task.Queue{Name: "mail", PausedAt: time.Now(), QueueSettings: task.QueueSettings{Limits: task.Limits{MaxConcurrent: 1}}})
	id, other := s.storeIn("mail/", 0), s.storeIn("other/", 0)
	got, states := s.ask(worker, 10, "mail/", "other/")
	s.wantClaimed("beside a pause", got, other)
	s.wantState(states["mail/"], task.BlockedByPause, unknown, unknown)
	s.SetQueue(task.Queue{Name: "mail"})
	got, _ = s.ask(worker, 10, "mail/")
	s.wantClaimed("after the pause", got, id)
}

func testOrder(s *subject) {
	worker := s.register()
	s.SetQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{PerKey: task.KeyLimits{Ordered: true}}})
	first, second := s.storeIn("mail/k", 0), s.storeIn("mail/k", 0)
	free, alsoFree := s.storeIn("mail/", 0), s.storeIn("mail/", 0)
	got, states := s.ask(worker, 10, "mail/k", "mail/")
	s.wantClaimed("the first of a key, and what has none", got, first, free, alsoFree)
	s.wantState(states["mail/k"], task.BlockedByKey, unknown, unknown)
	for _, c := range got {
		if c.Task.ID == first {
			s.finish(c, retried(c))
		}
	}
	got, states = s.ask(worker, 10, "mail/k")
	s.wantClaimed("behind the first, which is retried", got)
	s.wantState(states["mail/k"], "", 50*time.Second, time.Minute)
	s.Due(first) // by hand
	again := s.claimNext(worker)
	s.wantClaimed("the first again", []*task.Claim{again}, first)
	s.finish(again, succeeded(again))
	got, _ = s.ask(worker, 10, "mail/k")
	s.wantClaimed("then the second", got, second)
}

func testPriorities(s *subject) {
	worker := s.register()
	as := func(p task.Priority) func(*task.Task) { return func(t *task.Task) { t.Priority = p } }
	low, normal, high := s.storeIn("mail/", 0, as(task.Low)), s.storeIn("mail/", 0), s.storeIn("mail/", 0, as(task.High))
	later := s.storeIn("mail/", time.Minute, as(task.High)) // no priority makes it due
	for _, want := range []task.ID{high, normal, low} {
		got, _ := s.ask(worker, 1, "mail/")
		s.wantClaimed("by priority", got, want)
	}
	got, states := s.ask(worker, 10, "mail/")
	s.wantClaimed("before it is due", got)
	s.wantState(states["mail/"], "", 50*time.Second, time.Minute)
	s.Due(later)
	s.wantClaimed("by hand", s.claim(worker, 10), later)
}

func testHosts(s *subject) {
	worker := s.register()
	lanes := []task.Lane{" " + otherHost, "mail/k " + otherHost}
	ids := []task.ID{s.storeIn(lanes[0], 0), s.storeIn(lanes[0], 0), s.storeIn(lanes[1], 0)}
	got, _ := s.askFor(worker, 10, task.LaneAsk{Lane: lanes[0], Most: 1, Running: 2}, task.LaneAsk{Lane: lanes[1], Most: 1, Running: 2})
	s.wantClaimed("as many as a host may have, in all its lanes", got, ids[0], ids[2])
	got, states := s.askFor(worker, 10, task.LaneAsk{Lane: lanes[0], Most: 1, Running: 2})
	s.wantClaimed("one more", got)
	s.wantState(states[lanes[0]], task.BlockedByHost, unknown, unknown)
	got, _ = s.askFor(worker, 10, task.LaneAsk{Lane: lanes[0], Most: 1})
	s.wantClaimed("any number", got, ids[1])
}

func testPermits(s *subject) {
	worker, other := s.register(), s.register()
	s.SetQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxConcurrent: 2}}})
	lost, cancelled, third, fourth := s.storeIn("mail/", 0), s.storeIn("mail/", 0), s.storeIn("mail/", 0), s.storeIn("mail/", 0)
	got, _ := s.ask(worker, 10, "mail/")
	s.wantClaimed("the first two", got, lost, cancelled)
	s.Cancel(cancelled)
	for _, c := range got {
		if c.Task.ID == cancelled {
			s.finish(c, task.Decision{State: task.Cancelled})
		}
	}
	got, _ = s.ask(other, 10, "mail/")
	s.wantClaimed("the permit of one that was cancelled", got, third)
	s.Silence(worker)
	if gone := s.reap(other); !slices.Equal(gone, []task.ID{lost}) {
		s.Errorf("%d tasks were lost, want 1", len(gone))
	}
	got, states := s.ask(other, 10, "mail/")
	s.wantClaimed("the permit of one that was lost", got, fourth)
	s.wantState(states["mail/"], task.BlockedByQueue, unknown, unknown)
	s.finish(got[0], succeeded(got[0]))
	got, _ = s.ask(other, 10, "mail/")
	s.wantClaimed("the one that was lost, from its lane", got, lost)
}

func testLook(s *subject) {
	worker := s.register()
	s.store(0)
	for lane, delay := range map[task.Lane]time.Duration{"a/": time.Hour, "a/k": 0, " " + otherHost: 0, "b/": -time.Minute} {
		s.storeIn(lane, delay)
	}
	s.storeIn("a/", 2*time.Hour)
	want := []task.Lane{" " + otherHost, "a/", "a/k", "b/"}
	look := func(behind task.Lane, limit int, want ...task.Lane) {
		s.Helper()
		found, err := s.Lanes(s.Context(), behind, limit)
		s.must(err)
		var got []task.Lane
		for _, d := range found {
			got = append(got, d.Lane)
			if late := d.Lane == "a/"; late != (d.Wait > 50*time.Minute) || d.Wait > time.Hour || !late && d.Wait > 0 {
				s.Errorf("the first of %q is due in %v", d.Lane, d.Wait)
			}
		}
		if !slices.Equal(got, want) {
			s.Errorf("lanes behind %q: %q, want %q", behind, got, want)
		}
	}
	look("", 10, want...)
	look("", 2, want[:2]...)
	look("a/", 10, want[2:]...)
	s.ask(worker, 10, want...)
	look("", 10, "a/")
}

func testHoldBack(s *subject) {
	worker := s.register()
	elsewhere := func(t *task.Task) { t.URL = otherHost + "/x" }
	s.SetQueue(task.Queue{Name: "order", QueueSettings: task.QueueSettings{PerKey: task.KeyLimits{Ordered: true}}})
	plain, laned := s.storeIn("", 0, elsewhere), s.storeIn("mail/k", 0, elsewhere)
	stays, ordered := s.store(0), s.storeIn("order/k", 0, elsewhere)
	if moved, more, err := s.HoldBack(s.Context(), []string{otherHost}); moved[otherHost] != 1 || more || err != nil {
		s.Errorf("HoldBack = %v, %t, %v; want 1", moved, more, err)
	}
	s.wantClaimed("a claim of plain tasks", s.claim(worker, 10), stays)
	for lane, want := range map[task.Lane]int{"mail/k": 1, "order/k": 0} {
		if moved, more, err := s.HoldBackInLane(s.Context(), lane, []string{otherHost}); moved[otherHost] != want || more || err != nil {
			s.Errorf("HoldBackInLane of %q = %v, %t, %v; want %d", lane, moved, more, err, want)
		}
	}
	got, _ := s.ask(worker, 10, "mail/k", "order/k", "mail/k "+otherHost, " "+otherHost)
	s.wantClaimed("from the lanes", got, plain, laned, ordered)
	slices.SortFunc(got, func(a, b *task.Claim) int { return strings.Compare(string(a.Task.Lane()), string(b.Task.Lane())) })
	// A result can say that a task waits for its host from then on.
	for _, c := range got {
		s.finish(c, task.Decision{State: task.Pending, Host: otherHost})
	}
	found, err := s.Lanes(s.Context(), "", 10)
	s.must(err)
	var lanes []task.Lane
	for _, d := range found {
		lanes = append(lanes, d.Lane)
	}
	if want := []task.Lane{" " + otherHost, "mail/k " + otherHost, "order/k " + otherHost}; !slices.Equal(lanes, want) {
		s.Errorf("lanes %q, want %q", lanes, want)
	}
}

func testInSpite(s *subject) {
	worker := s.register()
	s.SetQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxConcurrent: 1}}})
	first, second, third := s.storeIn("mail/", 0), s.storeIn("mail/", 0), s.storeIn("mail/", time.Hour)
	one, err := s.ClaimOne(s.Context(), worker, second)
	s.must(err)
	got, states := s.ask(worker, 10, "mail/")
	s.wantClaimed("while one runs by hand", got)
	s.wantState(states["mail/"], task.BlockedByQueue, unknown, unknown)
	s.Due(third) // in spite of the limit
	s.wantClaimed("by hand", s.claim(worker, 10), third)
	s.finish(one, succeeded(one))
	got, _ = s.ask(worker, 10, "mail/")
	s.wantClaimed("while the other one runs", got)
	if left, err := s.Unfinished(s.Context(), []task.ID{first, second, third}); err != nil || len(left) != 2 {
		s.Errorf("%d are not over (%v), want 2", len(left), err)
	}
}

func testExpire(s *subject) {
	worker := s.register()
	s.SetQueue(task.Queue{Name: "mail", PausedAt: time.Now()})
	at := func(moment time.Time) func(*task.Task) { return func(t *task.Task) { t.ExpiresAt = moment } }
	past := time.Now().Add(-time.Hour)
	expired := []task.ID{s.storeIn("mail/", 0, at(past)), s.storeIn(" "+otherHost, 0, at(past))}
	s.storeIn("mail/", 0, at(time.Now().Add(time.Hour)))
	s.storeIn("mail/", 0)
	for _, want := range []int{1, 1, 0} {
		if n, err := s.Expire(s.Context(), 1); n != want || err != nil {
			s.Errorf("Expire = %d, %v; want %d", n, err, want)
		}
	}
	got := s.claim(worker, 10)
	s.wantClaimed("what expired", got, expired...)
	for _, c := range got {
		if _, may := c.MayStart(c.At); may || c.Number != 2 {
			s.Errorf("what expired may start: %t, under number %d", may, c.Number)
		}
		s.finish(c, task.Decision{State: task.Failed, Reason: task.Expired})
		s.wantTask(c.Task.ID, task.Failed, 0)
	}
}

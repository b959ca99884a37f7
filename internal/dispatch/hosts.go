package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/melodia/orchestrator/internal/limit"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	// maxIdleHosts is how many hosts without calls are remembered, and hostIdle for how long
	// at least: one that is forgotten starts slowly again.
	maxIdleHosts = 4096
	hostIdle     = 5 * time.Minute
	// congestedFor is for how long all instances take a host for congested that is so on one.
	congestedFor = 15 * time.Second
	// patientTimeout is from which timeout on a call says that its host is broken though others
	// get answers from it. Else a caller who gives calls a tenth of what the host takes would open
	// the breaker for all.
	patientTimeout = time.Second
	// minHostLook bounds how often the store is asked for unhealthy hosts.
	minHostLook = 100 * time.Millisecond
)

// hostStore is the part of the store that keeps hosts which are not healthy.
type hostStore interface {
	Hosts(ctx context.Context) ([]task.Host, error)
	// SaveHost stores a state that was changed from h.Version, 0 for none. saved is false
	// where another instance changed it before; stored is then what that one stored.
	SaveHost(ctx context.Context, h task.Host) (stored task.Host, saved bool, err error)
}

// hosts protects hosts from too many calls, and tasks from the hosts of others. It knows
// how many tasks each host holds here, how fast it frees their slots and how its calls end,
// and shares with all instances which hosts are congested, broken or held back.
//
// A task that is about to start without the lane of its host asks take. Where that says no, it
// belongs in that lane, and so do all other due tasks of the hosts in lanes.
// A claim from the lane of a host asks permits. A task that has its slot asks begin before
// its call, and end comes after it.
//
// Whenever mu is free:
//   - held = tasks for which take or takeAnyway was called and neither end nor drop was;
//   - calls of a host = its calls under way, and queue holds those of its tasks that have a slot and
//     wait for its slow start; queue is empty where calls < start.Allowed();
//   - busy holds exactly the hosts with held > 0.
type hosts struct {
	share float64
	slots int
	log   *slog.Logger
	// mayStart is called without mu when tasks in the lane of a host may start that could not
	// before. launch has a task carried out that waited for its host's slow start.
	mayStart func()
	launch   func(j *job)

	// unhealthy is how many hosts have a state; where it is zero nothing is in a lane.
	unhealthy atomic.Int32
	// spare is how many calls more than slots there may be: as many as slow hosts have beyond
	// their share. So tasks of other hosts never wait for those.
	spare   atomic.Int32
	changed chan struct{} // told when a state is to be stored; buffered

	mu      sync.Mutex
	total   int // slots that all hosts hold
	byName  map[string]*host
	busy    *host // the first of a ring
	looked  time.Time
	sweepAt int // size of byName at which hosts are forgotten
	dirty   map[*host]struct{}
}

// host is what the instance knows about one.
type host struct {
	name       string
	held       int // slots, and calls by request
	calls      int
	queue      []*job
	waking     bool // a timer of the slow start runs
	start      limit.Start
	pace       limit.Pace
	window     limit.Window
	used       time.Time // when its last call ended
	ours       bool      // calls to it come to this service
	next, prev *host     // in busy

	state             limit.State
	why               string
	since             time.Time
	version           int64
	savedAt           time.Time
	told              task.HostStatus // in the log
	congestedHere     bool            // this instance was the last to say that it is congested
	succeeded, failed int             // since state.Recovery began to hold
}

func newHosts(slots int, share float64, log *slog.Logger) *hosts {
	return &hosts{
		share: share, slots: slots, log: log, mayStart: func() {}, launch: func(*job) {},
		changed: make(chan struct{}, 1), byName: make(map[string]*host), dirty: make(map[*host]struct{}), sweepAt: maxIdleHosts,
	}
}

// inLane reports whether the tasks of a URL's host belong in its lane: the host is congested,
// broken or held back, or recovers from that. It is cheap where all hosts are healthy.
func (h *hosts) inLane(url string) bool {
	if h.unhealthy.Load() == 0 {
		return false
	}
	name := task.HostOf(url)
	h.mu.Lock()
	defer h.mu.Unlock()
	one := h.byName[name]
	return one != nil && !one.state.Healthy(time.Now())
}

// lanes returns the hosts whose due tasks belong in their lanes.
func (h *hosts) lanes() []string {
	if h.unhealthy.Load() == 0 {
		return nil
	}
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	var names []string
	for _, one := range h.byName {
		if !one.state.Healthy(now) {
			names = append(names, one.name)
		}
	}
	return names
}

// permits returns how many tasks of a host's lane may be claimed now, given so many free
// slots, and how many may run at a time on all instances together, 0 for any number.
// othersWait says that other tasks are due that could have these slots. Where none may be
// claimed, again is when to ask again at the latest; zero means when a slot is free.
// It is asked for lanes that have due tasks.
func (h *hosts) permits(name string, free int, othersWait bool) (n, running int, again time.Duration) {
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	one := h.get(name)
	if until := one.state.Blocked(); until.After(now) {
		return 0, one.state.Allowed, until.Sub(now)
	}
	n = free
	switch {
	case h.share >= 1:
	case one.ours:
		left := h.ownShare() - one.held
		n = min(n, h.slots-h.total, left)
		if left <= 0 {
			h.congest(one, now)
		}
	case !one.pace.Slow(now):
		h.relieve(one, now)
	default:
		left := h.limit(h.othersSlow(one, now)) - one.held
		// The calls that there may be beyond the slots are for others.
		if n = min(n, h.slots-h.total); othersWait {
			n = min(n, left)
		}
		if left <= 0 && !one.pace.Unknown(now) {
			h.congest(one, now)
		}
	}
	if one.state.Allowed > 0 {
		n = min(n, one.state.Allowed)
	}
	return max(n, 0), one.state.Allowed, 0
}

// take counts a task in whose call to url is to start without a lane. It returns nil where the
// task belongs in its host's lane: the host is not healthy, or it is slow and has its share.
func (h *hosts) take(url string, now time.Time) *host {
	name := task.HostOf(url)
	h.mu.Lock()
	defer h.mu.Unlock()
	one := h.get(name)
	switch {
	case !one.state.Healthy(now):
		return nil
	case h.isFull(one, one.held, now):
		h.congest(one, now)
		return nil
	}
	h.count(one)
	h.total++
	return one
}

// isFull reports whether a host that has so many slots has all that it may have. One of
// which nothing is known is slow only where others are: else each backlog of a new host
// would go through its lane. mu is held.
func (h *hosts) isFull(one *host, has int, now time.Time) bool {
	switch {
	case h.share >= 1 || has == 0:
		return false
	case one.ours:
		return has >= h.ownShare()
	case !one.pace.Slow(now):
		return false
	}
	slow := h.othersSlow(one, now)
	return has >= h.limit(slow) && (slow > 0 || !one.pace.Unknown(now))
}

// isOurs notes that calls to the host of a URL come to this service itself. They may wait for
// other tasks, so they never have slots that others need: only the part that no other slow
// host may have either.
func (h *hosts) isOurs(url string) {
	name := task.HostOf(url)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.get(name).ours = true
}

// ownShare is how many slots calls to this service itself may hold.
func (h *hosts) ownShare() int {
	return max(h.slots-limit.Share(h.slots, h.share, 0), 1)
}

// takeAnyway is take for a task that came from the lane of its host.
func (h *hosts) takeAnyway(url string) *host {
	name := task.HostOf(url)
	h.mu.Lock()
	defer h.mu.Unlock()
	one := h.get(name)
	h.count(one)
	h.total++
	return one
}

// drop counts a task out whose call will not begin.
func (h *hosts) drop(one *host) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.release(one)
	h.total--
}

// verdict says what becomes of a task that has its slot.
type verdict int

const (
	callNow   verdict = iota // its call begins, and end is called after it
	callLater                // launch is called when its call may begin
	callNever                // it goes back into its host's lane; drop is still to be called
)

// begin decides about the call of a task that has its slot.
func (h *hosts) begin(j *job, now time.Time) verdict {
	one := j.host
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case one.state.Blocked().After(now), one.state.Allowed > 0 && !j.fromLane:
		return callNever
	case j.extra && h.isFull(one, one.calls, now): // it was claimed before its host was slow
		h.congest(one, now)
		return callNever
	case one.calls >= one.start.Allowed() && one.start.Allowed() < h.slots:
		one.queue = append(one.queue, j)
		h.awaken(one)
		return callLater
	}
	one.calls++
	one.pace.Begin(now)
	return callNow
}

// beginAnyway notes that a call begins which is made by request: it waits for nothing.
func (h *hosts) beginAnyway(url string) *host {
	name, now := task.HostOf(url), time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	one := h.get(name)
	h.count(one)
	one.calls++
	one.pace.Begin(now)
	return one
}

// awaken has the slow start of a host with a queue go on after a while. mu is held.
func (h *hosts) awaken(one *host) {
	if one.waking {
		return
	}
	one.waking = true
	time.AfterFunc(limit.StartWait, func() {
		h.mu.Lock()
		one.waking = false
		if len(one.queue) > 0 {
			one.start.Waited()
		}
		ready := h.dequeue(one, time.Now())
		h.mu.Unlock()
		for _, j := range ready {
			h.launch(j)
		}
	})
}

// dequeue takes the tasks out of a host's queue that need not wait any more; launch asks
// begin about each. mu is held.
func (h *hosts) dequeue(one *host, now time.Time) (ready []*job) {
	n := min(max(one.start.Allowed()-one.calls, 0), len(one.queue))
	if one.state.Blocked().After(now) || one.start.Allowed() >= h.slots {
		n = len(one.queue)
	}
	if n == 0 {
		return nil
	}
	ready = one.queue[:n:n]
	one.queue = one.queue[n:]
	if len(one.queue) > 0 {
		h.awaken(one)
	}
	return ready
}

// takeQueue takes all tasks out that wait for a slow start.
func (h *hosts) takeQueue() (queued []*job) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for one, first := h.busy, true; one != nil && (first || one != h.busy); one, first = one.next, false {
		queued = append(queued, one.queue...)
		one.queue = nil
	}
	return queued
}

// end counts a task out whose call ended at now with o. It returns the tasks of its host that
// may be launched in its place; mostly none.
func (h *hosts) end(one *host, o *task.Outcome, now time.Time) (ready []*job) {
	return h.ended(one, o, now, 1)
}

// endAnyway is end of a call that is made by request, and has no slot.
func (h *hosts) endAnyway(one *host, o *task.Outcome, now time.Time) (ready []*job) {
	return h.ended(one, o, now, 0)
}

func (h *hosts) ended(one *host, o *task.Outcome, now time.Time, slots int) (ready []*job) {
	h.mu.Lock()
	h.total -= slots
	before := one.state
	one.calls--
	one.used = now
	if isCall(o) {
		one.pace.End(now, o.Duration)
	} else {
		one.pace.Drop(now)
	}
	h.release(one)
	h.judge(one, o, now)
	if len(one.queue) > 0 {
		ready = h.dequeue(one, now)
	}
	if !one.state.CongestedUntil.IsZero() && !one.ours && !one.pace.Slow(now) {
		h.relieve(one, now)
	}
	if h.spare.Load() > 0 && now.Sub(h.looked) > limit.SlowAfter/4 {
		h.measure(now)
	}
	relieved := one.state != before
	h.mu.Unlock()
	if relieved {
		h.mayStart()
	}
	return ready
}

// judge notes how a call ended. mu is held.
func (h *hosts) judge(one *host, o *task.Outcome, now time.Time) {
	if !isCall(o) {
		return
	}
	failed := isHostFailure(o)
	if !failed {
		one.start.Succeeded()
	}
	if o.TimedOut && o.Duration < patientTimeout && one.window.Succeeded(now) {
		return // others get answers: the timeout of this task is too short
	}
	before := one.state
	if o.RetryAfter > 0 && (o.StatusCode == 429 || o.StatusCode == 503) {
		h.set(one, before.Held(now, o.RetryAfter), now)
		if before.HeldUntil != one.state.HeldUntil {
			one.why = "it answered " + strconv.Itoa(o.StatusCode) + " with Retry-After"
		}
		return // it says when to call again: it is not broken
	}
	switch broken := one.window.Add(now, failed); {
	case one.state.Blocked().After(now):
		return // calls that began before
	case one.state.Allowed > 0:
		if failed {
			one.failed++
		} else {
			one.succeeded++
		}
		if broken = one.state.Breaks(one.failed, one.succeeded); !broken {
			if next, changed := before.Recovered(one.succeeded); changed {
				h.set(one, next, now)
			}
			return
		}
	case !broken:
		return
	}
	one.window.Reset()
	one.why = "most calls failed, the last one with: " + o.Error
	h.set(one, before.Broken(now), now)
}

// isCall reports whether an attempt came to something that says how its host is.
func isCall(o *task.Outcome) bool {
	return o.Kind != "" && o.Kind != task.OutcomeInterrupted && !o.Refused && !o.Untried
}

// isHostFailure reports whether a call ended in a way that counts for its host's breaker.
func isHostFailure(o *task.Outcome) bool {
	if o.Kind == task.OutcomeSucceeded || o.Snooze > 0 {
		return false
	}
	switch o.StatusCode {
	case 0, 429, 502, 503, 504:
		return true
	}
	return o.TimedOut
}

// congest notes that a host has its share and more of its tasks are due. mu is held.
func (h *hosts) congest(one *host, now time.Time) {
	if one.state.CongestedUntil.Sub(now) > congestedFor/2 {
		return
	}
	one.congestedHere = true
	next := one.state
	next.CongestedUntil = now.Add(congestedFor)
	if one.why == "" {
		one.why = "its calls take long, and they hold its share of the slots"
		if one.ours {
			one.why = "calls to this service itself hold their share of the slots"
		}
	}
	h.set(one, next, now)
}

// relieve notes that a host is not congested any more, if it was so here: where another instance
// says that it is, it has its share there. mu is held.
func (h *hosts) relieve(one *host, now time.Time) {
	if one.congestedHere && one.state.CongestedUntil.After(now) {
		one.congestedHere = false
		next := one.state
		next.CongestedUntil = time.Time{}
		h.set(one, next, now)
	}
}

// set changes the state of a host and has it stored. mu is held.
func (h *hosts) set(one *host, next limit.State, now time.Time) {
	if one.state == next {
		return
	}
	h.adopt(one, next, now)
	h.dirty[one] = struct{}{}
	signal(h.changed)
}

// adopt changes the state of a host here. mu is held.
func (h *hosts) adopt(one *host, next limit.State, now time.Time) {
	// After a further break or hold the same Recovery begins anew: what failed before must not
	// break it again, however long the host was away.
	if next.Recovery != one.state.Recovery || next.Opened != one.state.Opened || next.HeldUntil.After(one.state.HeldUntil) {
		one.succeeded, one.failed = 0, 0
	}
	if next.Healthy(now) {
		next = limit.State{}
		one.why = ""
	}
	was, is := one.state != limit.State{}, next != limit.State{}
	one.state = next
	switch {
	case is && !was:
		h.unhealthy.Add(1)
	case was && !is:
		h.unhealthy.Add(-1)
		one.window.Reset()
	}
}

// limit is how many slots a slow host may hold while other slow ones hold so many.
func (h *hosts) limit(others int) int {
	if others >= h.slots {
		others -= int(h.spare.Load())
	}
	return limit.Share(h.slots, h.share, others)
}

// othersSlow returns how many slots the other slow hosts hold, and sets spare. mu is held.
func (h *hosts) othersSlow(one *host, now time.Time) int {
	slow := h.measure(now)
	if one.pace.Slow(now) {
		slow -= one.held
	}
	return slow
}

// measure returns how many slots all slow hosts hold, and sets spare. mu is held.
func (h *hosts) measure(now time.Time) (slow int) {
	known := 0     // of these, slots of hosts that are known to be slow
	stuck := false // in calls to this service itself, which wait for others
	for one, first := h.busy, true; one != nil && (first || one != h.busy); one, first = one.next, false {
		if one.pace.Slow(now) {
			slow += one.held
			if !one.pace.Unknown(now) {
				known += one.held
			}
		}
		stuck = stuck || one.ours && one.held >= h.slots
	}
	h.looked = now
	share := limit.Share(h.slots, h.share, 0)
	spare := 0
	if h.share < 1 {
		spare = min(max(known-share, 0), h.slots-share)
	}
	if stuck { // where there is one slot, say
		spare = max(spare, 1)
	}
	h.spare.Store(int32(min(spare, math.MaxInt32))) //nolint:gosec // bounded
	return slow
}

// look sets spare anew. It is for the claim loop while it waits for a slot: time alone makes a host slow.
func (h *hosts) look() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.measure(time.Now())
}

// get returns the host with a name. mu is held.
func (h *hosts) get(name string) *host {
	one := h.byName[name]
	if one == nil {
		if len(h.byName) >= h.sweepAt {
			h.forget(time.Now())
		}
		one = &host{name: name}
		h.byName[name] = one
	}
	return one
}

// forget forgets hosts without calls: those that had none for hostIdle, and all where
// there are very many. mu is held.
func (h *hosts) forget(now time.Time) {
	for _, idle := range []time.Duration{hostIdle, 0} {
		for name, one := range h.byName {
			if _, dirty := h.dirty[one]; one.held == 0 && !dirty && !one.ours && one.state == (limit.State{}) && now.Sub(one.used) >= idle {
				delete(h.byName, name)
			}
		}
		if len(h.byName) < maxIdleHosts {
			break
		}
	}
	h.sweepAt = max(maxIdleHosts, 2*len(h.byName))
}

// count counts a task in. mu is held.
func (h *hosts) count(one *host) {
	one.held++
	if one.held > 1 {
		return
	}
	if h.busy == nil {
		h.busy, one.next, one.prev = one, one, one
		return
	}
	one.next, one.prev = h.busy, h.busy.prev
	one.prev.next, one.next.prev = one, one
}

// release counts a task out. mu is held.
func (h *hosts) release(one *host) {
	one.held--
	if one.held > 0 {
		return
	}
	if one.next == one {
		h.busy = nil
	} else {
		if h.busy == one {
			h.busy = one.next
		}
		one.prev.next, one.next.prev = one.next, one.prev
	}
	one.next, one.prev = nil, nil
}

// follow shares the states of hosts with the other instances until ctx ends: it stores what
// changes here, and asks every interval what changed elsewhere.
func (h *hosts) follow(ctx context.Context, store hostStore, interval time.Duration) {
	interval = max(interval, minHostLook)
	for {
		if err := h.exchange(ctx, store); err != nil && ctx.Err() == nil {
			h.log.Error("sharing the states of hosts failed", "error", err)
		}
		timer := time.NewTimer(jitter(interval))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-h.changed:
			// A burst of changes is stored once.
			sleep(ctx, minHostLook)
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// exchange stores what changed here and then takes over what is stored. A host that cannot
// be stored stays as it is here, and is stored the next time.
func (h *hosts) exchange(ctx context.Context, store hostStore) error {
	var errs []error
	for _, changed := range h.unsaved() {
		if err := h.save(ctx, store, changed); err != nil {
			h.mu.Lock()
			h.dirty[changed] = struct{}{}
			h.mu.Unlock()
			errs = append(errs, err)
		}
	}
	asked := time.Now()
	stored, err := store.Hosts(ctx)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	h.takeOver(stored, asked)
	return errors.Join(errs...)
}

func (h *hosts) unsaved() (changed []*host) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for one := range h.dirty {
		changed = append(changed, one)
	}
	clear(h.dirty)
	return changed
}

// save stores the state of a host. Where another instance changed it too, both agree on what
// is more careful.
func (h *hosts) save(ctx context.Context, store hostStore, one *host) error {
	for {
		now := time.Now()
		h.mu.Lock()
		mine := one.stored(now)
		h.mu.Unlock()
		if status, _ := mine.Status(); status == task.HostHealthy && mine.Version == 0 {
			return nil // it became healthy again before it was stored
		}
		stored, saved, err := store.SaveHost(ctx, mine)
		if err != nil {
			return err
		}
		now = time.Now()
		h.mu.Lock()
		one.savedAt, one.version, one.since = now, stored.Version, stored.Since
		if saved {
			h.tell(ctx, one)
			h.mu.Unlock()
			return nil
		}
		theirs := stateOf(&stored, now)
		next := theirs
		if stored.Version > 0 && mine.Allowed+int(mine.HeldFor+mine.OpenFor+mine.CongestedFor) > 0 {
			next = theirs.With(one.state)
		}
		h.adopt(one, next, now)
		again := next != theirs
		if !again {
			one.why = stored.Why
		}
		h.mu.Unlock()
		if !again {
			return nil
		}
	}
}

// tell logs that the status of a host has changed here. mu is held.
func (h *hosts) tell(ctx context.Context, one *host) {
	now := one.stored(time.Now())
	status, wait := now.Status()
	if status == one.told || status == task.HostHealthy && one.told == "" {
		return
	}
	one.told = status
	attrs := []slog.Attr{slog.String("host", one.name), slog.String("status", string(status))}
	switch status {
	case task.HostHealthy, task.HostRecovering:
		h.log.LogAttrs(ctx, slog.LevelInfo, "tasks of a host start again", attrs...)
	default:
		if wait > 0 {
			attrs = append(attrs, slog.Float64("wait_seconds", wait.Seconds()))
		}
		h.log.LogAttrs(ctx, slog.LevelWarn, "tasks of a host wait", append(attrs, slog.String("why", one.why))...)
	}
}

// stored is how a host is stored.
func (one *host) stored(now time.Time) task.Host {
	left := func(until time.Time) time.Duration {
		if until.IsZero() {
			return 0
		}
		return max(until.Sub(now), 0)
	}
	s := &one.state
	return task.Host{
		Name: one.name, CongestedFor: left(s.CongestedUntil), HeldFor: left(s.HeldUntil), OpenFor: left(s.OpenUntil),
		Opened: s.Opened, Allowed: s.Allowed, Doubled: s.Doubled, Why: one.why, Since: one.since, Version: one.version,
	}
}

// stateOf is the state of a host that was read at now.
func stateOf(stored *task.Host, now time.Time) limit.State {
	until := func(left time.Duration) time.Time {
		if left <= 0 {
			return time.Time{}
		}
		return now.Add(left)
	}
	return limit.State{
		HeldUntil: until(stored.HeldFor), OpenUntil: until(stored.OpenFor), CongestedUntil: until(stored.CongestedFor),
		Opened: stored.Opened, Recovery: limit.Recovery{Allowed: stored.Allowed, Doubled: stored.Doubled},
	}
}

// takeOver takes the states over that were read after asked. What changed here and was not
// stored before that stays.
func (h *hosts) takeOver(stored []task.Host, asked time.Time) {
	now := time.Now()
	h.mu.Lock()
	relieved := false
	known := make(map[*host]struct{}, len(stored))
	for i := range stored {
		one := h.get(stored[i].Name)
		known[one] = struct{}{}
		if h.keeps(one, asked) || stored[i].Version == one.version {
			continue
		}
		h.adopt(one, stateOf(&stored[i], now), now)
		one.congestedHere = false
		one.version, one.why, one.since = stored[i].Version, stored[i].Why, stored[i].Since
		relieved = true
	}
	if h.unhealthy.Load() > 0 {
		for _, one := range h.byName {
			if _, ok := known[one]; ok || one.state == (limit.State{}) && one.version == 0 || h.keeps(one, asked) {
				continue
			}
			h.adopt(one, limit.State{}, now)
			one.version = 0
			relieved = true
		}
	}
	h.mu.Unlock()
	if relieved {
		h.mayStart()
	}
}

// keeps reports whether a host's state is newer than what was asked for. mu is held.
func (h *hosts) keeps(one *host, asked time.Time) bool {
	_, dirty := h.dirty[one]
	return dirty || one.savedAt.After(asked)
}

package dispatch

import (
	"cmp"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	// maxFetch is the most tasks that one claim asks for.
	maxFetch = 256
	// prefetchTime is how long before its slot becomes free a task may be claimed: a
	// few times what a claim takes, so that no slot waits for one. Draining a backlog
	// became 8 to 14 % faster by it.
	prefetchTime = 20 * time.Millisecond
	// maxUnfinished, times the number of slots, is how many tasks may be claimed whose
	// results are not written. When the instance dies each of them is lost: it counts an
	// attempt, whether its call had begun or not, and is carried out again.
	maxUnfinished = 4
	// defaultDirect bounds the direct calls where there are no slots.
	defaultDirect = 200
)

var errBusy = fmt.Errorf("%w: as many calls as may be are under way", task.ErrOverloaded)

// slots decides how many tasks the instance may claim, and which claimed task starts
// when. It also counts the direct calls, which take no slot: a shutdown waits for them too.
//
// A slot is taken when a claim or a submission asks for a task, and free again when the
// task's call has ended, or a second later where the call met a shortage. Writing the
// result takes no slot. While there is a backlog, as many tasks are claimed in advance
// (prefetched) as slots should become free within prefetchTime. They wait in order, and
// each call that ends starts the one that waited longest.
//
// Whenever mu is free:
//   - tasks wait only while size tasks or more have calls;
//   - at most size + spare tasks got their calls while spare was what it is;
//   - taken = plain.taken + laned.taken = tasks with calls + tasks that wait + tasks being claimed or submitted +
//     slots that rest, and is 2 * size + spare at most;
//   - tasks being claimed or submitted + unfinished tasks are maxUnfinished * size at most;
//   - attempts is above zero while a call is under way, a task waits or one is being submitted;
//   - once stopping is set, no task can be reserved and attempts does not grow from zero,
//     except by the last claim, for which the Dispatcher waits first.
type slots struct {
	size int
	// spare is how many calls more there may be: see hosts.
	spare *atomic.Int32
	// plain and laned share the slots. While both have due tasks each may have half of them.
	plain, laned *claimant
	// attempts are the calls under way, with the writing that follows them, the tasks that
	// wait, and the submissions with a slot. mu is held where it may grow from zero.
	attempts sync.WaitGroup

	mu         sync.Mutex
	taken      int
	calls      int    // under way in slots
	direct     int    // calls under way outside the slots
	resting    int    // slots whose last call met a shortage
	unfinished int    // tasks that were assigned and are not finished
	waiting    []*job // prefetched, the oldest first
	stopping   bool
	throughput throughput
	ceiling    ceiling
}

// claimant is one of the two claim loops, with the slots that its tasks have. mu of slots
// guards it.
type claimant struct {
	// freed is told when as many slots are free as the loop wants. Its buffer is one.
	freed chan struct{}
	// wants reports whether tasks are due that have no slot. It is called with mu held.
	wants   func() bool
	taken   int
	wanted  int  // free slots that the loop waits for; 0: it does not wait
	backlog bool // more was due than the last claim asked for
}

func newSlots(size int) *slots {
	return &slots{size: size, spare: new(atomic.Int32), plain: newClaimant(), laned: newClaimant()}
}

func newClaimant() *claimant {
	return &claimant{freed: make(chan struct{}, 1), wants: func() bool { return false }}
}

// free returns how many tasks c may claim. Its freed is told once there are wanted or more.
func (s *slots) free(c *claimant, wanted int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.wanted = wanted
	return s.available(c)
}

// minFetch returns the number of free slots worth a round trip to the store: one, or a
// quarter of the capacity while there is a backlog.
func (s *slots) minFetch(c *claimant) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.backlog {
		return 1
	}
	return max(min(s.capacity()/4, maxFetch), 1)
}

// take takes slots for a claim and returns their number: all free ones while there is a
// backlog, otherwise half of them, so that submissions meanwhile find some.
func (s *slots) take(c *claimant) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.available(c)
	if !c.backlog {
		n = (n + 1) / 2
	}
	s.count(c, n)
	return n
}

// wants reports whether tasks are due that c has no slot for.
func (s *slots) wants(c *claimant) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return c.wants()
}

// count counts slots as taken for c, or freed where n is negative. mu is held.
func (s *slots) count(c *claimant, n int) {
	s.taken += n
	c.taken += n
}

// fetched notes that a claim for limit slots returned count tasks, and whether it left some that
// are due. It frees the slots that are left.
func (s *slots) fetched(c *claimant, limit, count int, more bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.backlog = count > 0 && more
	s.count(c, count-limit)
	s.notify()
}

// reserve takes a slot for a task that is being submitted, and reports whether it did. It
// takes none while tasks that were stored earlier are due. The caller assigns the slot
// or gives it back, and calls attempts.Done in either case.
func (s *slots) reserve() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping || s.plain.backlog || s.available(s.plain) == 0 {
		return false
	}
	s.count(s.plain, 1)
	s.attempts.Add(1)
	return true
}

// giveBack frees a reserved slot that was not assigned.
func (s *slots) giveBack() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count(s.plain, -1)
	s.notify()
}

// assign gives a slot that was taken by a claim to one of its tasks. It reports whether the
// task starts now. Otherwise all slots have calls, and the task waits.
func (s *slots) assign(j *job) (start bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.place(j)
}

// assignReserved is assign for a reserved slot. When the instance is stopping it assigns
// nothing and ok is false.
func (s *slots) assignReserved(j *job) (start, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false, false
	}
	return s.place(j), true
}

// place is assign. mu is held.
func (s *slots) place(j *job) (start bool) {
	s.unfinished++
	s.attempts.Add(1)
	if s.calls >= s.limit() {
		s.waiting = append(s.waiting, j)
		return false
	}
	s.begin(j)
	return true
}

// begin gives a job its call. mu is held.
func (s *slots) begin(j *job) {
	s.calls++
	j.extra = s.calls > s.size
}

// release ends the call of a job with a slot. It returns the task that waited longest,
// which starts now; nil where none waits.
func (s *slots) release(j *job) (next *job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.outcome.Shortage == "" {
		s.count(j.slot, -1)
		s.throughput.add(j.outcome.Duration)
	} else {
		s.resting++
		time.AfterFunc(jitter(shortageRest), func() { s.endRest(j.slot) })
	}
	s.calls--
	next = s.next()
	s.notify()
	return next
}

// next returns the task that waited longest, if it may have its call now. mu is held.
func (s *slots) next() (next *job) {
	if len(s.waiting) == 0 || s.calls >= s.limit() {
		return nil
	}
	next, s.waiting[0] = s.waiting[0], nil
	s.waiting = s.waiting[1:]
	s.begin(next)
	return next
}

// startWaiting is next of a slot that became free because spare has grown.
func (s *slots) startWaiting() (next *job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.next()
}

// limit is how many calls may be under way.
func (s *slots) limit() int { return s.size + int(s.spare.Load()) }

// decline notes that a task which was claimed gets no slot. The caller has its result
// written and then calls attempts.Done.
func (s *slots) decline(j *job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count(j.slot, -1)
	s.unfinished++
	s.attempts.Add(1)
	s.notify()
}

// endRest frees a slot that rested after a shortage.
func (s *slots) endRest(c *claimant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resting--
	s.count(c, -1)
	s.notify()
}

// finish notes that the result of an assigned task is written, or never will be.
func (s *slots) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unfinished--
	s.notify()
}

// takeWaiting removes the tasks that wait and frees their slots. For each of them
// attempts.Done and finish are still to be called.
func (s *slots) takeWaiting() []*job {
	s.mu.Lock()
	defer s.mu.Unlock()
	waiting := s.waiting
	s.waiting = nil
	for _, j := range waiting {
		s.count(j.slot, -1)
	}
	return waiting
}

// startDirect counts in a call outside the slots. The caller calls endDirect. There may
// be size direct calls, or defaultDirect where size is zero. When the instance is
// stopping the error is [ErrStopping], unless mayComeBack: then only when no call is
// under way that could have led to this one.
func (s *slots) startDirect(mayComeBack bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopping && (!mayComeBack || s.calls+s.direct == 0):
		return ErrStopping
	case s.direct >= cmp.Or(s.size, defaultDirect):
		return errBusy
	}
	s.direct++
	s.attempts.Add(1)
	return nil
}

func (s *slots) endDirect() {
	s.mu.Lock()
	s.direct--
	s.mu.Unlock()
	s.attempts.Done()
}

// lower lowers the ceiling after a call met a shortage of the whole instance.
func (s *slots) lower() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.size > 0 {
		s.ceiling.lower(time.Now(), s.calls-1, s.size)
	}
}

// stop keeps further submissions from taking slots, and direct calls from starting. Only
// a direct call that may come from a call under way still starts (see startDirect).
func (s *slots) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = true
}

// status returns the number of calls under way, direct ones included, and whether stop was called.
func (s *slots) status() (calls int, stopping bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls + s.direct, s.stopping
}

// notify wakes a claim loop that waits, when as many slots are free as it wants. mu is held.
func (s *slots) notify() {
	for _, c := range [...]*claimant{s.plain, s.laned} {
		if c.wanted > 0 && s.available(c) >= c.wanted {
			signal(c.freed)
		}
	}
}

// available is how many tasks c may claim. While results cannot be written, it falls to
// zero after maxUnfinished * size tasks. What the other claimant lacks of its half is left to it,
// if it wants that. mu is held.
func (s *slots) available(c *claimant) int {
	unassigned := s.taken - s.calls - len(s.waiting) // being claimed or submitted, and slots that rest
	n := min(s.capacity()-s.taken, maxUnfinished*s.size-s.unfinished-unassigned)
	other := s.plain
	if c == s.plain {
		other = s.laned
	}
	if lacks := s.size/2 - other.taken; lacks > 0 && n > 0 && other.wants() {
		n -= lacks
	}
	return max(min(n, maxFetch), 0)
}

// capacity is how many slots may be taken: all, and in a backlog those again that should
// become free within prefetchTime. During a shortage it is the ceiling and the slots that
// rest, at most. mu is held.
func (s *slots) capacity() int {
	capacity := s.limit()
	if s.plain.backlog || s.laned.backlog {
		capacity += min(s.throughput.within(prefetchTime, s.size), s.size)
	}
	if s.ceiling.since.IsZero() {
		return capacity
	}
	return min(s.ceiling.at(time.Now(), s.size)+s.resting, capacity)
}

// throughputWindow is how long the throughput is measured at a time.
const throughputWindow = 50 * time.Millisecond

// throughput is how many calls end in a time. It is measured anew in each throughputWindow.
type throughput struct {
	since     time.Time
	ended     int
	took      time.Duration // sum over the calls that ended
	perSecond float64
}

// add notes that a call ended which took d.
func (t *throughput) add(d time.Duration) {
	t.ended++
	t.took += d
}

// within returns how many calls of so many slots end in d if they go on as they did.
func (t *throughput) within(d time.Duration, slots int) int {
	if elapsed := time.Since(t.since); elapsed >= throughputWindow {
		t.perSecond = float64(t.ended) / elapsed.Seconds()
		if t.took > 0 {
			// Calls that began together end together. The calls that follow do not end
			// at that rate: Little's law bounds it.
			t.perSecond = min(t.perSecond, float64(slots*t.ended)/t.took.Seconds())
		}
		t.since, t.ended, t.took = time.Now(), 0, 0
	}
	return int(t.perSecond * d.Seconds())
}

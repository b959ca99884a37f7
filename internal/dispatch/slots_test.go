package dispatch

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/task"
)

// step is one thing that happens to slots; n and odd say more.
type step struct {
	kind string
	n    int
	odd  bool
}

// TestSlotsInvariants plays claims, submissions, calls, shortages and writes in any order,
// and checks after each step what the comment on slots promises.
func TestSlotsInvariants(t *testing.T) {
	t.Parallel()
	kinds := rapid.SampledFrom([]string{"time", "claim", "claimed", "claimed", "reserve", "submitted", "not submitted", "end", "end", "short", "written", "stuck"})
	rapid.Check(t, func(rt *rapid.T) {
		size := rapid.IntRange(1, 20).Draw(rt, "size")
		steps := rapid.SliceOf(rapid.Custom(func(rt *rapid.T) step {
			return step{kinds.Draw(rt, "kind"), rapid.IntRange(0, 1500).Draw(rt, "n"), rapid.Bool().Draw(rt, "odd")}
		})).Draw(rt, "steps")
		var problem string
		synctest.Test(t, func(*testing.T) { problem = playSlots(size, steps) })
		if problem != "" {
			rt.Fatal(problem)
		}
	})
}

// playSlots returns what is wrong, or nothing.
func playSlots(size int, steps []step) string {
	s := newSlots(size)
	var claims []claim // under way
	var reserved int   // submissions under way
	var calls []*job   // under way
	var waiting []*job // in the order in which they should start
	var written int    // tasks whose results are being written
	assigned := func(j *job, start bool) {
		if start {
			calls = append(calls, j)
		} else {
			waiting = append(waiting, j)
		}
	}
	for _, step := range steps {
		switch step.kind {
		case "time":
			time.Sleep(time.Duration(step.n) * time.Millisecond)
			synctest.Wait()
		case "claim":
			by := []*claimant{s.plain, s.laned}[step.n%2]
			s.plain.wants = func() bool { return step.n%3 == 0 }
			s.laned.wants = func() bool { return step.n%5 == 0 }
			if n := s.take(by); n > 0 {
				claims = append(claims, claim{by, n})
			}
		case "claimed":
			if len(claims) == 0 {
				continue
			}
			by, count := claims[0].by, claims[0].limit
			if step.odd {
				count = min(count, step.n)
			}
			for range count {
				j := &job{slot: by}
				assigned(j, s.assign(j))
			}
			s.fetched(by, claims[0].limit, count, claims[0].limit == count)
			claims = claims[1:]
		case "reserve":
			if s.reserve() {
				reserved++
			}
		case "submitted", "not submitted":
			if reserved == 0 {
				continue
			}
			reserved--
			if j := (&job{slot: s.plain}); step.kind == "submitted" {
				start, _ := s.assignReserved(j)
				assigned(j, start)
			} else {
				s.giveBack()
			}
			s.attempts.Done()
		case "end", "short":
			if len(calls) == 0 {
				continue
			}
			ended := calls[0]
			ended.outcome = task.Outcome{Duration: time.Duration(step.n) * time.Millisecond / 10}
			if step.kind == "short" {
				ended.outcome.Shortage = task.ShortageDescriptors
				s.lower()
			}
			calls = calls[1:]
			next := s.release(ended)
			switch {
			case len(waiting) > 0 && next == waiting[0]:
				calls, waiting = append(calls, next), waiting[1:]
			case len(waiting) > 0 || next != nil:
				return "the task that starts is not the one that waited longest"
			}
			s.attempts.Done()
			written++
		case "written":
			if written > 0 {
				written--
				s.finish()
			}
		case "stuck":
			for range s.takeWaiting() {
				s.attempts.Done()
				written++
			}
			waiting = nil
		}
		claimed := reserved
		for _, c := range claims {
			claimed += c.limit
		}
		if problem := s.check(len(calls), len(waiting), claimed, written); problem != "" {
			return fmt.Sprintf("after %+v: %s", step, problem)
		}
	}

	// When all is over, all slots are free.
	for _, c := range claims {
		s.fetched(c.by, c.limit, 0, false)
	}
	for range reserved {
		s.giveBack()
		s.attempts.Done()
	}
	for range s.takeWaiting() {
		s.attempts.Done()
		written++
	}
	for _, j := range calls {
		j.outcome = task.Outcome{}
		s.release(j)
		s.attempts.Done()
		written++
	}
	for range written {
		s.finish()
	}
	s.attempts.Wait()
	time.Sleep(ceilingHold + ceilingRise + 2*shortageRest)
	synctest.Wait()
	if problem := s.check(0, 0, 0, 0); problem != "" {
		return "in the end: " + problem
	}
	s.plain.wants, s.laned.wants = never, never
	for _, c := range []*claimant{s.plain, s.laned} {
		if s.resting > 0 || s.available(c) < size || c.taken != 0 {
			return fmt.Sprintf("in the end %d slots rest, %d are taken and %d of %d are free", s.resting, c.taken, s.available(c), size)
		}
	}
	return ""
}

// claim is one under way.
type claim struct {
	by    *claimant
	limit int
}

func never() bool { return false }

// check returns which invariant is broken.
func (s *slots) check(calls, waiting, claimed, written int) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch want := calls + waiting + claimed + s.resting; {
	case s.calls != calls || calls > s.size:
		return fmt.Sprintf("%d calls are counted, %d are under way in %d slots", s.calls, calls, s.size)
	case len(s.waiting) != waiting || waiting > 0 && calls < s.size:
		return fmt.Sprintf("%d tasks wait, want %d, while %d of %d slots have calls", len(s.waiting), waiting, calls, s.size)
	case s.taken != want || want > 2*s.size:
		return fmt.Sprintf("%d slots are taken, want %d of %d: %d calls, %d waiting, %d being claimed, %d resting", s.taken, want, s.size, calls, waiting, claimed, s.resting)
	case s.plain.taken+s.laned.taken != s.taken:
		return fmt.Sprintf("%d slots are taken, %d for plain tasks and %d for others", s.taken, s.plain.taken, s.laned.taken)
	case s.unfinished != calls+waiting+written || s.unfinished+claimed > maxUnfinished*s.size:
		return fmt.Sprintf("%d tasks are unfinished, want %d; %d more are being claimed", s.unfinished, calls+waiting+written, claimed)
	}
	return ""
}

func TestTakeLeavesRoomForSubmissions(t *testing.T) {
	t.Parallel()
	s := newSlots(9)
	if got := s.take(s.plain); got != 5 {
		t.Errorf("a claim takes %d of 9 free slots, want half", got)
	}
	if !s.reserve() {
		t.Error("a submission found no slot beside the claim")
	}
	s.fetched(s.plain, 5, 5, true)
	if s.reserve() {
		t.Error("a submission got a slot before the tasks of a backlog")
	}
	if got := s.take(s.plain); got != 3 {
		t.Errorf("a claim takes %d of 3 free slots in a backlog, want all", got)
	}
	s.fetched(s.plain, 3, 2, false)
	if got := s.minFetch(s.plain); got != 1 {
		t.Errorf("minFetch is %d without a backlog, want 1", got)
	}
}

func TestFreedTellsOfEnoughSlots(t *testing.T) {
	t.Parallel()
	s := newSlots(4)
	told := func() bool {
		select {
		case <-s.plain.freed:
			return true
		default:
			return false
		}
	}
	for range 4 {
		s.reserve()
	}
	if got := s.free(s.plain, 2); got != 0 {
		t.Fatalf("%d slots are free, want 0", got)
	}
	if s.giveBack(); told() {
		t.Error("told of 1 free slot, want 2")
	}
	if s.giveBack(); !told() {
		t.Error("not told of 2 free slots")
	}
}

func TestSlotsStop(t *testing.T) {
	t.Parallel()
	s := newSlots(2)
	if !s.reserve() || s.startDirect(false) != nil {
		t.Fatal("nothing starts before the stop")
	}
	s.stop()
	if _, ok := s.assignReserved(&job{}); ok {
		t.Error("a submitted task started after the stop")
	}
	if s.reserve() {
		t.Error("a slot was reserved after the stop")
	}
	if err := s.startDirect(false); !errors.Is(err, ErrStopping) {
		t.Errorf("a direct call after the stop: %v, want %v", err, ErrStopping)
	}
	if err := s.startDirect(true); err != nil {
		t.Errorf("a call that came back: %v", err)
	}
	if err := s.startDirect(true); !errors.Is(err, errBusy) {
		t.Errorf("one direct call too many: %v, want %v", err, errBusy)
	}
	s.endDirect()
	s.endDirect()
	if err := s.startDirect(true); !errors.Is(err, ErrStopping) {
		t.Errorf("no call is under way that could have come back: %v, want %v", err, ErrStopping)
	}
	if calls, stopping := s.status(); calls != 0 || !stopping {
		t.Errorf("status() = %d, %t, want 0, true", calls, stopping)
	}
	s.giveBack()
	s.attempts.Done()
	s.attempts.Wait()
}

func TestThroughput(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		measured := func(calls int, took time.Duration) *throughput {
			tp := &throughput{since: time.Now()}
			time.Sleep(throughputWindow)
			for range calls {
				tp.add(took)
			}
			return tp
		}
		for name, tt := range map[string]struct {
			calls int
			took  time.Duration
			want  int // of 10 slots, within 20 ms
		}{
			"none":     {0, 0, 0},
			"steady":   {50, 10 * time.Millisecond, 20},
			"together": {10, 2 * time.Second, 0}, // Little: 10 slots / 2 s = 5 a second
			"no time":  {50, 0, 20},
		} {
			if got := measured(tt.calls, tt.took).within(20*time.Millisecond, 10); got != tt.want {
				t.Errorf("%s: %d calls should end, want %d", name, got, tt.want)
			}
		}
		tp := measured(50, 10*time.Millisecond)
		tp.within(time.Second, 10)
		tp.add(time.Millisecond)
		time.Sleep(throughputWindow - 1)
		if got := tp.within(20*time.Millisecond, 10); got != 20 {
			t.Errorf("within its window the throughput is measured anew: %d, want 20", got)
		}
		time.Sleep(time.Nanosecond)
		if got := tp.within(time.Second, 10); got != 20 {
			t.Errorf("after its window the throughput is %d a second, want 20", got)
		}
	})
}

func TestUnwrittenResultsBoundClaims(t *testing.T) {
	t.Parallel()
	s := newSlots(2)
	for range maxUnfinished*2 - 1 {
		s.reserve()
		j := &job{slot: s.plain}
		s.assignReserved(j)
		s.release(j)
		s.attempts.Done() // of the reservation
		s.attempts.Done()
	}
	if got := s.take(s.plain); got != 1 {
		t.Fatalf("a claim takes %d slots, want the 1 that the limit on unwritten results leaves", got)
	}
	if got := s.free(s.plain, 1); got != 0 {
		t.Errorf("%d more tasks may be claimed during that claim, want 0", got)
	}
}

// While plain tasks and those of lanes are due, each may have half of the slots; alone
// they may have all.
func TestSlotsAreShared(t *testing.T) {
	t.Parallel()
	s := newSlots(10)
	take := func(c *claimant, want int) {
		t.Helper()
		c.backlog = true
		if got := s.take(c); got != want {
			t.Errorf("a claim takes %d slots, want %d", got, want)
		}
	}
	wants := func() bool { return true }
	take(s.plain, 10)
	s.fetched(s.plain, 10, 8, false)
	s.laned.wants = wants
	take(s.plain, 0) // 2 are free, and lanes lack 5
	take(s.laned, 2)
	s.plain.wants = wants
	s.count(s.plain, -4) // 4 calls end
	take(s.plain, 1)     // plain tasks have 4 of their half, lanes 2
	take(s.laned, 3)
	s.count(s.laned, -5)
	s.laned.wants = never
	take(s.plain, 5)
}

// A claim from lanes that was not full leaves a backlog where other lanes have due tasks, as limits
// bound what it got.
func TestBacklogOfLanes(t *testing.T) {
	t.Parallel()
	s := newSlots(40)
	for _, tt := range []struct {
		count int
		more  bool
		want  int // free slots worth a claim
	}{{0, true, 1}, {5, false, 1}, {5, true, 10}} {
		limit := s.take(s.laned)
		s.fetched(s.laned, limit, tt.count, tt.more)
		if got := s.minFetch(s.laned); got != tt.want {
			t.Errorf("after %d of %d, more: %t: a claim is worth %d free slots, want %d", tt.count, limit, tt.more, got, tt.want)
		}
	}
}

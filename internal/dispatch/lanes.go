package dispatch

import (
	"container/heap"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	// maxAsked is how many lanes one claim asks, and maxPerLane for how many tasks at least each
	// of many, once it is known that most have so many.
	maxAsked   = maxFetch
	maxPerLane = 4
	// maxOthersPause is the longest pause of a lane that another instance claims from, which
	// takes some milliseconds.
	maxOthersPause = 16 * time.Millisecond
	// laneLook is how many lanes one look reads, and lookShare in how much of the time,
	// 1 of so many, at the most.
	laneLook  = 1000
	lookShare = 50
	// minHorizon is how far ahead lanes are remembered whose tasks are due later: a look
	// finds the others in time.
	minHorizon = time.Minute
)

// laneStore is the part of the store that has lanes.
type laneStore interface {
	// ClaimLanes moves due tasks of unhealthy hosts to the lanes of these in place of claiming them.
	ClaimLanes(ctx context.Context, worker task.ID, asks []task.LaneAsk, unhealthy []string, limit int) ([]*task.Claim, []task.LaneState, error)
	// Lanes returns up to limit lanes in which tasks wait, from behind a lane on.
	Lanes(ctx context.Context, behind task.Lane, limit int) ([]task.LaneDue, error)
}

// lanes knows which lanes have tasks, as far as the instance has heard: from what it
// stores and gives back, and from looks at the store. What it does not know a look finds,
// and what it believes wrongly one claim corrects.
//
// Lanes have turns: first the groups, which are queues, and hosts for lanes without a
// queue; then, within a group, its lanes. So neither a queue with many keys nor a key with
// many tasks keeps others waiting for more than a round.
//
// Whenever mu is free:
//   - a lane is ready, or asked, or waits in timed until its moment;
//   - a group is in ring exactly once if it has ready lanes and is not blocked, otherwise not;
//   - ready is the length of ring.
type lanes struct {
	changed chan struct{} // told when a lane became ready or waits for less long; buffered
	lookNow chan struct{} // told when the store may have lanes that are not known; buffered
	low     chan struct{} // told when fewer lanes are ready than a claim may ask; buffered
	ready   atomic.Int32

	mu     sync.Mutex
	byName map[task.Lane]*lane
	// byHost is those of byName that have a host, and byKey those of them that have a key, by the
	// lane of that key without a host.
	byHost  map[string][]*lane
	byKey   map[task.Lane][]*lane
	groups  map[string]*group
	ring    []*group
	timed   timedLanes
	turns   uint64 // how many times lanes were asked
	horizon time.Duration
	perLane int // how many tasks most lanes have that are asked; maxPerLane at most
}

type lane struct {
	name  task.Lane
	host  string // of name
	group *group
	at    time.Time // when it becomes ready, while index is not negative
	index int       // in timed
	asked bool
	// blocked: it is not asked before at, even if more tasks are due; unless permit is set
	// and a task ends.
	blocked, permit bool
	forKey          bool   // the permit is one of its key
	turn            uint64 // the number of turns when it was asked last
	// While it is asked: a task of it ended, or is due from at on.
	freed, noted bool
	pause        time.Duration // after claims of others, or in vain
}

// group is the lanes of a queue, or of a host.
type group struct {
	name    string
	lanes   int     // known
	first   []*lane // ready, before those of ready; the last one has the next turn
	ready   []*lane
	inRing  bool
	blocked bool // it is not asked before the moment of until
	paused  bool
	asked   bool
	freed   bool  // while it is asked
	until   *lane // stands in timed for the group
}

func newLanes() *lanes {
	return &lanes{
		changed: make(chan struct{}, 1), lookNow: make(chan struct{}, 1), low: make(chan struct{}, 1),
		byName: make(map[task.Lane]*lane), byHost: make(map[string][]*lane), byKey: make(map[task.Lane][]*lane), groups: make(map[string]*group),
		horizon: minHorizon, perLane: 1,
	}
}

// note says that a task of a lane is due in wait. It never blocks.
func (l *lanes) note(name task.Lane, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.noteAt(name, wait, time.Now())
}

// noteAt is note. mu is held.
func (l *lanes) noteAt(name task.Lane, wait time.Duration, now time.Time) {
	one := l.byName[name]
	if one == nil {
		if wait > l.horizon {
			return
		}
		one = l.add(name)
	}
	at := now.Add(max(wait, 0))
	switch {
	case one.asked:
		if !one.noted || at.Before(one.at) {
			one.noted, one.at = true, at
		}
	case one.blocked, one.index < 0: // it is asked at its time, or is ready
	case at.Before(one.at):
		l.retime(one, at)
	}
}

// add makes a lane known, which waits for its first moment. mu is held.
func (l *lanes) add(name task.Lane) *lane {
	groupName := name.Queue()
	if groupName == "" {
		groupName = string(name)
	}
	g := l.groups[groupName]
	if g == nil {
		g = &group{name: groupName}
		g.until = &lane{group: g, index: -1}
		l.groups[groupName] = g
	}
	g.lanes++
	one := &lane{name: name, host: name.Host(), group: g, index: -1}
	l.byName[name] = one
	if one.host != "" {
		l.byHost[one.host] = append(l.byHost[one.host], one)
		if name.Key() != "" {
			l.byKey[name.At("")] = append(l.byKey[name.At("")], one)
		}
	}
	l.time(one, time.Now().Add(time.Hour))
	return one
}

// forget makes a lane unknown. mu is held.
func (l *lanes) forget(one *lane) {
	delete(l.byName, one.name)
	if one.host != "" {
		without(l.byHost, one.host, one)
		without(l.byKey, one.name.At(""), one)
	}
	if one.group.lanes--; one.group.lanes == 0 {
		l.untime(one.group.until)
		delete(l.groups, one.group.name)
	}
}

// without takes a lane out of those under a name.
func without[N comparable](lists map[N][]*lane, name N, one *lane) {
	if rest := slices.DeleteFunc(lists[name], func(other *lane) bool { return other == one }); len(rest) > 0 {
		lists[name] = rest
	} else {
		delete(lists, name)
	}
}

// freed says that a task of a lane ended or was given back: a permit may be free. It is
// called after that was committed, and never blocks.
func (l *lanes) freed(name task.Lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	one := l.byName[name]
	var g *group
	if one != nil {
		g = one.group
	} else if g = l.groups[name.Queue()]; g == nil {
		return
	}
	// Others that end in the same moment are claimed for together.
	soon := time.Now().Add(gatherTime)
	if g.asked {
		g.freed = true
	} else if g.blocked && g.until.permit && soon.Before(g.until.at) {
		l.retime(g.until, soon)
	}
	turn, ofHost := l.ofKey(name), l.ofHost(name.Host())
	l.wake(turn, soon)
	if ofHost != turn {
		l.wake(ofHost, soon)
	}
	if one != turn && (one == nil || !one.forKey && !one.forHost()) {
		l.wake(one, soon)
	}
}

// forHost reports whether a lane waits for a permit of its host.
func (one *lane) forHost() bool { return one.permit && !one.forKey && one.host != "" }

// wake has a lane asked soon if it waits for a permit. mu is held.
func (l *lanes) wake(one *lane, soon time.Time) {
	switch {
	case one == nil:
	case one.asked:
		one.freed = true
	case one.permit && soon.Before(one.at):
		l.retime(one, soon)
	}
}

// ofKey returns the lane that gets a permit of the key of a lane: of those that wait for one, or
// are asked, that which was asked least recently. mu is held.
func (l *lanes) ofKey(name task.Lane) (one *lane) {
	if name.Key() == "" {
		return nil
	}
	if len(l.byKey) == 0 {
		return l.byName[name]
	}
	key := name.At("")
	better := func(other *lane) bool {
		return (other.forKey || other.asked) && (one == nil || other.turn < one.turn)
	}
	if other := l.byName[key]; other != nil && better(other) {
		one = other
	}
	for _, other := range l.byKey[key] {
		if better(other) {
			one = other
		}
	}
	return one
}

// ofHost returns the lane that gets a permit of a host: of those that wait for one, or are asked,
// that which was asked least recently. mu is held.
func (l *lanes) ofHost(host string) (one *lane) {
	for _, other := range l.byHost[host] {
		if (other.forHost() || other.asked) && (one == nil || other.turn < one.turn) {
			one = other
		}
	}
	return one
}

// wakeHosts has all lanes asked that wait for their hosts.
func (l *lanes) wakeHosts() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for _, atHost := range l.byHost {
		for _, one := range atHost {
			if one.blocked {
				l.retime(one, now)
			}
		}
	}
}

// look says that the store may have lanes with due tasks that are not known here, or that
// a pause may have ended.
func (l *lanes) look() {
	signal(l.lookNow)
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for _, g := range l.groups {
		if g.paused && g.until.index >= 0 {
			l.retime(g.until, now)
		}
	}
}

// found notes lanes that a look has found, and reports whether one of them that was not known may be
// asked now.
func (l *lanes) found(due []task.LaneDue) (fresh bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for _, d := range due {
		known := l.byName[d.Lane] != nil
		l.noteAt(d.Lane, d.Wait, now)
		if one := l.byName[d.Lane]; !known && d.Wait <= 0 && !one.group.blocked {
			fresh = true
		}
	}
	return fresh
}

// looked sets the horizon after a look at all lanes that took so long: two more go by
// before a task is due that it left out.
func (l *lanes) looked(took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.horizon = max(minHorizon, 3*took)
}

// expire makes lanes and groups ready whose moment has come. It returns how long to wait
// for the next one; ok is false where there is none.
func (l *lanes) expire() (wait time.Duration, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for len(l.timed) > 0 && !l.timed[0].at.After(now) {
		one := l.timed[0]
		l.untime(one)
		one.blocked, one.permit, one.forKey = false, false, false
		if one.name == "" {
			one.group.blocked = false
			l.enter(one.group)
			continue
		}
		l.makeReady(one, false)
	}
	if len(l.timed) == 0 {
		return 0, false
	}
	return l.timed[0].at.Sub(now), true
}

// makeReady puts a lane behind the others of its group that are ready, or before them. mu is held.
func (l *lanes) makeReady(one *lane, first bool) {
	g := one.group
	if first {
		g.first = append(g.first, one)
	} else {
		g.ready = append(g.ready, one)
	}
	l.enter(g)
}

// next takes the lane of a group out that has the next turn: one is ready.
func (g *group) next() (one *lane) {
	if last := len(g.first) - 1; last >= 0 {
		one, g.first[last] = g.first[last], nil
		g.first = g.first[:last]
		return one
	}
	one, g.ready[0] = g.ready[0], nil
	g.ready = g.ready[1:]
	return one
}

// enter puts a group into the ring if it belongs there. mu is held.
func (l *lanes) enter(g *group) {
	if !g.inRing && !g.blocked && len(g.first)+len(g.ready) > 0 {
		g.inRing = true
		l.ring = append(l.ring, g)
		l.ready.Store(int32(len(l.ring))) //nolint:gosec // far below 2^31
	}
}

// take takes lanes to be asked for up to limit tasks together, each for its part of them: the groups
// have the same part, and so have the lanes of a group.
// permits bounds how many tasks of the lanes with a host are asked for; othersWait says that lanes
// of other hosts, or of none, are ready. Where these are none,
// the lane is asked again at the latest after again, or with zero when a slot is free.
// Each lane that take returns goes to answer.
func (l *lanes) take(limit int, permits func(one task.Lane, othersWait bool) (most, running int, again time.Duration)) []task.LaneAsk {
	l.mu.Lock()
	defer l.mu.Unlock()
	part := parts(limit, len(l.ring))
	hosts := make(map[string]*askedHost)
	per := make(map[*group]int)
	var asked []*lane
	var full []*group
	for len(l.ring) > 0 && len(asked) < min(limit, maxAsked) {
		g := l.ring[0]
		l.ring = l.ring[1:]
		if per[g] > 0 && per[g]*l.perLane >= part {
			full = append(full, g)
			continue
		}
		g.inRing = false
		one := g.next()
		l.enter(g)
		if one.host != "" {
			h := hosts[one.host]
			if h == nil {
				h = new(askedHost)
				hosts[one.host] = h
				// Lanes that are not ready at first do not become so here: this holds for all of the host.
				isOther := func(other *lane) bool { return other.host != one.host }
				h.most, h.running, h.again = permits(one.name, slices.ContainsFunc(asked, isOther) || anyReady(l.ring, isOther) || anyReady(full, isOther))
			}
			if h.lanes >= h.most {
				one.blocked, one.permit = true, true
				l.time(one, time.Now().Add(max(h.again, minPause)))
				continue
			}
			h.lanes++
		}
		l.turns++
		one.asked, one.noted, one.freed, one.turn = true, false, false, l.turns
		g.asked, g.freed = true, false
		asked = append(asked, one)
		per[g]++
	}
	l.ring = append(l.ring, full...)
	ready := 0
	for i := 0; i < len(l.ring) && ready < maxAsked; i++ {
		ready += len(l.ring[i].first) + len(l.ring[i].ready)
	}
	if ready < maxAsked {
		signal(l.low)
	}
	l.ready.Store(int32(len(l.ring))) //nolint:gosec // far below 2^31
	part = parts(limit, len(per))
	asks := make([]task.LaneAsk, len(asked))
	for i, one := range asked {
		asks[i] = task.LaneAsk{Lane: one.name, Most: parts(part, per[one.group])}
		if h := hosts[one.host]; h != nil {
			most := min(asks[i].Most, parts(h.most, h.lanes))
			h.most -= most
			h.lanes--
			asks[i].Most, asks[i].Running = most, h.running
		}
	}
	return asks
}

// askedHost is a host of lanes that are asked.
type askedHost struct {
	most, running int
	again         time.Duration
	lanes         int // that are asked
}

// parts is how many each of some gets of n, rounded up.
func parts(n, some int) int { return (n + max(some, 1) - 1) / max(some, 1) }

// anyReady reports whether a lane of some groups is ready for which is holds.
func anyReady(groups []*group, is func(*lane) bool) bool {
	return slices.ContainsFunc(groups, func(g *group) bool { return slices.ContainsFunc(g.first, is) || slices.ContainsFunc(g.ready, is) })
}

// answer puts lanes back that were asked for up to limit tasks together. claims are what was claimed,
// by lane. poll is when to ask those again that wait for
// what only others may know, as a limit that is changed.
func (l *lanes) answer(states []task.LaneState, claims map[task.Lane]int, limit int, poll time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	full := l.adapt(states, claims, limit)
	var first []*lane
	for _, s := range states {
		for _, host := range s.Held {
			l.noteAt(s.Lane.At(host), 0, now)
		}
		one := l.byName[s.Lane]
		if one == nil || !one.asked {
			continue
		}
		g := one.group
		one.asked, g.paused = false, s.Blocked == task.BlockedByPause
		// A lane that is not blocked, has due tasks and got none: others hold these, or the
		// store does not know the instance at the moment.
		inVain := s.Blocked == "" && s.Wait == 0 && claims[one.name] == 0 && len(s.Held) == 0 && !full
		if s.Blocked != task.BlockedByOthers && !inVain {
			one.pause = 0
		}
		switch {
		case s.Blocked == task.BlockedByPause:
			l.block(g, now.Add(poll), false)
			first = append(first, one)
		case s.Blocked == task.BlockedByOthers:
			one.pause = longer(one.pause, min(maxOthersPause, poll))
			l.time(one, now.Add(jitter(one.pause)))
		case inVain:
			one.pause = longer(one.pause, poll)
			l.time(one, now.Add(jitter(one.pause)))
		case s.Blocked == task.BlockedByQueue:
			switch {
			case s.Wait >= 0:
				l.block(g, now.Add(min(s.Wait, poll)), false)
			case !g.freed:
				l.block(g, now.Add(poll), true)
			}
			if claims[one.name] == 0 {
				first = append(first, one)
			} else {
				l.makeReady(one, false)
			}
		case s.Blocked != "":
			switch {
			case s.Wait >= 0:
				one.blocked = true
				l.time(one, now.Add(min(s.Wait, poll)))
			case one.freed:
				l.makeReady(one, false)
			default:
				one.blocked, one.permit, one.forKey = true, true, s.Blocked == task.BlockedByKey
				l.time(one, now.Add(poll))
			}
		case s.Wait == 0:
			if claims[one.name] == 0 {
				first = append(first, one)
			} else {
				l.makeReady(one, false)
			}
		case one.noted && (s.Wait < 0 || one.at.Before(now.Add(s.Wait))):
			l.time(one, one.at)
		case s.Wait > 0 && s.Wait <= l.horizon:
			l.time(one, now.Add(s.Wait))
		default:
			l.forget(one)
		}
	}
	for i := len(first) - 1; i >= 0; i-- {
		l.makeReady(first[i], true)
	}
	for _, s := range states {
		if one := l.byName[s.Lane]; one != nil {
			one.group.asked = false
		}
	}
	signal(l.changed)
}

// adapt learns how many tasks lanes have, and reports whether a claim got as many as it asked for. Where
// most lanes have more, fewer of them are asked for more; where too few came and other
// lanes are ready, more are asked. mu is held.
func (l *lanes) adapt(states []task.LaneState, claims map[task.Lane]int, limit int) (full bool) {
	total, more := 0, 0
	for _, s := range states {
		total += claims[s.Lane]
		if claims[s.Lane] > 0 && s.Blocked == "" && s.Wait == 0 {
			more++
		}
	}
	switch full = total >= limit; {
	case full && 2*more > len(claims):
		l.perLane = min(2*l.perLane, maxPerLane)
	case 2*total <= limit && len(l.ring) > 0:
		l.perLane = max(l.perLane/2, 1)
	}
	return full
}

// giveBack puts lanes back that were asked in vain: the store did not answer.
func (l *lanes) giveBack(asks []task.LaneAsk) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := len(asks) - 1; i >= 0; i-- {
		if one := l.byName[asks[i].Lane]; one != nil && one.asked {
			one.asked, one.group.asked = false, false
			l.makeReady(one, true)
		}
	}
}

// block keeps the lanes of a group from being asked until at; the end of one of its tasks
// may end that before. mu is held.
func (l *lanes) block(g *group, at time.Time, untilFreed bool) {
	g.blocked = true
	g.until.permit = untilFreed
	if g.until.index >= 0 {
		l.retime(g.until, at)
	} else {
		l.time(g.until, at)
	}
	if g.inRing {
		g.inRing = false
		for i, other := range l.ring {
			if other == g {
				l.ring = append(l.ring[:i:i], l.ring[i+1:]...)
				break
			}
		}
		l.ready.Store(int32(len(l.ring))) //nolint:gosec // far below 2^31
	}
}

// time has a lane wait until at. mu is held.
func (l *lanes) time(one *lane, at time.Time) {
	one.at = at
	heap.Push(&l.timed, one)
	if one.index == 0 {
		signal(l.changed)
	}
}

// retime changes the moment of a lane in timed. mu is held.
func (l *lanes) retime(one *lane, at time.Time) {
	one.at = at
	heap.Fix(&l.timed, one.index)
	if one.index == 0 {
		signal(l.changed)
	}
}

func (l *lanes) untime(one *lane) {
	if one.index >= 0 {
		heap.Remove(&l.timed, one.index)
	}
}

// timedLanes is a heap of lanes by their moments.
type timedLanes []*lane

func (t timedLanes) Len() int           { return len(t) }
func (t timedLanes) Less(i, j int) bool { return t[i].at.Before(t[j].at) }
func (t timedLanes) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].index, t[j].index = i, j
}

// Push is part of [heap.Interface].
func (t *timedLanes) Push(x any) {
	one := x.(*lane) //nolint:forcetypeassert // a heap of nothing else
	one.index = len(*t)
	*t = append(*t, one)
}

// Pop is part of [heap.Interface].
func (t *timedLanes) Pop() any {
	last := len(*t) - 1
	one := (*t)[last]
	(*t)[last] = nil
	*t = (*t)[:last]
	one.index = -1
	return one
}

// claimLanes claims and starts due tasks of lanes until ctx ends, beside claimDue.
func (d *Dispatcher) claimLanes(ctx context.Context) {
	var failing time.Duration
	for d.waitForLanes(ctx) && d.waitForSlots(ctx, d.slots.laned) {
		limit := d.slots.take(d.slots.laned)
		if limit == 0 {
			continue
		}
		s := d.session.Load()
		plain := d.slots.wants(d.slots.plain)
		asks := d.lanes.take(limit, func(one task.Lane, othersWait bool) (most, running int, again time.Duration) {
			most, running, again = d.hosts.permits(one.Host(), limit, plain || othersWait)
			if most == 0 && again == 0 {
				again = slotLook
			}
			return most, running, again
		})
		if len(asks) == 0 {
			d.slots.fetched(d.slots.laned, limit, 0, false)
			continue
		}
		// The end of ctx does not cut it short: the instance must know what it claimed.
		claims, states, err := d.store.ClaimLanes(s.writes, s.worker, asks, d.hosts.lanes(), limit)
		claimed := time.Now()
		byLane := make(map[task.Lane]int, len(asks))
		for _, c := range claims {
			byLane[c.Task.Lane()]++
			j := newJob(s, c, claimed)
			j.slot = d.slots.laned
			d.startLaned(j)
		}
		if err != nil {
			d.slots.fetched(d.slots.laned, limit, 0, false)
			d.lanes.giveBack(asks)
			d.log.Error("claiming from lanes failed", "error", err)
			failing = longer(failing, d.options.PollInterval)
			sleep(ctx, jitter(failing))
			continue
		}
		failing = 0
		d.lanes.answer(states, byLane, limit, jitter(d.options.PollInterval))
		d.slots.fetched(d.slots.laned, limit, len(claims), d.lanes.ready.Load() > 0)
		for _, state := range states {
			if len(state.Held) > 0 {
				d.heldBack.add(state.Lane)
			}
		}
	}
}

// startLaned is start of a task that was claimed from a lane, unless it goes on to that of its host.
func (d *Dispatcher) startLaned(j *job) {
	t := j.claim.Task
	if t.HeldHost != "" {
		j.fromLane = true
		j.host = d.hosts.takeAnyway(t.URL)
		d.start(j)
		return
	}
	if !d.startClaimed(j) {
		d.heldBack.add(t.Lane())
	}
}

// waitForLanes waits until a lane is ready, and reports whether ctx is still going on.
func (d *Dispatcher) waitForLanes(ctx context.Context) bool {
	for ctx.Err() == nil {
		wait, ok := d.lanes.expire()
		if d.lanes.ready.Load() > 0 {
			return true
		}
		if !ok {
			wait = d.options.PollInterval
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-d.lanes.changed:
		}
		timer.Stop()
	}
	return false
}

// followLanes looks for lanes that are not known here until ctx ends: at once, when told,
// and every PollInterval. It rests after each look for so long that the store spends 2 % of
// the time with them at most, but for looks that find lanes which are asked before the rest is over.
func (d *Dispatcher) followLanes(ctx context.Context) {
	for {
		began := time.Now()
		for behind, more := task.Lane(""), true; more; {
			start := time.Now()
			due, err := d.store.Lanes(ctx, behind, laneLook)
			if err != nil {
				if ctx.Err() == nil {
					d.log.Error("looking for lanes failed", "error", err)
				}
				break
			}
			fresh := d.lanes.found(due)
			if more = len(due) == laneLook; more {
				behind = due[len(due)-1].Lane
			}
			if !d.restAfterLook(ctx, (lookShare-1)*time.Since(start), more && fresh) {
				return
			}
		}
		d.lanes.looked(time.Since(began))
		timer := time.NewTimer(jitter(d.options.PollInterval))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-d.lanes.lookNow:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// restAfterLook rests, with fresh only until few lanes are ready, and reports whether ctx is still going on.
func (d *Dispatcher) restAfterLook(ctx context.Context, rest time.Duration, fresh bool) bool {
	low := d.lanes.low
	if !fresh {
		low = nil
	}
	timer := time.NewTimer(rest)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-low:
	}
	return ctx.Err() == nil
}

package task

import (
	"fmt"
	"math"
	"time"
)

// WaitingFor says what keeps a task that is due from being started.
type WaitingFor string

// What a task can wait for.
const (
	// WaitsForResume: its queue is paused.
	WaitsForResume WaitingFor = "queue_paused"
	// WaitsForQueue and WaitsForKey: all calls that the queue, or the flow key, may have at
	// a time are under way.
	WaitsForQueue WaitingFor = "queue_concurrency"
	WaitsForKey   WaitingFor = "key_concurrency"
	// WaitsForQueueRate and WaitsForKeyRate: all calls that these may start have started.
	WaitsForQueueRate WaitingFor = "queue_rate"
	WaitsForKeyRate   WaitingFor = "key_rate"
	// WaitsForOrder: the key is carried out in order, and another task of it comes first.
	WaitsForOrder WaitingFor = "key_order"
	// WaitsForShare: its host is slow, and holds its share of the slots.
	WaitsForShare WaitingFor = "host_share"
	// WaitsForBreaker: the host's breaker is open, or lets few calls through since it was.
	WaitsForBreaker WaitingFor = "host_breaker"
	// WaitsForRetryAfter: the host asked not to be called.
	WaitsForRetryAfter WaitingFor = "host_retry_after"
	// WaitsForSlots: all slots of all instances are busy.
	WaitsForSlots WaitingFor = "slots"
)

// Flow is what is known about the limits of a pending task at one moment.
type Flow struct {
	// InLane: the task waits for limits at all. Otherwise the rest is zero: it is a plain
	// task, or one call for it is made in spite of limits.
	InLane bool
	// PausedAt is since when the queue is paused; zero: it is not.
	PausedAt   time.Time
	Queue, Key Permits
	// Ordered: the key is carried out one task at a time. First is the one that was started
	// last and is not over, which comes first; zero: there is none, or it is this one.
	// FirstAt is when that is due.
	Ordered bool
	First   ID
	FirstAt time.Time
	// Host is what is known of the task's host; its Version is zero where that is healthy.
	// HostRunning is how many calls to the host are under way for tasks that waited for it.
	Host        Host
	HostRunning int
	// AheadInQueue and AheadInLane are how many tasks of the queue, and of the same queue,
	// key and host, are due before this one, by their priorities. Counted up to [MaxAhead].
	AheadInQueue, AheadInLane int
}

// Permits are limits, and how much of them is in use.
type Permits struct {
	Limits
	Running int
	// Used is how much of the burst is used up.
	Used float64
}

// hasNone reports whether as many calls are under way as there may be.
func (p *Permits) hasNone() bool { return p.MaxConcurrent > 0 && p.Running >= p.MaxConcurrent }

// next is how long it takes until another call may start by the rate; zero: it may now.
func (p *Permits) next() time.Duration {
	if p.MaxPerSecond == 0 {
		return 0
	}
	missing := p.Used + 1 - float64(p.EffectiveBurst())
	return time.Duration(math.Ceil(max(missing, 0) / p.MaxPerSecond * float64(time.Second)))
}

// Wait is what a pending task that is due waits for.
type Wait struct {
	// For is empty where nothing is known that keeps the task waiting.
	For WaitingFor
	// Limit is the limit that is used up, and Running how much of it is in use, where For
	// is a limit. A rate is calls a second.
	Limit   float64
	Running int
	// NextPermitAt is when another call may start; zero where that is not known.
	NextPermitAt time.Time
	// Ahead is how many tasks come before this one there, counted up to [MaxAhead].
	Ahead int
	// of is what the tasks ahead have in common, with its name: "of that queue".
	of string
	// why completes "It waits …".
	why string
}

// WaitOf returns what t waits for. It is zero unless t is pending and due.
func WaitOf(t *Task, f Facts) Wait {
	if t.State != Pending || t.RunAt.After(f.Now) {
		return Wait{}
	}
	var w Wait
	if f.Flow.InLane {
		w = waitForLimit(t, f)
	}
	switch {
	case w.For != "":
	case f.Flow.InLane:
		w.Ahead = f.Flow.AheadInLane
		w.of = " of its queue and key"
		if t.FlowKey == "" {
			w.of = " of its queue"
		}
		if t.Queue == "" {
			w.of = " for its host"
		}
	default:
		w.Ahead = f.Ahead
	}
	if w.For == "" && f.Slots > 0 && f.Running >= f.Slots {
		w.For, w.Limit, w.Running = WaitsForSlots, float64(f.Slots), f.Running
	}
	return w
}

// waitForLimit is WaitOf for limits that are not those of the instances. They are looked at
// in the order in which claims do.
func waitForLimit(t *Task, f Facts) Wait {
	l := &f.Flow
	queue, key := "queue "+t.Queue, fmt.Sprintf("key %s in queue %s", t.FlowKey, t.Queue)
	ofQueue := Wait{Ahead: l.AheadInQueue, of: " of that queue"}
	ofKey := Wait{Ahead: l.AheadInLane, of: " of that key"}
	switch {
	case t.Queue == "":
	case !l.PausedAt.IsZero():
		ofQueue.For, ofQueue.why = WaitsForResume, fmt.Sprintf("until it is resumed: %s has been paused for %s", queue, span(f.Now.Sub(l.PausedAt)))
		return ofQueue
	case l.Queue.hasNone():
		return ofQueue.concurrency(WaitsForQueue, &l.Queue, queue)
	case l.Queue.next() > 0:
		return ofQueue.rate(WaitsForQueueRate, &l.Queue, queue, f.Now)
	case t.FlowKey == "":
	case l.Ordered && l.First != ID{}:
		ofKey.For, ofKey.NextPermitAt = WaitsForOrder, l.FirstAt
		ofKey.why = fmt.Sprintf("for its turn: %s is carried out in order, and the task %s, which is due in %s, comes first", key, l.First, span(l.FirstAt.Sub(f.Now)))
		return ofKey
	case l.Ordered && l.Key.Running > 0:
		ofKey.For, ofKey.Limit, ofKey.Running = WaitsForOrder, 1, l.Key.Running
		ofKey.why = fmt.Sprintf("for its turn: %s is carried out in order, and a task of it is running", key)
		return ofKey
	case l.Key.hasNone():
		return ofKey.concurrency(WaitsForKey, &l.Key, key)
	case l.Key.next() > 0:
		return ofKey.rate(WaitsForKeyRate, &l.Key, key, f.Now)
	case l.Ordered && l.AheadInLane > 0:
		ofKey.For, ofKey.why = WaitsForOrder, fmt.Sprintf("for its turn: %s is carried out in order", key)
		return ofKey
	}
	return waitForHost(t, f)
}

func waitForHost(t *Task, f Facts) Wait {
	h := &f.Flow.Host
	if t.HeldHost == "" || h.Version == 0 {
		return Wait{}
	}
	w := Wait{Ahead: f.Flow.AheadInLane, of: " for that host"}
	why := ""
	if h.Why != "" {
		why = " (" + h.Why + ")"
	}
	switch status, wait := h.Status(); status {
	case HostHeld:
		w.For, w.NextPermitAt = WaitsForRetryAfter, f.Now.Add(wait)
		w.why = fmt.Sprintf("for its host: %s asked with Retry-After not to be called for %s more", h.Name, span(wait))
	case HostBroken:
		w.For, w.NextPermitAt = WaitsForBreaker, f.Now.Add(wait)
		w.why = fmt.Sprintf("for its host: no calls go to %s for %s more%s", h.Name, span(wait), why)
	case HostRecovering:
		w.For, w.Limit, w.Running = WaitsForBreaker, float64(h.Allowed), f.Flow.HostRunning
		w.why = fmt.Sprintf("for a permit: %s may have %s at a time while it recovers%s", h.Name, count(h.Allowed, "call"), why)
	case HostCongested:
		w.For, w.Running = WaitsForShare, f.Flow.HostRunning
		w.why = fmt.Sprintf("for its host: %s is slow%s", h.Name, why)
	case HostHealthy:
		return Wait{}
	}
	return w
}

// concurrency is w where all permits of p, which is of what, are in use.
func (w Wait) concurrency(why WaitingFor, p *Permits, what string) Wait {
	w.For, w.Limit, w.Running = why, float64(p.MaxConcurrent), p.Running
	switch {
	case p.Running > p.MaxConcurrent:
		w.why = fmt.Sprintf("for a permit: %s may have %s at a time, and has %d", what, count(p.MaxConcurrent, "call"), p.Running)
	case p.MaxConcurrent == 1:
		w.why = fmt.Sprintf("for a permit: the one of %s is in use", what)
	default:
		w.why = fmt.Sprintf("for a permit: all %d of %s are in use", p.MaxConcurrent, what)
	}
	return w
}

// rate is w where the rate of p, which is of what, gives no permit at the moment.
func (w Wait) rate(why WaitingFor, p *Permits, what string, now time.Time) Wait {
	wait := p.next()
	w.For, w.Limit, w.Running, w.NextPermitAt = why, p.MaxPerSecond, p.Running, now.Add(wait)
	w.why = fmt.Sprintf("for a permit: %s gives %v a second, the next one in %s", what, p.MaxPerSecond, span(wait))
	return w
}

// ahead says how many tasks are ahead.
func (w *Wait) ahead() string {
	switch w.Ahead {
	case 0:
		return "it is the next one"
	case 1:
		return fmt.Sprintf("1 task%s is ahead of it", w.of)
	case MaxAhead:
		return fmt.Sprintf("%d tasks or more%s are ahead of it", MaxAhead, w.of)
	default:
		return fmt.Sprintf("%d tasks%s are ahead of it", w.Ahead, w.of)
	}
}

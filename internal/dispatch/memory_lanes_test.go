package dispatch

import (
	"cmp"
	"context"
	"math"
	"slices"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// flow is what a store in memory knows about limits.
type flow struct {
	queues map[string]task.Queue
	keys   map[string]task.QueueKey // by "queue/key"
	used   map[string]bucket        // by "queue/" or "queue/key"
	heads  map[string]task.ID       // of ordered keys
}

type bucket struct {
	at   time.Time
	used float64
}

// setQueue writes the settings of a queue.
func (m *tables) setQueue(q task.Queue) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.flow.queues == nil {
		m.flow = flow{queues: map[string]task.Queue{}, keys: map[string]task.QueueKey{}, used: map[string]bucket{}, heads: map[string]task.ID{}}
	}
	m.flow.queues[q.Name] = q
}

// permits is how many more tasks may start under some limits, given those that run.
func (m *tables) permits(name string, l task.Limits, running int) (n int, wait time.Duration) {
	n, wait = math.MaxInt, -1
	if l.MaxConcurrent > 0 {
		n = l.MaxConcurrent - running
	}
	if l.MaxPerSecond > 0 && n > 0 {
		b := m.flow.used[name]
		b.used = max(b.used-m.now().Sub(b.at).Seconds()*l.MaxPerSecond, 0)
		b.at = m.now()
		m.flow.used[name] = b
		if free := int(math.Floor(float64(l.EffectiveBurst()) - b.used + 1e-9)); free < n {
			n = free
			if n < 1 {
				wait = time.Duration((b.used + 1 - float64(l.EffectiveBurst())) / l.MaxPerSecond * float64(time.Second))
			}
		}
	}
	return n, wait
}

// laneView is what a claim from lanes knows of the tasks.
type laneView struct {
	waiting       map[task.Lane][]*row // of the asked lanes, those that come first before the others
	queues, hosts map[string]int       // how many run
	keys          map[task.Lane]int
}

func (m *tables) view(asks []task.LaneAsk, unhealthy []string) (v laneView, held map[task.Lane][]string) {
	v = laneView{map[task.Lane][]*row{}, map[string]int{}, map[string]int{}, map[task.Lane]int{}}
	held = map[task.Lane][]string{}
	for _, a := range asks {
		v.waiting[a.Lane] = nil
	}
	for _, r := range m.rows {
		switch r.State {
		case task.Running:
			l := r.Lane()
			v.queues[l.Queue()]++
			v.keys[l.At("")]++
			v.hosts[l.Host()]++
		case task.Pending:
			l := r.Lane()
			waiting, asked := v.waiting[l]
			if !asked || r.byRequest {
				continue
			}
			if host := task.HostOf(r.URL); l.Host() == "" && slices.Contains(unhealthy, host) && !r.RunAt.After(m.now()) {
				r.HeldHost = host
				held[l] = []string{host}
				continue
			}
			v.waiting[l] = append(waiting, r)
		}
	}
	for _, waiting := range v.waiting {
		slices.SortFunc(waiting, func(x, y *row) int {
			return cmp.Or(x.RunAt.Add(-x.Priority.Lead()).Compare(y.RunAt.Add(-y.Priority.Lead())), slices.Compare(x.ID[:], y.ID[:]))
		})
	}
	return v, held
}

func (m *memory) ClaimLanes(ctx context.Context, worker task.ID, asks []task.LaneAsk, unhealthy []string, limit int) (claims []*task.Claim, states []task.LaneState, err error) {
	err = m.do(ctx, asked{op: "ClaimLanes", worker: worker, limit: limit}, func() {
		_, known := m.workers[worker]
		v, held := m.view(asks, unhealthy)
		taken := make([]int, len(asks))
		for more := known && !m.locked; more && len(claims) < limit; { // lanes have turns
			more = false
			for i, a := range asks {
				next, _ := m.nextOf(&v, a, min(a.Most-taken[i], limit-len(claims)))
				if next == nil {
					continue
				}
				more = true
				taken[i]++
				v.waiting[a.Lane] = slices.DeleteFunc(v.waiting[a.Lane], func(r *row) bool { return r == next })
				v.queues[a.Lane.Queue()]++
				v.keys[a.Lane.At("")]++
				v.hosts[a.Lane.Host()]++
				claims = append(claims, m.take(next, next.sent(), worker, m.now()))
				m.useUp(a.Lane, next.ID)
			}
		}
		for _, a := range asks {
			_, state := m.nextOf(&v, a, 0)
			state.Held = held[a.Lane]
			states = append(states, state)
		}
	})
	if err != nil {
		return nil, nil, err
	}
	return claims, states, nil
}

// useUp counts a start of a task of a lane towards the rates of its queue and key, and makes it
// the head of the key.
func (m *tables) useUp(lane task.Lane, id task.ID) {
	if m.flow.used == nil {
		return
	}
	names := []string{lane.Queue() + "/"}
	if lane.Key() != "" {
		names = append(names, string(lane.At("")))
	}
	for _, name := range names {
		b := m.flow.used[name]
		b.used++
		m.flow.used[name] = b
		m.flow.heads[name] = id
	}
}

// nextOf returns the task of a lane that is claimed next, nil where none may be, and what
// is left then.
func (m *tables) nextOf(v *laneView, a task.LaneAsk, most int) (*row, task.LaneState) {
	state := func(b task.Blocked, wait time.Duration) (*row, task.LaneState) {
		return nil, task.LaneState{Lane: a.Lane, Blocked: b, Wait: wait}
	}
	queue, key, host := a.Lane.Queue(), a.Lane.Key(), a.Lane.Host()
	q := m.flow.queues[queue]
	perKey := q.PerKey
	if own, ok := m.flow.keys[queue+"/"+key]; ok {
		perKey = own.KeyLimits
	}
	if perKey.Ordered {
		perKey.MaxConcurrent = 1
	}
	if !q.PausedAt.IsZero() {
		return state(task.BlockedByPause, -1)
	}
	waiting := v.waiting[a.Lane]
	if n, wait := m.permits(queue+"/", q.Limits, v.queues[queue]); queue != "" && n <= 0 {
		return state(task.BlockedByQueue, wait)
	}
	if n, wait := m.permits(string(a.Lane.At("")), perKey.Limits, v.keys[a.Lane.At("")]); key != "" && n <= 0 {
		return state(task.BlockedByKey, wait)
	}
	if host != "" && a.Running > 0 && v.hosts[host] >= a.Running {
		return state(task.BlockedByHost, -1)
	}
	if head := m.flow.heads[string(a.Lane.At(""))]; key != "" && perKey.Ordered {
		if i := slices.IndexFunc(waiting, func(r *row) bool { return r.ID == head }); i >= 0 {
			waiting = waiting[i : i+1]
		}
	}
	if len(waiting) == 0 {
		return state("", -1)
	}
	soonest := time.Duration(math.MaxInt64)
	for _, r := range waiting {
		if in := r.RunAt.Sub(m.now()); in <= 0 {
			if most <= 0 {
				return state("", 0)
			}
			return r, task.LaneState{}
		} else if in < soonest {
			soonest = in
		}
	}
	return state("", soonest)
}

// Lanes is not among the calls that the store counts: it comes with each poll.
func (m *memory) Lanes(ctx context.Context, behind task.Lane, limit int) (lanes []task.LaneDue, err error) {
	err = m.quietly(ctx, "Lanes", func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		due := map[task.Lane]time.Duration{}
		for _, r := range m.rows {
			if l := r.Lane(); r.State == task.Pending && l > behind && !r.isPlain() {
				wait, ok := due[l]
				if in := r.RunAt.Sub(m.now()); !ok || in < wait {
					due[l] = in
				}
			}
		}
		for l, wait := range due {
			lanes = append(lanes, task.LaneDue{Lane: l, Wait: wait})
		}
		slices.SortFunc(lanes, func(a, b task.LaneDue) int { return cmp.Compare(a.Lane, b.Lane) })
		lanes = lanes[:min(limit, len(lanes))]
	})
	return lanes, err
}

// Expire is not among the calls that the store counts, as Lanes.
func (m *memory) Expire(ctx context.Context, limit int) (n int, err error) {
	err = m.quietly(ctx, "Expire", func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, r := range m.rows {
			if r.State == task.Pending && !r.isPlain() && !r.ExpiresAt.IsZero() && r.ExpiresAt.Before(m.now()) && n < limit {
				r.byRequest, r.RunAt = true, m.now()
				r.claim++
				n++
			}
		}
	})
	return n, err
}

func (m *memory) HoldBack(ctx context.Context, hosts []string) (moved map[string]int, more bool, err error) {
	return m.HoldBackInLane(ctx, "", hosts)
}

func (m *memory) HoldBackInLane(ctx context.Context, lane task.Lane, hosts []string) (moved map[string]int, more bool, err error) {
	err = m.do(ctx, asked{op: "HoldBack"}, func() {
		moved = make(map[string]int)
		for _, r := range m.rows {
			if r.State == task.Pending && r.Lane() == lane && slices.Contains(hosts, task.HostOf(r.URL)) && !m.flow.queues[lane.Queue()].PerKey.Ordered {
				r.HeldHost = task.HostOf(r.URL)
				moved[r.HeldHost]++
			}
		}
	})
	return moved, false, err
}

package task_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/melodia/orchestrator/internal/task"
)

// What a due task waits for, and what explain says of it. Of several causes the one counts that
// a claim looks at first.
func TestWaitOf(t *testing.T) {
	t.Parallel()
	const host = "https://plays.melodia.app"
	permits := func(max int, perSecond float64, burst, running int, used float64) task.Permits {
		return task.Permits{Limits: task.Limits{MaxConcurrent: max, MaxPerSecond: perSecond, Burst: burst}, Running: running, Used: used}
	}
	full, spent := permits(2, 0, 0, 2, 0), permits(0, 0.5, 1, 3, 1)
	keyed := task.Spec{Queue: "mail", FlowKey: "a"}
	laned := func(change func(f *task.Flow)) task.Facts {
		f := task.Facts{Instances: 1, Slots: 10, Running: 3, Ahead: 77, Flow: task.Flow{InLane: true, AheadInQueue: 5, AheadInLane: 1}}
		change(&f.Flow)
		return f
	}
	of := func(h task.Host) task.Facts {
		h.Name, h.Version = host, 1
		return laned(func(f *task.Flow) { f.Host, f.HostRunning = h, 4 })
	}
	in := func(wait time.Duration) time.Time { return noon.Add(wait) }
	for name, tt := range map[string]struct {
		task  task.Task
		facts task.Facts
		want  task.Wait
		says  string
	}{
		"due later":      {task.Task{RunAt: in(time.Second), Spec: keyed}, laned(func(f *task.Flow) { f.Queue = full }), task.Wait{}, "It is due in 1.0 s."},
		"running":        {task.Task{State: task.Running, Spec: keyed}, laned(func(f *task.Flow) { f.Queue = full }), task.Wait{}, "Attempt 1"},
		"plain":          {task.Task{}, task.Facts{Instances: 1, Slots: 10, Running: 9, Ahead: 7}, task.Wait{Ahead: 7}, "7 tasks are ahead of it."},
		"no slot":        {task.Task{}, task.Facts{Instances: 1, Slots: 10, Running: 10}, task.Wait{For: task.WaitsForSlots, Limit: 10, Running: 10}, "all 10 slots of 1 instance are busy; it is the next one."},
		"slots unknown":  {task.Task{}, task.Facts{Instances: 1, Running: 10}, task.Wait{}, "it is the next one."},
		"nothing":        {task.Task{Spec: keyed}, laned(func(*task.Flow) {}), task.Wait{Ahead: 1}, "1 task of its queue and key is ahead of it."},
		"without a key":  {task.Task{Spec: task.Spec{Queue: "mail"}}, laned(func(f *task.Flow) { f.Key = full }), task.Wait{Ahead: 1}, "1 task of its queue is ahead of it."},
		"of a host only": {task.Task{HeldHost: host}, laned(func(f *task.Flow) { f.AheadInLane = task.MaxAhead }), task.Wait{Ahead: task.MaxAhead}, "10000 tasks or more for its host are ahead of it."},
		"in a lane, no slot": {task.Task{Spec: keyed}, task.Facts{Instances: 1, Slots: 3, Running: 3, Flow: task.Flow{InLane: true, AheadInLane: 2}},
			task.Wait{For: task.WaitsForSlots, Limit: 3, Running: 3, Ahead: 2}, "all 3 slots of 1 instance are busy; 2 tasks of its queue and key are ahead of it."},
		"a limit before slots": {task.Task{Spec: keyed}, task.Facts{Instances: 1, Slots: 3, Running: 3, Flow: task.Flow{InLane: true, Queue: full}},
			task.Wait{For: task.WaitsForQueue, Limit: 2, Running: 2}, "all 2 of queue mail are in use; it is the next one."},
		"a pause before all": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.PausedAt, f.Queue, f.Key = in(-time.Hour), full, full }),
			task.Wait{For: task.WaitsForResume, Ahead: 5}, "queue mail has been paused for 60 min; 5 tasks of that queue are ahead of it."},
		"the queue before its key": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Queue, f.Key = full, full }),
			task.Wait{For: task.WaitsForQueue, Limit: 2, Running: 2, Ahead: 5}, "all 2 of queue mail are in use; 5 tasks of that queue are ahead of it."},
		"one permit left": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Queue = permits(2, 0, 0, 1, 0) }), task.Wait{Ahead: 1}, "1 task of its queue and key"},
		"a lowered limit": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Queue = permits(1, 0, 0, 3, 0) }),
			task.Wait{For: task.WaitsForQueue, Limit: 1, Running: 3, Ahead: 5}, "queue mail may have 1 call at a time, and has 3;"},
		"the queue's rate": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Queue, f.Key = spent, full }),
			task.Wait{For: task.WaitsForQueueRate, Limit: 0.5, Running: 3, NextPermitAt: in(2 * time.Second), Ahead: 5}, "queue mail gives 0.5 a second, the next one in 2.0 s; 5 tasks"},
		"a rate with a permit": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Queue = permits(0, 0.5, 2, 3, 1) }), task.Wait{Ahead: 1}, "1 task of its queue and key"},
		"a rate's own burst":   {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Queue = permits(0, 2.5, 0, 3, 2) }), task.Wait{Ahead: 1}, "1 task of its queue and key"},
		"the key": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Key = permits(1, 0, 0, 1, 0) }),
			task.Wait{For: task.WaitsForKey, Limit: 1, Running: 1, Ahead: 1}, "the one of key a in queue mail is in use; 1 task of that key is ahead of it."},
		"the key's rate": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Key = spent }),
			task.Wait{For: task.WaitsForKeyRate, Limit: 0.5, Running: 3, NextPermitAt: in(2 * time.Second), Ahead: 1}, "key a in queue mail gives 0.5 a second"},
		"behind the head of its key": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Ordered, f.First, f.FirstAt = true, task.ID{15: 9}, in(3*time.Second) }),
			task.Wait{For: task.WaitsForOrder, NextPermitAt: in(3 * time.Second), Ahead: 1}, "the task 00000000-0000-0000-0000-000000000009, which is due in 3.0 s, comes first;"},
		"behind a running one of its key": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Ordered, f.Key = true, permits(0, 0, 0, 1, 0) }),
			task.Wait{For: task.WaitsForOrder, Limit: 1, Running: 1, Ahead: 1}, "a task of it is running;"},
		"behind others of its ordered key": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Ordered = true }),
			task.Wait{For: task.WaitsForOrder, Ahead: 1}, "key a in queue mail is carried out in order; 1 task of that key is ahead of it."},
		"the first of its ordered key": {task.Task{Spec: keyed}, laned(func(f *task.Flow) { f.Ordered, f.AheadInLane = true, 0 }), task.Wait{}, "it is the next one."},
		"a Retry-After": {task.Task{HeldHost: host}, of(task.Host{HeldFor: time.Minute, OpenFor: time.Second}),
			task.Wait{For: task.WaitsForRetryAfter, NextPermitAt: in(time.Minute), Ahead: 1}, host + " asked with Retry-After not to be called for 60 s more; 1 task for that host is ahead of it."},
		"a breaker": {task.Task{HeldHost: host}, of(task.Host{OpenFor: time.Minute, Allowed: 1, Why: "8 of 10 calls failed"}),
			task.Wait{For: task.WaitsForBreaker, NextPermitAt: in(time.Minute), Ahead: 1}, "no calls go to " + host + " for 60 s more (8 of 10 calls failed);"},
		"a recovery": {task.Task{HeldHost: host}, of(task.Host{Allowed: 4}),
			task.Wait{For: task.WaitsForBreaker, Limit: 4, Running: 4, Ahead: 1}, host + " may have 4 calls at a time while it recovers;"},
		"a share": {task.Task{HeldHost: host}, of(task.Host{CongestedFor: time.Second}),
			task.Wait{For: task.WaitsForShare, Running: 4, Ahead: 1}, host + " is slow; 1 task for that host is ahead of it."},
		"a key before its host": {task.Task{HeldHost: host, Spec: keyed}, laned(func(f *task.Flow) { f.Key, f.Host = full, task.Host{Name: host, Version: 1, HeldFor: time.Minute} }),
			task.Wait{For: task.WaitsForKey, Limit: 2, Running: 2, Ahead: 1}, "all 2 of key a"},
		"a host in no row": {task.Task{HeldHost: host}, laned(func(f *task.Flow) { f.Host = task.Host{Name: host, HeldFor: time.Minute} }), task.Wait{Ahead: 1}, "1 task for its host is ahead of it."},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tt.facts.Now, tt.facts.InstanceSeenAt, tt.facts.ClaimedAt = noon, noon, noon
			if tt.task.State == "" {
				tt.task.State = task.Pending
			}
			if tt.task.RunAt.IsZero() {
				tt.task.RunAt = noon
			}
			tt.task.Retry.MaxAttempts = 10
			if diff := cmp.Diff(tt.want, task.WaitOf(&tt.task, tt.facts), cmpopts.IgnoreUnexported(task.Wait{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if got := task.Explain(&tt.task, tt.facts); !strings.Contains(got, tt.says) {
				t.Errorf("explained as %q, want %q", got, tt.says)
			}
		})
	}
}

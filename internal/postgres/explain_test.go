package postgres_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// Why a task waits is known from what claims look at.
func TestExplainWaits(t *testing.T) {
	t.Parallel()
	const host = "https://plays.melodia.app"
	for name, tt := range map[string]struct {
		queue   string // columns of the queue mail, and their values
		prepare []string
		lane    func(*task.Task)
		claimed int // of the tasks in the lane, before
		want    task.Wait
		says    string
	}{
		"nothing": {want: task.Wait{Ahead: 2}, says: "2 tasks of its queue and key are ahead of it."},
		"a paused queue": {queue: "paused_at = now() - interval '5 min', max_concurrent = 1",
			want: task.Wait{For: task.WaitsForResume, Ahead: 3}, says: "It waits until it is resumed: queue mail has been paused for 5 min; 3 tasks of that queue are ahead of it. It has been due for"},
		"the queue": {queue: "max_concurrent = 1, key_max_concurrent = 1", claimed: 1,
			want: task.Wait{For: task.WaitsForQueue, Limit: 1, Running: 1, Ahead: 2}, says: "It waits for a permit: the one of queue mail is in use; 2 tasks of that queue are ahead of it."},
		"the queue, lowered": {queue: "max_concurrent = 2", claimed: 2, prepare: []string{"UPDATE queues SET max_concurrent = 1"},
			want: task.Wait{For: task.WaitsForQueue, Limit: 1, Running: 2, Ahead: 1}, says: "It waits for a permit: queue mail may have 1 call at a time, and has 2; 1 task of that queue is ahead of it."},
		"the key": {queue: "max_concurrent = 9, key_max_concurrent = 2", claimed: 2,
			want: task.Wait{For: task.WaitsForKey, Limit: 2, Running: 2}, says: "It waits for a permit: all 2 of key a in queue mail are in use; it is the next one."},
		"the key's own limit": {queue: "key_max_concurrent = 9", claimed: 1, prepare: []string{"INSERT INTO queue_keys (queue, key, version, max_concurrent) VALUES ('mail', 'a', 1, 1)"},
			want: task.Wait{For: task.WaitsForKey, Limit: 1, Running: 1, Ahead: 1}, says: "the one of key a in queue mail is in use; 1 task of that key is ahead of it."},
		"another key's limit": {queue: "key_max_concurrent = 9", claimed: 1, prepare: []string{"INSERT INTO queue_keys (queue, key, version, max_concurrent) VALUES ('mail', 'b', 1, 1)"},
			want: task.Wait{Ahead: 1}},
		"the queue's rate": {queue: "max_per_second = 0.01", claimed: 1,
			want: task.Wait{For: task.WaitsForQueueRate, Limit: 0.01, Running: 1, Ahead: 2}, says: "It waits for a permit: queue mail gives 0.01 a second, the next one in "},
		"the key's rate": {queue: "key_max_per_second = 0.01, key_burst = 2", claimed: 2,
			want: task.Wait{For: task.WaitsForKeyRate, Limit: 0.01, Running: 2}, says: "It waits for a permit: key a in queue mail gives 0.01 a second, the next one in "},
		"its turn": {queue: "key_ordered = true",
			want: task.Wait{For: task.WaitsForOrder, Ahead: 2}, says: "It waits for its turn: key a in queue mail is carried out in order; 2 tasks of that key are ahead of it."},
		"its turn behind a running task": {queue: "key_ordered = true", claimed: 1,
			want: task.Wait{For: task.WaitsForOrder, Limit: 1, Running: 1, Ahead: 1}, says: "is carried out in order, and a task of it is running; 1 task of that key is ahead of it."},
		"a Retry-After": {lane: func(tk *task.Task) { tk.HeldHost = host }, prepare: []string{"INSERT INTO hosts (name, held_until) VALUES ('" + host + "', now() + interval '1 hour')"},
			want: task.Wait{For: task.WaitsForRetryAfter, Ahead: 2}, says: "It waits for its host: https://plays.melodia.app asked with Retry-After not to be called for 60 min more; 2 tasks for that host are ahead of it."},
		"a breaker": {lane: func(tk *task.Task) { tk.HeldHost = host }, prepare: []string{"INSERT INTO hosts (name, open_until, opened, allowed, why) VALUES ('" + host + "', now() + interval '1 hour', 1, 1, '8 of 10 calls failed')"},
			want: task.Wait{For: task.WaitsForBreaker, Ahead: 2}, says: "no calls go to https://plays.melodia.app for 60 min more (8 of 10 calls failed); 2 tasks"},
		"a recovery": {lane: func(tk *task.Task) { tk.HeldHost = host }, prepare: []string{"INSERT INTO hosts (name, opened, allowed) VALUES ('" + host + "', 1, 2)"},
			want: task.Wait{For: task.WaitsForBreaker, Limit: 2, Ahead: 2}, says: "https://plays.melodia.app may have 2 calls at a time while it recovers; 2 tasks"},
		"a share": {lane: func(tk *task.Task) { tk.HeldHost = host }, prepare: []string{"INSERT INTO hosts (name, congested_until, why) VALUES ('" + host + "', now() + interval '1 hour', 'it takes long')"},
			want: task.Wait{For: task.WaitsForShare, Ahead: 2}, says: "https://plays.melodia.app is slow (it takes long); 2 tasks"},
		"a host that is healthy again": {lane: func(tk *task.Task) { tk.HeldHost = host }, want: task.Wait{Ahead: 2}},
		"a plain task's host": {lane: func(tk *task.Task) { tk.HeldHost, tk.Queue, tk.FlowKey, tk.Priority = host, "", "", "" },
			prepare: []string{"INSERT INTO hosts (name, congested_until, why) VALUES ('" + host + "', now() + interval '1 hour', '')"},
			want:    task.Wait{For: task.WaitsForShare, Ahead: 2}, says: "It waits for its host: https://plays.melodia.app is slow; 2 tasks for that host are ahead of it."},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			exec(t, pool, "INSERT INTO queues (name) VALUES ('mail')")
			if tt.queue != "" {
				exec(t, pool, "UPDATE queues SET "+tt.queue)
			}
			change := []func(*task.Task){inQueue("mail", "a", task.Normal)}
			if tt.lane != nil {
				change = append(change, tt.lane)
			}
			var tasks []*task.Task
			for n := range 3 { // the third is looked at
				tk := newTask(change...)
				insert(t, s, tk)
				exec(t, pool, "UPDATE tasks SET run_at = now() - interval '1 hour' + $2 * interval '1 min' WHERE id = $1", [16]byte(tk.ID), n)
				tasks = append(tasks, tk)
			}
			// Of other keys and queues: ahead in the queue only.
			for _, other := range []*task.Task{newTask(inQueue("mail", "b", task.High)), newTask(inQueue("mail.b", "a", task.High)), newTask()} {
				insert(t, s, other)
				exec(t, pool, "UPDATE tasks SET run_at = now() - interval '1 day' WHERE id = $1", [16]byte(other.ID))
			}
			for range tt.claimed {
				exec(t, pool, "UPDATE lanes SET burst_used = 0, version = version + 1") // made, or with a permit again
				for n := 0; n == 0; {
					got, _ := claimLanes(t, s, worker, 1, ask(tasks[0].Lane())...)
					n = len(got)
				}
			}
			if tt.claimed > 0 {
				exec(t, pool, "UPDATE lanes SET burst_used = $1, claimed_at = now()", tt.claimed)
			}
			for _, sql := range tt.prepare {
				exec(t, pool, sql)
			}
			got, f, err := s.Explain(t.Context(), tasks[2].ID, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			w := task.WaitOf(got, f)
			if rate := w.For == task.WaitsForQueueRate || w.For == task.WaitsForKeyRate; rate && (w.NextPermitAt.Before(f.Now.Add(90*time.Second)) || w.NextPermitAt.After(f.Now.Add(100*time.Second))) {
				t.Errorf("the next permit comes at %v, it is %v", w.NextPermitAt, f.Now)
			}
			plain := fmt.Sprintln(w.For, w.Limit, w.Running, w.Ahead)
			if diff := cmp.Diff(fmt.Sprintln(tt.want.For, tt.want.Limit, tt.want.Running, tt.want.Ahead), plain); diff != "" {
				t.Errorf("waits for, limit, running, ahead (-want +got):\n%s", diff)
			}
			if text := task.Explain(got, f); !strings.Contains(text, tt.says) {
				t.Errorf("got %q, want it to say %q", text, tt.says)
			}
		})
	}
}

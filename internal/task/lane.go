package task

import (
	"strings"
	"time"
)

// Lane is where a task waits for a limit: that of its queue, of its flow key, or of a host
// that is not healthy. The empty Lane is that of plain tasks, for which there are no limits.
//
// It is "queue/key", "queue/" where the task has no key, and has " host" behind it, or
// alone, for a task that waits for its host too. Neither names nor hosts have a space, and
// queues no slash.
type Lane string

// LaneOf returns the lane of a task with this queue, flow key and host, each of which may
// be empty; a key without a queue counts for nothing.
func LaneOf(queue, key, host string) Lane {
	lane := ""
	if queue != "" {
		lane = queue + "/" + key
	}
	if host != "" {
		lane += " " + host
	}
	return Lane(lane)
}

// Queue is the lane's queue; empty where it has none.
func (l Lane) Queue() string {
	queue, _, _ := strings.Cut(l.flow(), "/")
	return queue
}

// Key is the lane's flow key; empty where it has none.
func (l Lane) Key() string {
	_, key, _ := strings.Cut(l.flow(), "/")
	return key
}

// Host is the host, as [HostOf] returns it, that the lane's tasks wait for; empty where
// they wait for none.
func (l Lane) Host() string {
	_, host, _ := strings.Cut(string(l), " ")
	return host
}

// At is the lane of the same queue and key with another host, or none.
func (l Lane) At(host string) Lane {
	if host == "" {
		return Lane(l.flow())
	}
	return Lane(l.flow() + " " + host)
}

func (l Lane) flow() string {
	flow, _, _ := strings.Cut(string(l), " ")
	return flow
}

// Lane is where the task waits.
func (t *Task) Lane() Lane {
	if t.Queue == "" && t.HeldHost == "" {
		return ""
	}
	return LaneOf(t.Queue, t.FlowKey, t.HeldHost)
}

// LaneAsk asks for tasks of a lane.
type LaneAsk struct {
	Lane Lane
	// Most is how many tasks at most; 1 at least.
	Most int
	// Running is how many tasks of the lane's host may run at a time, in whatever lane they
	// waited for it; zero is any number.
	Running int
}

// LaneState says what is left in a lane after tasks were claimed from it.
type LaneState struct {
	Lane Lane
	// Blocked is what keeps the lane's tasks waiting. Where it is empty nothing does.
	Blocked Blocked
	// Held is the unhealthy hosts to whose lanes tasks of this lane were moved.
	Held []string
	// Wait is how long to wait before the lane is asked again: until its next task is due,
	// or a rate gives another permit. It is below zero where that is not known: there is
	// none, or what is Blocked waits for the end of a running task, or for a change.
	Wait time.Duration
}

// Blocked says which limit keeps the tasks of a lane waiting.
type Blocked string

// What keeps tasks of a lane waiting, in the order in which one hides the others.
const (
	// BlockedByPause: the queue is paused.
	BlockedByPause Blocked = "paused"
	// BlockedByOthers: nothing was taken though it may be due. Another instance claims from
	// the queue or the host, or has the tasks locked; or the limit of a host is kept for
	// the first time; or the worker is not registered. It may be asked again soon.
	BlockedByOthers Blocked = "others"
	// BlockedByQueue, BlockedByKey and BlockedByHost: a limit of those is used up.
	BlockedByQueue Blocked = "queue"
	BlockedByKey   Blocked = "key"
	BlockedByHost  Blocked = "host"
)

// LaneDue is a lane in which tasks wait, with the time until the first of them is due, which
// is below zero where one is overdue.
type LaneDue struct {
	Lane Lane
	Wait time.Duration
}

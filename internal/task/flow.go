package task

import (
	"slices"
	"time"
)

// DefaultQueue is the queue of tasks that have a flow key and name no queue.
const DefaultQueue = "default"

// Limits of names, in bytes.
const (
	MaxQueueName = 100
	MaxFlowKey   = 200
)

// Priority says how much earlier than others of its queue a task counts as due. So
// each task starts at some time, whatever else comes in.
type Priority string

// The priorities.
const (
	High   Priority = "high"
	Normal Priority = "normal"
	Low    Priority = "low"
)

// priorities are all of them.
var priorities = []Priority{High, Normal, Low}

// priorityLead is how much earlier a High task counts as due than a Normal one, and
// that one than a Low one.
const priorityLead = 15 * time.Minute

// Lead returns how much earlier than it is due a task of this priority counts as due.
func (p Priority) Lead() time.Duration {
	switch p {
	case High:
		return priorityLead
	case Low:
		return -priorityLead
	default:
		return 0
	}
}

// completeFlow sets what follows from the fields of flow control that are given.
func (s *Spec) completeFlow() {
	if s.Queue == "" && s.FlowKey != "" {
		s.Queue = DefaultQueue
	}
	if s.Queue != "" && s.Priority == "" {
		s.Priority = Normal
	}
	if s.Queue == "" && s.Priority == Normal {
		s.Priority = ""
	}
}

// checkFlow reports every rule of flow control that s breaks.
func (s *Spec) checkFlow(add func(message, kind string, path ...string)) {
	if s.Queue != "" && !IsQueueName(s.Queue) {
		add(wantQueueName, "invalid", "queue")
	}
	if s.FlowKey != "" && !IsFlowKey(s.FlowKey) {
		add(wantFlowKey, "invalid", "flow_key")
	}
	switch {
	case s.Priority == "":
	case !slices.Contains(priorities, s.Priority):
		add("must be any of "+join(priorities), "enum", "priority")
	case s.Queue == "":
		add("goes with queue or flow_key: it orders the tasks of one queue", "conflict", "priority")
	}
}

const (
	wantQueueName = "must be 1 to 100 letters, digits, dots, hyphens and underscores, and not . or .. alone"
	wantFlowKey   = "must be 1 to 200 visible ASCII characters, and not . or .. alone"
)

// IsQueueName reports whether a queue can have this name. A path with one that is . or ..
// leads elsewhere (RFC 3986 §5.2.4).
func IsQueueName(s string) bool {
	return isName(s, MaxQueueName, func(c byte) bool { return isAlphanumeric(rune(c)) || c == '.' || c == '_' || c == '-' })
}

// IsFlowKey reports whether s can be a flow key. What holds for paths with queues holds
// for those with keys.
func IsFlowKey(s string) bool {
	return isName(s, MaxFlowKey, func(c byte) bool { return '!' <= c && c <= '~' })
}

func isName(s string, limit int, allowed func(byte) bool) bool {
	if s == "" || len(s) > limit || s == "." || s == ".." {
		return false
	}
	for i := range len(s) {
		if !allowed(s[i]) {
			return false
		}
	}
	return true
}

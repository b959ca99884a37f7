package task

import "time"

// Shortage is what an instance lacks to make a call, as a sentence for people that says what to
// do. It is empty where the instance lacks nothing. Otherwise it may be the error of what the
// instance could not do for that reason.
type Shortage string

// Error returns the sentence.
func (s Shortage) Error() string { return string(s) }

// The shortages. The first two concern all new connections of an instance; the
// others concern some targets only.
const (
	ShortageDescriptors Shortage = "the service has no file descriptors left for another connection: raise its limit (ulimit -n) or lower DISPATCH_CONCURRENCY"
	ShortageMemory      Shortage = "the system has no memory left for another connection: give it more, or lower DISPATCH_CONCURRENCY"
	ShortagePorts       Shortage = "no local port is free for another connection to the target's address: widen net.ipv4.ip_local_port_range or lower DISPATCH_CONCURRENCY"
	ShortageResolver    Shortage = "no name server answers, so that no host name can be looked up: check the network and /etc/resolv.conf of the service"
)

// isShortage reports whether the error of an attempt is a [Shortage], so that the target was
// not called.
func isShortage(text string) bool {
	switch Shortage(text) {
	case ShortageDescriptors, ShortageMemory, ShortagePorts, ShortageResolver:
		return true
	}
	return false
}

// Everywhere reports whether the instance can open no connection at all, to no target.
func (s Shortage) Everywhere() bool { return s == ShortageDescriptors || s == ShortageMemory }

const (
	minShortageWait = time.Second
	// maxShortageDoublings keeps the wait at 8 s: a task that waited through a
	// long shortage is called soon after its end, and its story stays short meanwhile.
	maxShortageDoublings = 3
)

// shortageWait is how long a task waits after an attempt that met a shortage: longer
// with each claim that was not counted. Until then others are tried, by other instances too.
func (c *Claim) shortageWait() time.Duration {
	uncounted := c.Number - int64(c.AttemptNumber())
	return minShortageWait << min(max(uncounted, 0), maxShortageDoublings)
}

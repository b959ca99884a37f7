package task

import (
	"strings"
	"time"
)

// HostOf returns the host that a call to a URL of a task goes to, by which calls are
// limited: scheme, name and port, like "https://plays.melodia.app:8443", in lower case and
// without the default port of the scheme. It does not allocate for a URL whose host is
// written like that. It is meaningful only for a URL that [New] accepts.
func HostOf(rawURL string) string {
	scheme, _, found := strings.Cut(rawURL, "://")
	if !found {
		return rawURL
	}
	begin := len(scheme) + len("://")
	end := len(rawURL)
	if i := strings.IndexAny(rawURL[begin:], "/?#"); i >= 0 {
		end = begin + i
	}
	host := rawURL[:end]
	if colon := strings.LastIndexByte(host, ':'); colon > begin && !strings.HasSuffix(host, "]") {
		port := strings.TrimLeft(host[colon+1:], "0")
		if strings.EqualFold(scheme, "http") && port == "80" || strings.EqualFold(scheme, "https") && port == "443" {
			host = host[:colon]
		} else if len(port) < len(host)-colon-1 {
			host = host[:colon+1] + port
		}
	}
	return strings.ToLower(host)
}

// Host is what all instances know about a host that is not healthy: its tasks wait.
// Durations count from the moment at which it was read.
type Host struct {
	// Name is the host as [HostOf] returns it.
	Name string
	// CongestedFor is how long it still counts as congested: it holds its share of an
	// instance's slots, and more of its tasks are due. Zero where it does not.
	CongestedFor time.Duration
	// HeldFor is how long no call starts because a Retry-After of the host asked for that.
	HeldFor time.Duration
	// OpenFor is how long no call starts because the breaker is open. Opened is how many
	// times it opened without a recovery in between; zero: it is closed.
	OpenFor time.Duration
	Opened  int
	// Allowed is how many calls may be under way at a time, of all instances together, once
	// the host is neither held nor open. Zero: any number. It doubles with each round of
	// successes below Doubled, and grows by one from there on.
	Allowed, Doubled int
	// Why is one sentence without a query string or a secret.
	Why string
	// Since is when the host became unhealthy, by the store's clock.
	Since time.Time
	// Version tells states of the host apart. Zero: the host is healthy, and not stored.
	Version int64
}

// HostStatus says what the tasks of an unhealthy host wait for.
type HostStatus string

// The statuses, in the order in which one hides the others.
const (
	// HostHeld: a Retry-After holds the host's calls back.
	HostHeld HostStatus = "held"
	// HostBroken: the breaker is open.
	HostBroken HostStatus = "broken"
	// HostRecovering: calls start again, so many at a time.
	HostRecovering HostStatus = "recovering"
	// HostCongested: the host has its share of the slots.
	HostCongested HostStatus = "congested"
	// HostHealthy: nothing keeps its tasks waiting.
	HostHealthy HostStatus = "healthy"
)

// Status returns what the tasks of h wait for, and for how long that is known to last;
// zero where it is not known.
func (h *Host) Status() (s HostStatus, wait time.Duration) {
	switch {
	case h.HeldFor > 0 && h.HeldFor >= h.OpenFor:
		return HostHeld, h.HeldFor
	case h.OpenFor > 0:
		return HostBroken, h.OpenFor
	case h.Allowed > 0:
		return HostRecovering, 0
	case h.CongestedFor > 0:
		return HostCongested, 0
	default:
		return HostHealthy, 0
	}
}

package logging

import (
	"sync"
	"time"
)

// limitPeriod is how often a [Limiter] lets a line into the log.
const limitPeriod = time.Second

// Limiter counts events of a kind, so that many of them write one line a second. The
// zero Limiter is ready; any number of goroutines may use it.
type Limiter struct {
	mu     sync.Mutex
	logged time.Time
	count  int // events since then
}

// Count counts an event. It returns how many events the caller is to log now, this one
// included: those since the last line. It returns 0 where the last line is less than a
// second old.
func (l *Limiter) Count() int {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count++
	if now.Sub(l.logged) < limitPeriod {
		return 0
	}
	count := l.count
	l.count, l.logged = 0, now
	return count
}

package httpserver

import (
	"fmt"
	"testing"
	"time"
)

func TestRates(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	s := newRates(10, 2)
	take := func(name, address string, want time.Duration) {
		t.Helper()
		if got := s.take(name, address, now); got != want {
			t.Errorf("%s%s has to wait %v, want %v", name, address, got, want)
		}
	}
	take("", "192.0.2.1:1", 0)
	take("", "192.0.2.1:2", 0)
	take("", "192.0.2.1:3", 100*time.Millisecond)
	take("", "[::ffff:192.0.2.1]:4", 100*time.Millisecond)
	take("", "192.0.2.2:1", 0)
	// Whoever has one address of a network of 64 bits has all of them.
	take("", "[2001:db8::1]:1", 0)
	take("", "[2001:db8::2]:1", 0)
	take("", "[2001:db8::3%eth0]:1", 100*time.Millisecond)
	take("", "[2001:db8:0:1::3]:1", 0)
	take("plays", "192.0.2.1:5", 0)
	now = now.Add(100 * time.Millisecond)
	take("", "192.0.2.1:6", 0)
	take("", "192.0.2.1:6", 100*time.Millisecond)

	unlimited := newRates(0, 1)
	for range 1000 {
		if wait := unlimited.take("plays", "", now); wait != 0 || len(unlimited.limiters) > 0 {
			t.Fatalf("without a limit: waits %v, keeps %d limiters", wait, len(unlimited.limiters))
		}
	}
}

// However many there are, memory is bounded, and who was there first keeps
// their own.
func TestRatesAreBounded(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	s := newRates(1, 2)
	s.take("first", "", now)
	s.take("first", "", now)
	for i := range 3 * maxRates {
		s.take(fmt.Sprint(i), "", now)
	}
	if len(s.limiters) > maxRates {
		t.Errorf("%d limiters, want at most %d", len(s.limiters), maxRates)
	}
	if s.take("first", "", now) == 0 {
		t.Error("a flood of callers has given the first one a new start")
	}
	if s.take("late", "", now) == 0 {
		t.Error("those who share a limiter are not limited")
	}
	// Who was idle for as long as a limiter takes to fill makes room.
	now = now.Add(time.Second)
	s.take("first", "", now)
	now = now.Add(time.Second)
	if s.take("late", "", now) != 0 || s.limiters["late"] == nil {
		t.Error("the idle are not dropped")
	}
	if len(s.limiters) != 2 {
		t.Errorf("%d limiters, want those of first, which has something to wait for, and late", len(s.limiters))
	}
}

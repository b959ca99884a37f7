package postgres

import (
	"testing"
	"time"
)

func TestClockFollowsTheDatabase(t *testing.T) {
	t.Parallel()
	ours := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	const (
		trip = 10 * time.Millisecond // between the two moments of ours
		hour = time.Hour
	)
	for name, tt := range map[string]struct {
		known, seen time.Duration // offsets, the latter to the first moment of ours
		want        time.Duration
	}{
		"they agree":                        {0, 5 * time.Millisecond, 0},
		"at the start of the trip":          {0, 0, 0},
		"at its end":                        {0, trip, 0},
		"the database is ahead":             {0, hour, hour - trip},
		"the database is behind":            {0, -hour, -hour},
		"what was known stands":             {hour, hour + 3*time.Millisecond, hour},
		"the database's clock was set":      {hour, -hour, -hour},
		"ours was set back":                 {0, hour + trip, hour},
		"a longer trip would have been fit": {hour, hour - time.Second, hour - time.Second},
	} {
		var c clock
		c.offset.Store(int64(tt.known))
		c.saw(ours.Add(tt.seen), ours, ours.Add(trip))
		if got := time.Duration(c.offset.Load()); got != tt.want {
			t.Errorf("%s: the offset is %v, want %v", name, got, tt.want)
		}
	}
	var c clock
	c.offset.Store(int64(hour))
	c.saw(time.Time{}, ours, ours.Add(trip))
	if got := time.Duration(c.offset.Load()); got != hour {
		t.Errorf("the offset is %v after nothing was seen, want %v", got, hour)
	}
}

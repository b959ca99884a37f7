package task

import (
	"errors"
	"regexp"
	"sort"
	"time"
)

// Errors of [ParseRunAt]. Their texts complete "run_at …".
var (
	ErrNoZone   = errors.New("has no offset: add one (2026-12-24T21:00:00-03:00), or say in time_zone which zone it means")
	ErrTwoZones = errors.New("has an offset and time_zone is given too: leave one of them out")
	ErrNotATime = errors.New("must be a time like 2026-12-24T21:00:00Z or 2026-12-24T21:00:00-03:00 (RFC 3339), or 2026-12-24T21:00:00 with time_zone")
)

// ParseRunAt reads the moment that s names: RFC 3339 with an offset and a nil
// zone, or a local time without an offset in zone.
//
// Where the clocks of zone skip the local time (they go forward), the moment
// right after the gap is meant; where the local time comes twice (they go
// back), the first.
func ParseRunAt(s string, zone *time.Location) (time.Time, error) {
	parts := timeFormat.FindStringSubmatch(s)
	if parts == nil {
		return time.Time{}, ErrNotATime
	}
	local := parts[1] == ""
	if local {
		s += "Z"
	}
	t, err := time.Parse(time.RFC3339, s)
	switch {
	case err != nil:
		return time.Time{}, ErrNotATime
	case local && zone == nil:
		return time.Time{}, ErrNoZone
	case local:
		return resolve(t, zone), nil
	case zone != nil:
		return time.Time{}, ErrTwoZones
	}
	return t.UTC(), nil
}

// AppendTime appends t as callers and targets are shown it: RFC 3339 in UTC with
// microseconds, always six digits of them.
func AppendTime(b []byte, t time.Time) []byte {
	// With a layout of its own, and not one that package time writes without looking
	// it through, it took three times as long.
	b = t.UTC().AppendFormat(b, time.RFC3339)
	b = append(b[:len(b)-1], ".000000Z"...)
	for i, rest := len(b)-2, t.Nanosecond()/1000; rest > 0; i, rest = i-1, rest/10 {
		b[i] += byte(rest % 10)
	}
	return b
}

// timeFormat is the date-time of RFC 3339 §5.6 whose offset may be missing.
// [time.Parse] alone also takes an hour of one digit, a comma before the
// fraction, and offsets of 24 hours or 60 minutes.
var timeFormat = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)?$`)

// resolve turns the local time whose fields are those of wall (in UTC) into a
// moment in zone.
func resolve(wall time.Time, zone *time.Location) time.Time {
	// No zone is farther from UTC (RFC 9636 §3.2), and clocks change days apart:
	// one change at most matters.
	const farthest = 26 * time.Hour
	before, after := offset(wall.Add(-farthest), zone), offset(wall.Add(farthest), zone)
	first, second := wall.Add(-before), wall.Add(-after)
	switch {
	case offset(first, zone) == before:
		return first
	case offset(second, zone) == after:
		return second
	}
	// The clocks skip wall, so the change lies between second and first.
	// ZoneBounds misses it where a zone's table of changes ends and its rule
	// begins (America/Indiana/Winamac in 2007).
	start := second.Truncate(time.Second)
	skipped := sort.Search(int((after-before)/time.Second), func(i int) bool {
		return offset(start.Add(time.Duration(i)*time.Second), zone) == after
	})
	return start.Add(time.Duration(skipped) * time.Second)
}

// offset returns how far the clocks of zone are ahead of UTC at moment.
func offset(moment time.Time, zone *time.Location) time.Duration {
	_, seconds := moment.In(zone).Zone()
	return time.Duration(seconds) * time.Second
}

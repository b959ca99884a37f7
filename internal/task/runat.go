package task

import (
	"errors"
	"time"
)

// Errors of [ParseRunAt]. Their texts complete "run_at …".
var (
	ErrNoZone    = errors.New("has no offset: add one (2026-12-24T21:00:00-03:00), or say in time_zone which zone it means")
	ErrTwoZones  = errors.New("has an offset and time_zone is given too: leave one of them out")
	ErrNotATime  = errors.New("must be a time like 2026-12-24T21:00:00Z or 2026-12-24T21:00:00-03:00 (RFC 3339), or 2026-12-24T21:00:00 with time_zone")
	errWallClock = errors.New("the zone's transitions are inconsistent")
)

// ParseRunAt reads the moment that s names: RFC 3339 with an offset and a nil
// zone, or a local time without an offset in zone.
//
// Where the clocks of zone skip the local time (they go forward), the moment
// right after the gap is meant; where the local time comes twice (they go
// back), the first.
func ParseRunAt(s string, zone *time.Location) (time.Time, error) {
	var t time.Time
	// UnmarshalText is strict about RFC 3339, unlike time.Parse.
	if err := t.UnmarshalText([]byte(s)); err == nil {
		if zone != nil {
			return time.Time{}, ErrTwoZones
		}
		return t.UTC(), nil
	}
	wall, err := parseLocal(s)
	if err != nil {
		return time.Time{}, ErrNotATime
	}
	if zone == nil {
		return time.Time{}, ErrNoZone
	}
	return resolve(wall, zone)
}

// parseLocal reads a local time as if it were UTC.
func parseLocal(s string) (time.Time, error) {
	var t time.Time
	if err := t.UnmarshalText([]byte(s + "Z")); err != nil {
		return time.Time{}, err
	}
	return t, nil
}

// resolve turns the local time whose fields are those of wall (in UTC) into a
// moment in zone.
func resolve(wall time.Time, zone *time.Location) (time.Time, error) {
	t := time.Date(wall.Year(), wall.Month(), wall.Day(), wall.Hour(), wall.Minute(), wall.Second(), wall.Nanosecond(), zone)
	start, end := t.ZoneBounds()

	got := wallClock(t)
	switch {
	case got.Equal(wall):
		// The same local time may have come before, under the previous offset.
		if start.IsZero() {
			return t.UTC(), nil
		}
		_, before := start.Add(-time.Nanosecond).Zone()
		if earlier := wall.Add(-time.Duration(before) * time.Second); earlier.Before(start) {
			return earlier.UTC(), nil
		}
		return t.UTC(), nil
	case got.After(wall) && !start.IsZero():
		// In the gap, read with the offset from before it: the gap ended at start.
		return start.UTC(), nil
	case got.Before(wall) && !end.IsZero():
		// In the gap, read with the offset from after it: the gap begins at end.
		return end.UTC(), nil
	}
	return time.Time{}, errWallClock
}

// wallClock returns a UTC time with the fields that t shows in its own zone.
func wallClock(t time.Time) time.Time {
	_, offset := t.Zone()
	return t.UTC().Add(time.Duration(offset) * time.Second)
}

package task_test

import (
	"errors"
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // the machine may have no time zones

	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/task"
)

// zones are some of all kinds: without and with clock changes, in either
// hemisphere, by half an hour, at midnight, over the date line, in Ramadan,
// all year, and with offsets of odd minutes.
var zones = []string{
	"UTC", "Etc/GMT+12", "Etc/GMT-14",
	"Africa/Abidjan", "Africa/Cairo", "Africa/Casablanca", "Africa/El_Aaiun", "Africa/Monrovia", "Africa/Sao_Tome",
	"America/Anchorage", "America/Argentina/Buenos_Aires", "America/Argentina/San_Luis", "America/Asuncion",
	"America/Caracas", "America/Godthab", "America/Havana", "America/Indiana/Winamac", "America/Juneau",
	"America/Metlakatla", "America/Mexico_City", "America/New_York", "America/Santiago", "America/Sao_Paulo",
	"America/Scoresbysund", "America/St_Johns", "Antarctica/Casey", "Antarctica/Troll",
	"Asia/Gaza", "Asia/Kathmandu", "Asia/Kolkata", "Asia/Manila", "Asia/Pyongyang", "Asia/Tehran",
	"Atlantic/Azores", "Australia/Eucla", "Australia/Lord_Howe", "Australia/Sydney",
	"Europe/Amsterdam", "Europe/Berlin", "Europe/Dublin", "Europe/Istanbul", "Europe/Lisbon", "Europe/London",
	"Europe/Moscow", "Pacific/Apia", "Pacific/Chatham", "Pacific/Kiritimati", "Pacific/Kwajalein", "Pacific/Norfolk",
}

func location(t interface {
	Helper()
	Fatal(...any)
}, name string) *time.Location {
	t.Helper()
	if name == "" {
		return nil
	}
	zone, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return zone
}

func TestParseRunAt(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, s, zone, want string
	}{
		{"Z", "2026-12-24T21:00:00Z", "", "2026-12-24T21:00:00Z"},
		{"offset", "2026-12-24T21:00:00-03:00", "", "2026-12-25T00:00:00Z"},
		{"odd offset", "2026-12-24T21:00:00+05:45", "", "2026-12-24T15:15:00Z"},
		{"greatest offset", "2026-12-24T21:00:00+23:59", "", "2026-12-23T21:01:00Z"},
		{"unknown offset", "2026-12-24T21:00:00-00:00", "", "2026-12-24T21:00:00Z"},
		{"fraction", "2026-12-24T21:00:00.25Z", "", "2026-12-24T21:00:00.25Z"},
		{"nanoseconds", "2026-12-24T21:00:00.123456789+01:00", "", "2026-12-24T20:00:00.123456789Z"},
		{"less than nanoseconds", "2026-12-24T21:00:00.1234567899Z", "", "2026-12-24T21:00:00.123456789Z"},
		{"leap day", "2028-02-29T00:00:00Z", "", "2028-02-29T00:00:00Z"},
		{"first year", "0000-01-01T00:00:00Z", "", "0000-01-01T00:00:00Z"},
		{"last year", "9999-12-31T23:59:59.999999999Z", "", "9999-12-31T23:59:59.999999999Z"},

		{"local", "2026-12-24T21:00:00", "America/Argentina/Buenos_Aires", "2026-12-25T00:00:00Z"},
		{"local with a fraction", "2026-12-24T21:00:00.5", "America/Argentina/Buenos_Aires", "2026-12-25T00:00:00.5Z"},
		{"local in UTC", "2026-12-24T21:00:00", "UTC", "2026-12-24T21:00:00Z"},
		{"local, 45 minutes off", "2026-12-24T21:00:00", "Asia/Kathmandu", "2026-12-24T15:15:00Z"},
		{"local in winter", "2026-01-15T12:00:00", "Europe/Berlin", "2026-01-15T11:00:00Z"},
		{"local in summer", "2026-07-15T12:00:00", "Europe/Berlin", "2026-07-15T10:00:00Z"},
		{"local in the far future", "9999-07-15T12:00:00", "Europe/Berlin", "9999-07-15T10:00:00Z"},
		{"local in a leap year's last hours", "2028-12-31T23:30:00", "America/New_York", "2029-01-01T04:30:00Z"},
		{"local mean time", "0000-01-01T00:00:00", "America/New_York", "0000-01-01T04:56:02Z"},
		{"local mean time, east", "1850-01-01T00:00:00", "Europe/Berlin", "1849-12-31T23:06:32Z"},

		{"before a gap", "2026-03-08T01:59:59.999999999", "America/New_York", "2026-03-08T06:59:59.999999999Z"},
		{"gap begins", "2026-03-08T02:00:00", "America/New_York", "2026-03-08T07:00:00Z"},
		{"in a gap", "2026-03-08T02:30:00.5", "America/New_York", "2026-03-08T07:00:00Z"},
		{"gap ends", "2026-03-08T02:59:59.999999999", "America/New_York", "2026-03-08T07:00:00Z"},
		{"after a gap", "2026-03-08T03:00:00", "America/New_York", "2026-03-08T07:00:00Z"},
		{"after a gap, with a fraction", "2026-03-08T03:00:00.000000001", "America/New_York", "2026-03-08T07:00:00.000000001Z"},
		{"before a fold", "2026-11-01T00:59:59", "America/New_York", "2026-11-01T04:59:59Z"},
		{"fold begins", "2026-11-01T01:00:00", "America/New_York", "2026-11-01T05:00:00Z"},
		{"in a fold", "2026-11-01T01:30:00", "America/New_York", "2026-11-01T05:30:00Z"},
		{"fold ends", "2026-11-01T01:59:59.999999999", "America/New_York", "2026-11-01T05:59:59.999999999Z"},
		{"after a fold", "2026-11-01T02:00:00", "America/New_York", "2026-11-01T07:00:00Z"},
		{"after a fold, with a fraction", "2026-11-01T02:00:00.5", "America/New_York", "2026-11-01T07:00:00.5Z"},

		{"gap east of UTC", "2026-03-29T02:30:00", "Europe/Berlin", "2026-03-29T01:00:00Z"},
		{"fold east of UTC", "2026-10-25T02:30:00", "Europe/Berlin", "2026-10-25T00:30:00Z"},
		{"gap at UTC", "2026-03-29T01:30:00", "Europe/London", "2026-03-29T01:00:00Z"},
		{"fold at UTC", "2026-10-25T01:30:00", "Europe/London", "2026-10-25T00:30:00Z"},
		{"gap to negative DST", "2026-03-29T01:30:00", "Europe/Dublin", "2026-03-29T01:00:00Z"},
		{"no gap any more", "2026-10-04T00:30:00", "America/Argentina/Buenos_Aires", "2026-10-04T03:30:00Z"},
		{"last gap of Buenos Aires", "2008-10-19T00:30:00", "America/Argentina/Buenos_Aires", "2008-10-19T03:00:00Z"},
		{"last fold of Buenos Aires", "2009-03-14T23:30:00", "America/Argentina/Buenos_Aires", "2009-03-15T01:30:00Z"},
		{"gap at midnight", "2026-09-06T00:00:00", "America/Santiago", "2026-09-06T04:00:00Z"},
		{"fold at midnight", "2026-04-04T23:30:00", "America/Santiago", "2026-04-05T02:30:00Z"},
		{"after a fold at midnight", "2026-04-05T00:00:00", "America/Santiago", "2026-04-05T04:00:00Z"},
		{"gap of half an hour", "2026-10-04T02:15:00", "Australia/Lord_Howe", "2026-10-03T15:30:00Z"},
		{"after a gap of half an hour", "2026-10-04T02:30:00", "Australia/Lord_Howe", "2026-10-03T15:30:00Z"},
		{"fold of half an hour", "2026-04-05T01:45:00", "Australia/Lord_Howe", "2026-04-04T14:45:00Z"},
		{"fold of a Ramadan", "2026-02-15T02:30:00", "Africa/Casablanca", "2026-02-15T01:30:00Z"},
		{"gap after a Ramadan", "2026-03-22T02:30:00", "Africa/Casablanca", "2026-03-22T02:00:00Z"},
		{"gap of two hours", "2007-03-11T02:30:00", "America/Indiana/Winamac", "2007-03-11T08:00:00Z"},
		{"before a skipped day", "2011-12-29T23:59:59", "Pacific/Apia", "2011-12-30T09:59:59Z"},
		{"skipped day begins", "2011-12-30T00:00:00", "Pacific/Apia", "2011-12-30T10:00:00Z"},
		{"skipped day ends", "2011-12-30T23:59:59", "Pacific/Apia", "2011-12-30T10:00:00Z"},
		{"after a skipped day", "2011-12-31T00:00:00", "Pacific/Apia", "2011-12-30T10:00:00Z"},
		{"a day twice", "1892-07-04T12:00:00", "Pacific/Apia", "1892-07-03T23:26:56Z"},
	} {
		got, err := task.ParseRunAt(tt.s, location(t, tt.zone))
		if err != nil || got.Format(time.RFC3339Nano) != tt.want || got.Location() != time.UTC {
			t.Errorf("%s: ParseRunAt(%q, %q) = %v, %v; want %s", tt.name, tt.s, tt.zone, got, err, tt.want)
		}
	}
}

func TestParseRunAtRefuses(t *testing.T) {
	t.Parallel()
	// Whether there is a zone or not.
	for name, s := range map[string]string{
		"empty":                  "",
		"garbage":                "tomorrow at nine",
		"date":                   "2026-12-24",
		"without seconds":        "2026-12-24T21:00",
		"without seconds, Z":     "2026-12-24T21:00Z",
		"lower-case t":           "2026-12-24t21:00:00Z",
		"lower-case z":           "2026-12-24T21:00:00z",
		"space for T":            "2026-12-24 21:00:00Z",
		"comma":                  "2026-12-24T21:00:00,5Z",
		"comma, local":           "2026-12-24T21:00:00,5",
		"point without fraction": "2026-12-24T21:00:00.Z",
		"point, local":           "2026-12-24T21:00:00.",
		"24:00":                  "2026-12-24T24:00:00Z",
		"24:00, local":           "2026-12-24T24:00:00",
		"leap second":            "2016-12-31T23:59:60Z",
		"leap second, local":     "2016-12-31T23:59:60",
		"minute 60":              "2026-12-24T21:60:00Z",
		"hour of one digit":      "2026-12-24T9:00:00Z",
		"the same, local":        "2026-12-24T9:00:00",
		"day of one digit":       "2026-12-4T21:00:00Z",
		"month 13":               "2026-13-24T21:00:00Z",
		"month 0":                "2026-00-24T21:00:00Z",
		"day 0":                  "2026-12-00T21:00:00Z",
		"30 February":            "2026-02-30T21:00:00Z",
		"no leap year":           "2027-02-29T21:00:00Z",
		"no leap year, local":    "2027-02-29T21:00:00",
		"year of five digits":    "12026-12-24T21:00:00Z",
		"signed year":            "+2026-12-24T21:00:00Z",
		"negative year":          "-001-12-24T21:00:00Z",
		"offset of 24 hours":     "2026-12-24T21:00:00+24:00",
		"offset of 60 minutes":   "2026-12-24T21:00:00+01:60",
		"offset without colon":   "2026-12-24T21:00:00+0100",
		"offset of hours":        "2026-12-24T21:00:00+01",
		"offset with a minus":    "2026-12-24T21:00:00\u221203:00",
		"two offsets":            "2026-12-24T21:00:00ZZ",
		"zone's name":            "2026-12-24T21:00:00 CET",
		"space before":           " 2026-12-24T21:00:00Z",
		"line feed after":        "2026-12-24T21:00:00Z\n",
		"line feed, local":       "2026-12-24T21:00:00\n",
		"NUL":                    "2026-12-24T21:00:00Z\x00",
		"other digits":           "２０２６-12-24T21:00:00Z",
		"basic format":           "20261224T210000Z",
		"seconds since 1970":     "1798146000",
	} {
		for _, zone := range []string{"", "Europe/Berlin"} {
			if got, err := task.ParseRunAt(s, location(t, zone)); !errors.Is(err, task.ErrNotATime) || !got.IsZero() {
				t.Errorf("%s: ParseRunAt(%q, %q) = %v, %v; want %v", name, s, zone, got, err, task.ErrNotATime)
			}
		}
	}
	for _, tt := range []struct {
		s, zone string
		want    error
	}{
		{"2026-12-24T21:00:00", "", task.ErrNoZone},
		{"2026-12-24T21:00:00.5", "", task.ErrNoZone},
		{"2026-12-24T21:00:00Z", "Europe/Berlin", task.ErrTwoZones},
		{"2026-12-24T21:00:00Z", "UTC", task.ErrTwoZones},
		{"2026-12-24T21:00:00+01:00", "Europe/Berlin", task.ErrTwoZones},
	} {
		if got, err := task.ParseRunAt(tt.s, location(t, tt.zone)); !errors.Is(err, tt.want) || !got.IsZero() {
			t.Errorf("ParseRunAt(%q, %q) = %v, %v; want %v", tt.s, tt.zone, got, err, tt.want)
		}
	}
}

// local is a local time's form.
const local = "2006-01-02T15:04:05.999999999"

// wallClock returns a UTC time with the fields that clocks in zone show at moment.
func wallClock(moment time.Time, zone *time.Location) time.Time {
	_, offset := moment.In(zone).Zone()
	return moment.Add(time.Duration(offset) * time.Second).UTC()
}

// modelRunAt watches the clocks of zone until they show wall, a whole second,
// or more.
func modelRunAt(wall time.Time, zone *time.Location) time.Time {
	reached := func(moment time.Time) bool { return !wallClock(moment, zone).Before(wall) }
	// No zone was ever more than 16 hours ahead.
	moment := wall.Add(-17 * time.Hour)
	for ; ; moment = moment.Add(time.Minute) {
		next := moment.Add(time.Minute)
		// Where the clocks change within this minute, they may show wall for
		// seconds only.
		changes := wallClock(next, zone).Sub(wallClock(moment, zone)) != time.Minute
		if !reached(next) && !changes {
			continue
		}
		for second := moment; !second.After(next); second = second.Add(time.Second) {
			if reached(second) {
				return second
			}
		}
	}
}

// changes returns the moments of one year at which the clocks of zone change.
func changes(zone *time.Location, year int) (moments []time.Time) {
	ahead := func(moment time.Time) time.Duration { return wallClock(moment, zone).Sub(moment) }
	for day := time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC); day.Year() == year; day = day.AddDate(0, 0, 1) {
		before, after := day, day.AddDate(0, 0, 1)
		if ahead(before) == ahead(after) {
			continue
		}
		for after.Sub(before) > time.Second {
			middle := before.Add((after.Sub(before) / 2).Truncate(time.Second))
			if ahead(middle) == ahead(before) {
				before = middle
			} else {
				after = middle
			}
		}
		moments = append(moments, after)
	}
	return moments
}

func TestParseRunAtMatchesModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		zone := location(t, rapid.SampledFrom(zones).Draw(t, "zone"))
		year := rapid.IntRange(1840, 2140).Draw(t, "year")
		near := rapid.SampledFrom(append(changes(zone, year), time.Date(year, 12, 31, 23, 0, 0, 0, time.UTC))).Draw(t, "near")
		away := rapid.OneOf(rapid.IntRange(-2, 2), rapid.IntRange(-3*3600, 3*3600), rapid.IntRange(-30*3600, 30*3600)).Draw(t, "seconds away")
		wall := wallClock(near.Add(-rapid.SampledFrom([]time.Duration{0, time.Second}).Draw(t, "before")), zone).Add(time.Duration(away) * time.Second)

		got, err := task.ParseRunAt(wall.Format(local), zone)
		want := modelRunAt(wall, zone)
		if err != nil || !got.Equal(want) {
			t.Fatalf("ParseRunAt(%q, %v) = %v, %v; want %v", wall.Format(local), zone, got, err, want)
		}

		// Part of a second later is that much later, but in a gap.
		fraction := time.Duration(rapid.IntRange(1, 999_999_999).Draw(t, "nanoseconds"))
		if wallClock(want, zone).Equal(wall) {
			want = want.Add(fraction)
		}
		s := wall.Add(fraction).Format(local)
		if got, err := task.ParseRunAt(s, zone); err != nil || !got.Equal(want) {
			t.Fatalf("ParseRunAt(%q, %v) = %v, %v; want %v", s, zone, got, err, want)
		}
	})
}

func FuzzParseRunAt(f *testing.F) {
	f.Add("2026-12-24T21:00:00-03:00", uint8(0))
	f.Add("2026-03-08T02:30:00.5", uint8(20))
	f.Add("2011-12-30T12:00:00", uint8(44))
	f.Add("2026-12-24T9:00:00,5+24:60", uint8(1))
	f.Add("0000-01-01T00:00:00", uint8(30))
	f.Fuzz(func(t *testing.T, s string, n uint8) {
		zone := location(t, zones[int(n)%len(zones)])
		moment, err := task.ParseRunAt(s, nil)
		inZone, zoneErr := task.ParseRunAt(s, zone)
		switch {
		case err == nil && errors.Is(zoneErr, task.ErrTwoZones):
			want, err := time.Parse(time.RFC3339Nano, s)
			if err != nil || !moment.Equal(want) || moment.Location() != time.UTC {
				t.Errorf("ParseRunAt(%q) = %v, want %v, %v", s, moment, want, err)
			}
			if offset := strings.LastIndexAny(s, "Z+-"); offset < len("2026-12-24T21:00:00") {
				t.Errorf("ParseRunAt(%q) accepts a time without an offset", s)
			}
		case zoneErr == nil && errors.Is(err, task.ErrNoZone):
			wall, err := time.Parse(time.RFC3339Nano, s+"Z")
			if err != nil || inZone.Location() != time.UTC {
				t.Errorf("ParseRunAt(%q, %v) = %v; %v", s, zone, inZone, err)
			}
			// The clocks show wall or more, and just before did not.
			if at, before := wallClock(inZone, zone), wallClock(inZone.Add(-1), zone); at.Before(wall) || !before.Before(wall) {
				t.Errorf("ParseRunAt(%q, %v) = %v; clocks go from %v to %v", s, zone, inZone, before, at)
			}
		case !errors.Is(err, task.ErrNotATime) || !errors.Is(zoneErr, task.ErrNotATime):
			t.Errorf("ParseRunAt(%q): %v without a zone, %v with %v", s, err, zoneErr, zone)
		}
		if (err == nil || zoneErr == nil) && (s[10] != 'T' || s[13] != ':' || strings.ContainsAny(s, ", tz")) {
			t.Errorf("ParseRunAt(%q) is not strict", s)
		}
	})
}

func BenchmarkParseRunAt(b *testing.B) {
	for _, bb := range []struct{ name, s, zone string }{
		{"offset", "2026-12-24T21:00:00-03:00", ""},
		{"local", "2026-12-24T21:00:00", "America/New_York"},
		{"gap", "2026-03-08T02:30:00", "America/New_York"},
	} {
		zone := location(b, bb.zone)
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := task.ParseRunAt(bb.s, zone); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestAppendTime(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		moment := time.Unix(rapid.Int64Range(-62135596800, 253402300799).Draw(t, "second"), rapid.Int64Range(0, 999_999_999).Draw(t, "nanosecond"))
		moment = moment.In(location(t, rapid.SampledFrom(zones).Draw(t, "zone")))
		want := "at " + moment.UTC().Format("2006-01-02T15:04:05.000000Z")
		if got := string(task.AppendTime([]byte("at "), moment)); got != want {
			t.Errorf("AppendTime(%v) = %q, want %q", moment, got, want)
		}
	})
}

func BenchmarkAppendTime(b *testing.B) {
	moment, text := time.Unix(1795640399, 123456789), make([]byte, 0, 40)
	b.ReportAllocs()
	for b.Loop() {
		text = task.AppendTime(text[:0], moment)
	}
}

package task_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/task"
)

func TestParseID(t *testing.T) {
	t.Parallel()
	want := task.ID{0x01, 0x93, 0x9e, 0x0c, 0x5c, 0x1e, 0x7c, 0xc1, 0xb1, 0xa6, 0x9d, 0x8a, 0x4d, 0x6c, 0x1a, 0x2b}
	for _, s := range []string{
		"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b",
		"01939E0C-5C1E-7CC1-B1A6-9D8A4D6C1A2B",
		"01939e0C-5c1E-7Cc1-B1a6-9D8a4d6c1A2b",
	} {
		got, err := task.ParseID(s)
		if err != nil || got != want {
			t.Errorf("ParseID(%q) = %v, %v; want %v", s, got, err, want)
		}
		if got, want := got.String(), "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"; got != want {
			t.Errorf("String() = %q, want %q", got, want)
		}
	}
}

func TestParseIDRefuses(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]string{
		"empty":                  "",
		"one digit short":        "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2",
		"one digit more":         "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b0",
		"no hyphens":             "01939e0c5c1e7cc1b1a69d8a4d6c1a2b",
		"a hyphen moved":         "01939e0-c5c1e-7cc1-b1a6-9d8a4d6c1a2b",
		"a hyphen for a digit":   "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2-",
		"a digit for hyphen 1":   "01939e0c05c1e-7cc1-b1a6-9d8a4d6c1a2b",
		"a digit for hyphen 2":   "01939e0c-5c1e07cc1-b1a6-9d8a4d6c1a2b",
		"a digit for hyphen 3":   "01939e0c-5c1e-7cc10b1a6-9d8a4d6c1a2b",
		"a digit for hyphen 4":   "01939e0c-5c1e-7cc1-b1a609d8a4d6c1a2b",
		"not a hex digit":        "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2g",
		"braces":                 "{01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b}",
		"braces, length kept":    "{1939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2}",
		"URN":                    "urn:uuid:01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b",
		"space before":           " 01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b",
		"space for a digit":      "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2 ",
		"line feed after":        "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b\n",
		"NUL":                    "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2\x00",
		"digits of two bytes":    "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1aé",
		"full-width hyphen-like": "01939e0c–5c1e-7cc1-b1a6-9d8a4d6c1a",
	} {
		if got, err := task.ParseID(s); err == nil || got != (task.ID{}) {
			t.Errorf("%s: ParseID(%q) = %v, %v; want the zero ID and an error", name, s, got, err)
		}
	}
}

// FuzzParseID compares with another implementation, which takes more forms:
// the canonical one alone has 36 characters and no brace.
func FuzzParseID(f *testing.F) {
	f.Add("01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b")
	f.Add("{1939E0C-5c1e-7cc1-b1a6-9d8a4d6c1a2}")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		got, err := task.ParseID(s)
		want, wantErr := uuid.Parse(s)
		if canonical := wantErr == nil && len(s) == 36; (err == nil) != canonical {
			t.Fatalf("ParseID(%q): %v; want accepted = %t", s, err, canonical)
		}
		if err != nil {
			return
		}
		if got != task.ID(want) {
			t.Errorf("ParseID(%q) = %x, want %x", s, got, want)
		}
		if got.String() != want.String() || got.String() != strings.ToLower(s) {
			t.Errorf("ParseID(%q).String() = %q, want %q", s, got, want)
		}
	})
}

// FuzzID reads back what String writes.
func FuzzID(f *testing.F) {
	f.Add(make([]byte, 16))
	f.Add([]byte("\xff\x00\x7f\x80\x0f\xf0\x09\x90\xa0\x0a\x01\x10\x55\xaa\x99\x66"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var id task.ID
		copy(id[:], b)
		if got, want := id.String(), uuid.UUID(id).String(); got != want {
			t.Errorf("ID(%x).String() = %q, want %q", id[:], got, want)
		}
		if got, err := task.ParseID(id.String()); err != nil || got != id {
			t.Errorf("ParseID(%q) = %x, %v; want %x", id, got, err, id)
		}
	})
}

func BenchmarkParseID(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := task.ParseID("01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkIDString(b *testing.B) {
	id := task.ID{0x01, 0x93, 0x9e, 0x0c, 0x5c, 0x1e, 0x7c, 0xc1}
	b.ReportAllocs()
	for b.Loop() {
		_ = id.String()
	}
}

func TestNewID(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 24, 12, 0, 0, 123456789, time.UTC)
	for name, tt := range map[string]struct {
		at     time.Time
		random uint64
		want   string
	}{
		"no random bits":      {at, 0, "01a20d6d-5a7b-774f-8000-000000000000"},
		"all random bits":     {at, 1<<64 - 1, "01a20d6d-5a7b-774f-bfff-ffffffffffff"},
		"the start of 1970":   {time.Unix(0, 0), 0, "00000000-0000-7000-8000-000000000000"},
		"a nanosecond before": {at.Truncate(time.Millisecond).Add(-1), 0, "01a20d6d-5a7a-7fff-8000-000000000000"},
	} {
		if got := task.NewID(tt.at, tt.random).String(); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
	if first, id := task.FirstID(at), task.NewID(at.Truncate(time.Millisecond), 0); first != id {
		t.Errorf("FirstID = %s, want %s", first, id)
	}
}

func TestFirstID(t *testing.T) {
	t.Parallel()
	epoch := task.FirstID(time.Unix(0, 0))
	if before := task.FirstID(time.Unix(-120, 0)); before != epoch {
		t.Errorf("the first id of a moment before 1970 is %s, want %s", before, epoch)
	}
	if some := task.NewID(time.Unix(0, 0), 0); bytes.Compare(epoch[:], some[:]) > 0 {
		t.Errorf("%s is not the first: %s comes before it", epoch, some)
	}
}

func TestIDsSortByTheirMoment(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		moment := func(name string) time.Time {
			return time.Unix(0, rapid.Int64Range(0, 1<<62).Draw(t, name))
		}
		a, b := moment("a"), moment("b")
		if b.Sub(a) < 245*time.Nanosecond { // 2^-12 ms
			return
		}
		random := rapid.Uint64()
		x, y := task.NewID(a, random.Draw(t, "x")), task.NewID(b, random.Draw(t, "y"))
		if x.String() >= y.String() {
			t.Errorf("the ID of %v is %s, that of %v is %s", a, x, b, y)
		}
	})
}

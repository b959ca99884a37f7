package task_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

var noon = time.Date(2026, 11, 24, 12, 0, 0, 123456000, time.UTC)

func TestFilterCheck(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		filter task.Filter
		want   []string // paths of what is wrong
	}{
		"nothing": {},
		"everything": {filter: task.Filter{
			States: []task.State{task.Pending, task.Running, task.Succeeded, task.Failed, task.Cancelled},
			Labels: map[string]string{"kind": "play", "empty": ""}, Host: "plays.melodia.app", URLPrefix: "https://plays",
			CreatedAfter: noon, CreatedBefore: noon.Add(1), RunAfter: noon, FinishedBefore: noon,
			Reasons:     []task.Reason{task.AttemptsExhausted, task.RetryDurationExhausted, task.ClientError, task.Expired, task.TargetRefused},
			MinAttempts: 100, CreatedBy: "plays@melodia.app", Queue: "mail", FlowKey: "tenant-42",
		}},
		"an address":               {filter: task.Filter{Host: "10.1.2.3"}},
		"an IPv6 address":          {filter: task.Filter{Host: "[fd00::1]"}},
		"a bare IPv6 address":      {filter: task.Filter{Host: "fd00::1"}, want: []string{"host"}},
		"a host with a port":       {filter: task.Filter{Host: "melodia.app:80"}, want: []string{"host"}},
		"an address with a port":   {filter: task.Filter{Host: "[fd00::1]:80"}, want: []string{"host"}},
		"a URL as host":            {filter: task.Filter{Host: "https://melodia.app"}, want: []string{"host"}},
		"a path in the host":       {filter: task.Filter{Host: "melodia.app/x"}, want: []string{"host"}},
		"a user in the host":       {filter: task.Filter{Host: "me@melodia.app"}, want: []string{"host"}},
		"no state":                 {filter: task.Filter{States: []task.State{task.Failed, "done"}}, want: []string{"state"}},
		"no reason":                {filter: task.Filter{Reasons: []task.Reason{""}}, want: []string{"reason"}},
		"a label without a name":   {filter: task.Filter{Labels: map[string]string{"": "x"}}, want: []string{"labels"}},
		"a label that is too long": {filter: task.Filter{Labels: map[string]string{"kind": strings.Repeat("x", 257)}}, want: []string{"labels kind"}},
		"a URL that is too long":   {filter: task.Filter{URLPrefix: strings.Repeat("x", 2049)}, want: []string{"url"}},
		"a URL that is not UTF-8":  {filter: task.Filter{URLPrefix: "http://\xff"}, want: []string{"url"}},
		"a URL with a NUL":         {filter: task.Filter{URLPrefix: "http://\x00"}, want: []string{"url"}},
		"a name with a NUL":        {filter: task.Filter{CreatedBy: "a\x00"}, want: []string{"created_by"}},
		"no queue's name":          {filter: task.Filter{Queue: "a/b"}, want: []string{"queue"}},
		"no flow key":              {filter: task.Filter{FlowKey: "a b"}, want: []string{"flow_key"}},
		"more attempts than any":   {filter: task.Filter{MinAttempts: 101}, want: []string{"min_attempts"}},
		"fewer than none":          {filter: task.Filter{MinAttempts: -1}, want: []string{"min_attempts"}},
		"an empty range":           {filter: task.Filter{RunAfter: noon, RunBefore: noon}, want: []string{"run_before"}},
		"far years": {filter: task.Filter{CreatedAfter: noon.AddDate(-1000, 0, 0), FinishedBefore: noon.AddDate(8000, 0, 0)},
			want: []string{"created_after", "finished_before"}},
	} {
		err := tt.filter.Check()
		var errs task.Errors
		if err != nil && !errors.As(err, &errs) {
			t.Errorf("%s: %v is not Errors", name, err)
		}
		var got []string
		for _, e := range errs {
			got = append(got, strings.Join(e.Path, " "))
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestFilterIsZero(t *testing.T) {
	t.Parallel()
	if !(&task.Filter{}).IsZero() {
		t.Error("the zero Filter is not zero")
	}
	for i, f := range []task.Filter{
		{States: []task.State{task.Failed}}, {Labels: map[string]string{"a": "b"}}, {Host: "a"}, {URLPrefix: "a"},
		{CreatedAfter: noon}, {CreatedBefore: noon}, {RunAfter: noon}, {RunBefore: noon}, {FinishedAfter: noon}, {FinishedBefore: noon},
		{Reasons: []task.Reason{task.Expired}}, {MinAttempts: 1}, {CreatedBy: "a"}, {Queue: "a"}, {FlowKey: "a"},
	} {
		if f.IsZero() {
			t.Errorf("filter %d is zero", i)
		}
	}
}

func TestCursor(t *testing.T) {
	t.Parallel()
	tk := &task.Task{ID: task.NewID(noon, 42), RunAt: noon.Add(time.Hour), FinishedAt: noon.Add(2 * time.Hour)}
	filters := []task.Filter{
		{},
		{States: []task.State{task.Failed}},
		{States: []task.State{task.Failed, task.Cancelled}},
		{Labels: map[string]string{"kind": "play"}},
		{RunAfter: noon},
		{RunAfter: noon.Add(time.Microsecond)},
		{FinishedBefore: noon},
		{FinishedBefore: noon, RunAfter: noon},
	}
	for i, f := range filters {
		want := task.Position{ID: tk.ID}
		switch f.Order() {
		case task.ByRunAt:
			want.At = tk.RunAt
		case task.ByFinishedAt:
			want.At = tk.FinishedAt
		case task.ByID:
		}
		cursor := f.Cursor(f.PositionOf(tk))
		if got, err := f.ParseCursor(cursor); err != nil || got != want {
			t.Errorf("filter %d: ParseCursor = %v, %v, want %v", i, got, err, want)
		}
		for j, other := range filters {
			if _, err := other.ParseCursor(cursor); (err == nil) != (i == j) {
				t.Errorf("filter %d takes the cursor of filter %d: %v", j, i, err)
			}
		}
		for at := range cursor {
			changed := []byte(cursor)
			changed[at] ^= 1
			if _, err := f.ParseCursor(string(changed)); err == nil {
				t.Errorf("filter %d takes a cursor that was changed at %d", i, at)
			}
		}
	}
	// Its checksum anybody can make.
	at := task.Filter{RunAfter: noon}
	for _, moment := range []time.Time{time.UnixMicro(-1e18), time.UnixMicro(1e18), time.UnixMicro(-1)} {
		if p, err := at.ParseCursor(at.Cursor(task.Position{At: moment})); err == nil {
			t.Errorf("a cursor at %v is taken, which the store cannot hold", p.At)
		}
	}
	// The order in which a filter's words were given is not part of it.
	a, b := task.Filter{States: []task.State{task.Failed, task.Cancelled}}, task.Filter{States: []task.State{task.Cancelled, task.Failed}}
	if _, err := b.ParseCursor(a.Cursor(a.PositionOf(tk))); err != nil {
		t.Errorf("the same states in another order: %v", err)
	}
}

func FuzzParseCursor(f *testing.F) {
	filter := task.Filter{RunAfter: noon}
	f.Add(filter.Cursor(task.Position{At: noon, ID: task.NewID(noon, 42)}))
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := filter.ParseCursor(s); err == nil && filter.Cursor(p) != s {
			t.Errorf("ParseCursor(%q) = %v, which is written as %q", s, p, filter.Cursor(p))
		}
	})
}

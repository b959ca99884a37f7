//go:build faults

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// clockCase is a sort of task whose way depends on the time.
type clockCase struct {
	extra  string        // members of the request
	moment string        // a member that is a moment,
	in     time.Duration // so long from now
	answer func(w http.ResponseWriter, r *http.Request, nth int)
	wait   time.Duration // until it is due, at the most
	pause  time.Duration // between its calls, at the least
	calls  int           // -1: as many as it takes
	end    string
}

const twiceASecond = `"min_backoff_seconds":0.5,"max_backoff_seconds":0.5`

var clockCases = map[string]clockCase{
	"now":                     {calls: 1, end: "succeeded"},
	"delay":                   {extra: `,"delay_seconds":2`, wait: 2 * time.Second, calls: 1, end: "succeeded"},
	"run_at in three seconds": {moment: "run_at", in: 3 * time.Second, wait: 3 * time.Second, calls: 1, end: "succeeded"},
	"run_at half an hour ago": {moment: "run_at", in: -30 * time.Minute, calls: 1, end: "succeeded"},
	"retries": {extra: `,"retry":{` + twiceASecond + `}`, answer: unavailable(2, ""),
		pause: 400 * time.Millisecond, calls: 3, end: "succeeded"},
	"retries that end by time": {extra: `,"retry":{"max_retry_duration_seconds":2,` + twiceASecond + `}`, answer: unavailable(100, ""),
		pause: 400 * time.Millisecond, calls: -1, end: "failed retry_duration_exhausted"},
	"Retry-After": {extra: "," + quickly, answer: unavailable(1, "with Date"), pause: time.Second, calls: 2, end: "succeeded"},
	"Retry-After of a target without a clock": {extra: "," + quickly, answer: unavailable(1, "without Date"),
		pause: time.Second, calls: 2, end: "succeeded"},
	"expires in half an hour":  {moment: "expires_at", in: 30 * time.Minute, calls: 1, end: "succeeded"},
	"expired half an hour ago": {moment: "expires_at", in: -30 * time.Minute, end: "failed expired"},
	"expires between its calls": {extra: `,"retry":{` + twiceASecond + `}`, moment: "expires_at", in: 2 * time.Second, answer: unavailable(100, ""),
		pause: 400 * time.Millisecond, calls: -1, end: "failed expired"},
}

// in is a moment from now, in JSON.
func in(d time.Duration) string {
	return fmt.Sprintf("%q", time.Now().Add(d).UTC().Format(time.RFC3339Nano))
}

// unavailable answers 500 to the first calls of a task, and asks for two seconds
// by a date when retryAfter says how. Of a 503 the tasks of all cases would have to
// wait: it counts for the host.
func unavailable(first int, retryAfter string) func(http.ResponseWriter, *http.Request, int) {
	return func(w http.ResponseWriter, _ *http.Request, nth int) {
		if nth > first {
			return
		}
		if retryAfter != "" {
			w.Header().Set("Retry-After", time.Now().Add(2*time.Second).UTC().Format(http.TimeFormat))
		}
		if retryAfter == "without Date" {
			w.Header()["Date"] = nil
		}
		w.WriteHeader(http.StatusInternalServerError)
	}
}

// Instances whose clocks are an hour ahead, an hour behind and right work on one
// database, and their work cannot be told apart.
func TestClocksAnHourOff(t *testing.T) {
	const lease, poll = time.Second, 100 * time.Millisecond
	const hour, slack = time.Hour, patience / 2
	buildWithClockOffset(t)
	database := pgtest.URL(t)
	j := newJournal(t)
	j.answer = func(w http.ResponseWriter, r *http.Request, nth int) {
		name := r.Header.Get("X-Case")
		if answer := clockCases[name].answer; answer != nil {
			answer(w, r, nth)
		} else if name == "held" && nth == 1 {
			<-r.Context().Done()
		}
	}
	j.audit(database)
	instances := map[time.Duration]*process{}
	for _, offset := range []time.Duration{0, hour, -hour} {
		p := start(t, "serve", "DATABASE_URL="+database, "LEASE_DURATION="+lease.String(), "POLL_INTERVAL="+poll.String(),
			fmt.Sprintf("CLOCK_OFFSET_SECONDS=%d", int(offset.Seconds())))
		date, err := http.ParseTime(p.do(http.MethodGet, "/health/live", "").header.Get("Date"))
		if got := time.Until(date); err != nil || (got-offset).Abs() > patience {
			t.Fatalf("the clock of an instance is off by %v (%v), want %v", got, err, offset)
		}
		instances[offset] = p
	}

	var names []string // of the submissions
	for range 3 {
		for _, p := range instances {
			for name, c := range clockCases {
				extra := fmt.Sprintf(`"headers":{"X-Case":%q}`, name) + c.extra
				if c.moment != "" {
					extra += fmt.Sprintf(`,%q:%s`, c.moment, in(c.in))
				}
				j.submit(t.Context(), p.url, extra)
				names = append(names, name)
			}
		}
	}
	for i, name := range names {
		c, s := clockCases[name], j.submissions[i]
		if s.status != http.StatusAccepted {
			t.Fatalf("%s: answered %d, want 202", name, s.status)
		}
		if got := s.task.RunAt.Sub(s.task.CreatedAt); got > c.wait || got < c.wait-slack {
			t.Errorf("%s: due %v after it was stored, want %v", name, got, c.wait)
		}
		got := instances[0].await(s.id, ended)
		if end := strings.TrimSpace(got.State + " " + or(got.Reason, "")); end != c.end {
			t.Errorf("%s: %s, want %s\n%s", name, end, c.end, compact(t, got))
		}
		j.mu.Lock()
		arrivals := slices.Clone(j.arrivals[s.id])
		j.mu.Unlock()
		if c.calls >= 0 && len(arrivals) != c.calls {
			t.Errorf("%s: %d calls, want %d", name, len(arrivals), c.calls)
		}
		for n, a := range arrivals {
			if late := a.at.Sub(a.runAt); late > slack {
				t.Errorf("%s: call %d came %v after it was due", name, n+1, late)
			}
			if n == 0 {
				continue
			}
			if pause := a.at.Sub(arrivals[n-1].at); pause < c.pause || pause > c.pause+slack {
				t.Errorf("%s: call %d came %v after the one before, want %v", name, n+1, pause, c.pause)
			}
		}
		for n, a := range got.Attempts {
			end := a.StartedAt.Add(time.Duration(a.DurationSeconds * float64(time.Second)))
			if a.StartedAt.Before(s.task.RunAt) || a.StartedAt.Sub(arrivals[n].at).Abs() > slack || end.After(got.FinishedAt.Add(time.Second)) {
				t.Errorf("%s: the times of attempt %d make no sense\n%s", name, n+1, compact(t, got))
			}
		}
	}

	target := newTarget(t, statusOf)
	for offset, p := range instances {
		if p.count(`"msg":"task succeeded"`) == 0 {
			t.Errorf("the instance whose clock is off by %v carried out nothing", offset)
		}
		for expires, want := range map[time.Duration]int{30 * time.Minute: http.StatusOK, -30 * time.Minute: http.StatusUnprocessableEntity} {
			a := p.do(http.MethodPost, "/worker-endpoint", fmt.Sprintf(`{"url":"%s/200","expires_at":%s}`, target.url, in(expires)))
			if a.status != want {
				t.Errorf("clock off by %v, a call that is not stored and expires in %v: %d %s, want %d", offset, expires, a.status, a.raw, want)
			}
		}
	}

	for _, offset := range []time.Duration{hour, -hour} {
		before := j.called()
		for range 5 {
			j.submit(t.Context(), instances[offset].url, `"headers":{"X-Case":"held"},"timeout_seconds":10`)
		}
		eventually(t, func() bool { return j.called() == before+5 }, func() string { return "calls that are held did not arrive" })
		instances[offset].stop(syscall.SIGKILL)
	}
	j.checkTakeovers(j.check(database), lease, poll)
}

// buildWithClockOffset has the test start a program whose wall clock is off by
// CLOCK_OFFSET_SECONDS; its monotonic clock is not. A Go program does not ask
// the C library for the time, so nothing from outside can do that.
func buildWithClockOffset(t *testing.T) {
	t.Helper()
	output, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	original := filepath.Join(strings.TrimSpace(string(output)), "src", "time", "time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		t.Fatal(err)
	}
	changed := string(source)
	for _, change := range [][2]string{
		{"\nimport (\n", "\nimport (\n\t\"syscall\"\n"},
		{"\nfunc Now() Time {\n\tsec, nsec, mono := runtimeNow()\n", `
var clockOffset = func() int64 {
	value, _ := syscall.Getenv("CLOCK_OFFSET_SECONDS")
	seconds, _ := atoi(value)
	return int64(seconds)
}()

func Now() Time {
	sec, nsec, mono := runtimeNow()
	sec += clockOffset
`},
	} {
		if strings.Count(changed, change[0]) != 1 {
			t.Fatalf("%s has changed: where is %q?", original, change[0])
		}
		changed = strings.Replace(changed, change[0], change[1], 1)
	}
	dir := t.TempDir()
	replacement := filepath.Join(dir, "time.go")
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{original: replacement}})
	if err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string][]byte{replacement: []byte(changed), filepath.Join(dir, "overlay.json"): overlay} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	usual := binary
	t.Cleanup(func() { binary = usual })
	binary = filepath.Join(dir, "orchestrator")
	if output, err := buildCommand(binary, "-overlay", filepath.Join(dir, "overlay.json")).CombinedOutput(); err != nil {
		t.Fatalf("build with another clock: %v\n%s", err, output)
	}
}

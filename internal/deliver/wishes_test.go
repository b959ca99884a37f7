package deliver

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

func TestWishes(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	for name, tt := range map[string]struct {
		code    int
		headers []string
		never   bool
		snooze  time.Duration
		told    string // how the error ends
	}{
		"nothing":                {503, nil, false, 0, "503 Service Unavailable"},
		"never":                  {503, []string{"Orchestrator-Retry", "never"}, true, 0, "; the target asks not to be called again"},
		"never, 429":             {429, []string{"Orchestrator-Retry", "Never"}, true, 0, "; the target asks not to be called again"},
		"never, 404":             {404, []string{"Orchestrator-Retry", "never"}, true, 0, "; the target asks not to be called again"},
		"another word":           {503, []string{"Orchestrator-Retry", "later"}, false, 0, "503 Service Unavailable"},
		"snooze":                 {503, []string{"Orchestrator-Snooze", "30"}, false, 30 * time.Second, "; the target asks to be called again in 30 s"},
		"snooze, 404":            {404, []string{"Orchestrator-Snooze", "1.5"}, false, 1500 * time.Millisecond, "; the target asks to be called again in 1.5 s"},
		"snooze, 302":            {302, []string{"Orchestrator-Snooze", "1"}, false, time.Second, "; the target asks to be called again in 1 s"},
		"both":                   {503, []string{"Orchestrator-Retry", "never", "Orchestrator-Snooze", "30"}, true, 30 * time.Second, "; the target asks not to be called again"},
		"for a day":              {503, []string{"Orchestrator-Snooze", "86400"}, false, day, " in 86400 s"},
		"for longer":             {503, []string{"Orchestrator-Snooze", "86401"}, false, day, " in 86400 s"},
		"for ages":               {503, []string{"Orchestrator-Snooze", strings.Repeat("9", 2000)}, false, day, " in 86400 s"},
		"for no time":            {503, []string{"Orchestrator-Snooze", "0"}, false, 0, "503 Service Unavailable"},
		"for next to no time":    {503, []string{"Orchestrator-Snooze", "0.0000000001"}, false, 0, "503 Service Unavailable"},
		"negative":               {503, []string{"Orchestrator-Snooze", "-1"}, false, 0, "503 Service Unavailable"},
		"with an exponent":       {503, []string{"Orchestrator-Snooze", "1e3"}, false, 0, "503 Service Unavailable"},
		"infinite":               {503, []string{"Orchestrator-Snooze", "Inf"}, false, 0, "503 Service Unavailable"},
		"with a unit":            {503, []string{"Orchestrator-Snooze", "30s"}, false, 0, "503 Service Unavailable"},
		"a point":                {503, []string{"Orchestrator-Snooze", "."}, false, 0, "503 Service Unavailable"},
		"two points":             {503, []string{"Orchestrator-Snooze", "1.2.3"}, false, 0, "503 Service Unavailable"},
		"an empty one":           {503, []string{"Orchestrator-Snooze", ""}, false, 0, "503 Service Unavailable"},
		"a success passes over":  {200, []string{"Orchestrator-Retry", "never", "Orchestrator-Snooze", "30"}, false, 0, ""},
		"another success, so do": {299, []string{"Orchestrator-Snooze", "30"}, false, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t, answer(tt.code, "", tt.headers...))
			o := newDeliverer(t).Deliver(t.Context(), newCall("POST", s.URL, nil))
			if o.Never != tt.never || o.Snooze != tt.snooze || o.Kind != task.Classify(tt.code) {
				t.Errorf("got %s, Never = %t, Snooze = %v; want %t, %v", o.Kind, o.Never, o.Snooze, tt.never, tt.snooze)
			}
			if !strings.HasSuffix(o.Error, tt.told) || tt.told == "" && o.Error != "" {
				t.Errorf("Error = %q, want it to end in %q", o.Error, tt.told)
			}
		})
	}
}

// What a head asks for holds, whatever becomes of the body behind it.
func TestWishesOfABrokenAnswer(t *testing.T) {
	t.Parallel()
	address := newRawServer(t, func(conn net.Conn, _ int) {
		_ = readRequest(bufio.NewReader(conn))
		_, _ = io.WriteString(conn, "HTTP/1.1 503 Busy\r\nOrchestrator-Snooze: 30\r\nContent-Length: 100\r\n\r\nha")
	})
	o := newDeliverer(t).Deliver(t.Context(), newCall("POST", "http://"+address, nil))
	if o.Snooze != 30*time.Second || o.StatusCode != 503 {
		t.Errorf("got %+v, want it snoozed for 30 s", o)
	}
}

// A call is one hop further than the request that handed its task in.
func TestHopsOfACall(t *testing.T) {
	t.Parallel()
	var got []string
	s := newServer(t, func(_ http.ResponseWriter, r *http.Request) { got = r.Header["Orchestrator-Hops"] })
	for hops, want := range map[int]string{0: "1", 9: "10", task.MaxHops: "32768"} {
		c := newCall("POST", s.URL, nil)
		c.Task.Hops = hops
		if o := newDeliverer(t).Deliver(t.Context(), c); o.Kind != task.OutcomeSucceeded {
			t.Fatalf("the call came to %+v", o)
		}
		if len(got) != 1 || got[0] != want {
			t.Errorf("a task with %d hops calls with Orchestrator-Hops %q, want %s", hops, got, want)
		}
	}
}

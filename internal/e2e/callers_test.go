package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// What is wrong with a request is said in a clear answer, and nothing of it is
// stored or called.
func TestRefusedRequestsLeaveNothing(t *testing.T) {
	t.Parallel()
	const mebibyte = 1 << 20
	database := pgtest.URL(t)
	p := start(t, "serve", "DATABASE_URL="+database)
	target := newTarget(t, statusOf)
	deep := strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000)
	// A request that is right but for one member.
	request := func(path, member string) string {
		when := ""
		if path == "/schedule" {
			when = `"delay_seconds":0,`
		}
		return `{"url":"` + target.url + `/200",` + when + member + `}`
	}
	member := func(text string) func(string) string {
		return func(path string) string { return request(path, text) }
	}
	for name, tt := range map[string]struct {
		body   func(path string) string
		header int // so many header lines
		status int
	}{
		"1 MiB + 1": {func(path string) string {
			empty := request(path, `"body":""`)
			return request(path, `"body":"`+strings.Repeat("x", mebibyte+1-len(empty))+`"`)
		}, 0, http.StatusRequestEntityTooLarge},
		"10,000 headers":              {member(`"payload":1`), 10_000, http.StatusRequestHeaderFieldsTooLarge},
		"invalid UTF-8":               {member("\"payload\":\"\xff\""), 0, http.StatusBadRequest},
		"invalid UTF-8 in body":       {member("\"body\":\"\xc3\x28\""), 0, http.StatusBadRequest},
		"a lone surrogate":            {member(`"payload":"\ud800"`), 0, http.StatusBadRequest},
		"a lone surrogate in a label": {member(`"labels":{"a":"\udc00"}`), 0, http.StatusBadRequest},
		"NUL in the url": {func(path string) string {
			return strings.Replace(request(path, `"payload":1`), "/200", `/200\u0000`, 1)
		}, 0, http.StatusUnprocessableEntity},
		"NUL in a header":                 {member(`"headers":{"X-A":"\u0000"}`), 0, http.StatusUnprocessableEntity},
		"NUL in a header's name":          {member(`"headers":{"X-\u0000":"a"}`), 0, http.StatusUnprocessableEntity},
		"NUL in a label":                  {member(`"labels":{"a":"\u0000"}`), 0, http.StatusUnprocessableEntity},
		"NUL in a label's name":           {member(`"labels":{"\u0000":"a"}`), 0, http.StatusUnprocessableEntity},
		"NUL in the method":               {member(`"method":"\u0000"`), 0, http.StatusUnprocessableEntity},
		"NUL in a member's name":          {member(`"\u0000":1`), 0, http.StatusUnprocessableEntity},
		"1e400 seconds":                   {member(`"timeout_seconds":1e400`), 0, http.StatusUnprocessableEntity},
		"nested 10,000 deep":              {member(`"payload":` + deep), 0, http.StatusBadRequest},
		"nested 10,000 deep, and a label": {member(`"labels":` + deep), 0, http.StatusBadRequest},
		"a key twice":                     {member(`"timeout_seconds":1,"timeout_seconds":2`), 0, http.StatusBadRequest},
		"a key twice in the payload":      {member(`"payload":{"a":{"b":1,"b":1}}`), 0, http.StatusBadRequest},
		"trailing data":                   {func(path string) string { return request(path, `"payload":1`) + "x" }, 0, http.StatusBadRequest},
		"a second value":                  {func(path string) string { return strings.Repeat(request(path, `"payload":1`), 2) }, 0, http.StatusBadRequest},
	} {
		for _, path := range []string{"/enqueue", "/schedule", "/worker-endpoint"} {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.url+path, strings.NewReader(tt.body(path)))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Content-Type", "application/json")
			r.Header["A"] = make([]string, tt.header) // the shortest lines that there are
			response, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Errorf("%s, %s: %v", path, name, err)
				continue
			}
			raw, err := io.ReadAll(response.Body)
			_ = response.Body.Close()
			if err != nil || response.StatusCode != tt.status {
				t.Errorf("%s, %s: %d %.500s (%v), want %d", path, name, response.StatusCode, raw, err, tt.status)
			}
			// Of headers net/http itself says that they are too large.
			if tt.header == 0 && (response.Header.Get("Content-Type") != "application/problem+json" || !bytes.Contains(raw, []byte(`"detail":"The `))) {
				t.Errorf("%s, %s: %.500s, want a problem with a sentence", path, name, raw)
			}
		}
	}
	if got := stored(t, database); len(got) > 0 {
		t.Errorf("stored: %q, want nothing", got)
	}
	if got := target.got("/200"); len(got) > 0 {
		t.Errorf("the target was called %d times, want never", len(got))
	}

	// What is legal although it looks odd arrives as it was sent.
	for _, payload := range []string{`"\u0000"`, `"\ud83d\ude00"`, `1e300`, `-0.10e-2`, strings.Repeat("[", 9000) + strings.Repeat("]", 9000), `{ "a" : 1 , "A":2}`} {
		before := len(target.got("/200"))
		task := p.submit("/enqueue", request("/enqueue", `"payload":`+payload))
		if got := p.await(task.ID, ended); got.State != "succeeded" {
			t.Errorf("%.50s: %s, want succeeded", payload, compact(t, got))
		}
		if got := target.got("/200")[before:]; len(got) != 1 || got[0].body != payload {
			t.Errorf("%.50s: the target got %v, want it once as it is", payload, got)
		}
	}
	p.await(p.submit("/enqueue", `{"url":"`+target.url+`/text","body":"a\u0000b"}`).ID, ended)
	if got := target.got("/text"); len(got) != 1 || got[0].body != "a\x00b" {
		t.Errorf("a text with NUL: the target got %v, want it once as it is", got)
	}
}

// stored is the URL of every task in the tables, sorted.
func stored(t *testing.T, databaseURL string) []string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	rows, err := conn.Query(t.Context(), "SELECT url FROM tasks UNION ALL SELECT url FROM task_history ORDER BY url")
	if err != nil {
		t.Fatal(err)
	}
	urls, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return urls
}

// Calls that /worker-endpoint makes without storing them are seen by /health,
// and there is a bound on them; tasks that are due keep their own.
func TestWorkerEndpointIsBounded(t *testing.T) {
	t.Parallel()
	const bound = 3
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), fmt.Sprint("DISPATCH_CONCURRENCY=", bound))
	release := make(chan struct{})
	target := newTarget(t, func(_ http.ResponseWriter, r *http.Request, _ int) {
		if r.URL.Path == "/hangs" {
			<-release
		}
	})
	eventually(t, func() bool { return p.do(http.MethodGet, "/health", "").status == http.StatusOK },
		func() string { return "the instance does not register" })
	hangs := `{"url":"` + target.url + `/hangs"}`
	later := p.submit("/schedule", `{"url":"`+target.url+`/later","delay_seconds":3600}`)
	var calling sync.WaitGroup
	for range bound {
		calling.Go(func() {
			if a := p.do(http.MethodPost, "/worker-endpoint", hangs); a.status != http.StatusOK {
				t.Errorf("answer = %d %s, want 200", a.status, a.raw)
			}
		})
	}
	eventually(t, func() bool { return len(target.got("/hangs")) == bound }, func() string { return "the calls are not made" })
	if a := p.do(http.MethodGet, "/health", ""); !strings.Contains(a.raw, fmt.Sprintf(`"running":%d`, bound)) {
		t.Errorf("/health = %s, want %d calls under way", a.raw, bound)
	}
	for _, body := range []string{hangs, `{"task_id":"` + later.ID + `"}`} {
		a := p.do(http.MethodPost, "/worker-endpoint", body)
		if a.status != http.StatusTooManyRequests || a.header.Get("Retry-After") == "" || !strings.Contains(a.raw, "Nothing was stored or carried out") {
			t.Errorf("one more: %d %s, Retry-After %q, want 429", a.status, a.raw, a.header.Get("Retry-After"))
		}
	}
	if got := p.await(p.submit("/enqueue", `{"url":"`+target.url+`/due"}`).ID, ended); got.State != "succeeded" {
		t.Errorf("a task that is due: %s, want succeeded", compact(t, got))
	}
	close(release)
	calling.Wait()
	if a := p.do(http.MethodPost, "/worker-endpoint", `{"task_id":"`+later.ID+`"}`); a.status != http.StatusOK {
		t.Errorf("when the others have ended: %d %s, want 200", a.status, a.raw)
	}
	got := []int{len(target.got("/hangs")), len(target.got("/later")), len(target.got("/due"))}
	if diff := cmp.Diff([]int{bound, 1, 1}, got); diff != "" {
		t.Errorf("calls of /hangs, /later, /due (-want +got):\n%s", diff)
	}
}

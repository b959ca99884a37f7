package e2e

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// The way from a task that did not arrive to why, as docs/operations.md walks it.
func TestFindAndExplain(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t))
	target := newTarget(t, statusOf)
	lost := p.submit("/enqueue", `{"url":"`+target.url+`/503/lost","labels":{"kind":"play","user":"7"},"retry":{"max_attempts":2,"min_backoff_seconds":0.01}}`)
	fine := p.submit("/enqueue", `{"url":"`+target.url+`/200/fine","labels":{"kind":"play"}}`)
	later := p.submit("/schedule", `{"url":"`+target.url+`/200/later","delay_seconds":3600,"labels":{"kind":"play"}}`)
	for _, id := range []string{lost.ID, fine.ID} {
		if got := p.do(http.MethodGet, "/tasks/"+id+"?wait_seconds=60", "").task; !ended(got) {
			t.Errorf("after the wait: %s, want an end", compact(t, got))
		}
	}

	list := func(query string) (ids []string, next *string) {
		t.Helper()
		a := p.do(http.MethodGet, "/tasks?"+query, "")
		var page struct {
			Tasks      []taskJSON
			NextCursor *string `json:"next_cursor"`
		}
		if err := json.Unmarshal([]byte(a.raw), &page); err != nil || a.status != http.StatusOK {
			t.Fatalf("GET /tasks?%s = %d %s", query, a.status, a.raw)
		}
		for _, one := range page.Tasks {
			ids = append(ids, one.ID)
		}
		return ids, page.NextCursor
	}
	host, err := url.Parse(target.url)
	if err != nil {
		t.Fatal(err)
	}
	all := []string{later.ID, fine.ID, lost.ID} // the newest first
	for query, want := range map[string][]string{
		"":                             all,
		"state=failed":                 {lost.ID},
		"state=pending,succeeded":      {later.ID, fine.ID},
		"label.kind=play&label.user=7": {lost.ID},
		"host=" + host.Hostname():      all,
		"url=" + target.url + "/200/":  {later.ID, fine.ID},
		"reason=attempts_exhausted":    {lost.ID},
		"min_attempts=2":               {lost.ID},
		"created_by=nobody":            nil,
		"run_after=" + later.RunAt.Format(time.RFC3339Nano):         {later.ID},
		"created_before=" + fine.CreatedAt.Format(time.RFC3339Nano): {lost.ID},
		"finished_after=2020-01-01T00:00:00Z&state=failed":          {lost.ID},
	} {
		if got, next := list(query); compact(t, got) != compact(t, want) || next != nil {
			t.Errorf("GET /tasks?%s: %v, want %v and no more", query, got, want)
		}
	}
	var paged []string
	for query := "limit=1"; ; {
		ids, next := list(query)
		paged = append(paged, ids...)
		if next == nil {
			break
		}
		query = "limit=1&cursor=" + *next
	}
	if compact(t, paged) != compact(t, all) {
		t.Errorf("page by page: %v, want %v", paged, all)
	}

	if got, want := p.do(http.MethodGet, "/tasks/counts", "").raw, `{"states":{"pending":{"count":1,"exact":true},"running":{"count":0,"exact":true},`+
		`"succeeded":{"count":1,"exact":true},"failed":{"count":1,"exact":true},"cancelled":{"count":0,"exact":true}},"oldest_due_seconds":0}`; got != want && got != want+"\n" {
		t.Errorf("GET /tasks/counts: %s, want %s", got, want)
	}
	var explained struct {
		Summary string
		Facts   struct {
			Instances, Slots int
			LastStatusCode   int `json:"last_status_code"`
		}
	}
	a := p.do(http.MethodGet, "/tasks/"+lost.ID+"/explain", "")
	if err := json.Unmarshal([]byte(a.raw), &explained); err != nil || explained.Facts.Instances != 1 || explained.Facts.Slots != 200 || explained.Facts.LastStatusCode != 503 {
		t.Errorf("GET …/explain = %d %s", a.status, a.raw)
	}
}

// Thousands wait for the end of tasks, on the instance that carries them out
// and on another, and hold no connection to the database meanwhile.
func TestManyWait(t *testing.T) {
	t.Parallel()
	databaseURL := pgtest.URL(t)
	release := make(chan struct{})
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		if r.URL.Path == "/slow" {
			<-release
		}
	})
	t.Cleanup(sync.OnceFunc(func() {
		select {
		case <-release:
		default:
			close(release) // before the target closes
		}
	}))
	const tasks, waiters = 20, 2000
	first := start(t, "serve", "DATABASE_URL="+databaseURL, "DATABASE_MAX_CONNS=4", "LOG_LEVEL=info")
	second := start(t, "serve", "DATABASE_URL="+databaseURL, "DATABASE_MAX_CONNS=4", "LOG_LEVEL=info", "DISPATCH=false")
	var ids []string
	for range tasks {
		ids = append(ids, first.submit("/enqueue", `{"url":"`+target.url+`/slow","timeout_seconds":600}`).ID)
	}

	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	var asked, waiting sync.WaitGroup
	// wait has n callers wait on a process. They ask again where the wait was not long
	// enough, or the database was too busy to look a task up, which 503 says.
	wait := func(p *process, n int, id func(int) string, want ...string) {
		for i := range n {
			asked.Add(1)
			waiting.Go(func() {
				once := sync.OnceFunc(asked.Done)
				ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) { once() }})
				state := waitOnce(ctx, t, client, p.url+"/tasks/"+id(i)+"?wait_seconds=60")
				once()
				wanted := func() bool {
					return slices.ContainsFunc(want, func(w string) bool { return strings.HasPrefix(state, w) })
				}
				for again := 0; again < 10 && !wanted() && (state == "running" || strings.HasPrefix(state, "503 ")); again++ {
					state = waitOnce(t.Context(), t, client, p.url+"/tasks/"+id(i)+"?wait_seconds=60")
				}
				if !wanted() {
					t.Errorf("after the wait a task is %q, want %q", state, want)
				}
			})
		}
	}
	wait(first, waiters, func(i int) string { return ids[i%tasks] }, "succeeded")
	wait(second, waiters, func(i int) string { return ids[i%tasks] }, "succeeded")
	asked.Wait()

	// Everybody else is served meanwhile.
	for range 3 {
		quick := second.submit("/enqueue", `{"url":"`+target.url+`/quick"}`)
		if got := second.do(http.MethodGet, "/tasks/"+quick.ID+"?wait_seconds=60", "").task; got.State != "succeeded" {
			t.Errorf("a task beside the waiting: %s, want succeeded", compact(t, got))
		}
	}
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	var connections int
	err = conn.QueryRow(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'orchestrator'").Scan(&connections)
	if err != nil || connections > 8 {
		t.Errorf("%d connections (%v), want at most the 8 of two instances", connections, err)
	}
	close(release)
	waiting.Wait()

	// SIGTERM does not wait for those who wait.
	later := first.submit("/schedule", `{"url":"`+target.url+`/quick","delay_seconds":3600}`)
	wait(second, 100, func(int) string { return later.ID }, "pending", "503 ") // the latter for who came too late
	asked.Wait()
	second.stop(syscall.SIGTERM)
	waiting.Wait()
}

// waitOnce asks for a task and returns its state, or what was answered instead.
func waitOnce(ctx context.Context, t *testing.T, client *http.Client, url string) string {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Error(err)
		return ""
	}
	response, err := client.Do(request)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = response.Body.Close() }()
	raw, err := io.ReadAll(response.Body)
	if err != nil {
		return err.Error()
	}
	var got taskJSON
	if err := json.Unmarshal(raw, &got); err != nil || response.StatusCode != http.StatusOK {
		return response.Status + " " + string(raw)
	}
	return got.State
}

package httpapi

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// fakeHosts keeps hosts that are not healthy.
type fakeHosts struct{ hosts []task.Host }

func (f *fakeHosts) SomeHosts(_ context.Context, behind string, limit int) (some []task.Host, _ error) {
	for _, h := range f.hosts {
		if h.Name > behind && len(some) < limit {
			some = append(some, h)
		}
	}
	return some, nil
}

func (f *fakeHosts) CloseHost(_ context.Context, name string) error {
	for i, h := range f.hosts {
		if h.Name == name {
			f.hosts = append(f.hosts[:i:i], f.hosts[i+1:]...)
			return nil
		}
	}
	return task.ErrNotFound
}

func TestHosts(t *testing.T) {
	t.Parallel()
	s := newService(t)
	if a := s.get("/hosts"); a.status != http.StatusOK || cmp.Diff(map[string]any{"hosts": []any{}, "next_cursor": nil}, a.json) != "" {
		t.Errorf("got %d: %s", a.status, a.text)
	}
	s.store.hosts = []task.Host{
		{Name: "http://10.1.2.3:8080", HeldFor: time.Minute, Since: storedAt, Version: 1},
		{Name: "https://a.example", OpenFor: 30 * time.Second, Opened: 2, Allowed: 1, Why: "8 of 10 calls failed", Since: storedAt, Version: 1},
		{Name: "https://b.example", Opened: 1, Allowed: 4, Since: storedAt, Version: 1},
		{Name: "https://c.example", CongestedFor: time.Second, Since: storedAt, Version: 1},
	}
	host := func(name, status, why string, until, allowed any, opened float64) map[string]any {
		return map[string]any{"host": name, "status": status, "why": why, "since": "2026-11-24T12:00:00.123456Z", "until": until, "allowed": allowed, "opened": opened}
	}
	want := map[string]any{"hosts": []any{
		host("http://10.1.2.3:8080", "held", "", "2026-11-24T12:01:00.123456Z", nil, 0),
		host("https://a.example", "broken", "8 of 10 calls failed", "2026-11-24T12:00:30.123456Z", 1.0, 2),
		host("https://b.example", "recovering", "", nil, 4.0, 1),
		host("https://c.example", "congested", "", nil, nil, 0),
	}, "next_cursor": nil}
	if diff := cmp.Diff(want, s.get("/hosts?limit=4").json); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	page := s.get("/hosts?limit=3")
	if got := page.at("next_cursor"); got != "https://b.example" || page.at("hosts", 3) != nil {
		t.Errorf("a page of 3: %s, want the cursor https://b.example", page.text)
	}
	if a := s.get("/hosts?limit=3&cursor=https%3A%2F%2Fb.example"); a.at("hosts", 0, "host") != "https://c.example" || a.at("next_cursor") != nil {
		t.Errorf("the page behind it: %s", a.text)
	}
	s.refused(s.get("/hosts?limit=0"), http.StatusUnprocessableEntity, `["query","limit"] out_of_range`)
	s.refused(s.get("/hosts?limit=201"), http.StatusUnprocessableEntity, `["query","limit"] out_of_range`)
	for _, name := range []string{"https%3A%2F%2Fa.example", "b.example", "10.1.2.3:8080", "HTTPS%3A%2F%2FC.example:443"} {
		if a := s.post("/hosts/"+name+"/close", ""); a.status != http.StatusNoContent {
			t.Errorf("close %s: got %d: %s", name, a.status, a.text)
		}
	}
	if len(s.store.hosts) != 0 {
		t.Errorf("%v are not closed", s.store.hosts)
	}
	s.refused(s.post("/hosts/b.example/close", ""), http.StatusNotFound)
	s.refused(s.post("/hosts/"+marker+"%20/close", ""), http.StatusNotFound)
}

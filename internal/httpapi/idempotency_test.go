package httpapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// keyed makes a fake store remember keys as the real one does.
func keyed(s *service) {
	first := map[string]*task.Task{}
	s.store.insert = func(_ context.Context, t *task.Task) error {
		switch before := first[t.IdempotencyKey]; {
		case t.IdempotencyKey == "":
		case before == nil:
			first[t.IdempotencyKey] = t
		case string(before.Fingerprint) == string(t.Fingerprint):
			return &task.RepeatError{Tasks: []task.ID{before.ID}}
		default:
			return task.ErrKeyTaken
		}
		return nil
	}
	s.store.get = func(_ context.Context, id task.ID) (*task.Task, error) {
		for _, t := range first {
			if t.ID == id {
				now := *t
				now.State, now.LastClaim = task.Succeeded, 1
				return &now, nil
			}
		}
		return nil, task.ErrNotFound
	}
}

func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	for path, body := range map[string]string{"/enqueue": with("payload", "1"), "/schedule": with("delay_seconds", "60")} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			keyed(s)
			const key = `~!"#,;k`
			a := s.post(path, body, "Idempotency-Key", key)
			first := s.only(a)
			if a.header["Idempotent-Replayed"] != nil {
				t.Errorf("the first answer has Idempotent-Replayed: %q", a.header["Idempotent-Replayed"])
			}

			// As it is now, like GET /tasks/{id}; the same bytes as whatever JSON.
			a = s.post(path, body, "Idempotency-Key", key, "Content-Type", "application/vnd.melodia+json; charset=utf-8")
			if a.status != http.StatusOK || a.header.Get("Idempotent-Replayed") != "true" || a.header.Get("Location") != "/tasks/"+first.ID.String() {
				t.Errorf("a repeat: got %d with %v", a.status, a.header)
			}
			if seen := s.get("/tasks/" + first.ID.String()); a.text != seen.text || a.header.Get("ETag") != seen.header.Get("ETag") || a.at("state") != "succeeded" {
				t.Errorf("a repeat: got %s %s\nwant what GET says: %s %s", a.header.Get("ETag"), a.text, seen.header.Get("ETag"), seen.text)
			}
			if stored := s.store.taken(); len(stored) > 0 {
				t.Errorf("a repeat stored %d tasks", len(stored))
			}

			other := s.post(path, strings.TrimSuffix(body, "}")+`,"labels":{"k":"`+marker+`"}}`, "Idempotency-Key", key)
			s.refused(other, http.StatusConflict)
			s.refused(s.post(path, body+" ", "Idempotency-Key", key), http.StatusConflict)
			if path == "/schedule" {
				s.only(s.post("/enqueue", with("payload", "1"), "Idempotency-Key", "both"))
				s.refused(s.post(path, body, "Idempotency-Key", "both"), http.StatusConflict)
			}

			// Others have keys of their own, and so do those without a name.
			for _, caller := range []string{"plays", "plays " + key, key} {
				s.only(s.post(path, body, "Idempotency-Key", key, "X-Test-Caller", caller))
				if a := s.post(path, body, "Idempotency-Key", key, "X-Test-Caller", caller); a.status != http.StatusOK || a.at("created_by") != caller {
					t.Errorf("a repeat by %q: got %d %s", caller, a.status, a.text)
				}
			}
			s.only(s.post(path, body, "Idempotency-Key", "bc", "X-Test-Caller", "a"))
			s.only(s.post(path, body, "Idempotency-Key", "c", "X-Test-Caller", "ab"))
			s.only(s.post(path, body))
			s.only(s.post(path, body))
		})
	}
}

// The same request to the two paths, with a key that is not known there.
func TestFingerprintHasThePath(t *testing.T) {
	t.Parallel()
	api := newService(t).API
	fingerprint := func(path string) (got []byte) {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, strings.NewReader("{}"))
		r.Header.Set("Idempotency-Key", "k")
		api.door.ReadBody(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			in, err := api.submission(r)
			if err != nil {
				t.Error(err)
			}
			got = in.Fingerprint
		})).ServeHTTP(httptest.NewRecorder(), r)
		return got
	}
	one, two := fingerprint("/enqueue"), fingerprint("/schedule")
	if len(one) != 32 || cmp.Equal(one, two) {
		t.Errorf("got the fingerprints %x and %x, want two different ones of 32 bytes", one, two)
	}
}

func TestIllegalIdempotencyKeys(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const loc = `["header","Idempotency-Key"] `
	for name, tt := range map[string]struct {
		values []string
		want   string
	}{
		"empty":      {[]string{""}, "string_too_short"},
		"long":       {[]string{strings.Repeat("k", 256)}, "string_pattern_mismatch"},
		"a space":    {[]string{"a " + marker}, "string_pattern_mismatch"},
		"a tab":      {[]string{"a\t" + marker}, "string_pattern_mismatch"},
		"not ASCII":  {[]string{"é" + marker}, "string_pattern_mismatch"},
		"two":        {[]string{"a", marker}, "duplicate"},
		"twice":      {[]string{marker, marker}, "duplicate"},
		"an empty 2": {[]string{"a", ""}, "duplicate"},
	} {
		for _, path := range []string{"/enqueue", "/schedule"} {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server().URL+path, strings.NewReader(with("payload", "1")))
			if err != nil {
				t.Fatal(err)
			}
			r.Header["Content-Type"], r.Header["Idempotency-Key"] = []string{"application/json"}, tt.values
			a := s.send(r)
			if got := a.errors(); len(got) != 1 || got[0] != loc+tt.want {
				t.Errorf("%s: got errors %q, want %s", name, got, tt.want)
			}
			s.refused(a, http.StatusUnprocessableEntity, loc+tt.want)
		}
	}
	keyed(s)
	for _, legal := range []string{"k", strings.Repeat("k", 255), "8e03978e-40d5-43e8-bc93-6894a57f9324"} {
		s.only(s.post("/enqueue", with("payload", "1"), "Idempotency-Key", legal))
	}
}

// Whoever sends it again must not be told that nothing is stored, for want of a
// look at it.
func TestRepeatThatCannotBeRead(t *testing.T) {
	t.Parallel()
	for _, busy := range []error{task.ErrOverloaded, task.ErrTooBroad} {
		s := newService(t)
		s.store.insert = func(context.Context, *task.Task) error { return &task.RepeatError{Tasks: []task.ID{{1}}} }
		s.store.get = func(context.Context, task.ID) (*task.Task, error) { return nil, busy }
		for path, body := range map[string]string{"/enqueue": with("payload", "1"), "/tasks/batch": `{"tasks":[` + with("payload", "1") + `]}`} {
			if a := s.post(path, body, "Idempotency-Key", "k"); a.status != http.StatusServiceUnavailable || a.detail() != storedDetail || a.header.Get("Retry-After") == "" {
				t.Errorf("%s, %v: got %d %q", path, busy, a.status, a.detail())
			}
		}
	}
}

// Of what is over, and whose retention is too, it is known that it was done.
func TestRepeatAfterTheRetention(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.insert = func(context.Context, *task.Task) error { return &task.RepeatError{Tasks: []task.ID{{1}}} }
	a := s.post("/enqueue", with("payload", "1"), "Idempotency-Key", "k")
	s.refused(a, http.StatusConflict)
	if a.detail() != goneDetail {
		t.Errorf("got %q", a.detail())
	}
}

// What was stored stays stored when it is sent again, though it breaks rules by
// now: time has passed, or settings have changed.
func TestRepeatThatBreaksRules(t *testing.T) {
	t.Parallel()
	late := `"expires_at":"` + storedAt.Add(30*time.Second).Format(time.RFC3339) + `"`
	refusedTarget := `{"url":"https://refused.example/","payload":1}`
	for path, tt := range map[string]struct {
		body   string
		errors []string
	}{
		"/schedule":    {with("delay_seconds", "60,"+late), []string{`["body","expires_at"] conflict`}},
		"/enqueue":     {refusedTarget, []string{`["body","url"] target_refused`}},
		"/tasks/batch": {`{"tasks":[` + with("payload", "1") + `,` + with("delay_seconds", "60,"+late) + `]}`, []string{`["body","tasks",1,"expires_at"] conflict`}},
	} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			s := newService(t, func(o *settings) {
				o.Policy = fakePolicy(func(rawURL string) error {
					if strings.Contains(rawURL, "refused") {
						return errors.New("must be allowed")
					}
					return nil
				})
			})
			first := task.ID{7}
			s.store.get = func(context.Context, task.ID) (*task.Task, error) {
				return &task.Task{ID: first, State: task.Pending, RunAt: storedAt, CreatedAt: storedAt}, nil
			}
			var asked []string
			var found error
			s.store.repeated = func(key string, fingerprint []byte) error {
				asked = append(asked, fmt.Sprintf("%s %d", key, len(fingerprint)))
				return found
			}
			s.refused(s.post(path, tt.body), http.StatusUnprocessableEntity, tt.errors...)
			if asked != nil {
				t.Errorf("without a key %q were looked up", asked)
			}
			for _, found = range []error{nil, fmt.Errorf("look up: %w", task.ErrKeyTaken)} {
				s.refused(s.post(path, tt.body, "Idempotency-Key", "k", "X-Test-Caller", "plays"), http.StatusUnprocessableEntity, tt.errors...)
			}
			if want := []string{"plays k 32", "plays k 32"}; !cmp.Equal(asked, want) {
				t.Errorf("looked up %q, want %q", asked, want)
			}
			found = fmt.Errorf("look up: %w", &task.RepeatError{Tasks: []task.ID{first}})
			if a := s.post(path, tt.body, "Idempotency-Key", "k"); a.status != http.StatusOK || a.header.Get("Idempotent-Replayed") != "true" || !strings.Contains(a.text, first.String()) {
				t.Errorf("a repeat: got %d %s", a.status, a.text)
			}
			found = task.ErrUnavailable // whether it is stored is not known
			s.refused(s.post(path, tt.body, "Idempotency-Key", "k"), http.StatusServiceUnavailable)
			found = errors.New("never asked")
			s.refused(s.post(path, "{", "Idempotency-Key", "k"), http.StatusBadRequest)
		})
	}
}

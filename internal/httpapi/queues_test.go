package httpapi

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// fakeQueues keeps settings of queues as a store does. Versions are 1, 2, 3, ….
type fakeQueues struct {
	queues  map[string]task.Queue
	keys    map[string]task.QueueKey // by "queue key"
	loads   map[string]task.QueueLoad
	version int64
	// rival, where it is not nil, is called before anything is written.
	rival func()
	inUse bool
}

func (f *fakeQueues) QueueDefaults(_ context.Context, name string) (task.QueueDefaults, error) {
	return f.queues[name].Defaults, nil
}

func (f *fakeQueues) Queue(_ context.Context, name string) (task.Queue, error) {
	q, ok := f.queues[name]
	if !ok {
		return q, fmt.Errorf("get queue: %w", task.ErrQueueNotFound)
	}
	return q, nil
}

func (f *fakeQueues) Queues(_ context.Context, behind string, limit int) (found []task.Queue, err error) {
	for _, name := range slices.Sorted(maps.Keys(f.queues)) {
		if name > behind && len(found) < limit {
			found = append(found, f.queues[name])
		}
	}
	return found, nil
}

func (f *fakeQueues) QueueLoads(_ context.Context, names []string) (loads []task.QueueLoad, err error) {
	for _, name := range names {
		loads = append(loads, f.loads[name])
	}
	return loads, nil
}

// write stores a value unless it was read in another version than the stored one.
func write[T any](f *fakeQueues, all *map[string]T, name string, v T, version func(*T) *int64) (T, error) {
	if f.rival != nil {
		f.rival()
	}
	if *all == nil {
		*all = make(map[string]T)
	}
	stored := (*all)[name]
	if *version(&stored) != *version(&v) {
		return v, fmt.Errorf("write: %w", task.ErrQueueChanged)
	}
	f.version++
	*version(&v) = f.version
	(*all)[name] = v
	return v, nil
}

func (f *fakeQueues) PutQueue(_ context.Context, q task.Queue) (task.Queue, error) {
	q.PausedAt = f.queues[q.Name].PausedAt
	return write(f, &f.queues, q.Name, q, func(q *task.Queue) *int64 { return &q.Version })
}

func (f *fakeQueues) PauseQueue(ctx context.Context, name string, paused bool) (task.Queue, error) {
	q, err := f.Queue(ctx, name)
	if err != nil {
		return q, err
	}
	q.PausedAt = time.Time{}
	if paused {
		q.PausedAt = storedAt
	}
	f.queues[name] = q
	return q, nil
}

func (f *fakeQueues) DeleteQueue(ctx context.Context, name string, version int64) error {
	if f.rival != nil {
		f.rival()
	}
	q, err := f.Queue(ctx, name)
	switch {
	case err != nil:
		return err
	case f.inUse:
		return task.ErrQueueInUse
	case q.Version != version:
		return task.ErrQueueChanged
	}
	delete(f.queues, name)
	return nil
}

func (f *fakeQueues) QueueKey(_ context.Context, queue, key string) (task.QueueKey, error) {
	k, ok := f.keys[queue+" "+key]
	if !ok {
		return k, task.ErrQueueKeyNotFound
	}
	return k, nil
}

func (f *fakeQueues) QueueKeys(_ context.Context, queue, behind string, limit int) (found []task.QueueKey, err error) {
	for _, k := range slices.SortedFunc(maps.Values(f.keys), func(a, b task.QueueKey) int { return cmp.Compare(a.Key, b.Key) }) {
		if k.Queue == queue && k.Key > behind && len(found) < limit {
			found = append(found, k)
		}
	}
	return found, nil
}

func (f *fakeQueues) PutQueueKey(_ context.Context, k task.QueueKey) (task.QueueKey, error) {
	if _, ok := f.queues[k.Queue]; !ok {
		return k, task.ErrQueueNotFound
	}
	return write(f, &f.keys, k.Queue+" "+k.Key, k, func(k *task.QueueKey) *int64 { return &k.Version })
}

func (f *fakeQueues) DeleteQueueKey(ctx context.Context, queue, key string, version int64) error {
	if f.rival != nil {
		f.rival()
	}
	k, err := f.QueueKey(ctx, queue, key)
	switch {
	case err != nil:
		return err
	case version != 0 && k.Version != version:
		return task.ErrQueueChanged
	}
	delete(f.keys, queue+" "+key)
	return nil
}

// shownQueue is a queue without any setting, as it is answered.
func shownQueue(change func(q, perKey, defaults, retry map[string]any)) map[string]any {
	perKey := map[string]any{"max_concurrent": nil, "max_per_second": nil, "burst": nil, "ordered": false}
	retry := map[string]any{"max_attempts": nil, "max_retry_duration_seconds": nil, "min_backoff_seconds": nil, "max_backoff_seconds": nil, "max_doublings": nil, "retry_client_errors": nil}
	defaults := map[string]any{"timeout_seconds": nil, "retry": retry}
	q := map[string]any{"name": "mail", "paused": false, "paused_at": nil, "max_concurrent": nil, "max_per_second": nil, "burst": nil, "per_key": perKey, "defaults": defaults}
	if change != nil {
		change(q, perKey, defaults, retry)
	}
	return q
}

const allSettings = `{"max_concurrent":5,"max_per_second":2.5,"burst":7,"per_key":{"max_concurrent":1,"max_per_second":0.001,"burst":1,"ordered":true},` +
	`"defaults":{"timeout_seconds":1.5,"retry":{"max_attempts":3,"max_retry_duration_seconds":0,"min_backoff_seconds":0.29,"max_backoff_seconds":60,"max_doublings":0,"retry_client_errors":false}}}`

func TestPutQueue(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]map[string]any{
		`{}`: shownQueue(nil),
		`{"max_concurrent":null,"max_per_second":null,"burst":null,"per_key":null,"defaults":null}`: shownQueue(nil),
		`{"per_key":{},"defaults":{"retry":null}}`:                                                  shownQueue(nil),
		`{"max_concurrent":1000000}`:                                                                shownQueue(func(q, _, _, _ map[string]any) { q["max_concurrent"] = 1e6 }),
		`{"max_per_second":2.1,"per_key":{"max_per_second":0.5}}`: shownQueue(func(q, k, _, _ map[string]any) {
			q["max_per_second"], q["burst"], k["max_per_second"], k["burst"] = 2.1, 3.0, 0.5, 1.0
		}),
		allSettings: shownQueue(func(q, k, d, r map[string]any) {
			q["max_concurrent"], q["max_per_second"], q["burst"] = 5.0, 2.5, 7.0
			k["max_concurrent"], k["max_per_second"], k["burst"], k["ordered"] = 1.0, 0.001, 1.0, true
			d["timeout_seconds"], r["max_attempts"], r["max_retry_duration_seconds"], r["min_backoff_seconds"] = 1.5, 3.0, 0.0, 0.29
			r["max_backoff_seconds"], r["max_doublings"], r["retry_client_errors"] = 60.0, 0.0, false
		}),
	} {
		s := newService(t)
		for version := 1; version <= 2; version++ { // as if nothing had been before
			a := s.do(http.MethodPut, "/queues/mail", body)
			if a.status != http.StatusOK || a.header.Get("ETag") != fmt.Sprintf("%q", fmt.Sprint(version)) {
				t.Fatalf("%s: got %d with ETag %s: %s", body, a.status, a.header.Get("ETag"), a.text)
			}
			if diff := gocmp.Diff(want, a.json); diff != "" {
				t.Errorf("%s (-want +got):\n%s", body, diff)
			}
		}
	}
}

// The cases of RFC 7396, appendix A, that an object of this kind can have, and what they
// come to.
func TestPatchQueue(t *testing.T) {
	t.Parallel()
	all := func(change func(q, perKey, defaults, retry map[string]any)) map[string]any {
		s := newService(t)
		want, _ := s.do(http.MethodPut, "/queues/mail", allSettings).json.(map[string]any)
		object := func(of map[string]any, name string) map[string]any { m, _ := of[name].(map[string]any); return m }
		change(want, object(want, "per_key"), object(want, "defaults"), object(object(want, "defaults"), "retry"))
		return want
	}
	none := shownQueue(nil)
	for body, want := range map[string]map[string]any{
		`{}`:                        all(func(_, _, _, _ map[string]any) {}),
		`{"max_concurrent":6}`:      all(func(q, _, _, _ map[string]any) { q["max_concurrent"] = 6.0 }),
		`{"max_concurrent":null}`:   all(func(q, _, _, _ map[string]any) { q["max_concurrent"] = nil }),
		`{"burst":null}`:            all(func(q, _, _, _ map[string]any) { q["burst"] = 3.0 }),
		`{"per_key":{}}`:            all(func(_, _, _, _ map[string]any) {}),
		`{"per_key":{"burst":2}}`:   all(func(_, k, _, _ map[string]any) { k["burst"] = 2.0 }),
		`{"per_key":null}`:          all(func(q, _, _, _ map[string]any) { q["per_key"] = none["per_key"] }),
		`{"defaults":null}`:         all(func(q, _, _, _ map[string]any) { q["defaults"] = none["defaults"] }),
		`{"defaults":{"retry":{}}}`: all(func(_, _, _, _ map[string]any) {}),
		`{"defaults":{"retry":{"max_attempts":null,"max_doublings":2}}}`: all(func(_, _, _, r map[string]any) { r["max_attempts"], r["max_doublings"] = nil, 2.0 }),
		`{"defaults":{"retry":null,"timeout_seconds":2}}`: all(func(_, _, d, _ map[string]any) {
			d["retry"], d["timeout_seconds"] = none["defaults"].(map[string]any)["retry"], 2.0
		}),
		`{"max_per_second":null,"burst":null,"per_key":{"ordered":null}}`: all(func(q, k, _, _ map[string]any) {
			q["max_per_second"], q["burst"], k["ordered"] = nil, nil, false
		}),
	} {
		for _, contentType := range []string{"application/json", "application/merge-patch+json"} {
			s := newService(t)
			s.do(http.MethodPut, "/queues/mail", allSettings)
			a := s.do(http.MethodPatch, "/queues/mail", body, "Content-Type", contentType, "If-Match", `"1"`)
			if a.status != http.StatusOK || a.header.Get("ETag") != `"2"` {
				t.Fatalf("%s: got %d with ETag %s: %s", body, a.status, a.header.Get("ETag"), a.text)
			}
			if diff := gocmp.Diff(want, a.json); diff != "" {
				t.Errorf("%s (-want +got):\n%s", body, diff)
			}
		}
	}
	s := newService(t)
	s.refused(s.do(http.MethodPatch, "/queues/mail", `{}`), http.StatusNotFound)
}

func TestQueueSettingsThatBreakRules(t *testing.T) {
	t.Parallel()
	for body, errors := range map[string][]string{
		`{"max_concurent":1}`:                                          {`["body","max_concurent"] extra_forbidden`},
		`{"max_concurent":null}`:                                       {`["body","max_concurent"] extra_forbidden`},
		`{"paused":true}`:                                              {`["body","paused"] extra_forbidden`},
		`{"max_concurrent":0}`:                                         {`["body","max_concurrent"] greater_than_equal`},
		`{"max_concurrent":-1}`:                                        {`["body","max_concurrent"] greater_than_equal`},
		`{"max_concurrent":1000001}`:                                   {`["body","max_concurrent"] less_than_equal`},
		`{"max_concurrent":1.5}`:                                       {`["body","max_concurrent"] int_type`},
		`{"max_concurrent":"` + marker + `"}`:                          {`["body","max_concurrent"] int_type`},
		`{"max_per_second":0}`:                                         {`["body","max_per_second"] greater_than_equal`},
		`{"max_per_second":0.0009}`:                                    {`["body","max_per_second"] greater_than_equal`},
		`{"max_per_second":10001}`:                                     {`["body","max_per_second"] less_than_equal`},
		`{"max_per_second":1e999}`:                                     {`["body","max_per_second"] less_than_equal`},
		`{"burst":0,"max_per_second":1}`:                               {`["body","burst"] greater_than_equal`},
		`{"burst":5}`:                                                  {`["body","burst"] conflict`},
		`{"per_key":{"burst":5}}`:                                      {`["body","per_key","burst"] conflict`},
		`{"per_key":5}`:                                                {`["body","per_key"] object_type`},
		`{"per_key":{"order":true}}`:                                   {`["body","per_key","order"] extra_forbidden`},
		`{"per_key":{"ordered":true,"max_concurrent":2}}`:              {`["body","per_key","max_concurrent"] conflict`},
		`{"defaults":{"timeout_seconds":0}}`:                           {`["body","defaults","timeout_seconds"] greater_than_equal`},
		`{"defaults":{"url":"` + marker + `"}}`:                        {`["body","defaults","url"] extra_forbidden`},
		`{"defaults":{"retry":{"max_attempts":101}}}`:                  {`["body","defaults","retry","max_attempts"] less_than_equal`},
		`{"defaults":{"retry":{"for":"soon"}}}`:                        {`["body","defaults","retry","for"] string_pattern_mismatch`},
		`{"defaults":{"retry":{"for":"40d"}}}`:                         {`["body","defaults","retry","for"] out_of_range`},
		`{"defaults":{"retry":{"for":"6h","max_attempts":3}}}`:         {`["body","defaults","retry","max_attempts"] conflict`},
		`{"defaults":{"retry":{"for":"6h","max_backoff_seconds":1}}}`:  {`["body","defaults","retry","for"] out_of_range`},
		`{"defaults":{"retry":{"min_backoff_seconds":86400}}}`:         {`["body","defaults","retry","max_backoff_seconds"] out_of_range`},
		`{"defaults":{"retry":{"max_retry_duration_seconds":-0.001}}}`: {`["body","defaults","retry","max_retry_duration_seconds"] greater_than_equal`},
		`[]`: {`["body"] object_type`},
	} {
		for _, method := range []string{http.MethodPut, http.MethodPatch} {
			s := newService(t)
			s.store.queues = map[string]task.Queue{"mail": {Name: "mail", Version: 7}}
			s.refused(s.do(method, "/queues/mail", body), http.StatusUnprocessableEntity, errors...)
			if got := s.store.queues["mail"].Version; got != 7 {
				t.Errorf("%s %s: something was written", method, body)
			}
		}
	}
	s := newService(t)
	for path, mistake := range map[string]string{
		"/queues/a%20b" + marker:              "string_pattern_mismatch",
		"/queues/" + strings.Repeat("a", 101): "string_too_long",
		"/queues/m%C3%BAsica":                 "string_pattern_mismatch",
		"/queues/a%2Fb":                       "string_pattern_mismatch",
	} {
		s.refused(s.do(http.MethodPut, path, `{}`), http.StatusUnprocessableEntity, `["path","name"] `+mistake)
		s.refused(s.get(path), http.StatusUnprocessableEntity, `["path","name"] `+mistake)
	}
	s.refused(s.do(http.MethodPut, "/queues/%2E%2E", `{}`), http.StatusUnprocessableEntity, `["path","name"] invalid`)
	s.refused(s.do(http.MethodPut, "/queues/mail", ""), http.StatusBadRequest)
	s.refused(s.do(http.MethodPut, "/queues/mail", "{"), http.StatusBadRequest)
	s.refused(s.do(http.MethodPut, "/queues/mail", "{}", "Content-Type", "text/plain"), http.StatusUnsupportedMediaType)
}

// A queue keeps what retry.for stands for; its tasks have that unless they say something else.
func TestQueueRetriesFor(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.do(http.MethodPut, "/queues/mail", `{"defaults":{"retry":{"max_attempts":3,"max_backoff_seconds":5,"min_backoff_seconds":2}}}`)
	a := s.do(http.MethodPatch, "/queues/mail", `{"defaults":{"retry":{"for":"10h","max_attempts":null}}}`)
	want := map[string]any{
		"max_attempts": 100.0, "max_retry_duration_seconds": 36000.0, "min_backoff_seconds": 2.0, "max_backoff_seconds": 3600.0, "max_doublings": nil, "retry_client_errors": nil,
	}
	if diff := gocmp.Diff(want, member(a.json, "defaults", "retry")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	a = s.do(http.MethodPatch, "/queues/mail", `{"defaults":{"retry":{"max_attempts":4}}}`)
	want["max_attempts"] = 4.0
	if diff := gocmp.Diff(want, member(a.json, "defaults", "retry")); diff != "" {
		t.Errorf("one member (-want +got):\n%s", diff)
	}
}

// Of editors who read the same settings the first writes, and the others read again.
func TestEditorsOfQueueSettings(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.refused(s.do(http.MethodPut, "/queues/mail", `{}`, "If-Match", "*"), http.StatusPreconditionFailed)
	s.refused(s.do(http.MethodPatch, "/queues/mail", `{}`, "If-Match", `"1"`), http.StatusPreconditionFailed)
	if s.store.queues != nil {
		t.Error("a queue was made in spite of If-Match")
	}
	s.do(http.MethodPut, "/queues/mail", `{"max_concurrent":1}`)
	tag := s.get("/queues/mail").header.Get("ETag")
	if a := s.do(http.MethodPut, "/queues/mail", `{"max_concurrent":2}`, "If-Match", tag); a.status != http.StatusOK {
		t.Fatalf("the first editor gets %d: %s", a.status, a.text)
	}
	for _, method := range []string{http.MethodPut, http.MethodPatch} {
		s.refused(s.do(method, "/queues/mail", `{"max_concurrent":3}`, "If-Match", tag), http.StatusPreconditionFailed)
	}
	s.refused(s.do(http.MethodDelete, "/queues/mail", "", "If-Match", tag), http.StatusPreconditionFailed)
	if got := s.store.queues["mail"].MaxConcurrent; got != 2 {
		t.Errorf("the limit is %d, want that of the first editor", got)
	}

	// At the very moment: what is read anew is in no version that If-Match names, or is
	// changed in its turn.
	once := func() {
		s.store.rival = func() {
			s.store.rival = nil
			s.do(http.MethodPatch, "/queues/mail", `{"burst":9,"max_per_second":1}`)
		}
	}
	once()
	s.refused(s.do(http.MethodPatch, "/queues/mail", `{"max_concurrent":4}`, "If-Match", `"2"`), http.StatusPreconditionFailed)
	once()
	if a := s.do(http.MethodPatch, "/queues/mail", `{"max_concurrent":5}`); a.status != http.StatusOK || a.at("max_concurrent") != 5.0 || a.at("burst") != 9.0 {
		t.Errorf("got %d: %s; want both changes", a.status, a.text)
	}
	s.store.rival = func() {
		q := s.store.queues["mail"]
		q.Version += 100
		s.store.queues["mail"] = q
	}
	s.refused(s.do(http.MethodPatch, "/queues/mail", `{"max_concurrent":6}`), http.StatusConflict)
}

func TestSeeQueues(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.refused(s.get("/queues/mail"), http.StatusNotFound)
	s.store.queues = map[string]task.Queue{"mail": {Name: "mail", Version: 5}, "a": {Name: "a", PausedAt: storedAt}, "z": {Name: "z"}}
	s.store.loads = map[string]task.QueueLoad{"mail": {Waiting: 211, Running: 5, Keys: 17, OldestDue: 3200 * time.Millisecond}}
	want := shownQueue(func(q, _, _, _ map[string]any) {
		q["waiting"], q["running"], q["keys_in_use"], q["oldest_due_seconds"] = 211.0, 5.0, 17.0, 3.2
	})
	a := s.get("/queues/mail")
	if diff := gocmp.Diff(want, a.json); diff != "" || a.header.Get("ETag") != `"5"` {
		t.Errorf("got %d with ETag %s (-want +got):\n%s", a.status, a.header.Get("ETag"), diff)
	}
	first := s.get("/queues?limit=2")
	if first.at("queues", 0, "name") != "a" || first.at("queues", 0, "paused") != true || first.at("queues", 0, "paused_at") != "2026-11-24T12:00:00.123456Z" {
		t.Errorf("the first page is %s", first.text)
	}
	if diff := gocmp.Diff(want, first.at("queues", 1)); diff != "" || first.at("next_cursor") != "mail" {
		t.Errorf("the first page is %s (-want +got):\n%s", first.text, diff)
	}
	if rest := s.get("/queues?limit=2&cursor=mail"); rest.at("queues", 0, "name") != "z" || rest.at("next_cursor") != nil {
		t.Errorf("the second page is %s", rest.text)
	}
	s.refused(s.get("/queues?limit=0"), http.StatusUnprocessableEntity, `["query","limit"] out_of_range`)
	s.refused(s.get("/queues?limit=201"), http.StatusUnprocessableEntity, `["query","limit"] out_of_range`)
	s.refused(s.get("/queues?name="+marker), http.StatusUnprocessableEntity, `["query","name"] extra_forbidden`)
}

func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, act := range []string{"pause", "resume"} {
		s.refused(s.post("/queues/mail/"+act, ""), http.StatusNotFound)
	}
	s.do(http.MethodPut, "/queues/mail", `{"max_concurrent":1}`)
	for _, tt := range []struct {
		act    string
		paused bool
	}{{"pause", true}, {"pause", true}, {"resume", false}, {"resume", false}} {
		a := s.post("/queues/mail/"+tt.act, "", "X-Test-Caller", "plays@melodia.app")
		if a.status != http.StatusOK || a.at("paused") != tt.paused || a.at("max_concurrent") != 1.0 || a.header.Get("ETag") != `"1"` {
			t.Errorf("%s: got %d with ETag %s: %s", tt.act, a.status, a.header.Get("ETag"), a.text)
		}
		s.loggedAct("queue "+tt.act+"d", `"queue":"mail"`)
	}
}

func TestPurge(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.refused(s.post("/queues/mail/purge", `{}`), http.StatusNotFound)
	s.store.queues = map[string]task.Queue{"mail": {Name: "mail"}}
	var filter task.Filter
	s.store.match = func(f *task.Filter, _ int) ([]task.ID, error) {
		filter = *f
		return []task.ID{{2}, {1}}, nil
	}
	var cancelled []task.ID
	s.store.cancelMany = func(ids []task.ID) (int, map[task.ID]int64, error) {
		cancelled = ids
		return len(ids), nil, nil
	}
	for body, want := range map[string]task.Filter{
		`{}`:                          {Queue: "mail", States: []task.State{task.Pending}},
		`{"filter":{}}`:               {Queue: "mail", States: []task.State{task.Pending}},
		`{"filter":{"flow_key":"a"}}`: {Queue: "mail", FlowKey: "a", States: []task.State{task.Pending}},
		`{"filter":{"queue":"mail"},"dry_run":true}`: {Queue: "mail", States: []task.State{task.Pending}},
		`{"filter":{"state":["pending"]}}`:           {Queue: "mail", States: []task.State{task.Pending}},
	} {
		a := s.post("/queues/mail/purge", body)
		if diff := gocmp.Diff(want, filter); diff != "" || a.at("matched") != 2.0 || a.at("changed") != 0.0 || a.at("dry_run") != true || cancelled != nil {
			t.Errorf("%s: got %d: %s, cancelled %v (-want +got):\n%s", body, a.status, a.text, cancelled, diff)
		}
	}
	if a := s.post("/queues/mail/purge", `{"dry_run":false}`); a.at("changed") != 2.0 || gocmp.Diff([]task.ID{{1}, {2}}, cancelled) != "" {
		t.Errorf("got %d: %s, cancelled %v", a.status, a.text, cancelled)
	}
	for body, errors := range map[string][]string{
		`{"filter":{"state":["running"]}}`:          {`["body","filter","state"] conflict`},
		`{"filter":{"queue":"other"}}`:              {`["body","filter","queue"] conflict`},
		`{"filter":{"flow_key":"` + marker + ` "}}`: {`["body","filter","flow_key"] invalid`},
		`{"filters":{}}`:                            {`["body","filters"] extra_forbidden`},
	} {
		s.refused(s.post("/queues/mail/purge", body), http.StatusUnprocessableEntity, errors...)
	}
}

func TestDeleteQueue(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.refused(s.do(http.MethodDelete, "/queues/mail", ""), http.StatusNotFound)
	s.do(http.MethodPut, "/queues/mail", `{}`)
	s.store.inUse = true
	s.refused(s.do(http.MethodDelete, "/queues/mail", ""), http.StatusConflict)
	s.store.inUse = false
	if a := s.do(http.MethodDelete, "/queues/mail", "", "If-Match", `"1"`); a.status != http.StatusNoContent || a.text != "" || len(s.store.queues) != 0 {
		t.Errorf("got %d %q, and %d queues are left", a.status, a.text, len(s.store.queues))
	}
}

func TestQueueKeys(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const path = "/queues/mail/keys/tenant%2F42"
	s.refused(s.do(http.MethodPut, path, `{}`), http.StatusNotFound)
	s.refused(s.get("/queues/mail/keys"), http.StatusNotFound)
	s.do(http.MethodPut, "/queues/mail", `{}`)
	s.refused(s.get(path), http.StatusNotFound)
	s.refused(s.do(http.MethodDelete, path, ""), http.StatusNotFound)
	s.refused(s.do(http.MethodPut, path, `{}`, "If-Match", "*"), http.StatusPreconditionFailed)

	want := map[string]any{"queue": "mail", "key": "tenant/42", "max_concurrent": 20.0, "max_per_second": 0.5, "burst": 1.0, "ordered": false}
	a := s.do(http.MethodPut, path, `{"max_concurrent":20,"max_per_second":0.5}`)
	tag := a.header.Get("ETag")
	if diff := gocmp.Diff(want, a.json); a.status != http.StatusOK || tag != `"2"` || diff != "" {
		t.Fatalf("got %d with ETag %s (-want +got):\n%s", a.status, tag, diff)
	}
	if diff := gocmp.Diff(want, s.get(path).json); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// What is left out is none, whatever was before.
	a = s.do(http.MethodPut, path, `{"ordered":true}`, "If-Match", tag)
	want = map[string]any{"queue": "mail", "key": "tenant/42", "max_concurrent": nil, "max_per_second": nil, "burst": nil, "ordered": true}
	if diff := gocmp.Diff(want, a.json); diff != "" {
		t.Errorf("written again (-want +got):\n%s", diff)
	}
	s.refused(s.do(http.MethodPut, path, `{}`, "If-Match", tag), http.StatusPreconditionFailed)
	s.refused(s.do(http.MethodDelete, path, "", "If-Match", tag), http.StatusPreconditionFailed)

	s.do(http.MethodPut, "/queues/mail/keys/b", `{}`)
	page := s.get("/queues/mail/keys?limit=1")
	if page.at("keys", 0, "key") != "b" || page.at("next_cursor") != "b" {
		t.Errorf("the first page is %s", page.text)
	}
	if page = s.get("/queues/mail/keys?limit=1&cursor=b"); page.at("keys", 0, "key") != "tenant/42" || page.at("next_cursor") != nil {
		t.Errorf("the second page is %s", page.text)
	}
	if a := s.do(http.MethodDelete, path, "", "If-Match", "*"); a.status != http.StatusNoContent || len(s.store.keys) != 1 {
		t.Errorf("got %d, and %d keys are left", a.status, len(s.store.keys))
	}
	for body, errors := range map[string][]string{
		`{"burst":1}`:                         {`["body","burst"] conflict`},
		`{"max_concurrent":2,"ordered":true}`: {`["body","max_concurrent"] conflict`},
		`{"max_concurrent":0}`:                {`["body","max_concurrent"] greater_than_equal`},
		`{"ordered":"` + marker + `"}`:        {`["body","ordered"] bool_type`},
	} {
		s.refused(s.do(http.MethodPut, path, body), http.StatusUnprocessableEntity, errors...)
	}
	s.refused(s.do(http.MethodPut, "/queues/mail/keys/a%20"+marker, `{}`), http.StatusUnprocessableEntity, `["path","key"] string_pattern_mismatch`)
	s.refused(s.do(http.MethodPut, "/queues/mail/keys/%2E%2E", `{}`), http.StatusUnprocessableEntity, `["path","key"] invalid`)
}

// What a task leaves out is what its queue says, and otherwise what the service says.
func TestDefaultsOfQueues(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.do(http.MethodPut, "/queues/mail", `{"defaults":{"timeout_seconds":120,"retry":{"max_attempts":3,"min_backoff_seconds":5}}}`)
	s.do(http.MethodPut, "/queues/default", `{"defaults":{"timeout_seconds":7}}`)
	plain := s.only(s.post("/enqueue", `{"url":"`+target+`"}`)).Spec
	for fields, want := range map[string]func(*task.Spec){
		`"queue":"mail"`: func(s *task.Spec) {
			s.Queue, s.Timeout, s.Retry.MaxAttempts, s.Retry.MinBackoff = "mail", 2*time.Minute, 3, 5*time.Second
		},
		`"queue":"mail","timeout_seconds":1,"retry":{"max_attempts":1}`: func(s *task.Spec) {
			s.Queue, s.Timeout, s.Retry.MaxAttempts, s.Retry.MinBackoff = "mail", time.Second, 1, 5*time.Second
		},
		`"queue":"other"`: func(s *task.Spec) { s.Queue = "other" },
		`"flow_key":"a"`:  func(s *task.Spec) { s.Queue, s.FlowKey, s.Timeout = "default", "a", 7*time.Second },
	} {
		spec := plain
		spec.Priority = task.Normal
		want(&spec)
		request := `{"url":"` + target + `",` + fields + `}`
		for path, body := range map[string]string{
			"/enqueue": request, "/schedule": strings.TrimSuffix(request, "}") + `,"delay_seconds":0}`,
			"/tasks/batch": `{"tasks":[{"url":"` + target + `"},` + request + `]}`,
		} {
			if a := s.post(path, body); a.status != http.StatusAccepted {
				t.Fatalf("%s %s: got %d: %s", path, body, a.status, a.text)
			}
			stored := s.store.taken()
			if diff := gocmp.Diff(spec, stored[len(stored)-1].Spec); diff != "" {
				t.Errorf("%s %s (-want +got):\n%s", path, fields, diff)
			}
		}
	}
	// Together they may break a rule that neither breaks alone.
	s.refused(s.post("/enqueue", `{"url":"`+target+`","queue":"mail","retry":{"max_backoff_seconds":1}}`), http.StatusUnprocessableEntity, `["body","retry","max_backoff_seconds"] out_of_range`)
}

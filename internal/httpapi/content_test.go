package httpapi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/task"
)

// A payload is any JSON, and its bytes are what counts: they are stored, or sent,
// as they came, through every door.
func TestPayloadsAreNotRead(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.get = func(context.Context, task.ID) (*task.Task, error) { return stored(), nil }
	var changed *task.Task
	s.store.change = func(t *task.Task) (*task.Task, error) { changed = t; return t, nil }
	deep := 9_990 // levels, with those around it below the 10,000 that are read
	for name, payload := range map[string]string{
		"2 to the 1024":             "179769313486231590772930519078902473361797697894230657273430081157732675805500963132708477322407536021120113879871393357658789768814416622492847430639474124377767893424865485276302219601246094119453082952085005768838150682342462881473913110540827237163350510684586298239947245938479716304835356329624224137216",
		"1e999":                     "1e999",
		"in an object":              `{"n":-1e400,"m":[1E+999999999999]}`,
		"too small":                 "1e-400",
		"10,000 digits":             strings.Repeat("7", 10_000),
		"10,000 digits of fraction": "0." + strings.Repeat("7", 10_000),
		"minus nothing":             "-0",
		"1.0":                       "1.0",
		"white space":               " [ 1 ,\t2.50,\r\n 3 ] ",
		"escapes":                   `"\u0041\/\ud83c\udfb5"`,
		"false":                     "false",
		"empty":                     `""`,
		"deep lists":                strings.Repeat("[", deep) + strings.Repeat("]", deep),
		"deep objects":              strings.Repeat(`{"a":`, deep) + "1e999" + strings.Repeat("}", deep),
	} {
		want := strings.Trim(payload, " ") // white space around it is not part of it
		taken := func() *task.Task {
			if tasks := s.store.taken(); len(tasks) > 0 {
				return tasks[0]
			}
			if _, once := s.dispatcher.taken(); len(once) > 0 {
				return once[0]
			}
			one := changed
			changed = nil
			return one
		}
		for door, send := range map[string]func() *answer{
			"enqueue":  func() *answer { return s.post("/enqueue", with("payload", payload)) },
			"schedule": func() *answer { return s.post("/schedule", with("payload", payload+`,"delay_seconds":5`)) },
			"batch":    func() *answer { return s.post("/tasks/batch", batchOf(with("payload", payload))) },
			"once":     func() *answer { return s.post("/enqueue", with("payload", payload), "Idempotency-Key", "k") },
			"worker":   func() *answer { return s.post("/worker-endpoint", with("payload", payload)) },
			"pubsub":   func() *answer { return s.post("/worker-endpoint", pushed(with("payload", payload))) },
			"change":   func() *answer { return s.do(http.MethodPatch, taskPath, `{"payload":`+payload+`}`) },
		} {
			a := send()
			if a.status != http.StatusAccepted && a.status != http.StatusOK {
				t.Errorf("%s at %s: got status %d: %s", name, door, a.status, a.text)
				continue
			}
			got := taken()
			if got == nil || string(got.Body) != want || got.ContentType != "application/json" || got.BodyBytes != len(want) {
				t.Errorf("%s at %s: got %+v, want the payload's bytes", name, door, got)
			}
		}
	}
	// Null is none, wherever it stands.
	s.post("/enqueue", with("payload", " null "))
	if got := s.store.taken(); len(got) != 1 || got[0].Body != nil || got[0].ContentType != "" {
		t.Errorf("got %+v, want no body", got)
	}
}

// A number that no float64 holds breaks the rule of the field that it is sent for.
func TestNumbersBeyondAFloat(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, tt := range []struct {
		path, body, want string
	}{
		{"/enqueue", with("timeout_seconds", "1e999"), `["body","timeout_seconds"] less_than_equal`},
		{"/enqueue", with("timeout_seconds", "-1e999"), `["body","timeout_seconds"] greater_than_equal`},
		{"/enqueue", with("timeout_seconds", "1"+strings.Repeat("0", 400)), `["body","timeout_seconds"] less_than_equal`},
		{"/enqueue", with("payload", `1e999,"timeout_seconds":1e999`), `["body","timeout_seconds"] less_than_equal`},
		{"/enqueue", withRetry("min_backoff_seconds", "1e999"), `["body","retry","min_backoff_seconds"] less_than_equal`},
		{"/enqueue", withRetry("max_attempts", "1e999"), `["body","retry","max_attempts"] less_than_equal`},
		{"/enqueue", withRetry("max_attempts", "-1e999"), `["body","retry","max_attempts"] greater_than_equal`},
		{"/enqueue", `{"url":1e999}`, `["body","url"] string_type`},
		{"/enqueue", with("labels", `{"a":1e999}`), `["body","labels","a"] string_type`},
		{"/enqueue", with("nonsense", "1e999"), `["body","nonsense"] extra_forbidden`},
		{"/schedule", with("delay_seconds", "1e999"), `["body","delay_seconds"] less_than_equal`},
		{"/worker-endpoint", with("timeout_seconds", "1e999"), `["body","timeout_seconds"] less_than_equal`},
		{"/worker-endpoint", `{"task_id":1e999}`, `["body","task_id"] string_type`},
		{"/worker-endpoint", pushed(with("timeout_seconds", "1e999")), `["body","message","data","timeout_seconds"] less_than_equal`},
		{"/tasks/batch", batchOf(with("delay_seconds", "1e999")), `["body","tasks",0,"delay_seconds"] less_than_equal`},
		{"/tasks/redrive", `{"filter":{"state":["failed"]},"spread_seconds":1e999}`, `["body","spread_seconds"] less_than_equal`},
		{"/tasks/cancel", `{"filter":{"min_attempts":1e999}}`, `["body","filter","min_attempts"] less_than_equal`},
	} {
		s.refused(s.post(tt.path, tt.body), http.StatusUnprocessableEntity, tt.want)
	}
	s.refused(s.post("/enqueue", "1e999"), http.StatusUnprocessableEntity, `["body"] object_type`)
}

// base64s are texts, and what they hold: nil where they hold nothing.
var base64s = []struct {
	text string
	want []byte
}{
	{"", []byte{}}, {"AA==", []byte{0}}, {"AA", []byte{0}}, {"/+8=", []byte{0xff, 0xef}}, {"_-8=", []byte{0xff, 0xef}}, {"_-8", []byte{0xff, 0xef}},
	{"/+8", []byte{0xff, 0xef}}, {"AAEC", []byte{0, 1, 2}}, {"bGluZQo=", []byte("line\n")},
	{"A", nil}, {"A===", nil}, {"AA=", nil}, {"AA===", nil}, {"AAE==", nil}, {"====", nil}, {"=", nil}, {"AAEC=", nil}, {"AAEC====", nil}, {"AA==AA==", nil},
	{"/_8=", nil}, // of both alphabets
	{"AB==", nil}, // bits that no encoder leaves over
	{"AAE/\n", nil}, {"AA\r\nEC", nil}, {" AAEC", nil}, {"AA EC", nil}, {"AAEC\t", nil}, {"AA.C", nil}, {"ÄÄEC", nil}, {"AAE\x00", nil}, {"data:;base64,AAEC", nil},
}

func TestBodyBase64(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, tt := range base64s {
		encoded, err := json.Marshal(tt.text)
		if err != nil {
			t.Fatal(err)
		}
		for path, body := range map[string]string{
			"/enqueue":         with("body_base64", string(encoded)),
			"/schedule":        with("body_base64", string(encoded)+`,"delay_seconds":1`),
			"/worker-endpoint": with("body_base64", string(encoded)),
			"/tasks/batch":     batchOf(with("body_base64", string(encoded))),
		} {
			a := s.post(path, body)
			if tt.want == nil {
				if path == "/tasks/batch" {
					s.refused(a, http.StatusUnprocessableEntity, `["body","tasks",0,"body_base64"] invalid`)
				} else {
					s.refused(a, http.StatusUnprocessableEntity, `["body","body_base64"] invalid`)
				}
				continue
			}
			_, tasks := s.dispatcher.taken()
			tasks = append(tasks, s.store.taken()...)
			if len(tasks) != 1 {
				t.Errorf("%q at %s: got status %d: %s", tt.text, path, a.status, a.text)
				continue
			}
			if got := tasks[0]; got.Body == nil || string(got.Body) != string(tt.want) || got.ContentType != "application/octet-stream" || got.BodyBytes != len(tt.want) {
				t.Errorf("%q at %s: got %q as %s, want %q as application/octet-stream", tt.text, path, got.Body, got.ContentType, tt.want)
			}
		}
	}
}

// Each way to write bytes in base64 is read, and nothing else is.
func TestDecodeBase64(t *testing.T) {
	t.Parallel()
	encodings := []*base64.Encoding{base64.StdEncoding, base64.URLEncoding, base64.RawStdEncoding, base64.RawURLEncoding}
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.SliceOf(rapid.Byte()).Draw(t, "bytes")
		text := rapid.SampledFrom(encodings).Draw(t, "encoding").EncodeToString(want)
		if got, err := decodeBase64(text); err != nil || string(got) != string(want) {
			t.Fatalf("%q: got %v, %v, want %v", text, got, err, want)
		}
		odd := rapid.String().Draw(t, "text")
		got, err := decodeBase64(odd)
		legal := slices.ContainsFunc(encodings, func(e *base64.Encoding) bool { return e.EncodeToString(got) == odd })
		if (err == nil) != legal {
			t.Fatalf("%q: got %v, %v, which is written otherwise", odd, got, err)
		}
	})
}

func TestOneOfPayloadBodyAndBytes(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for fields, want := range map[string][]string{
		`"payload":1,"body":"x"`:                        {"body"},
		`"payload":1,"body_base64":"AA=="`:              {"body_base64"},
		`"body":"x","body_base64":"AA=="`:               {"body_base64"},
		`"body_base64":"AA==","body":"","payload":{}`:   {"body", "body_base64"},
		`"payload":null,"body":"x","body_base64":"AA="`: {"body_base64", "body_base64"},
		`"method":"GET","body_base64":"AA=="`:           {"method"},
		`"method":"HEAD","body_base64":""`:              {"method"},
	} {
		for _, path := range submissions {
			body := `{"url":"` + target + `",` + fields + `}`
			if path == "/schedule" {
				body = strings.Replace(body, "{", `{"delay_seconds":1,`, 1)
			}
			a := s.post(path, body)
			s.nothingHappened(a)
			var got []string
			for _, e := range a.errors() {
				got = append(got, strings.Split(e, `"`)[3])
			}
			if a.status != http.StatusUnprocessableEntity || !slices.Equal(got, want) {
				t.Errorf("%s with %s: got %d for %v, want 422 for %v", path, fields, a.status, got, want)
			}
		}
	}
}

// A body reads back as the field that it came in, and the same.
func TestShownPayloads(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		body        []byte
		contentType string
		headers     map[string]string
		want        string // behind the attempts
		is          string // the content type
	}{
		"payload":               {[]byte(`{ "n": 1E+2,"m":[1.50]}`), jsonContent, nil, `,"payload":{ "n": 1E+2,"m":[1.50]}`, jsonContent},
		"payload of text":       {[]byte(`"</script>\u0000"`), jsonContent, nil, `,"payload":"</script>\u0000"`, jsonContent},
		"payload with a type":   {[]byte(`1`), jsonContent, map[string]string{"content-TYPE": "application/vnd.melodia+json"}, `,"payload":1`, "application/vnd.melodia+json"},
		"body":                  {[]byte("a line\n\x00"), textContent, nil, `,"body":"a line\n\u0000"`, textContent},
		"body of JSON":          {[]byte(`{"a":1}`), textContent, nil, `,"body":"{\"a\":1}"`, textContent},
		"empty body":            {[]byte{}, textContent, nil, `,"body":""`, textContent},
		"bytes":                 {[]byte{0, 1, 0xff, 0xfe}, bytesContent, nil, `,"body_base64":"AAH//g=="`, bytesContent},
		"bytes that are text":   {[]byte("text"), bytesContent, nil, `,"body_base64":"dGV4dA=="`, bytesContent},
		"no bytes":              {[]byte{}, bytesContent, nil, `,"body_base64":""`, bytesContent},
		"JSON that is none":     {[]byte(`{"a":1,"a":2}`), jsonContent, nil, `,"body":"{\"a\":1,\"a\":2}"`, jsonContent},
		"text that is not UTF8": {[]byte("\xff"), textContent, nil, `,"body_base64":"/w=="`, textContent},
		"none":                  {nil, "", map[string]string{"Content-Type": "x/y"}, ``, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			whole := stored(func(tk *task.Task) {
				tk.Body, tk.ContentType, tk.Headers = tt.body, tt.contentType, tt.headers
			})
			bare := *whole
			bare.Body = nil
			s.store.getWithBody = func(context.Context, task.ID) (*task.Task, error) { return whole, nil }
			s.store.get = func(context.Context, task.ID) (*task.Task, error) { return &bare, nil }
			shown, plain := s.get(taskPath+"?include=payload"), s.get(taskPath)
			for _, a := range []*answer{shown, plain} {
				var is any
				if tt.is != "" {
					is = tt.is
				}
				if a.status != http.StatusOK || a.at("payload_bytes") != float64(len(tt.body)) || a.at("content_type") != is || a.header.Get("ETag") != etag(whole) {
					t.Errorf("got %d with ETag %s, want %d bytes of %v: %s", a.status, a.header.Get("ETag"), len(tt.body), is, a.text)
				}
			}
			if got, want := shown.text, strings.TrimSuffix(plain.text, "}")+tt.want+"}"; got != want {
				t.Errorf("\ngot  %s\nwant %s", got, want)
			}
		})
	}
}

// Who may see a task may not see what its call carries.
func TestWhoMaySeePayloads(t *testing.T) {
	t.Parallel()
	for _, show := range []bool{false, true} {
		var scopes []string
		s := newService(t, func(o *settings) {
			o.ShowPayloads = show
			o.Callers = fakeCallers(func(http.Header) (string, []string, error) { return "plays", scopes, nil })
		})
		s.store.getWithBody = func(context.Context, task.ID) (*task.Task, error) { return stored(), nil }
		s.store.get = s.store.getWithBody
		for _, tt := range []struct {
			scopes []string
			may    bool
		}{
			{[]string{scopeManage}, true}, {[]string{scopeRead, scopeManage}, true}, {[]string{scopeRead}, show},
			{[]string{scopeSubmit, scopeInternal}, false}, {nil, false},
		} {
			scopes = tt.scopes
			calls := s.store.callCount()
			a := s.get(taskPath + "?include=payload")
			if (a.status == http.StatusOK) != tt.may {
				t.Errorf("SHOW_PAYLOADS %v, scopes %v: got %d: %s", show, tt.scopes, a.status, a.text)
			}
			if tt.may {
				continue
			}
			s.refused(a, http.StatusForbidden)
			if s.store.callCount() != calls || strings.Contains(a.text, marker) {
				t.Errorf("a refused caller had the task read: %s", a.text)
			}
			if show {
				continue
			}
			if want := "The caller lacks the scope manage, which include=payload needs unless SHOW_PAYLOADS is on; it has "; !strings.HasPrefix(a.detail(), want) {
				t.Errorf("got %q, want %q…", a.detail(), want)
			}
			if want := `error="insufficient_scope", scope="manage"`; !strings.Contains(a.header.Get("WWW-Authenticate"), want) {
				t.Errorf("got WWW-Authenticate %q, want %s in it", a.header.Get("WWW-Authenticate"), want)
			}
		}
		// Without it the scope is as ever.
		scopes = []string{scopeManage}
		s.refused(s.get(taskPath), http.StatusForbidden)
		scopes = []string{scopeRead}
		if a := s.get(taskPath); a.status != http.StatusOK || strings.Contains(a.text, marker) {
			t.Errorf("got %d, want 200 without the body: %s", a.status, a.text)
		}
		s.refused(s.get(taskPath+"?include=body"), http.StatusUnprocessableEntity, `["query","include"] enum`)
	}
}

// Who waits with include=payload holds no body until the task has ended.
func TestWaitingForAPayload(t *testing.T) {
	t.Parallel()
	s := newService(t)
	ended := make(chan struct{})
	s.dispatcher.watch = func(task.ID) (<-chan struct{}, func(), error) { return ended, func() {}, nil }
	var reads []string
	s.store.get = func(context.Context, task.ID) (*task.Task, error) {
		reads = append(reads, "without")
		close(ended)
		return stored(), nil
	}
	s.store.getWithBody = func(context.Context, task.ID) (*task.Task, error) {
		reads = append(reads, "with")
		return stored(func(tk *task.Task) { tk.State, tk.Body, tk.ContentType = task.Succeeded, []byte("1"), jsonContent }), nil
	}
	a := s.get(taskPath + "?include=payload&wait_seconds=30")
	if a.status != http.StatusOK || a.at("payload") != 1.0 || a.at("state") != "succeeded" {
		t.Errorf("got %d: %s", a.status, a.text)
	}
	if want := []string{"without", "with"}; !slices.Equal(reads, want) {
		t.Errorf("the task was read %v, want %v", reads, want)
	}
}

// Payloads in answers that are not read are bounded, all together.
func TestShownPayloadsAreBounded(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.getWithBody = func(context.Context, task.ID) (*task.Task, error) {
		return stored(func(tk *task.Task) { tk.Body, tk.ContentType = make([]byte, 1<<20), bytesContent }), nil
	}
	fill(s.Guard.Answers(), maxAnswers-shownGrowth<<20)
	if a := s.get(taskPath + "?include=payload"); a.status != http.StatusOK {
		t.Errorf("got %d, want the last one that fits: %s", a.status, clipped(a.text))
	}
	s.Guard.Answers().Reserve(1, 0)
	a := s.get(taskPath + "?include=payload")
	s.refused(a, http.StatusServiceUnavailable)
	if a.header.Get("Retry-After") == "" {
		t.Error("the answer does not say when to try again")
	}
	if got := s.Guard.Answers().Used(); got != maxAnswers-shownGrowth<<20+1 {
		t.Errorf("%d bytes are counted after all answers, want %d", got, maxAnswers-shownGrowth<<20+1)
	}
}

// pushed is what Pub/Sub sends of a message that holds data: the fields of its
// documentation, each name in both of its spellings.
func pushed(data string) string {
	return fmt.Sprintf(`{"deliveryAttempt":5,"message":{"attributes":{"kind":"play"},"data":%q,"messageId":"2070443601311540","message_id":"2070443601311540",
		"orderingKey":"key","publishTime":"2026-11-24T12:00:00.123Z","publish_time":"2026-11-24T12:00:00.123Z","a":1e999},
		"subscription":"projects/melodia/subscriptions/plays","someday":{"more":[1]}}`, base64.StdEncoding.EncodeToString([]byte(data)))
}

func TestWorkPushedByPubSub(t *testing.T) {
	t.Parallel()
	for _, tt := range workOutcomes { // an engine is told the same, whatever the form
		s := newService(t)
		s.dispatcher.runOnce = func(context.Context, *task.Task) (task.Outcome, error) { return tt.outcome, nil }
		if a := s.post("/worker-endpoint", pushed(with("payload", "1"))); a.status != tt.status || a.detail() != tt.detail {
			t.Errorf("%s: got %d %q, want %d %q", tt.name, a.status, a.detail(), tt.status, tt.detail)
		}
	}
	s := newService(t)
	want := task.Spec{
		URL: target, Method: "PUT", Body: []byte("\xff\x00"), ContentType: "application/octet-stream", Timeout: 1500 * time.Millisecond,
		Retry: task.RetryPolicy{MaxAttempts: 1, MinBackoff: time.Second, MaxBackoff: time.Hour, MaxDoublings: 16},
	}
	inner := `{"url":"` + target + `","method":"PUT","body_base64":"_wA","timeout_seconds":1.5}`
	for name, body := range map[string]string{
		"whole":      pushed(inner),
		"bare":       `{"message":{"data":"` + base64.StdEncoding.EncodeToString([]byte(inner)) + `"}}`,
		"other base": `{"message":{"data":"` + base64.RawURLEncoding.EncodeToString([]byte(inner)) + `"},"subscription":null}`,
		"unwrapped":  inner,
	} {
		a := s.post("/worker-endpoint", body, "Content-Type", "application/json")
		_, once := s.dispatcher.taken()
		if a.status != http.StatusOK || len(once) != 1 {
			t.Fatalf("%s: got %d and %d calls, want 200 and 1: %s", name, a.status, len(once), a.text)
		}
		if diff := cmp.Diff(want, once[0].Spec); diff != "" {
			t.Errorf("%s: called (-want +got):\n%s", name, diff)
		}
	}
}

// What is wrong with the request is told by its place in the message.
func TestWorkRefusesWhatPubSubPushes(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) {
		o.Policy = fakePolicy(func(url string) error {
			if strings.Contains(url, "forbidden") {
				return errors.New("names a host that the target policy does not allow")
			}
			return nil
		})
	})
	for name, tt := range map[string]struct {
		body    string
		errors  []string
		message string
	}{
		"no object":         {`{"message":"` + marker + `"}`, []string{`["body","message"] object_type`}, ""},
		"null":              {`{"message":null}`, []string{`["body","message"] object_type`}, ""},
		"no data":           {`{"message":{"attributes":{"kind":"play"}}}`, []string{`["body","message","data"] missing`}, ""},
		"empty data":        {`{"message":{"data":""}}`, []string{`["body","message","data"] string_too_short`}, ""},
		"data of a kind":    {`{"message":{"data":5}}`, []string{`["body","message","data"] string_type`}, ""},
		"null data":         {`{"message":{"data":null}}`, []string{`["body","message","data"] string_type`}, ""},
		"no base64":         {`{"message":{"data":"` + marker + ` "}}`, []string{`["body","message","data"] invalid`}, errNotBase64.Error()},
		"no JSON":           {pushed(marker), []string{`["body","message","data"] invalid`}, "must hold a task request in JSON: what it holds is not valid JSON, at byte 0."},
		"cut JSON":          {pushed(`{"url":`), []string{`["body","message","data"] invalid`}, "must hold a task request in JSON: what it holds ends in the middle of its JSON, at byte 7."},
		"a member twice":    {pushed(`{"a":1,"a":2}`), []string{`["body","message","data"] invalid`}, ""},
		"too many members":  {pushed(object(maxMembers+1, "a", "1")), []string{`["body","message","data"] invalid`}, ""},
		"a list":            {pushed(`[]`), []string{`["body","message","data"] object_type`}, ""},
		"no url":            {pushed(`{}`), []string{`["body","message","data","url"] missing`}, ""},
		"a misspelt field":  {pushed(with("timeout", "1")), []string{`["body","message","data","timeout"] extra_forbidden`}, ""},
		"deeper":            {pushed(withRetry("max_attempts", "0")), []string{`["body","message","data","retry","max_attempts"] greater_than_equal`}, ""},
		"a domain's rule":   {pushed(with("headers", `{"Host":"`+marker+`"}`)), []string{`["body","message","data","headers","Host"] reserved`}, ""},
		"a refused target":  {pushed(`{"url":"https://forbidden.example/"}`), []string{`["body","message","data","url"] target_refused`}, ""},
		"a callback":        {pushed(with("on_success", `{"url":"`+target+`"}`)), []string{`["body","message","data","on_success"] conflict`}, ""},
		"expired":           {pushed(with("expires_at", `"2001-01-01T00:00:00Z"`)), []string{`["body","message","data","expires_at"] expired`}, ""},
		"a stored task":     {pushed(`{"task_id":"` + storedID + `"}`), []string{`["body","message","data","url"] missing`, `["body","message","data","task_id"] extra_forbidden`}, ""},
		"a message in it":   {pushed(pushed(with("payload", "1"))), nil, ""},
		"two forms at once": {`{"task_id":"` + storedID + `","message":{"data":"AAAA"}}`, []string{`["body","message"] extra_forbidden`}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.on(t)
			a := s.post("/worker-endpoint", tt.body)
			if tt.errors == nil {
				s.nothingHappened(a)
				if a.status != http.StatusUnprocessableEntity {
					t.Errorf("got %d, want 422: %s", a.status, a.text)
				}
				return
			}
			s.refused(a, http.StatusUnprocessableEntity, tt.errors...)
			if tt.message != "" && a.message(strings.Split(tt.errors[0], " ")[0]) != tt.message {
				t.Errorf("got %q, want %q", a.message(strings.Split(tt.errors[0], " ")[0]), tt.message)
			}
		})
	}
}

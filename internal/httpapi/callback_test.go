package httpapi

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

func TestCallbackMistakes(t *testing.T) {
	t.Parallel()
	const legal = `"url":"https://example.com/ended"`
	for name, tt := range map[string]struct {
		callback string
		errors   []string // FIELD stands for the field
	}{
		"of another type":        {`"` + marker + `"`, []string{`["body","FIELD"] object_type`}},
		"empty":                  {`{}`, []string{`["body","FIELD","url"] missing`}},
		"empty url":              {`{"url":""}`, []string{`["body","FIELD","url"] string_too_short`}},
		"url too long":           {`{"url":"https://` + strings.Repeat("a", task.MaxURLBytes) + marker + `"}`, []string{`["body","FIELD","url"] string_too_long`}},
		"relative url":           {`{"url":"/` + marker + `"}`, []string{`["body","FIELD","url"] invalid`}},
		"url with a password":    {`{"url":"https://u:` + marker + `@example.com/"}`, []string{`["body","FIELD","url"] invalid`}},
		"reserved header":        {`{` + legal + `,"headers":{"Host":"` + marker + `","Orchestrator-Task-Id":"1"}}`, []string{`["body","FIELD","headers","Host"] reserved`, `["body","FIELD","headers","Orchestrator-Task-Id"] reserved`}},
		"reserved header with _": {`{` + legal + `,"headers":{"Proxy_Authorization":"` + marker + `"}}`, []string{`["body","FIELD","headers","Proxy_Authorization"] reserved`}},
		"header of another type": {`{` + legal + `,"headers":{"X.A":5}}`, []string{`["body","FIELD","headers","X.A"] string_type`}},
		"header with NUL":        {`{` + legal + `,"headers":{"X":"` + marker + `\u0000"}}`, []string{`["body","FIELD","headers","X"] invalid`}},
		"header twice":           {`{` + legal + `,"headers":{"X-A":"` + marker + `","x-a":""}}`, []string{`["body","FIELD","headers","x-a"] duplicate`}},
		"too many headers":       {`{` + legal + `,"headers":` + object(task.MaxHeaders+1, "X-", `"`+marker+`"`) + `}`, []string{`["body","FIELD","headers"] too_long`}},
		"too many header bytes":  {`{` + legal + `,"headers":{"X":"` + marker + strings.Repeat("a", task.MaxHeaderBytes) + `"}}`, []string{`["body","FIELD","headers"] too_long`}},
		"malformed reference":    {`{` + legal + `,"headers":{"X":"${secret:` + marker + `/}"}}`, []string{`["body","FIELD","headers","X"] invalid`}},
		"callbacks of its own":   {`{` + legal + `,"on_failure":{` + legal + `}}`, []string{`["body","FIELD","on_failure"] extra_forbidden`}},
		"a payload":              {`{` + legal + `,"payload":"` + marker + `"}`, []string{`["body","FIELD","payload"] extra_forbidden`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			for path, more := range submissionsOf {
				for _, field := range []string{"on_success", "on_failure"} {
					var want []string
					for _, e := range tt.errors {
						want = append(want, strings.Replace(e, "FIELD", field, 1))
					}
					s.refused(s.post(path, `{"url":"`+target+`","`+field+`":`+tt.callback+more+`}`), http.StatusUnprocessableEntity, want...)
				}
			}
		})
	}
}

// submissionsOf is what a request to each path needs besides what they share.
var submissionsOf = map[string]string{"/enqueue": "", "/schedule": `,"delay_seconds":1`, "/worker-endpoint": ""}

func TestCallbacksInTasks(t *testing.T) {
	t.Parallel()
	s := newService(t)
	const yes = `"on_success":{"url":"https://example.com/yes?q=1","headers":{"Authorization":"Bearer ${secret:b}","X-A":"b"}}`
	const no = `"on_failure":{"url":"https://example.com/no"}`
	onSuccess := &task.Callback{URL: "https://example.com/yes?q=1", Headers: map[string]string{"Authorization": "Bearer ${secret:b}", "X-A": "b"}}
	onFailure := &task.Callback{URL: "https://example.com/no"}
	shownSuccess := map[string]any{"url": "https://example.com/yes?q=1", "headers": map[string]any{"Authorization": "[redacted]", "X-A": "b"}}
	shownFailure := map[string]any{"url": "https://example.com/no", "headers": map[string]any{}}
	for _, path := range []string{"/enqueue", "/schedule"} {
		for _, tt := range []struct {
			members                    string
			onSuccess, onFailure       *task.Callback
			shownSuccess, shownFailure any
		}{
			{yes + "," + no, onSuccess, onFailure, shownSuccess, shownFailure},
			{yes, onSuccess, nil, shownSuccess, nil},
			{no, nil, onFailure, nil, shownFailure},
			{`"on_success":null,"on_failure":null`, nil, nil, nil, nil},
		} {
			a := s.post(path, `{"url":"`+target+`",`+tt.members+submissionsOf[path]+`}`)
			got := s.only(a)
			if diff := cmp.Diff([]*task.Callback{tt.onSuccess, tt.onFailure}, []*task.Callback{got.OnSuccess, got.OnFailure}); diff != "" {
				t.Errorf("%s %s: stored (-want +got):\n%s", path, tt.members, diff)
			}
			if diff := cmp.Diff([]any{tt.shownSuccess, tt.shownFailure}, []any{a.at("on_success"), a.at("on_failure")}); diff != "" {
				t.Errorf("%s %s: shown (-want +got):\n%s", path, tt.members, diff)
			}
		}
	}
}

// A callback goes nowhere that a task may not go.
func TestCallbacksAreHeldToTheSettings(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) {
		o.Policy = fakePolicy(func(url string) error {
			if url == target || url == target+"/ended" {
				return nil
			}
			return errors.New("names a host that the target policy does not allow")
		})
		o.Secrets = fakeSecrets(func(name, url string) error {
			if name == "known" && url == target+"/ended" {
				return nil
			}
			return errors.New("refers to a secret that does not exist")
		})
	})
	for path, more := range submissionsOf {
		a := s.post(path, `{"url":"`+target+`","on_success":{"url":"https://`+marker+`.example/","headers":{"X":"${secret:known}"}},
			"on_failure":{"url":"`+target+`/ended","headers":{"X-A":"${secret:known}","X-B":"${secret:`+marker+`}"}}`+more+`}`)
		s.refused(a, http.StatusUnprocessableEntity, `["body","on_success","url"] target_refused`, `["body","on_failure","headers","X-B"] secret_refused`)
	}
	// The task's own headers may not have what its callback's may.
	s.refused(s.post("/enqueue", `{"url":"`+target+`","headers":{"X-A":"${secret:known}"},"on_failure":{"url":"`+target+`/ended","headers":{"X-A":"${secret:known}"}}}`),
		http.StatusUnprocessableEntity, `["body","headers","X-A"] secret_refused`)
}

// Nothing is stored there, so that there is nothing that could call back.
func TestWorkHasNoCallbacks(t *testing.T) {
	t.Parallel()
	s := newService(t)
	a := s.post("/worker-endpoint", `{"url":"`+target+`","on_success":{"url":"https://`+marker+`.example/"},"on_failure":{"url":"https://`+marker+`.example/"}}`)
	s.refused(a, http.StatusUnprocessableEntity, `["body","on_success"] conflict`, `["body","on_failure"] conflict`)
	want := "must not be there, since nothing is stored here: the answer has the result, and /enqueue has callbacks"
	if got := a.message(`["body","on_success"]`); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

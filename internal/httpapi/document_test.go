package httpapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"gopkg.in/yaml.v2"

	"github.com/melodia/orchestrator/internal/task"
)

// The limits that the schemas state are those that the domain enforces.
func TestLimitsAreTheDomains(t *testing.T) {
	t.Parallel()
	d := newService(t).schema
	// Those of task.IsQueueName, task.IsFlowKey and task.ParseRetryFor.
	patterns := map[string]string{"queue": "^[A-Za-z0-9._-]+$", "flow_key": "^[!-~]+$", "for": "^([0-9]{1,8}[dhms])+$"}
	limits := []struct {
		schema, property, keyword string
		want                      float64
	}{
		{"TaskRequest", "url", "maxLength", task.MaxURLBytes},
		{"TaskRequest", "url", "minLength", 1},
		{"TaskRequest", "headers", "maxProperties", task.MaxHeaders},
		{"TaskRequest", "labels", "maxProperties", task.MaxLabels},
		{"TaskRequest", "queue", "maxLength", task.MaxQueueName},
		{"TaskRequest", "flow_key", "maxLength", task.MaxFlowKey},
		{"TaskRequest", "timeout_seconds", "minimum", task.MinTimeout.Seconds()},
		{"TaskRequest", "timeout_seconds", "maximum", task.MaxTimeout.Seconds()},
		{"CallbackRequest", "url", "maxLength", task.MaxURLBytes},
		{"CallbackRequest", "url", "minLength", 1},
		{"CallbackRequest", "headers", "maxProperties", task.MaxHeaders},
		{"AuthRequest", "audience", "minLength", 1},
		{"AuthRequest", "audience", "maxLength", task.MaxAudience},
		{"RetryRequest", "for", "maxLength", 32},
		{"AuthRequest", "role", "maxLength", task.MaxRole}, {"AuthRequest", "role", "minLength", 1},
		{"RetryRequest", "max_attempts", "minimum", 1},
		{"RetryRequest", "max_attempts", "maximum", task.MaxAttemptsLimit},
		{"RetryRequest", "max_retry_duration_seconds", "minimum", 0},
		{"RetryRequest", "max_retry_duration_seconds", "maximum", task.MaxRetryDurationLimit.Seconds()},
		{"RetryRequest", "min_backoff_seconds", "minimum", task.MinBackoffLimit.Seconds()},
		{"RetryRequest", "min_backoff_seconds", "maximum", task.MaxBackoffLimit.Seconds()},
		{"RetryRequest", "max_backoff_seconds", "minimum", task.MinBackoffLimit.Seconds()},
		{"RetryRequest", "max_backoff_seconds", "maximum", task.MaxBackoffLimit.Seconds()},
		{"RetryRequest", "max_doublings", "minimum", 0},
		{"RetryRequest", "max_doublings", "maximum", task.MaxDoublingsLimit},
		{"ScheduleRequest", "delay_seconds", "minimum", 0},
		{"ScheduleRequest", "delay_seconds", "maximum", task.Horizon.Seconds()},
		{"BatchRequest", "tasks", "minItems", 1},
		{"BatchRequest", "tasks", "maxItems", task.MaxBatch},
	}
	// What has every property of another schema states its limits too.
	alike := map[string][]string{"TaskRequest": {"ScheduleRequest", "BatchTask"}, "ScheduleRequest": {"BatchTask"}}
	want, stated := map[string]any{}, map[string]any{}
	for _, l := range limits {
		for _, schema := range append([]string{l.schema}, alike[l.schema]...) {
			want[schema+"."+l.property+" "+l.keyword] = l.want
		}
	}
	for _, schema := range []string{"TaskRequest", "CallbackRequest", "AuthRequest", "RetryRequest", "ScheduleRequest", "BatchTask", "BatchRequest"} {
		for name, property := range member(d.root, "components", "schemas", schema, "properties") {
			for _, keyword := range []string{"minimum", "maximum", "minLength", "maxLength", "maxProperties", "minProperties", "minItems", "maxItems", "pattern", "exclusiveMinimum", "exclusiveMaximum"} {
				got, ok := member(property)[keyword]
				if pattern, known := patterns[name]; ok && known && keyword == "pattern" {
					if got != pattern {
						t.Errorf("%s.%s has the pattern %v, want %s", schema, name, got, pattern)
					}
				} else if ok {
					stated[schema+"."+name+" "+keyword] = got
				}
			}
		}
	}
	if diff := cmp.Diff(want, stated); diff != "" {
		t.Errorf("limits (-of the domain +in the schemas):\n%s", diff)
	}
	// What a schema cannot state is in the description.
	for property, words := range map[string]string{
		"url":     fmt.Sprintf("at most %d bytes", task.MaxURLBytes),
		"headers": fmt.Sprintf("at most %d and %d KiB in all", task.MaxHeaders, task.MaxHeaderBytes>>10),
		"labels":  fmt.Sprintf("At most %d, names up to %d and values up to %d bytes", task.MaxLabels, task.MaxLabelName, task.MaxLabelValue),
		"run_at":  fmt.Sprintf("At most %d years ahead", task.Horizon/(365*24*time.Hour)),
	} {
		text, _ := member(d.root, "components", "schemas", "ScheduleRequest", "properties", property)["description"].(string)
		if !strings.Contains(text, words) {
			t.Errorf("the description of %s is %q, want it to say %q", property, text, words)
		}
	}
}

// The words that the document lists are those that the domain knows.
func TestWordsAreTheDomains(t *testing.T) {
	t.Parallel()
	d := newService(t).schema
	enum := func(schema, property string) []any {
		return allOf(member(d.root, "components", "schemas", schema, "properties", property)["enum"])
	}
	kinds := []any{"succeeded", "retryable", "permanent", "snoozed", "interrupted", "lost"}
	for _, tt := range []struct {
		schema, property string
		want             []any
	}{
		{"Task", "state", []any{string(task.Pending), string(task.Running), string(task.Succeeded), string(task.Failed), string(task.Cancelled)}},
		{"Facts", "state", []any{string(task.Pending), string(task.Running), string(task.Succeeded), string(task.Failed), string(task.Cancelled)}},
		{"Facts", "reason", []any{string(task.AttemptsExhausted), string(task.RetryDurationExhausted), string(task.ClientError), string(task.Expired), string(task.TargetRefused), nil}},
		{"Facts", "last_outcome", append(kinds[:len(kinds):len(kinds)], nil)},
		{"Facts", "waiting_for", []any{
			string(task.WaitsForResume), string(task.WaitsForQueue), string(task.WaitsForQueueRate), string(task.WaitsForKey), string(task.WaitsForKeyRate),
			string(task.WaitsForOrder), string(task.WaitsForShare), string(task.WaitsForBreaker), string(task.WaitsForRetryAfter), string(task.WaitsForSlots), nil,
		}},
		{"Host", "status", []any{string(task.HostHeld), string(task.HostBroken), string(task.HostRecovering), string(task.HostCongested)}},
		{"TaskRequest", "priority", []any{string(task.High), string(task.Normal), string(task.Low)}},
		{"ChangeRequest", "priority", []any{string(task.High), string(task.Normal), string(task.Low)}},
		{"Task", "priority", []any{string(task.High), string(task.Normal), string(task.Low), nil}},
		{"Ended", "state", []any{string(task.Succeeded), string(task.Failed)}},
		{"Ended", "reason", []any{string(task.AttemptsExhausted), string(task.RetryDurationExhausted), string(task.ClientError), string(task.Expired), string(task.TargetRefused), nil}},
		{"Task", "reason", []any{string(task.AttemptsExhausted), string(task.RetryDurationExhausted), string(task.ClientError), string(task.Expired), string(task.TargetRefused), nil}},
		{"Attempt", "outcome", kinds},
		{"WorkResult", "outcome", kinds[:5]}, // only reaping finds a call lost
	} {
		if diff := cmp.Diff(tt.want, enum(tt.schema, tt.property)); diff != "" {
			t.Errorf("%s.%s (-want +got):\n%s", tt.schema, tt.property, diff)
		}
	}
	for _, kind := range []task.Kind{task.OutcomeSucceeded, task.OutcomeRetryable, task.OutcomePermanent, task.OutcomeSnoozed, task.OutcomeInterrupted, task.OutcomeLost} {
		if !slices.Contains(kinds, any(string(kind))) {
			t.Errorf("the kind %q is not in the document", kind)
		}
	}
	// Each listed method is legal, and the one that is not listed is not.
	for _, method := range append(enum("TaskRequest", "method"), "TRACE") {
		_, err := task.New(task.ID{1}, task.Spec{URL: target, Method: method.(string), Timeout: task.MinTimeout, Retry: task.DefaultRetryPolicy()}, task.When{}, storedAt)
		if (err != nil) != (method == "TRACE") {
			t.Errorf("the domain says of the method %v: %v", method, err)
		}
	}
}

// everything calls f with each object of the document and the way to it.
func everything(v any, way string, f func(way string, object map[string]any)) {
	switch v := v.(type) {
	case map[string]any:
		f(way, v)
		for name, value := range v {
			everything(value, way+"/"+name, f)
		}
	case []any:
		for i, value := range v {
			everything(value, way+"/"+strconv.Itoa(i), f)
		}
	}
}

func TestDocumentIsComplete(t *testing.T) {
	t.Parallel()
	d := newService(t).schema
	for name, want := range map[string]any{"openapi": "3.1.0"} {
		if d.root[name] != want {
			t.Errorf("%s is %v, want %v", name, d.root[name], want)
		}
	}
	for _, name := range []string{"title", "version", "description"} {
		if s, _ := member(d.root, "info")[name].(string); s == "" {
			t.Errorf("info has no %s", name)
		}
	}
	tags := map[any]bool{}
	for _, tag := range allOf(d.root["tags"]) {
		if s, _ := member(tag)["description"].(string); s == "" {
			t.Errorf("the tag %v has no description", member(tag)["name"])
		}
		tags[member(tag)["name"]] = true
	}
	everything(d.root, "#", func(way string, object map[string]any) {
		if ref, ok := object["$ref"].(string); ok && member(d.root, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...) == nil {
			t.Errorf("%s: %s leads nowhere", way, ref)
		}
		if types := allOf(object["type"]); slices.Contains(types, any("null")) && object["enum"] != nil && !slices.Contains(allOf(object["enum"]), nil) {
			t.Errorf("%s may be null, but its enum says otherwise", way)
		}
	})

	ids := map[any]string{}
	for path, item := range member(d.root, "paths") {
		for method, operation := range item.(map[string]any) {
			operation := operation.(map[string]any)
			at := strings.ToUpper(method) + " " + path
			for _, name := range []string{"operationId", "summary", "description"} {
				if s, _ := operation[name].(string); s == "" {
					t.Errorf("%s has no %s", at, name)
				}
			}
			if other, ok := ids[operation["operationId"]]; ok {
				t.Errorf("%s and %s have the same operationId", at, other)
			}
			ids[operation["operationId"]] = at
			if list := allOf(operation["tags"]); len(list) == 0 || !tags[list[0]] {
				t.Errorf("%s has the tags %v, want described ones", at, list)
			}
			for _, parameter := range allOf(operation["parameters"]) {
				// Swagger UI would send the example of a filter, and find nothing; and that of
				// include, which few callers may.
				if name := member(parameter)["name"]; at == "GET /tasks" && name != "limit" || name == "include" {
					want := []any(nil)
					if name == "labels" { // of which it would make up some
						want = []any{map[string]any{}}
					}
					if diff := cmp.Diff(want, allOf(member(parameter, "schema")["examples"])); diff != "" {
						t.Errorf("%s: examples of the parameter %v (-want +got):\n%s", at, name, diff)
					}
				} else {
					checkValueSchema(t, d, at+" "+fmt.Sprint(name), member(parameter, "schema"))
				}
				if s, _ := member(parameter)["description"].(string); s == "" {
					t.Errorf("%s: the parameter %v has no description", at, member(parameter)["name"])
				}
			}
			for status, response := range member(operation, "responses") {
				if s, _ := member(response)["description"].(string); s == "" || s == http.StatusText(http.StatusUnprocessableEntity) {
					t.Errorf("%s: %s has no description of its own", at, status)
				}
				if len(member(response, "content")) != 1 && status != strconv.Itoa(http.StatusNoContent) {
					t.Errorf("%s: %s has %d content types, want 1", at, status, len(member(response, "content")))
				}
				for name, header := range member(response, "headers") {
					if s, _ := member(header)["description"].(string); s == "" {
						t.Errorf("%s: the header %s has no description", at, name)
					}
					checkValueSchema(t, d, at+" "+name, member(header, "schema"))
				}
			}
			if operation["requestBody"] != nil {
				content := member(operation, "requestBody", "content", "application/json")
				if len(member(operation, "requestBody", "content")) != 1 || content == nil {
					t.Errorf("%s: the body is not declared as JSON, and as it alone", at)
				}
				if len(member(content, "examples")) == 0 || member(content, "schema") == nil {
					t.Errorf("%s: the body has no schema, or no example", at)
				}
			}
		}
	}
	// What linters and generators insist on: callbacks are operations too.
	everything(d.root["paths"], "#", func(way string, object map[string]any) {
		if object["patternDescription"] != nil {
			t.Errorf("%s: patternDescription is no keyword of OpenAPI", way)
		}
		if object["responses"] == nil {
			return
		}
		if s, _ := object["operationId"].(string); s == "" {
			t.Errorf("%s has no operationId", way)
		} else if strings.Contains(way, "/callbacks/") {
			if ids[s] != "" {
				t.Errorf("%s and %s have the same operationId", way, ids[s])
			}
			ids[s] = way
		}
		if _, ok := object["security"].([]any); !ok {
			t.Errorf("%s does not say whether it needs credentials", way)
		}
	})
	if servers := allOf(d.root["servers"]); len(servers) != 1 || member(servers[0])["url"] != "/" {
		t.Errorf("the servers are %v, want the one that the document came from", servers)
	}
	if len(ids) != 31+4 {
		t.Errorf("the document has %d operations, want 31 and 4 callbacks", len(ids))
	}

	for name, schema := range member(d.root, "components", "schemas") {
		for property, value := range member(schema, "properties") {
			at := name + "." + property
			if s, _ := member(value)["description"].(string); s == "" {
				t.Errorf("%s has no description", at)
			}
			checkValueSchema(t, d, at, member(value))
		}
		for _, required := range allOf(member(schema)["required"]) {
			if member(schema, "properties", required.(string)) == nil {
				t.Errorf("%s requires %v, which it does not have", name, required)
			}
		}
		if ours := !strings.HasPrefix(name, "PubSub"); member(schema)["additionalProperties"] == false != ours {
			t.Errorf("%s allows members that it does not list", name)
		}
	}
}

// checkValueSchema fails unless a schema has an example that it admits. What
// is made of other schemas has the examples of those.
func checkValueSchema(t *testing.T, d *document, at string, schema map[string]any) {
	t.Helper()
	if schema["$ref"] != nil || member(schema, "items")["$ref"] != nil {
		return
	}
	examples := allOf(schema["examples"])
	if len(examples) == 0 {
		t.Errorf("%s has no example", at)
	}
	for _, example := range append(examples, schema["default"]) {
		if example == nil {
			continue
		}
		if mistakes := d.validate(schema, example, ""); len(mistakes) > 0 {
			t.Errorf("%s: its example or default breaks its schema: %v", at, mistakes)
		}
	}
}

// Examples can be pasted as they are.
func TestExamplesWork(t *testing.T) {
	t.Parallel()
	s := newService(t)
	posted := 0
	type operation struct{ method, path string }
	all := map[operation]map[string]any{}
	for path, item := range member(s.schema.root, "paths") {
		for method, declared := range member(item) {
			all[operation{strings.ToUpper(method), strings.NewReplacer("/{id}/complete", "/"+storedID+"/complete", "{name}", "mail", "{key}", "tenant-42").Replace(path)}] = member(declared)
		}
	}
	for at, declared := range all {
		if at.method == http.MethodPatch && strings.HasPrefix(at.path, "/tasks/") {
			continue // there is no task
		}
		path := at.path
		content := member(declared, "requestBody", "content", "application/json")
		for name, example := range member(content, "examples") {
			if summary, _ := member(example)["summary"].(string); summary == "" {
				t.Errorf("%s: the example %s has no summary", path, name)
			}
			value := member(example)["value"]
			if mistakes := s.schema.validate(member(content, "schema"), value, ""); len(mistakes) > 0 {
				t.Errorf("%s: the example %s breaks the schema: %v", path, name, mistakes)
			}
			b, err := json.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			want := http.StatusAccepted
			if path == "/worker-endpoint" || strings.HasPrefix(path, "/tasks/") && path != "/tasks/batch" || strings.HasPrefix(path, "/queues/") {
				want = http.StatusOK
			}
			s.store.queues = map[string]task.Queue{"mail": {Name: "mail"}}
			if a := s.do(at.method, path, string(b), "Orchestrator-Completion-Token", completionToken); a.status != want {
				t.Errorf("%s: the example %s is answered %d, want %d: %s", path, name, a.status, want, a.text)
			}
			posted++
		}
	}
	if posted < 7 {
		t.Errorf("%d examples were posted, want at least 7", posted)
	}
	// The fields' own examples make a right request too.
	for schema, path := range map[string]string{"TaskRequest": "/enqueue", "ScheduleRequest": "/schedule", "BatchTask": "/tasks/batch"} {
		request := map[string]any{}
		for name, property := range member(s.schema.root, "components", "schemas", schema, "properties") {
			if examples := allOf(member(property)["examples"]); len(examples) > 0 {
				request[name] = examples[0]
			}
		}
		delete(request, "body") // payload is there
		delete(request, "body_base64")
		delete(request, "delay_seconds") // run_at is there
		b, err := json.Marshal(request)
		if err != nil {
			t.Fatal(err)
		}
		if path == "/tasks/batch" {
			b = fmt.Appendf(nil, `{"tasks":[%s]}`, b)
		}
		if a := s.post(path, string(b)); a.status != http.StatusAccepted {
			t.Errorf("%s: %s is answered %d: %s", path, b, a.status, a.text)
		}
	}
}

// The example of a problem has the status under which the page shows it.
func TestProblemExamples(t *testing.T) {
	t.Parallel()
	root := newService(t).schema.root
	seen := 0
	for path, item := range member(root, "paths") {
		for method, operation := range member(item) {
			for status, response := range member(operation, "responses") {
				examples := member(response, "content", "application/problem+json", "examples")
				if examples == nil {
					continue
				}
				seen++
				reference, _ := member(examples, "problem")["$ref"].(string)
				value := member(root, "components", "examples", strings.TrimPrefix(reference, "#/components/examples/"), "value")
				if got := fmt.Sprint(value["status"]); got != status {
					t.Errorf("%s %s: the example of %s has the status %s", method, path, status, got)
				}
			}
		}
	}
	if seen == 0 {
		t.Error("no operation has an example of a problem")
	}
}

// Swagger UI shows the first example by name: it is the shortest.
func TestFirstExampleIsTheSimplest(t *testing.T) {
	t.Parallel()
	everything(newService(t).schema.root["paths"], "#", func(way string, object map[string]any) {
		examples := member(object, "examples")
		if !strings.HasSuffix(way, "/requestBody/content/application~1json") && !strings.HasSuffix(way, "/requestBody/content/application/json") || len(examples) == 0 {
			return
		}
		length := func(name string) int {
			b, err := json.Marshal(member(examples[name])["value"])
			if err != nil {
				t.Fatal(err)
			}
			return len(b)
		}
		first := slices.Min(slices.Collect(maps.Keys(examples)))
		for name := range examples {
			if length(name) < length(first) {
				t.Errorf("%s: the example %s comes first, %s is shorter", way, first, name)
			}
		}
	})
}

// The target of the examples is the one that was asked for.
func TestExampleURL(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) { o.ExampleURL = "http://127.0.0.1:9/echo" })
	everything(s.schema.root["paths"], "#/paths", func(way string, object map[string]any) {
		if url, ok := object["url"].(string); ok && regexp.MustCompile(`/examples/\w+/value$`).MatchString(way) && url != "http://127.0.0.1:9/echo" {
			t.Errorf("%s calls %s", way, url)
		}
	})
}

func TestDocumentIsServed(t *testing.T) {
	t.Parallel()
	s := newService(t)
	asJSON, asYAML := s.get("/openapi.json"), s.get("/openapi.yaml")
	if asJSON.status != http.StatusOK || asJSON.header.Get("Content-Type") != "application/json" {
		t.Errorf("got %d %s, want 200 application/json", asJSON.status, asJSON.header.Get("Content-Type"))
	}
	if asYAML.status != http.StatusOK || asYAML.header.Get("Content-Type") != "application/yaml" {
		t.Errorf("got %d %s, want 200 application/yaml", asYAML.status, asYAML.header.Get("Content-Type"))
	}
	if diff := cmp.Diff(s.schema.root, asJSON.json); diff != "" {
		t.Errorf("served (-want +got):\n%s", diff)
	}
	var parsed any
	if err := yaml.Unmarshal([]byte(asYAML.text), &parsed); err != nil {
		t.Fatalf("the YAML does not parse: %v", err)
	}
	if diff := cmp.Diff(asJSON.json, plainYAML(parsed)); diff != "" {
		t.Errorf("JSON and YAML differ (-json +yaml):\n%s", diff)
	}
	var written bytes.Buffer
	if err := s.WriteDocument(&written); err != nil || written.String() != asYAML.text {
		t.Errorf("WriteDocument wrote %d bytes (%v), want the %d that are served", written.Len(), err, len(asYAML.text))
	}
	// What `orchestrator openapi` has is enough.
	bare := New(Options{Defaults: s.Defaults, Version: s.Version, ExampleURL: s.ExampleURL})
	written.Reset()
	if err := bare.WriteDocument(&written); err != nil || written.String() != asYAML.text {
		t.Errorf("without a store WriteDocument wrote %d bytes (%v), want the same %d", written.Len(), err, len(asYAML.text))
	}
}

// plainYAML gives a YAML value the types that encoding/json uses.
func plainYAML(v any) any {
	switch v := v.(type) {
	case map[any]any:
		object := make(map[string]any, len(v))
		for name, value := range v {
			object[fmt.Sprint(name)] = plainYAML(value)
		}
		return object
	case []any:
		list := make([]any, len(v))
		for i, value := range v {
			list[i] = plainYAML(value)
		}
		return list
	case int:
		return float64(v)
	default:
		return v
	}
}

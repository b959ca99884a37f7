package task_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// flow is the fields of flow control.
type flow struct {
	queue, key string
	priority   task.Priority
}

func flowOf(s *task.Spec) flow { return flow{s.Queue, s.FlowKey, s.Priority} }

func TestFlowOfNewTasks(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ given, want flow }{
		"plain":                         {},
		"plain, normal":                 {given: flow{priority: task.Normal}},
		"a queue":                       {flow{queue: "mail"}, flow{"mail", "", task.Normal}},
		"a key":                         {flow{key: "tenant-42"}, flow{task.DefaultQueue, "tenant-42", task.Normal}},
		"a queue and a key":             {flow{"mail", "tenant-42", task.Low}, flow{"mail", "tenant-42", task.Low}},
		"a key and a priority":          {flow{key: "~!", priority: task.High}, flow{task.DefaultQueue, "~!", task.High}},
		"all that names may have":       {flow{queue: "-A.z_0"}, flow{"-A.z_0", "", task.Normal}},
		"the longest names":             {flow{strings.Repeat("q", 100), strings.Repeat("/", 200), ""}, flow{strings.Repeat("q", 100), strings.Repeat("/", 200), task.Normal}},
		"names that look like a path's": {flow{"...", "a/../b", ""}, flow{"...", "a/../b", task.Normal}},
	} {
		got, err := submissionOf(func(s *submission) { s.Queue, s.FlowKey, s.Priority = tt.given.queue, tt.given.key, tt.given.priority }).new()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(tt.want, flowOf(&got.Spec), cmp.AllowUnexported(flow{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestRulesOfFlow(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		given flow
		want  []string
	}{
		"a long queue":              {flow{queue: strings.Repeat("q", 101)}, []string{"queue invalid"}},
		"a queue with a space":      {flow{queue: "my mail"}, []string{"queue invalid"}},
		"a queue with a slash":      {flow{queue: "a/b"}, []string{"queue invalid"}},
		"a queue beyond ASCII":      {flow{queue: "música"}, []string{"queue invalid"}},
		"a queue that is a dot":     {flow{queue: "."}, []string{"queue invalid"}},
		"a queue that is two":       {flow{queue: ".."}, []string{"queue invalid"}},
		"a queue with a NUL":        {flow{queue: "\x00"}, []string{"queue invalid"}},
		"a long key":                {flow{key: strings.Repeat("k", 201)}, []string{"flow_key invalid"}},
		"a key with a space":        {flow{key: "a b"}, []string{"flow_key invalid"}},
		"a key with DEL":            {flow{key: "\x7f"}, []string{"flow_key invalid"}},
		"a key beyond ASCII":        {flow{key: "é"}, []string{"flow_key invalid"}},
		"a key that is two dots":    {flow{"mail", "..", ""}, []string{"flow_key invalid"}},
		"no such priority":          {flow{"mail", "", "urgent"}, []string{"priority enum"}},
		"a priority without queue":  {flow{priority: task.High}, []string{"priority conflict"}},
		"a low one without queue":   {flow{priority: task.Low}, []string{"priority conflict"}},
		"neither priority nor task": {flow{priority: "urgent"}, []string{"priority enum"}},
	} {
		got := broken(t, submissionOf(func(s *submission) { s.Queue, s.FlowKey, s.Priority = tt.given.queue, tt.given.key, tt.given.priority }))
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestChangeOfFlow(t *testing.T) {
	t.Parallel()
	mail := flow{"mail", "tenant-42", task.High}
	for name, tt := range map[string]struct {
		was    flow
		change task.Change
		want   flow
		broken []string
	}{
		"nothing":                   {was: mail, want: mail},
		"another queue":             {was: mail, change: task.Change{Queue: new("slow")}, want: flow{"slow", "tenant-42", task.High}},
		"another key":               {was: mail, change: task.Change{FlowKey: new("tenant-7")}, want: flow{"mail", "tenant-7", task.High}},
		"another priority":          {was: mail, change: task.Change{Priority: new(task.Low)}, want: flow{"mail", "tenant-42", task.Low}},
		"no key":                    {was: mail, change: task.Change{FlowKey: new("")}, want: flow{"mail", "", task.High}},
		"no queue, but a key":       {was: mail, change: task.Change{Queue: new("")}, want: flow{task.DefaultQueue, "tenant-42", task.High}},
		"neither":                   {was: mail, change: task.Change{Queue: new(""), FlowKey: new("")}},
		"neither, and normal":       {was: mail, change: task.Change{Queue: new(""), FlowKey: new(""), Priority: new(task.Normal)}},
		"of a plain one the queue":  {change: task.Change{Queue: new("mail")}, want: flow{"mail", "", task.Normal}},
		"of a plain one the key":    {change: task.Change{FlowKey: new("tenant-42")}, want: flow{task.DefaultQueue, "tenant-42", task.Normal}},
		"of a plain one the order":  {change: task.Change{Priority: new(task.High)}, broken: []string{"priority conflict"}},
		"neither, and a priority":   {was: mail, change: task.Change{Queue: new(""), FlowKey: new(""), Priority: new(task.Low)}, broken: []string{"priority conflict"}},
		"a queue that cannot be":    {was: mail, change: task.Change{Queue: new("a b")}, broken: []string{"queue invalid"}},
		"a key that cannot be":      {was: mail, change: task.Change{FlowKey: new("a b")}, broken: []string{"flow_key invalid"}},
		"a priority that cannot be": {was: mail, change: task.Change{Priority: new(task.Priority("urgent"))}, broken: []string{"priority enum"}},
	} {
		tk, err := submissionOf(func(s *submission) { s.Queue, s.FlowKey, s.Priority = tt.was.queue, tt.was.key, tt.was.priority }).new()
		if err != nil {
			t.Fatal(err)
		}
		changed, err := tk.Change(tt.change, began)
		var got []string
		errs, _ := err.(task.Errors)
		for _, e := range errs {
			got = append(got, strings.Join(e.Path, ".")+" "+e.Kind)
		}
		if diff := cmp.Diff(tt.broken, got); diff != "" {
			t.Errorf("%s: rules broken (-want +got):\n%s", name, diff)
		}
		if err != nil {
			continue
		}
		if diff := cmp.Diff(tt.want, flowOf(&changed.Spec), cmp.AllowUnexported(flow{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestPriorityLead(t *testing.T) {
	t.Parallel()
	for p, want := range map[task.Priority]time.Duration{task.High: 15 * time.Minute, task.Normal: 0, "": 0, task.Low: -15 * time.Minute} {
		if got := p.Lead(); got != want {
			t.Errorf("Lead of %q = %v, want %v", p, got, want)
		}
	}
}

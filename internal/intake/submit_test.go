package intake

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// A submission is of one task or of a batch; both go by the same rules.
type submission func(t *testing.T, in *Intake, r Request, made *task.Task, refusal error) (stored *task.Task, repeated bool, err error)

var submissions = map[string]submission{
	"one": func(t *testing.T, in *Intake, r Request, made *task.Task, refusal error) (*task.Task, bool, error) {
		return in.Submit(t.Context(), r, made, refusal)
	},
	"batch": func(t *testing.T, in *Intake, r Request, made *task.Task, refusal error) (*task.Task, bool, error) {
		tasks, repeated, err := in.SubmitBatch(t.Context(), r, []*task.Task{made}, refusal)
		if err != nil {
			return nil, repeated, err
		}
		return tasks[0], repeated, nil
	},
}

// eachSubmission runs a test of both.
func eachSubmission(t *testing.T, test func(t *testing.T, submit submission)) {
	t.Helper()
	for name, submit := range submissions {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, submit)
		})
	}
}

func TestSubmit(t *testing.T) {
	t.Parallel()
	parent := task.ID{9}
	eachSubmission(t, func(t *testing.T, submit submission) {
		f := new(fakes)
		in := newIntake(f)
		made := legal(t, in, task.When{Delay: time.Minute})
		stored, repeated, err := submit(t, in, Request{Origin: Origin{Principal: "plays", Hops: 2, Parent: parent}}, made, nil)
		if err != nil || repeated || stored != made || len(f.stored) != 1 {
			t.Fatalf("got %v, %v, %v, and %d tasks are stored", stored, repeated, err, len(f.stored))
		}
		if stored.CreatedBy != "plays" || stored.Hops != 2 || stored.ParentID != parent || stored.IdempotencyKey != "" || stored.Fingerprint != nil {
			t.Errorf("stored as %+v", stored)
		}
		if f.asked > 0 || f.looked != nil {
			t.Errorf("the clock was asked %d times, and %q were looked up", f.asked, f.looked)
		}
		for _, failure := range []error{errDatabase, task.ErrKeyTaken} {
			f.refuse = failure
			if _, repeated, err := submit(t, in, Request{IdempotencyKey: "k"}, legal(t, in, task.When{}), nil); !errors.Is(err, failure) || repeated {
				t.Errorf("got %v, %v, want %v", repeated, err, failure)
			}
		}
	})
}

// keysOf returns the key and the fingerprint that was stored, with a batch or with its task.
func keysOf(f *fakes) (string, []byte) {
	if f.batches != nil {
		b := f.batches[len(f.batches)-1]
		return b.IdempotencyKey, b.Fingerprint
	}
	t := f.stored[len(f.stored)-1]
	return t.IdempotencyKey, t.Fingerprint
}

func TestKeys(t *testing.T) {
	t.Parallel()
	parent := task.ID{9}
	given := []byte("what the door says")
	call := "call of " + parent.String() + " " + fmt.Sprintf("%x", given) + " "
	eachSubmission(t, func(t *testing.T, submit submission) {
		for _, tt := range []struct {
			request Request
			key     string
		}{
			{Request{IdempotencyKey: "k"}, " k"},
			{Request{IdempotencyKey: "k", Origin: Origin{Principal: "plays"}}, "plays k"},
			{Request{IdempotencyKey: "k", Origin: Origin{Principal: "plays", Parent: parent, IsCall: true}}, "plays k"},
			{Request{Origin: Origin{Parent: parent, IsCall: true}}, " " + call},
			{Request{Origin: Origin{Principal: "plays", Parent: parent, IsCall: true}}, "plays " + call},
			{Request{Origin: Origin{Principal: "plays", Parent: parent}}, ""},
		} {
			f := new(fakes)
			in := newIntake(f)
			tt.request.Fingerprint = given
			if _, _, err := submit(t, in, tt.request, legal(t, in, task.When{}), nil); err != nil {
				t.Fatal(err)
			}
			key, fingerprint := keysOf(f)
			if key != tt.key || (key != "") != (string(fingerprint) == string(given)) {
				t.Errorf("%+v: stored under %q with the fingerprint %q, want %q", tt.request, key, fingerprint, tt.key)
			}
		}
	})
}

// A door that has no bytes to compare leaves it to the tasks.
func TestFingerprintOfTasks(t *testing.T) {
	t.Parallel()
	eachSubmission(t, func(t *testing.T, submit submission) {
		f := new(fakes)
		in := newIntake(f)
		of := func(when task.When, change ...func(*task.Spec)) string {
			t.Helper()
			if _, _, err := submit(t, in, Request{IdempotencyKey: "k"}, legal(t, in, when, change...), nil); err != nil {
				t.Fatal(err)
			}
			_, fingerprint := keysOf(f)
			if len(fingerprint) != 32 {
				t.Fatalf("got %d bytes, want 32", len(fingerprint))
			}
			return string(fingerprint)
		}
		seen := map[string]string{}
		differs := func(name, fingerprint string) {
			if other, found := seen[fingerprint]; found {
				t.Errorf("%s has the fingerprint of %s", name, other)
			}
			seen[fingerprint] = name
		}
		headers := func(m map[string]string) func(*task.Spec) { return func(s *task.Spec) { s.Headers = m } }
		two := map[string]string{"A": "1", "B": "2"}
		if of(task.When{}, headers(two)) != of(task.When{}, headers(map[string]string{"B": "2", "A": "1"})) {
			t.Error("the same task has another fingerprint when it comes again")
		}
		if of(task.When{}) != of(task.When{}, headers(map[string]string{})) {
			t.Error("a task without headers has another fingerprint when they are left out")
		}
		differs("a task", of(task.When{}))
		differs("a delay", of(task.When{Delay: 1}))
		differs("a moment", of(task.When{At: storedAt}))
		differs("two headers", of(task.When{}, headers(two)))
		differs("one header", of(task.When{}, headers(map[string]string{"A": "1B2"})))
		differs("other headers", of(task.When{}, headers(map[string]string{"A": "1B", "C": "2"})))
		differs("an empty header", of(task.When{}, headers(map[string]string{"A": ""})))
		differs("an empty body", of(task.When{}, func(s *task.Spec) { s.Body = []byte{} }))
		differs("labels", of(task.When{}, func(s *task.Spec) { s.Labels = two }))
		onSuccess := &task.Callback{URL: target}
		differs("on_success", of(task.When{}, func(s *task.Spec) { s.OnSuccess = onSuccess }))
		differs("on_failure", of(task.When{}, func(s *task.Spec) { s.OnFailure = onSuccess }))
		differs("a callback with headers", of(task.When{}, func(s *task.Spec) { s.OnFailure = &task.Callback{URL: target, Headers: two} }))
	})
}

// It is stored: what a later version computes must be the same.
func TestFingerprintStays(t *testing.T) {
	t.Parallel()
	made := &task.Task{ID: task.ID{1}, Delay: time.Second, Spec: task.Spec{
		URL: target, Method: "PUT", Headers: map[string]string{"A": "1", "B": ""}, Body: []byte("{}"), ContentType: "application/json", Timeout: time.Minute,
		Retry:     task.RetryPolicy{MaxAttempts: 10, MinBackoff: time.Second, MaxBackoff: time.Hour, MaxDoublings: 16},
		ExpiresAt: storedAt, OnFailure: &task.Callback{URL: target}, OIDCAudience: "a",
	}}
	const want = "9037611bda8d2d06a0ddd5f1985f4e60c4902ed8d9edcc2ebbd677476a4a4f81"
	if got := fmt.Sprintf("%x", fingerprintOf([]*task.Task{made})); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A field that a Spec gets counts too.
func TestFingerprintHasEveryField(t *testing.T) {
	t.Parallel()
	plain := string(fingerprintOf([]*task.Task{{}}))
	var walk func(t *testing.T, task *task.Task, v reflect.Value, path string)
	walk = func(t *testing.T, made *task.Task, v reflect.Value, path string) {
		zero := reflect.Zero(v.Type())
		switch v.Interface().(type) {
		case string:
			v.SetString("x")
		case []byte:
			v.SetBytes([]byte("x"))
		case bool:
			v.SetBool(true)
		case int, time.Duration:
			v.SetInt(5)
		case time.Time:
			v.Set(reflect.ValueOf(storedAt))
		case map[string]string:
			v.Set(reflect.ValueOf(map[string]string{"a": "b"}))
		case *task.JWT:
			v.Set(reflect.ValueOf(&task.JWT{}))
			if asRole := []*task.Task{{Spec: task.Spec{JWT: &task.JWT{Role: "x"}}}}; string(fingerprintOf(asRole)) == string(fingerprintOf([]*task.Task{made})) {
				t.Errorf("%s: its role does not count", path)
			}
		case *task.Callback:
			v.Set(reflect.ValueOf(&task.Callback{}))
		case *task.Completion:
			v.Set(reflect.ValueOf(&task.Completion{Timeout: time.Hour}))
		case task.Priority:
			v.SetString(string(task.High))
		case task.RetryPolicy:
			for i := range v.NumField() {
				walk(t, made, v.Field(i), path+"."+v.Type().Field(i).Name)
			}
			return
		default:
			t.Fatalf("%s is a %s: say here what one may be", path, v.Type())
		}
		if string(fingerprintOf([]*task.Task{made})) == plain {
			t.Errorf("%s does not count", path)
		}
		v.Set(zero)
	}
	made := new(task.Task)
	spec := reflect.ValueOf(&made.Spec).Elem()
	for i := range spec.NumField() {
		walk(t, made, spec.Field(i), spec.Type().Field(i).Name)
	}
}

func TestRepeat(t *testing.T) {
	t.Parallel()
	first := &task.Task{ID: task.ID{7}, State: task.Succeeded}
	for name, tt := range map[string]struct {
		tasks  map[task.ID]*task.Task
		unread error
		want   error
	}{
		"what it came to":     {tasks: map[task.ID]*task.Task{first.ID: first}},
		"over, and forgotten": {want: ErrRepeatGone},
		"too many read":       {tasks: map[task.ID]*task.Task{first.ID: first}, unread: task.ErrOverloaded, want: ErrRepeatUnread},
		"reading takes long":  {tasks: map[task.ID]*task.Task{first.ID: first}, unread: task.ErrTooBroad, want: ErrRepeatUnread},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachSubmission(t, func(t *testing.T, submit submission) {
				f := &fakes{refuse: &task.RepeatError{Tasks: []task.ID{first.ID}}, tasks: tt.tasks, unread: tt.unread}
				in := newIntake(f)
				stored, repeated, err := submit(t, in, Request{IdempotencyKey: "k"}, legal(t, in, task.When{}), nil)
				if !errors.Is(err, tt.want) || !repeated {
					t.Errorf("got %v, %v, want a repeat and %v", repeated, err, tt.want)
				}
				if err == nil && (stored.ID != first.ID || stored.State != task.Succeeded) {
					t.Errorf("got the task %+v, want the first one", stored)
				}
			})
		})
	}
}

// What was stored stays stored when it is sent again, though it breaks rules by
// now: time has passed, or settings have changed.
func TestRepeatThatBreaksRules(t *testing.T) {
	t.Parallel()
	refusal := errors.New("breaks a rule")
	for name, tt := range map[string]struct {
		// change is nil where the door could make no task.
		change   func(*task.Spec)
		request  Request
		repeated error
		wants    func(error) bool
		looked   []string
	}{
		"without a name":            {request: Request{Fingerprint: []byte("f")}, wants: func(err error) bool { return errors.Is(err, refusal) }},
		"by its tasks, without any": {request: Request{IdempotencyKey: "k"}, wants: func(err error) bool { return errors.Is(err, refusal) }},
		"for the first time": {request: Request{IdempotencyKey: "k", Fingerprint: []byte("f")},
			wants: func(err error) bool { return errors.Is(err, refusal) }, looked: []string{" k"}},
		"under the key of another": {request: Request{IdempotencyKey: "k", Fingerprint: []byte("f")}, repeated: fmt.Errorf("look up: %w", task.ErrKeyTaken),
			wants: func(err error) bool { return errors.Is(err, refusal) }, looked: []string{" k"}},
		"again": {request: Request{IdempotencyKey: "k", Fingerprint: []byte("f")}, repeated: fmt.Errorf("look up: %w", &task.RepeatError{Tasks: []task.ID{{7}}}),
			wants: func(err error) bool { return err == nil }, looked: []string{" k"}},
		"it is not known whether again": {request: Request{IdempotencyKey: "k", Fingerprint: []byte("f")}, repeated: errDatabase,
			wants: func(err error) bool { return errors.Is(err, errDatabase) }, looked: []string{" k"}},
		"it would expire by now": {change: func(s *task.Spec) { s.ExpiresAt = storedAt.Add(time.Second) }, request: Request{IdempotencyKey: "k", Fingerprint: []byte("f")},
			wants: func(err error) bool { return err != nil && strings.Contains(err.Error(), "expires_at") }, looked: []string{" k"}},
		"it would expire by now, again": {change: func(s *task.Spec) { s.ExpiresAt = storedAt.Add(time.Second) }, request: Request{IdempotencyKey: "k", Fingerprint: []byte("f")},
			repeated: &task.RepeatError{Tasks: []task.ID{{7}}}, wants: func(err error) bool { return err == nil }, looked: []string{" k"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachSubmission(t, func(t *testing.T, submit submission) {
				f := &fakes{repeated: tt.repeated, tasks: map[task.ID]*task.Task{{7}: {ID: task.ID{7}}}}
				in := newIntake(f)
				var made *task.Task
				refused := refusal
				if tt.change != nil {
					made, refused = legal(t, in, task.When{Delay: time.Minute}, tt.change), nil
				}
				stored, repeated, err := submit(t, in, tt.request, made, refused)
				if !tt.wants(err) || repeated != (err == nil) || len(f.stored) > 0 {
					t.Errorf("got %v, %v, %v, and %d tasks are stored", stored, repeated, err, len(f.stored))
				}
				if diff := cmp.Diff(tt.looked, f.looked); diff != "" {
					t.Errorf("looked up (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// Only tasks that have a delay and an end need the database's clock, once for all.
func TestDelays(t *testing.T) {
	t.Parallel()
	f := new(fakes)
	in := newIntake(f)
	ending := func(s *task.Spec) { s.ExpiresAt = storedAt.Add(time.Minute) }
	tasks := []*task.Task{
		legal(t, in, task.When{}, ending), legal(t, in, task.When{Delay: time.Minute}, ending), legal(t, in, task.When{Delay: time.Minute + 1}, ending),
		legal(t, in, task.When{Delay: time.Hour}), legal(t, in, task.When{Delay: time.Hour}, ending),
	}
	_, _, err := in.SubmitBatch(t.Context(), Request{}, tasks, nil)
	wrong, _ := errors.AsType[BatchError](err)
	if len(wrong) != 2 || wrong[0].Index != 2 || wrong[1].Index != 4 || wrong[1].Errors[0].Kind != "conflict" || f.asked != 1 || len(f.stored) > 0 {
		t.Errorf("got %v after the clock was asked %d times, and %d tasks are stored", err, f.asked, len(f.stored))
	}
	if _, _, err := in.SubmitBatch(t.Context(), Request{}, tasks[:2], nil); err != nil || len(f.stored) != 2 {
		t.Errorf("got %v, and %d tasks are stored", err, len(f.stored))
	}
	f.clockless = errDatabase
	for name, submit := range submissions {
		if _, _, err := submit(t, in, Request{}, tasks[1], nil); !errors.Is(err, errDatabase) {
			t.Errorf("%s: got %v, want what the clock says", name, err)
		}
		if _, _, err := submit(t, in, Request{}, tasks[0], nil); err != nil {
			t.Errorf("%s that is due now: got %v", name, err)
		}
	}
}

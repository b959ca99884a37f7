package intake

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

func TestDefaults(t *testing.T) {
	t.Parallel()
	in := newIntake(new(fakes))
	want := task.Spec{URL: target, Method: "POST", Timeout: 7 * time.Second, Retry: task.DefaultRetryPolicy()}
	one, two := legal(t, in, task.When{}), legal(t, in, task.When{Delay: time.Minute})
	if diff := cmp.Diff(want, one.Spec); diff != "" {
		t.Errorf("a task that leaves all out (-want +got):\n%s", diff)
	}
	if one.State != task.Pending || one.ID == two.ID || two.Delay != time.Minute {
		t.Errorf("got the tasks %+v and %+v", one, two)
	}
}

func TestTaskBreaksRules(t *testing.T) {
	t.Parallel()
	refusing := func(o *Options) {
		o.Policy = fakePolicy(func(url string) error {
			if strings.Contains(url, "forbidden") {
				return errors.New("must be allowed")
			}
			return nil
		})
		o.Identity = fakePolicy(func(string) error { return errors.New("must not be there") })
		o.Issuer = fakeIssuer(func(_, role string) error {
			if role == "known" {
				return nil
			}
			return errors.New("must not be there")
		})
		o.Secrets = fakeSecrets(func(name, url string) error {
			if name == "known" && url == target {
				return nil
			}
			return errors.New("refers to a secret")
		})
	}
	const forbidden = "https://forbidden.example/"
	for name, tt := range map[string]struct {
		change func(*task.Spec)
		when   task.When
		errs   []string
	}{
		"nothing":                              {func(*task.Spec) {}, task.When{}, nil},
		"the domain's":                         {func(s *task.Spec) { s.Timeout, s.URL, s.OIDCAudience = 0, "ftp://x/", "a" }, task.When{Delay: -1}, []string{"url invalid", "timeout_seconds out_of_range", "delay_seconds out_of_range"}},
		"the target":                           {func(s *task.Spec) { s.URL = forbidden }, task.When{}, []string{"url target_refused"}},
		"a callback's target":                  {func(s *task.Spec) { s.OnSuccess = &task.Callback{URL: forbidden} }, task.When{}, []string{"on_success.url target_refused"}},
		"the other callback's":                 {func(s *task.Spec) { s.OnFailure = &task.Callback{URL: forbidden} }, task.When{}, []string{"on_failure.url target_refused"}},
		"a token":                              {func(s *task.Spec) { s.OIDCAudience = "a" }, task.When{}, []string{"auth target_refused"}},
		"a token for a target that is refused": {func(s *task.Spec) { s.URL, s.OIDCAudience = forbidden, "a" }, task.When{}, []string{"url target_refused"}},
		"a token of the platform":              {func(s *task.Spec) { s.JWT = &task.JWT{Role: "unknown"} }, task.When{}, []string{"auth target_refused"}},
		"one that is allowed":                  {func(s *task.Spec) { s.JWT = &task.JWT{Role: "known", Audience: "a"} }, task.When{}, nil},
		"one for a target that is refused":     {func(s *task.Spec) { s.URL, s.JWT = forbidden, &task.JWT{} }, task.When{}, []string{"url target_refused"}},
		"a secret that is allowed":             {func(s *task.Spec) { s.Headers = map[string]string{"X": "${secret:known}"} }, task.When{}, nil},
		"secrets": {func(s *task.Spec) {
			s.Headers = map[string]string{"X-B": "${secret:known} ${secret:b} ${secret:c}", "X-A": "${secret:a}", "X-C": "c"}
		}, task.When{}, []string{"headers.X-A secret_refused", "headers.X-B secret_refused"}},
		"a secret for the callback's target": {func(s *task.Spec) {
			s.Headers = map[string]string{"X": "${secret:known}"}
			s.OnFailure = &task.Callback{URL: target + "/ended", Headers: map[string]string{"X": "${secret:known}"}}
		}, task.When{}, []string{"on_failure.headers.X secret_refused"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in := newIntake(new(fakes), refusing)
			made, err := in.Task(asked(in, tt.change), tt.when)
			errs, _ := errors.AsType[task.Errors](err)
			var got []string
			for _, e := range errs {
				got = append(got, strings.Join(e.Path, ".")+" "+e.Kind)
			}
			if diff := cmp.Diff(tt.errs, got); diff != "" || (made == nil) != (err != nil) {
				t.Errorf("got the task %v and (-want +got):\n%s", made, diff)
			}
		})
	}
}

// What cannot be found out for want of file descriptors is no mistake of the request.
func TestSecretsInAShortage(t *testing.T) {
	t.Parallel()
	f := &fakes{repeated: &task.RepeatError{Tasks: []task.ID{{7}}}, tasks: map[task.ID]*task.Task{{7}: {ID: task.ID{7}}}}
	in := newIntake(f, func(o *Options) {
		o.Secrets = fakeSecrets(func(string, string) error { return fmt.Errorf("read: %w", task.ShortageDescriptors) })
	})
	referring := map[string]string{"X": "${secret:a}"}
	for name, change := range map[string]func(*task.Spec){
		"headers":    func(s *task.Spec) { s.Headers = referring },
		"on_success": func(s *task.Spec) { s.OnSuccess = &task.Callback{URL: target, Headers: referring} },
		"on_failure": func(s *task.Spec) { s.OnFailure = &task.Callback{URL: target, Headers: referring} },
	} {
		if made, err := in.Task(asked(in, change), task.When{}); made != nil || err != error(task.ShortageDescriptors) {
			t.Errorf("%s: got %v, %v, want %v", name, made, err, task.ShortageDescriptors)
		}
	}
	before := legal(t, in, task.When{})
	f.tasks[before.ID] = before
	reference := "${secret:a}"
	if _, err := in.Change(t.Context(), before.ID, task.Change{Headers: map[string]*string{"X": &reference}}, nil); err != error(task.ShortageDescriptors) {
		t.Errorf("a change: got %v, want %v", err, task.ShortageDescriptors)
	}
}

func TestUnstored(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		expires   time.Time
		clockless error
		kind      string
		asked     int
	}{
		"it never expires":        {},
		"it expires now":          {expires: storedAt, asked: 1},
		"it has expired":          {expires: storedAt.Add(-1), kind: "expired", asked: 1},
		"the moment is not known": {expires: storedAt, clockless: errDatabase, asked: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := &fakes{clockless: tt.clockless}
			in := newIntake(f)
			made := legal(t, in, task.When{}, func(s *task.Spec) { s.ExpiresAt = tt.expires })
			err := in.Unstored(t.Context(), Origin{Hops: 3}, made)
			errs, _ := errors.AsType[task.Errors](err)
			if (len(errs) > 0) != (tt.kind != "") || tt.kind != "" && errs[0].Kind != tt.kind || tt.kind == "" && !errors.Is(err, tt.clockless) || f.asked != tt.asked {
				t.Errorf("got %v after the clock was asked %d times, want %q, %v after %d", err, f.asked, tt.kind, tt.clockless, tt.asked)
			}
			if err == nil && (made.Retry.MaxAttempts != 1 || made.Hops != 3 || made.RunAt.IsZero()) {
				t.Errorf("got a task of %d attempts with %d hops, due at %s", made.Retry.MaxAttempts, made.Hops, made.RunAt)
			}
		})
	}
}

// All that stores, redrives or makes tasks refuses a request that too many calls led to,
// before anything else.
func TestHops(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]func(t *testing.T, in *Intake, o Origin, made *task.Task) error{
		"submit": func(t *testing.T, in *Intake, o Origin, made *task.Task) error {
			_, _, err := in.Submit(t.Context(), Request{Origin: o}, made, nil)
			return err
		},
		"submit a batch": func(t *testing.T, in *Intake, o Origin, made *task.Task) error {
			_, _, err := in.SubmitBatch(t.Context(), Request{Origin: o}, []*task.Task{made}, nil)
			return err
		},
		"carry out": func(t *testing.T, in *Intake, o Origin, made *task.Task) error {
			return in.Unstored(t.Context(), o, made)
		},
		"redrive": func(t *testing.T, in *Intake, o Origin, made *task.Task) error {
			_, err := in.Redrive(t.Context(), o, made.ID)
			return err
		},
		"redrive many": func(t *testing.T, in *Intake, o Origin, made *task.Task) error {
			_, err := in.RedriveMany(t.Context(), o, []task.ID{made.ID}, 0, 0)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, tt := range []struct {
				most, hops int
				refused    bool
			}{{2, 0, false}, {2, 2, false}, {2, 3, true}, {0, task.MaxHops, false}} {
				redriven := -1
				f := &fakes{redrive: func(hops int) error { redriven = hops; return nil }}
				in := newIntake(f, func(o *Options) { o.MaxHops = tt.most })
				err := do(t, in, Origin{Hops: tt.hops}, legal(t, in, task.When{}))
				if got, refused := errors.AsType[*HopsError](err); refused != tt.refused || refused && got.Max != tt.most || !refused && err != nil {
					t.Errorf("%d hops of %d: got %v, want a refusal: %v", tt.hops, tt.most, err, tt.refused)
				}
				if tt.refused && (len(f.stored) > 0 || redriven >= 0 || f.woken > 0) {
					t.Errorf("%d hops of %d: it had an effect", tt.hops, tt.most)
				}
				for _, stored := range f.stored {
					if stored.Hops != tt.hops {
						t.Errorf("%d hops: stored with %d", tt.hops, stored.Hops)
					}
				}
				if strings.HasPrefix(name, "redrive") && !tt.refused && (redriven != tt.hops || f.woken != 1) {
					t.Errorf("redriven with %d hops, and the dispatcher was woken %d times; want %d, once", redriven, f.woken, tt.hops)
				}
			}
		})
	}
}

func TestChange(t *testing.T) {
	t.Parallel()
	secrets := func(o *Options) {
		o.Secrets = fakeSecrets(func(string, string) error { return errors.New("refers to a secret") })
	}
	errNotAllowed := errors.New("not in this version")
	minute, second := time.Minute, time.Second
	reference, value := "${secret:a}", "b"
	for name, tt := range map[string]struct {
		change task.Change
		allow  error
		writes []error
		want   error
		kind   string // of the one task.Errors
		woken  int
	}{
		"one":                      {change: task.Change{Timeout: &second}, writes: []error{nil}, woken: 1},
		"among others":             {writes: []error{task.ErrChanged, task.ErrChanged, nil}, woken: 1},
		"among others, in vain":    {writes: []error{task.ErrChanged, task.ErrChanged, task.ErrChanged}, want: task.ErrChanged},
		"of another version":       {allow: errNotAllowed, want: errNotAllowed},
		"without a database":       {writes: []error{errDatabase}, want: errDatabase},
		"that breaks a rule":       {change: task.Change{Timeout: new(time.Duration)}, kind: "out_of_range"},
		"that expires in its wait": {change: task.Change{When: &task.When{Delay: time.Hour}}, kind: "conflict"},
		"that waits":               {change: task.Change{When: &task.When{Delay: minute}}, writes: []error{nil}, woken: 1},
		"with a secret":            {change: task.Change{Headers: map[string]*string{"X": &reference}}, kind: "secret_refused"},
		"with a header":            {change: task.Change{Headers: map[string]*string{"X": &value}}, writes: []error{nil}, woken: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := new(fakes)
			in := newIntake(f, secrets)
			before := legal(t, in, task.When{At: storedAt}, func(s *task.Spec) { s.ExpiresAt = storedAt.Add(2 * time.Minute) })
			f.tasks = map[task.ID]*task.Task{before.ID: before}
			written := 0
			f.change = func(changed *task.Task) (*task.Task, error) {
				written++
				return changed, tt.writes[written-1]
			}
			changed, err := in.Change(t.Context(), before.ID, tt.change, func(shown *task.Task) error {
				if shown.ID != before.ID {
					t.Errorf("asked about the task %s, want %s", shown.ID, before.ID)
				}
				return tt.allow
			})
			errs, _ := errors.AsType[task.Errors](err)
			switch {
			case tt.kind != "" && (len(errs) != 1 || errs[0].Kind != tt.kind), tt.kind == "" && !errors.Is(err, tt.want):
				t.Errorf("got %v, want %v %s", err, tt.want, tt.kind)
			case (changed != nil) != (err == nil), written != len(tt.writes), f.woken != tt.woken:
				t.Errorf("got the task %v, %d writes, and the dispatcher woken %d times; want %d and %d", changed, written, f.woken, len(tt.writes), tt.woken)
			}
		})
	}
	if _, err := newIntake(new(fakes)).Change(t.Context(), task.ID{1}, task.Change{}, nil); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("a task that is not there: got %v", err)
	}
}

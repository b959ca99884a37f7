package task_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

var service = task.Spec{Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy()}

func rulesOf(t *testing.T, err error) (rules []string) {
	t.Helper()
	errs, ok := err.(task.Errors)
	if err != nil && !ok {
		t.Fatalf("%v is not Errors", err)
	}
	for _, e := range errs {
		rules = append(rules, strings.Join(e.Path, ".")+" "+e.Kind)
	}
	return rules
}

func TestQueueSettings(t *testing.T) {
	t.Parallel()
	retry := func(c task.RetryChange) task.QueueSettings {
		return task.QueueSettings{Defaults: task.QueueDefaults{Retry: c}}
	}
	limits := func(l task.Limits) task.QueueSettings { return task.QueueSettings{Limits: l} }
	for name, tt := range map[string]struct {
		settings task.QueueSettings
		broken   []string
	}{
		"none":              {},
		"the least":         {settings: limits(task.Limits{MaxConcurrent: 1, MaxPerSecond: 0.001, Burst: 1})},
		"the most":          {settings: limits(task.Limits{MaxConcurrent: 1_000_000, MaxPerSecond: 10_000, Burst: 1_000_000})},
		"a rate alone":      {settings: limits(task.Limits{MaxPerSecond: 2.5})},
		"too few calls":     {limits(task.Limits{MaxConcurrent: -1}), []string{"max_concurrent out_of_range"}},
		"too many calls":    {limits(task.Limits{MaxConcurrent: 1_000_001}), []string{"max_concurrent out_of_range"}},
		"too slow":          {limits(task.Limits{MaxPerSecond: 0.0009}), []string{"max_per_second out_of_range"}},
		"too fast":          {limits(task.Limits{MaxPerSecond: 10_000.1}), []string{"max_per_second out_of_range"}},
		"backwards":         {limits(task.Limits{MaxPerSecond: -1}), []string{"max_per_second out_of_range"}},
		"no number":         {limits(task.Limits{MaxPerSecond: math.NaN()}), []string{"max_per_second out_of_range"}},
		"a burst of none":   {limits(task.Limits{MaxPerSecond: 1, Burst: -1}), []string{"burst out_of_range"}},
		"too large a burst": {limits(task.Limits{MaxPerSecond: 1, Burst: 1_000_001}), []string{"burst out_of_range"}},
		"a burst alone":     {limits(task.Limits{Burst: 5}), []string{"burst conflict"}},
		"of keys": {task.QueueSettings{PerKey: task.KeyLimits{Limits: task.Limits{MaxConcurrent: -1, MaxPerSecond: 10_001, Burst: -1}}},
			[]string{"per_key.max_concurrent out_of_range", "per_key.max_per_second out_of_range", "per_key.burst out_of_range"}},
		"ordered":                               {settings: task.QueueSettings{PerKey: task.KeyLimits{Ordered: true, Limits: task.Limits{MaxConcurrent: 1, MaxPerSecond: 1}}}},
		"ordered, two at a time":                {task.QueueSettings{PerKey: task.KeyLimits{Ordered: true, Limits: task.Limits{MaxConcurrent: 2}}}, []string{"per_key.max_concurrent conflict"}},
		"defaults":                              {settings: task.QueueSettings{Defaults: task.QueueDefaults{Timeout: new(time.Minute), Retry: task.RetryChange{MaxAttempts: new(3)}}}},
		"a short timeout":                       {task.QueueSettings{Defaults: task.QueueDefaults{Timeout: new(time.Millisecond)}}, []string{"defaults.timeout_seconds out_of_range"}},
		"a long timeout":                        {task.QueueSettings{Defaults: task.QueueDefaults{Timeout: new(time.Hour)}}, []string{"defaults.timeout_seconds out_of_range"}},
		"no attempt":                            {retry(task.RetryChange{MaxAttempts: new(0)}), []string{"defaults.retry.max_attempts out_of_range"}},
		"a backoff above the service's longest": {retry(task.RetryChange{MinBackoff: new(2 * time.Hour)}), []string{"defaults.retry.max_backoff_seconds out_of_range"}},
		"both backoffs":                         {settings: retry(task.RetryChange{MinBackoff: new(2 * time.Hour), MaxBackoff: new(3 * time.Hour)})},
	} {
		if diff := cmp.Diff(tt.broken, rulesOf(t, tt.settings.Check(service))); diff != "" {
			t.Errorf("%s: rules broken (-want +got):\n%s", name, diff)
		}
	}
	key := task.KeyLimits{Ordered: true, Limits: task.Limits{MaxConcurrent: 2, Burst: 1}}
	if diff := cmp.Diff([]string{"burst conflict", "max_concurrent conflict"}, rulesOf(t, key.Check())); diff != "" {
		t.Errorf("a key's limits: rules broken (-want +got):\n%s", diff)
	}
}

func TestEffectiveBurst(t *testing.T) {
	t.Parallel()
	for limits, want := range map[task.Limits]int{
		{}: 0, {MaxConcurrent: 7}: 0, {MaxPerSecond: 0.001}: 1, {MaxPerSecond: 2}: 2, {MaxPerSecond: 2.1}: 3, {MaxPerSecond: 100, Burst: 1}: 1,
	} {
		if got := limits.EffectiveBurst(); got != want {
			t.Errorf("%+v: %d, want %d", limits, got, want)
		}
	}
}

// A queue's defaults are for what a task leaves out, and leave out what the service says.
func TestQueueDefaults(t *testing.T) {
	t.Parallel()
	d := task.QueueDefaults{Timeout: new(time.Minute), Retry: task.RetryChange{MaxAttempts: new(3), RetryClientErrors: new(true)}}
	want := service
	want.Timeout, want.Retry.MaxAttempts, want.Retry.RetryClientErrors = time.Minute, 3, true
	if diff := cmp.Diff(want, d.In(service)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(service, (&task.QueueDefaults{}).In(service)); diff != "" {
		t.Errorf("no defaults (-want +got):\n%s", diff)
	}
}

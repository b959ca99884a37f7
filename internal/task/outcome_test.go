package task_test

import (
	"math"
	"math/big"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/task"
)

func TestClassify(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		first, last int
		want        task.Kind
	}{
		{math.MinInt, math.MinInt, task.OutcomeRetryable},
		{0, 0, task.OutcomeRetryable}, // no response
		{100, 199, task.OutcomeRetryable},
		{200, 299, task.OutcomeSucceeded},
		{300, 399, task.OutcomePermanent},
		{400, 407, task.OutcomePermanent},
		{408, 408, task.OutcomeRetryable},
		{409, 424, task.OutcomePermanent},
		{425, 425, task.OutcomeRetryable},
		{426, 428, task.OutcomePermanent},
		{429, 429, task.OutcomeRetryable},
		{430, 499, task.OutcomePermanent},
		{500, 999, task.OutcomeRetryable},
		{math.MaxInt, math.MaxInt, task.OutcomeRetryable},
	} {
		for code := tt.first; ; code++ {
			if got := task.Classify(code); got != tt.want {
				t.Errorf("Classify(%d) = %s, want %s", code, got, tt.want)
			}
			if code == tt.last {
				break
			}
		}
	}
}

// began is when the tests' tasks are claimed for the first time.
var began = time.Date(2026, 3, 14, 15, 9, 26, 535_897_000, time.UTC)

// claimOf returns a claim of a task that waits 8 s before each retry, after
// count attempts. change may alter it.
func claimOf(count int, change func(*task.Claim)) *task.Claim {
	c := &task.Claim{
		Task: &task.Task{
			State:        task.Running,
			AttemptCount: count,
			Spec: task.Spec{Retry: task.RetryPolicy{
				MaxAttempts: 5, MinBackoff: 8 * time.Second, MaxBackoff: 8 * time.Second,
			}},
		},
		Number: 7, At: began, FirstAt: began,
	}
	if change != nil {
		change(c)
	}
	return c
}

// Random numbers that spread a wait to its lower end, not at all, and to its
// upper end, which random numbers never quite reach.
var lowest, middle, highest = 0.0, 0.5, math.Nextafter(1, 0)

// result is what a test expects of a [task.Decision].
type result struct {
	State  task.State
	Reason task.Reason
	Wait   time.Duration
}

func resultOf(d task.Decision) result { return result{d.State, d.Reason, d.Wait} }

func TestNext(t *testing.T) {
	t.Parallel()
	clientErrors := func(c *task.Claim) { c.Task.Retry.RetryClientErrors = true }
	maxAttempts := func(n int) func(*task.Claim) {
		return func(c *task.Claim) { c.Task.Retry.MaxAttempts = n }
	}
	status := func(code int) task.Outcome { return task.Outcome{Kind: task.Classify(code), StatusCode: code} }
	never := func(o task.Outcome) task.Outcome { o.Never = true; return o }
	snooze := func(o task.Outcome) task.Outcome { o.Snooze = time.Minute; return o }
	snoozes := func(n int) func(*task.Claim) {
		return func(c *task.Claim) { c.Task.SnoozeCount = n }
	}
	var (
		succeeded = result{State: task.Succeeded}
		retry     = result{State: task.Pending, Wait: 8 * time.Second}
		atOnce    = result{State: task.Pending}
		cancelled = result{State: task.Cancelled}
		snoozed   = result{State: task.Pending, Wait: time.Minute}
		failed    = func(r task.Reason) result { return result{State: task.Failed, Reason: r} }
	)
	tests := map[string]struct {
		outcome task.Outcome
		count   int
		change  func(*task.Claim)
		want    result
	}{
		"200":                    {status(200), 0, nil, succeeded},
		"299":                    {status(299), 0, nil, succeeded},
		"204 at the last":        {status(204), 4, nil, succeeded},
		"204 after max_attempts": {status(204), 5, nil, succeeded},

		"408":                     {status(408), 0, nil, retry},
		"425":                     {status(425), 0, nil, retry},
		"429":                     {status(429), 0, nil, retry},
		"500":                     {status(500), 0, nil, retry},
		"503":                     {status(503), 0, nil, retry},
		"599":                     {status(599), 0, nil, retry},
		"no connection":           {task.Outcome{Kind: task.OutcomeRetryable, Error: "connection refused"}, 0, nil, retry},
		"timeout":                 {task.Outcome{Kind: task.OutcomeRetryable, TimedOut: true}, 0, nil, retry},
		"timeout in a 200's body": {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 200, TimedOut: true}, 0, nil, retry},

		"400":                                  {status(400), 0, nil, failed(task.ClientError)},
		"404":                                  {status(404), 0, nil, failed(task.ClientError)},
		"499":                                  {status(499), 0, nil, failed(task.ClientError)},
		"404 at the last attempt":              {status(404), 4, nil, failed(task.ClientError)},
		"400 with retry_client_errors":         {status(400), 0, clientErrors, retry},
		"499 with retry_client_errors":         {status(499), 0, clientErrors, retry},
		"404 with retry_client_errors, last":   {status(404), 4, clientErrors, failed(task.AttemptsExhausted)},
		"429 with retry_client_errors":         {status(429), 0, clientErrors, retry},
		"302":                                  {status(302), 0, nil, failed(task.ClientError)},
		"399":                                  {status(399), 0, nil, failed(task.ClientError)},
		"302 with retry_client_errors":         {status(302), 0, clientErrors, failed(task.ClientError)},
		"permanent without a status":           {task.Outcome{Kind: task.OutcomePermanent}, 0, clientErrors, failed(task.ClientError)},
		"address refused":                      {task.Outcome{Kind: task.OutcomePermanent, Refused: true}, 0, nil, failed(task.TargetRefused)},
		"address refused, last":                {task.Outcome{Kind: task.OutcomePermanent, Refused: true}, 4, nil, failed(task.TargetRefused)},
		"address refused, client errors":       {task.Outcome{Kind: task.OutcomePermanent, Refused: true}, 0, clientErrors, failed(task.TargetRefused)},
		"interrupted":                          {task.Outcome{Kind: task.OutcomeInterrupted}, 0, nil, atOnce},
		"interrupted at the last attempt":      {task.Outcome{Kind: task.OutcomeInterrupted}, 4, nil, atOnce},
		"interrupted after a Retry-After":      {task.Outcome{Kind: task.OutcomeInterrupted, StatusCode: 503, RetryAfter: time.Minute}, 0, nil, atOnce},
		"500, last but one":                    {status(500), 3, nil, retry},
		"500, last":                            {status(500), 4, nil, failed(task.AttemptsExhausted)},
		"500, beyond the last":                 {status(500), 5, nil, failed(task.AttemptsExhausted)},
		"500, the only attempt":                {status(500), 0, maxAttempts(1), failed(task.AttemptsExhausted)},
		"cancelled":                            {task.Outcome{Kind: task.OutcomeInterrupted, Cancelled: true}, 0, nil, cancelled},
		"cancelled, and it succeeded":          {task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200, Cancelled: true}, 0, nil, succeeded},
		"cancelled, and it would be retried":   {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Cancelled: true}, 0, nil, cancelled},
		"cancelled, and it was the last":       {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Cancelled: true}, 4, nil, failed(task.AttemptsExhausted)},
		"cancelled, and it was refused":        {task.Outcome{Kind: task.OutcomePermanent, StatusCode: 403, Cancelled: true}, 0, nil, failed(task.ClientError)},
		"500, a policy that allows no attempt": {status(500), 0, maxAttempts(0), failed(task.AttemptsExhausted)},

		"never":                                  {never(status(503)), 0, nil, failed(task.ClientError)},
		"never, 429":                             {never(status(429)), 0, nil, failed(task.ClientError)},
		"never, with retry_client_errors":        {never(status(404)), 0, clientErrors, failed(task.ClientError)},
		"never, at the last attempt":             {never(status(503)), 4, nil, failed(task.ClientError)},
		"never, and the body timed out":          {never(task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, TimedOut: true}), 0, nil, failed(task.ClientError)},
		"never, and the body was interrupted":    {never(task.Outcome{Kind: task.OutcomeInterrupted, StatusCode: 503}), 0, nil, failed(task.ClientError)},
		"never wins":                             {snooze(never(status(503))), 0, nil, failed(task.ClientError)},
		"never beside a success":                 {never(status(200)), 0, nil, succeeded},
		"snooze":                                 {snooze(status(503)), 0, nil, snoozed},
		"snooze, 404":                            {snooze(status(404)), 0, nil, snoozed},
		"snooze, 302":                            {snooze(status(302)), 0, nil, snoozed},
		"snooze, at the last attempt":            {snooze(status(503)), 4, nil, snoozed},
		"snooze beside a success":                {snooze(status(200)), 0, nil, succeeded},
		"snooze, and it is to be cancelled":      {snooze(task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Cancelled: true}), 0, nil, cancelled},
		"snooze, and the body was interrupted":   {snooze(task.Outcome{Kind: task.OutcomeInterrupted, StatusCode: 503}), 0, nil, snoozed},
		"snooze raises no backoff":               {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Snooze: time.Second, RetryAfter: time.Hour}, 0, nil, result{State: task.Pending, Wait: time.Second}},
		"snooze of ages":                         {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Snooze: math.MaxInt64}, 0, nil, result{State: task.Pending, Wait: 24 * time.Hour}},
		"the 100th snooze":                       {snooze(status(503)), 0, snoozes(99), snoozed},
		"the 101st snooze counts as 503":         {snooze(status(503)), 0, snoozes(100), retry},
		"the 101st snooze counts as 404":         {snooze(status(404)), 0, snoozes(100), failed(task.ClientError)},
		"the 101st snooze at the last attempt":   {snooze(status(503)), 4, snoozes(100), failed(task.AttemptsExhausted)},
		"the 101st snooze, with client errors":   {snooze(status(404)), 0, func(c *task.Claim) { snoozes(100)(c); clientErrors(c) }, retry},
		"the 101st snooze, and it was cut short": {snooze(task.Outcome{Kind: task.OutcomeInterrupted, StatusCode: 503}), 0, snoozes(100), atOnce},
	}
	for name, tt := range tests {
		d := claimOf(tt.count, tt.change).Next(tt.outcome, began.Add(time.Second), middle)
		if got := resultOf(d); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", name, got, tt.want)
		}
		if got, want := d.Counted, d.Attempt.Outcome != task.OutcomeInterrupted && d.Attempt.Outcome != task.OutcomeSnoozed; got != want {
			t.Errorf("%s: Counted = %t, want %t", name, got, want)
		}
	}
}

func TestNextRecordsTheAttempt(t *testing.T) {
	t.Parallel()
	c := claimOf(2, func(c *task.Claim) { c.FirstAt = began.Add(-time.Hour) })
	d := c.Next(task.Outcome{
		Kind: task.OutcomeRetryable, StatusCode: 503, Error: "answered 503", ResponseExcerpt: "away",
		RetryAfter: time.Minute, Duration: 3 * time.Second, TimedOut: true,
	}, began.Add(4*time.Second), middle)
	want := task.Attempt{
		Round: 1, Number: 3, StartedAt: began.Add(time.Second), Duration: 3 * time.Second, Outcome: task.OutcomeRetryable,
		StatusCode: 503, Error: "answered 503", ResponseExcerpt: "away", RetryAfter: time.Minute,
	}
	if d.Attempt == nil || *d.Attempt != want {
		t.Errorf("Attempt = %+v, want %+v", d.Attempt, want)
	}
	if c.Task.AttemptCount != 2 || c.Task.State != task.Running || c.Task.Attempts != nil {
		t.Errorf("Next changed the task: %+v", c.Task)
	}
}

func TestNextWait(t *testing.T) {
	t.Parallel()
	const backoff = 8 * time.Second
	tests := map[string]struct {
		retryAfter time.Duration
		random     float64
		want       time.Duration
	}{
		"no jitter":                        {0, middle, backoff},
		"least":                            {0, lowest, 6400 * time.Millisecond},
		"most":                             {0, highest, 9600 * time.Millisecond},
		"Retry-After below":                {time.Second, middle, backoff},
		"Retry-After below, least":         {6 * time.Second, lowest, 6400 * time.Millisecond},
		"Retry-After between, least":       {7 * time.Second, lowest, 7 * time.Second},
		"Retry-After between, most":        {9 * time.Second, highest, 9600 * time.Millisecond},
		"Retry-After above":                {time.Minute, middle, time.Minute},
		"Retry-After is not jittered down": {time.Minute, lowest, time.Minute},
		"Retry-After is not jittered up":   {time.Minute, highest, time.Minute},
		"Retry-After of 24 h":              {24 * time.Hour, middle, 24 * time.Hour},
		"Retry-After above 24 h":           {24*time.Hour + 1, middle, 24 * time.Hour},
		"Retry-After of ages":              {math.MaxInt64, middle, 24 * time.Hour},
		"Retry-After in the past":          {-time.Minute, middle, backoff},
		"Retry-After in the past, by ages": {math.MinInt64, lowest, 6400 * time.Millisecond},
	}
	for name, tt := range tests {
		d := claimOf(0, nil).Next(task.Outcome{Kind: task.OutcomeRetryable, RetryAfter: tt.retryAfter}, began, tt.random)
		if got, want := resultOf(d), (result{State: task.Pending, Wait: tt.want}); got != want {
			t.Errorf("%s: got %+v, want %+v", name, got, want)
		}
	}
}

func TestNextWaitGrows(t *testing.T) {
	t.Parallel()
	for i, want := range seconds(10, 20, 40, 80, 160, 240, 300, 300) {
		c := claimOf(i, func(c *task.Claim) {
			c.Task.Retry = task.RetryPolicy{MaxAttempts: 10, MinBackoff: 10 * time.Second, MaxBackoff: 300 * time.Second, MaxDoublings: 3}
		})
		if got := c.Next(task.Outcome{Kind: task.OutcomeRetryable}, began, middle).Wait; got != want {
			t.Errorf("after attempt %d: Wait = %v, want %v", i+1, got, want)
		}
	}
}

// TestNextLimits has retries that would come 10 s after the first attempt
// began: 2 s have passed, and 8 s are to wait.
func TestNextLimits(t *testing.T) {
	t.Parallel()
	const next = 10 * time.Second
	var (
		retry     = result{State: task.Pending, Wait: 8 * time.Second}
		exhausted = result{State: task.Failed, Reason: task.RetryDurationExhausted}
		expired   = result{State: task.Failed, Reason: task.Expired}
		attempts  = result{State: task.Failed, Reason: task.AttemptsExhausted}
	)
	tests := map[string]struct {
		count      int
		duration   time.Duration // max_retry_duration
		expires    time.Duration // from the beginning; 0 is never
		retryAfter time.Duration
		want       result
	}{
		"no limit":                              {0, 0, 0, 0, retry},
		"duration just enough":                  {0, next, 0, 0, retry},
		"duration too short":                    {0, next - 1, 0, 0, exhausted},
		"duration over already":                 {0, 1, 0, 0, exhausted},
		"duration without end":                  {0, math.MaxInt64, 0, 0, retry},
		"negative duration is no limit":         {0, -1, 0, 0, retry},
		"duration too short for Retry-After":    {0, next, 0, 9 * time.Second, exhausted},
		"both stop rules":                       {4, next - 1, 0, 0, attempts},
		"max_attempts before the duration":      {4, next, 0, 0, attempts},
		"duration before max_attempts":          {3, next - 1, 0, 0, exhausted},
		"expires just late enough":              {0, 0, next, 0, retry},
		"expires too early":                     {0, 0, next - 1, 0, expired},
		"expired already":                       {0, 0, time.Second, 0, expired},
		"expires too early for Retry-After":     {0, 0, next, 9 * time.Second, expired},
		"expires, but no attempt is left":       {4, 0, next - 1, 0, attempts},
		"both the duration and expires":         {0, next - 1, next - 1, 0, exhausted},
		"neither the duration nor expires, yet": {0, next, next, 0, retry},
	}
	for name, tt := range tests {
		c := claimOf(tt.count, func(c *task.Claim) {
			c.At = began.Add(time.Second) // a later attempt than the first
			c.Task.Retry.MaxRetryDuration = tt.duration
			if tt.expires != 0 {
				c.Task.ExpiresAt = began.Add(tt.expires)
			}
		})
		o := task.Outcome{Kind: task.OutcomeRetryable, RetryAfter: tt.retryAfter}
		if got := resultOf(c.Next(o, began.Add(2*time.Second), middle)); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", name, got, tt.want)
		}
		// A snooze of the same length meets the same limits, but for that of attempts.
		wantSnoozed := tt.want
		if tt.want == attempts {
			wantSnoozed = map[string]result{
				"both stop rules": exhausted, "max_attempts before the duration": retry, "expires, but no attempt is left": expired,
			}[name]
		}
		o = task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Snooze: max(8*time.Second, tt.retryAfter)}
		if got := resultOf(c.Next(o, began.Add(2*time.Second), middle)); got != wantSnoozed {
			t.Errorf("%s, snoozed: got %+v, want %+v", name, got, wantSnoozed)
		}
		for _, kind := range []task.Kind{task.OutcomeSucceeded, task.OutcomeInterrupted} {
			if got := c.Next(task.Outcome{Kind: kind}, began.Add(2*time.Second), middle); got.State == task.Failed {
				t.Errorf("%s: after %s got %+v, want it not failed", name, kind, resultOf(got))
			}
		}
	}
}

func TestMayStart(t *testing.T) {
	t.Parallel()
	const now = 10 * time.Second // from the beginning
	tests := map[string]struct {
		count    int
		duration time.Duration
		expires  time.Duration
		want     task.Reason // "" admits
	}{
		"first attempt":                          {0, 0, 0, ""},
		"last attempt":                           {4, 0, 0, ""},
		"a lost attempt was the last":            {5, 0, 0, task.AttemptsExhausted},
		"more attempts than allowed":             {6, 0, 0, task.AttemptsExhausted},
		"expires now":                            {0, 0, now, ""},
		"expired":                                {0, 0, now - 1, task.Expired},
		"expired, with attempts":                 {1, 0, now - 1, task.Expired},
		"duration just enough":                   {1, now, 0, ""},
		"duration over":                          {1, now - 1, 0, task.RetryDurationExhausted},
		"duration bounds retries, not the first": {0, now - 1, 0, ""},
		"expired and everything exhausted":       {5, now - 1, now - 1, task.Expired},
		"attempts and duration exhausted":        {5, now - 1, 0, task.AttemptsExhausted},
	}
	for name, tt := range tests {
		c := claimOf(tt.count, func(c *task.Claim) {
			c.Task.Retry.MaxRetryDuration = tt.duration
			if tt.expires != 0 {
				c.Task.ExpiresAt = began.Add(tt.expires)
			}
		})
		d, ok := c.MayStart(began.Add(now))
		want := task.Decision{State: task.Failed, Reason: tt.want}
		if tt.want == "" {
			want = task.Decision{}
		}
		if d != want || ok != (tt.want == "") {
			t.Errorf("%s: got %+v, %t; want %+v, %t", name, d, ok, want, tt.want == "")
		}
	}
}

// The time for retries goes on while a task is snoozed, though no attempt counted.
func TestAdmitAfterASnooze(t *testing.T) {
	t.Parallel()
	for limit, want := range map[time.Duration]task.Reason{10 * time.Second: "", 10*time.Second - 1: task.RetryDurationExhausted} {
		c := claimOf(0, func(c *task.Claim) { c.Task.SnoozeCount, c.Task.Retry.MaxRetryDuration = 1, limit })
		if d, ok := c.MayStart(began.Add(10 * time.Second)); d.Reason != want || ok != (want == "") {
			t.Errorf("max_retry_duration %v: got %+v, %t", limit, d, ok)
		}
	}
}

// A request to cancel that outlived an attempt is honoured before all else.
func TestAdmitHonoursARequestToCancel(t *testing.T) {
	t.Parallel()
	c := claimOf(5, func(c *task.Claim) {
		c.Task.CancelRequestedAt, c.Task.ExpiresAt = began, began
	})
	if d, ok := c.MayStart(began.Add(time.Second)); ok || d != (task.Decision{State: task.Cancelled}) {
		t.Errorf("got %+v, %t; want cancelled, false", d, ok)
	}
}

func TestAttemptNumber(t *testing.T) {
	t.Parallel()
	for count, want := range []int{1, 2, 3} {
		if got := claimOf(count, nil).AttemptNumber(); got != want {
			t.Errorf("after %d attempts: AttemptNumber() = %d, want %d", count, got, want)
		}
	}
}

var (
	kinds   = []task.Kind{task.OutcomeSucceeded, task.OutcomeRetryable, task.OutcomePermanent, task.OutcomeInterrupted, task.OutcomeLost}
	snoozes = rapid.OneOf(rapid.Just(time.Duration(0)), rapid.Custom(func(t *rapid.T) time.Duration {
		return time.Duration(rapid.Int64Range(1, int64(2*task.MaxSnooze)).Draw(t, "snooze"))
	}))
	randoms = rapid.Custom(func(t *rapid.T) float64 { return unit(rapid.Uint64().Draw(t, "bits")) })
)

// unit maps all numbers onto [0, 1).
func unit(bits uint64) float64 { return float64(bits>>11) / (1 << 53) }

// checkNext holds what every decision must, whatever led to it.
func checkNext(t interface {
	Helper()
	Errorf(string, ...any)
}, c *task.Claim, o task.Outcome, now time.Time, random float64) {
	t.Helper()
	d := c.Next(o, now, random)
	if !task.Running.CanBecome(d.State) {
		t.Errorf("got %+v: a running task cannot become %s", resultOf(d), d.State)
	}
	if (d.State == task.Failed) != (d.Reason != "") {
		t.Errorf("got %+v: a reason goes with failed, and only with it", resultOf(d))
	}
	if o.Cancelled && d.State == task.Pending || !o.Cancelled && d.State == task.Cancelled {
		t.Errorf("got %+v from an outcome with Cancelled = %t", resultOf(d), o.Cancelled)
	}
	if d.State != task.Pending && d.Wait != 0 {
		t.Errorf("got %+v: only a pending task waits", resultOf(d))
	}
	if kind := d.Attempt.Outcome; d.Counted != (kind != task.OutcomeInterrupted && kind != task.OutcomeSnoozed) {
		t.Errorf("Counted = %t after %s", d.Counted, kind)
	}
	switch kind := d.Attempt.Outcome; {
	case o.Kind == task.OutcomeSucceeded:
		if kind != o.Kind {
			t.Errorf("a success became %s", kind)
		}
	case o.Never:
		if kind != task.OutcomePermanent || d.State != task.Failed {
			t.Errorf("got %+v as %s, though the target said never", resultOf(d), kind)
		}
	case o.Snooze > 0 && c.Task.SnoozeCount < task.MaxSnoozes:
		if kind != task.OutcomeSnoozed || d.State == task.Pending && d.Wait != min(o.Snooze, task.MaxSnooze) {
			t.Errorf("got %+v as %s, though the target snoozed it for %v", resultOf(d), kind, o.Snooze)
		}
		return // it waits as the target said, whatever the policy
	case kind != o.Kind:
		t.Errorf("%s became %s, though the target asked for nothing", o.Kind, kind)
	}
	if d.Attempt == nil || d.Attempt.Number != c.Task.AttemptCount+1 {
		t.Errorf("Attempt = %+v, want number %d", d.Attempt, c.Task.AttemptCount+1)
	}
	if d.Counted && d.State == task.Pending && c.Task.AttemptCount+1 >= c.Task.Retry.MaxAttempts {
		t.Errorf("got %+v after attempt %d of %d", resultOf(d), d.Attempt.Number, c.Task.Retry.MaxAttempts)
	}

	// wait <= max*(1+Jitter), or what Retry-After may ask for. As 5*wait <= 6*max,
	// with some leave beyond 50 bits, where a float64 no longer holds every number.
	limit := new(big.Int).Mul(big.NewInt(6), big.NewInt(int64(max(c.Task.Retry.MaxBackoff, 0))))
	if retryAfter := big.NewInt(5 * int64(task.MaxRetryAfter)); o.RetryAfter > 0 && limit.Cmp(retryAfter) < 0 {
		limit = retryAfter
	}
	limit.Add(limit, new(big.Int).Rsh(limit, 50))
	if d.Wait < 0 || new(big.Int).Mul(big.NewInt(5), big.NewInt(int64(d.Wait))).Cmp(limit) > 0 {
		t.Errorf("Wait = %v with %+v and Retry-After %v, random %v", d.Wait, c.Task.Retry, o.RetryAfter, random)
	}
	// Within Jitter of the backoff, where a Duration reaches that far.
	backoff := float64(c.Task.Retry.Backoff(c.Task.AttemptCount + 1))
	least, most := backoff*(1-task.Jitter), min(backoff*(1+task.Jitter), math.MaxInt64)
	slack := 1 + most/(1<<50)
	if d.State == task.Pending && d.Counted && o.RetryAfter <= 0 && (float64(d.Wait) < least-slack || float64(d.Wait) > most+slack) {
		t.Errorf("Wait = %v, want between %v and %v", d.Wait, time.Duration(least), time.Duration(most))
	}
	if want := min(o.RetryAfter, task.MaxRetryAfter); d.State == task.Pending && d.Counted && d.Wait < want {
		t.Errorf("Wait = %v, less than the Retry-After of %v", d.Wait, want)
	}
}

func TestNextHoldsItsBounds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := claimOf(rapid.IntRange(0, 200).Draw(t, "count"), func(c *task.Claim) {
			c.Task.Retry = rapid.OneOf(legalPolicies, absurdPolicies).Draw(t, "policy")
			if rapid.Bool().Draw(t, "expires") {
				c.Task.ExpiresAt = began.Add(time.Duration(absurdNumbers.Draw(t, "expires_in")))
			}
		})
		o := task.Outcome{
			Kind:       rapid.SampledFrom(append(kinds, "")).Draw(t, "kind"),
			StatusCode: rapid.IntRange(0, 999).Draw(t, "status"),
			RetryAfter: time.Duration(absurdNumbers.Draw(t, "retry_after")),
			Refused:    rapid.Bool().Draw(t, "refused"),
			Cancelled:  rapid.Bool().Draw(t, "cancelled"),
			Never:      rapid.Bool().Draw(t, "never"),
			Snooze:     snoozes.Draw(t, "snoozes"),
		}
		c.Task.SnoozeCount = rapid.IntRange(0, 2*task.MaxSnoozes).Draw(t, "snoozed")
		checkNext(t, c, o, began.Add(time.Duration(absurdNumbers.Draw(t, "passed"))), randoms.Draw(t, "random"))
	})
}

func FuzzNext(f *testing.F) {
	f.Add(int64(10*time.Second), int64(300*time.Second), 3, 10, int64(time.Hour), 2, uint8(1), 503, int64(time.Minute), int64(time.Minute), uint64(1<<63))
	f.Add(int64(math.MaxInt64), int64(math.MaxInt64), math.MaxInt, math.MaxInt, int64(0), 0, uint8(1), 0, int64(0), int64(0), uint64(math.MaxUint64))
	f.Add(int64(math.MinInt64), int64(math.MinInt64), math.MinInt, math.MinInt, int64(math.MinInt64), 0, uint8(2), 404, int64(math.MinInt64), int64(math.MaxInt64), uint64(0))
	f.Fuzz(func(t *testing.T, shortest, longest int64, doublings, maxAttempts int, duration int64, count int, kind uint8, status int, retryAfter, passed int64, bits uint64) {
		c := claimOf(max(count%(1<<30), 0), func(c *task.Claim) {
			c.Task.Retry = task.RetryPolicy{
				MaxAttempts: maxAttempts, MaxRetryDuration: time.Duration(duration), MinBackoff: time.Duration(shortest),
				MaxBackoff: time.Duration(longest), MaxDoublings: doublings, RetryClientErrors: kind&0x80 != 0,
			}
			if kind&0x40 != 0 {
				c.Task.ExpiresAt = began.Add(time.Duration(passed / 2))
			}
		})
		o := task.Outcome{
			Kind: kinds[int(kind&0x1f)%len(kinds)], StatusCode: status, RetryAfter: time.Duration(retryAfter), Refused: kind&0x20 != 0,
		}
		checkNext(t, c, o, began.Add(time.Duration(passed)), unit(bits))
	})
}

// TestEveryLifeEnds takes tasks from claim to claim through whatever may
// happen to them. Interruptions, which do not count, are the only thing that
// can go on for ever; here they do not.
func TestEveryLifeEnds(t *testing.T) {
	t.Parallel()
	happenings := rapid.SampledFrom(append([]task.Kind{ // mostly what keeps a task alive
		task.OutcomeRetryable, task.OutcomeRetryable, task.OutcomeRetryable, task.OutcomeRetryable,
		task.OutcomeLost, task.OutcomeLost, task.OutcomeInterrupted,
	}, kinds...))
	rapid.Check(t, func(t *rapid.T) {
		life := &task.Task{State: task.Pending}
		life.Retry = legalPolicies.Draw(t, "policy")
		if rapid.Bool().Draw(t, "unlimited") {
			life.Retry.MaxRetryDuration = 0
		}
		if rapid.Bool().Draw(t, "expires") {
			life.ExpiresAt = began.Add(time.Duration(rapid.Int64Range(0, int64(30*24*time.Hour)).Draw(t, "expires_in")))
		}
		become := func(next task.State) {
			if !life.State.CanBecome(next) {
				t.Fatalf("a %s task became %s", life.State, next)
			}
			life.State = next
		}
		pass := func(limit time.Duration) time.Duration {
			return time.Duration(rapid.Int64Range(0, int64(limit)).Draw(t, "passes"))
		}

		now, interruptions := began, 0
		sleepy := rapid.Bool().Draw(t, "sleepy") // a target that snoozes whatever it can
		for claims := 1; !life.State.Terminal(); claims++ {
			if claims > life.Retry.MaxAttempts+interruptions+task.MaxSnoozes+1 {
				t.Fatalf("still alive after %d attempts, %d interruptions and %d snoozes", life.AttemptCount, interruptions, life.SnoozeCount)
			}
			become(task.Running)
			c := &task.Claim{Task: life, Number: int64(claims), At: now, FirstAt: began}
			if d, ok := c.MayStart(now); !ok {
				if d.State != task.Failed || d.Reason == "" || d.Attempt != nil || d.Counted {
					t.Fatalf("not admitted with %+v", d)
				}
				become(d.State)
				break
			}

			if !life.ExpiresAt.IsZero() && now.After(life.ExpiresAt) {
				t.Fatalf("attempt at %v, after %v", now, life.ExpiresAt)
			}
			if limit := life.Retry.MaxRetryDuration; life.AttemptCount > 0 && limit > 0 && now.Sub(began) > limit {
				t.Fatalf("retry %v after the first attempt, more than %v", now.Sub(began), limit)
			}
			now = now.Add(pass(task.MaxTimeout))
			kind := happenings.Draw(t, "happens")
			if kind == task.OutcomeInterrupted {
				interruptions++
			}
			if interruptions > 20 {
				kind = task.OutcomeLost
			}
			switch kind {
			case task.OutcomeLost: // nobody asks Next; the store counts it
				become(task.Pending)
				life.AttemptCount++
			default:
				o := task.Outcome{
					Kind:       kind,
					StatusCode: rapid.SampledFrom([]int{0, 302, 404, 503}).Draw(t, "status"),
					RetryAfter: pass(2 * task.MaxRetryAfter),
					Snooze:     snoozes.Draw(t, "snoozes"),
					Never:      rapid.IntRange(0, 99).Draw(t, "never") == 0,
				}
				if sleepy {
					o.Snooze = max(o.Snooze, 1)
				}
				d := c.Next(o, now, randoms.Draw(t, "random"))
				become(d.State)
				if d.Counted {
					life.AttemptCount++
				}
				if d.Attempt.Outcome == task.OutcomeSnoozed {
					life.SnoozeCount++
					if d.Counted {
						t.Fatalf("a snooze counted as an attempt")
					}
				}
				if life.SnoozeCount > task.MaxSnoozes {
					t.Fatalf("snoozed %d times", life.SnoozeCount)
				}
				now = now.Add(d.Wait)
			}
			if life.AttemptCount > life.Retry.MaxAttempts {
				t.Fatalf("%d attempts of %d", life.AttemptCount, life.Retry.MaxAttempts)
			}
			now = now.Add(pass(time.Minute))
		}
	})
}

func TestLifeOfFailures(t *testing.T) {
	t.Parallel()
	for _, want := range []int{1, 2, 10, 100} {
		c := claimOf(0, func(c *task.Claim) { c.Task.Retry.MaxAttempts = want })
		for c.Task.State == task.Running {
			d := c.Next(task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 500}, began, middle)
			c.Task.AttemptCount++
			if d.State == task.Failed {
				c.Task.State, c.Task.Reason = d.State, d.Reason
			}
		}
		if got := c.Task.AttemptCount; got != want || c.Task.Reason != task.AttemptsExhausted {
			t.Errorf("max_attempts %d: failed as %s after %d", want, c.Task.Reason, got)
		}
	}
}

func BenchmarkNext(b *testing.B) {
	c := claimOf(2, nil)
	o := task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, RetryAfter: time.Second}
	now := began.Add(time.Second)
	b.ReportAllocs()
	for b.Loop() {
		_ = c.Next(o, now, middle)
	}
}

package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// journal is what the clients and the target of one fault test saw. Its check
// compares that with what the tables say, after the total-queue checker of
// Jepsen (https://github.com/jepsen-io/jepsen, checker.clj).
type journal struct {
	t      *testing.T
	url    string // of the target
	client *http.Client
	// answer is how the target answers the nth call (from 1) of a task: with
	// 200 where it is nil. It is set before the first submission.
	answer func(w http.ResponseWriter, r *http.Request, nth int)
	// insists has every second submission of a load bear an idempotency key, under
	// which it is made again until it is answered with a task.
	insists bool
	// urls, where there are any, take turns as the target of submissions. All are the journal's.
	urls []string

	mu          sync.Mutex
	submissions []submission
	arrivals    map[string][]*arrival // by task id
}

// submission is one request for a task, which bears a mark of its own.
type submission struct {
	mark   string
	key    string // for idempotency; empty is none
	tries  int
	status int    // 0: no answer came
	id     string // with 202, or 200 where it had been stored before
	task   taskJSON
}

// arrival is one call that reached the target.
type arrival struct {
	mark    string
	attempt int
	runAt   time.Time
	at      time.Time
	status  int  // what was answered
	whole   bool // the connection was not cut before the answer was written
}

func newJournal(t *testing.T) *journal {
	t.Helper()
	j := &journal{
		t:        t,
		arrivals: map[string][]*arrival{},
		client:   &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256}, Timeout: patience},
	}
	server := httptest.NewServer(http.HandlerFunc(j.serve))
	t.Cleanup(server.Close)
	t.Cleanup(j.client.CloseIdleConnections)
	j.url = server.URL
	return j
}

// alsoAt has the target listen at another address, and returns its URL there: another host.
func (j *journal) alsoAt(address string) (url string) {
	j.t.Helper()
	listener, err := net.Listen("tcp", address+":0")
	if err != nil {
		j.t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(j.serve))
	_ = server.Listener.Close()
	server.Listener = listener
	server.Start()
	j.t.Cleanup(server.Close)
	return server.URL
}

// callbacks are members of a request that have the target told of either end.
func (j *journal) callbacks() string {
	return fmt.Sprintf(`"on_success":{"url":"%s/ended"},"on_failure":{"url":"%s/ended"}`, j.url, j.url)
}

// serve is the target.
func (j *journal) serve(w http.ResponseWriter, r *http.Request) {
	var payload struct{ Mark, ID string }
	if err := json.NewDecoder(r.Body).Decode(&payload); err != nil {
		return // cut in the middle of the request: the target did nothing
	}
	if payload.ID != "" {
		payload.Mark = "end of " + payload.ID
	}
	attempt, _ := strconv.Atoi(r.Header.Get("Orchestrator-Attempt"))
	runAt, _ := time.Parse(time.RFC3339Nano, r.Header.Get("Orchestrator-Run-At"))
	a := &arrival{mark: payload.Mark, attempt: attempt, runAt: runAt, at: time.Now(), status: http.StatusOK}
	id := r.Header.Get("Orchestrator-Task-Id")
	j.mu.Lock()
	j.arrivals[id] = append(j.arrivals[id], a)
	nth := len(j.arrivals[id])
	j.mu.Unlock()
	if j.answer != nil {
		j.answer(&answerRecorder{w, j, a}, r, nth)
	}
	j.mu.Lock()
	a.whole = r.Context().Err() == nil
	j.mu.Unlock()
}

// answerRecorder notes the status of an answer.
type answerRecorder struct {
	http.ResponseWriter
	journal *journal
	arrival *arrival
}

func (w *answerRecorder) WriteHeader(status int) {
	w.journal.mu.Lock()
	w.arrival.status = status
	w.journal.mu.Unlock()
	w.ResponseWriter.WriteHeader(status)
}

func (w *answerRecorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// submit submits a task and returns the status of the answer, 0 where none
// came. extra holds further members of the request, like `"retry":{…}`; with a
// run_at or a delay_seconds among them it goes to /schedule.
func (j *journal) submit(ctx context.Context, serviceURL, extra string) (status int) {
	return j.try(ctx, j.begin(false), serviceURL, extra)
}

// insist is submit under a key, again and again until it is answered with a task.
func (j *journal) insist(ctx context.Context, serviceURL func() string, extra string) {
	for n := j.begin(true); ctx.Err() == nil; {
		if status := j.try(context.WithoutCancel(ctx), n, serviceURL(), extra); status == http.StatusAccepted || status == http.StatusOK {
			return
		}
	}
}

// begin returns the number of a submission that is about to be made.
func (j *journal) begin(keyed bool) (n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n = len(j.submissions)
	s := submission{mark: fmt.Sprintf("task %d", n)}
	if keyed {
		s.key = fmt.Sprintf("key-%d", n)
	}
	j.submissions = append(j.submissions, s)
	return n
}

func (j *journal) try(ctx context.Context, n int, serviceURL, extra string) (status int) {
	j.mu.Lock()
	s := &j.submissions[n]
	s.tries++
	mark, key, tries := s.mark, s.key, s.tries
	j.mu.Unlock()

	path := "/enqueue"
	if strings.Contains(extra, `"run_at"`) || strings.Contains(extra, `"delay_seconds"`) {
		path = "/schedule"
	}
	if extra != "" {
		extra = "," + extra
	}
	target := j.url
	if len(j.urls) > 0 {
		target = j.urls[n%len(j.urls)]
	}
	body := fmt.Sprintf(`{"url":"%s/journal","payload":{"mark":%q}%s}`, target, mark, extra)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, serviceURL+path, strings.NewReader(body))
	if err != nil {
		j.t.Error(err)
		return 0
	}
	request.Header.Set("Content-Type", "application/json")
	if key != "" {
		request.Header.Set("Idempotency-Key", key)
		request.GetBody = nil // or the client may make the request again by itself
	}
	response, err := j.client.Do(request)
	if err != nil {
		return 0
	}
	defer func() { _ = response.Body.Close() }()
	raw, err := io.ReadAll(response.Body)
	if err != nil {
		return 0
	}
	var task taskJSON
	repeat := response.Header.Get("Idempotent-Replayed") == "true"
	switch status = response.StatusCode; status {
	case http.StatusAccepted, http.StatusOK:
		if repeat != (status == http.StatusOK) || repeat && tries == 1 {
			j.t.Errorf("%s, tried %d times, was answered %d with %v", mark, tries, status, response.Header)
		}
		if err := json.Unmarshal(raw, &task); err != nil || task.ID == "" {
			j.t.Errorf("an answer of %d without a task: %s", status, raw)
		}
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		if response.Header.Get("Retry-After") == "" {
			j.t.Errorf("an answer of %d without Retry-After: %s", status, raw)
		}
	default:
		j.t.Errorf("a legal task was answered with %d: %s", status, raw)
	}
	j.mu.Lock()
	j.submissions[n].status, j.submissions[n].id, j.submissions[n].task = status, task.ID, task
	j.mu.Unlock()
	return status
}

// load submits n tasks from callers at a time, perSecond of them or, where that
// is 0, as fast as it goes. serviceURL is asked anew for each.
func (j *journal) load(ctx context.Context, n, callers, perSecond int, serviceURL func() string, extra string) {
	turns := make(chan int)
	var submitting sync.WaitGroup
	for range callers {
		submitting.Go(func() {
			for n := range turns {
				if j.insists && n%2 == 0 {
					j.insist(ctx, serviceURL, extra)
				} else {
					// Not cut short at the end of the load: what its caller had left behind
					// might be stored, and over, while the tables are read.
					j.submit(context.WithoutCancel(ctx), serviceURL(), extra)
				}
			}
		})
	}
	var pace <-chan time.Time
	if perSecond > 0 {
		ticker := time.NewTicker(time.Second / time.Duration(perSecond))
		defer ticker.Stop()
		pace = ticker.C
	}
	for turn := range n {
		if pace != nil {
			<-pace
		}
		if ctx.Err() != nil {
			break
		}
		turns <- turn
	}
	close(turns)
	submitting.Wait()
}

// submitted is the number of submissions that were begun.
func (j *journal) submitted() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.submissions)
}

// answered is the number of submissions that were answered with status.
func (j *journal) answered(status int) (n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, s := range j.submissions {
		if s.status == status {
			n++
		}
	}
	return n
}

// vain is the number of tries under a key that were not answered with a task.
func (j *journal) vain() (n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, s := range j.submissions {
		n += max(s.tries-1, 0)
	}
	return n
}

// called is the number of tasks that reached the target.
func (j *journal) called() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.arrivals)
}

const auditSQL = `
CREATE TABLE audit (
    seq bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    id uuid NOT NULL, was text, became text, old_claim bigint, claim bigint, run_at timestamptz, worker_id uuid, lost boolean, told int,
    lane text, claimed_at timestamptz);
CREATE FUNCTION audit_task() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO audit (id, was, became, old_claim, claim, run_at, worker_id, lost, told, lane, claimed_at) VALUES (
        COALESCE(NEW.id, OLD.id), OLD.state, NEW.state, OLD.claim, NEW.claim, COALESCE(NEW.run_at, OLD.run_at), COALESCE(NEW.worker_id, OLD.worker_id),
        TG_OP = 'UPDATE' AND NEW.attempts->-1->>'outcome' = 'lost' AND NEW.attempts <> OLD.attempts,
        jsonb_array_length(NEW.attempts), NEW.lane, NEW.claimed_at);
    RETURN NULL;
END $$;
CREATE TRIGGER audit_task AFTER INSERT OR UPDATE OR DELETE ON tasks FOR EACH ROW EXECUTE FUNCTION audit_task();

CREATE TABLE audit_workers (id uuid NOT NULL, last_seen timestamptz NOT NULL);
CREATE FUNCTION audit_worker() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO audit_workers VALUES (OLD.id, OLD.heartbeat_at);
    RETURN NULL;
END $$;
CREATE TRIGGER audit_worker AFTER DELETE ON workers FOR EACH ROW EXECUTE FUNCTION audit_worker()`

// audit has a migrated database write down every transition of every task.
func (j *journal) audit(databaseURL string) {
	j.t.Helper()
	conn, err := pgx.Connect(j.t.Context(), databaseURL)
	if err != nil {
		j.t.Fatal(err)
	}
	defer func() { _ = conn.Close(j.t.Context()) }()
	if _, err := conn.Exec(j.t.Context(), auditSQL, pgx.QueryExecModeSimpleProtocol); err != nil {
		j.t.Fatal(err)
	}
}

// figures are what a check found.
type figures struct {
	submitted, accepted, refused, unanswered int
	// replayed ones were accepted by a try whose answer was lost.
	replayed      int
	stored, calls int
	// The words of Jepsen: lost tasks were acknowledged and are not there;
	// unexpected calls belong to no submission; duplicated tasks were called
	// more often than their attempts explain; recovered ones were stored and
	// carried out although their client did not get to know of it.
	lost, unexpected, duplicated, recovered int
	// repeated tasks have an attempt that was lost or interrupted.
	repeated int
	// callbacks is how many are stored.
	callbacks int
	// cancelled is how many tasks ended so, redriven how often one began anew.
	cancelled, redriven int
	// lostAttempts are those of which no result was recorded.
	lostAttempts int
	// failed tasks are those that ended so.
	failed int
	// takeovers are the times from the last sign of life of an instance to the
	// next claim of a task that it held, sorted.
	takeovers []time.Duration
}

func (f figures) String() string {
	median, worst := time.Duration(0), time.Duration(0)
	if n := len(f.takeovers); n > 0 {
		median, worst = f.takeovers[n/2], f.takeovers[n-1]
	}
	return fmt.Sprintf("submitted %d, accepted %d, refused %d, unanswered %d, stored %d, calls %d; lost %d, unexpected %d, duplicated %d, recovered %d; repeated %d, taken over after %.2f s (median), %.2f s (worst)",
		f.submitted, f.accepted, f.refused, f.unanswered, f.stored, f.calls,
		f.lost, f.unexpected, f.duplicated, f.recovered, f.repeated, median.Seconds(), worst.Seconds())
}

// story is what the tables say of a task that has ended.
type story struct {
	ID            string
	Mark          *string
	CallbackOf    *string // the task whose end it tells
	TellsSuccess  bool
	TellsFailure  bool
	State, Reason string
	Claim         int64
	Counted, Most int
	Expires       bool
	RetryDuration float64
	CreatedAt     time.Time
	FinishedAt    time.Time
	Attempts      []attemptStory
	// redriven is how many attempts there were each time that it was redriven.
	redriven []int
}

type attemptStory struct {
	Number     int
	Outcome    string
	StatusCode int `json:"status_code"`
	Error      string
	StartedAt  time.Time `json:"started_at"`
}

const storiesSQL = `SELECT id::text, COALESCE(convert_from(body, 'UTF8')::json->>'mark', 'end of ' || (labels->>'callback_of')) AS mark,
    labels->>'callback_of' AS callback_of, COALESCE(callbacks ? 'on_success', false) AS tells_success, COALESCE(callbacks ? 'on_failure', false) AS tells_failure, state, reason, claim,
    attempt_count AS counted, max_attempts AS most, expires_at IS NOT NULL AS expires,
    max_retry_duration_seconds AS retry_duration, created_at, finished_at, attempts FROM task_history`

// check waits until every task has ended and then looks for violations of the
// invariants: nothing acknowledged is lost, nothing unknown is carried out,
// every repeat is explained, nothing starts early, attempts stay within their
// limit, every transition is legal, claims only grow, what ends is kept, each
// end has its callback, and an unanswered submission is stored once at most.
func (j *journal) check(databaseURL string) figures {
	j.t.Helper()
	awaitEmpty(j.t, databaseURL)
	conn, err := pgx.Connect(j.t.Context(), databaseURL)
	if err != nil {
		j.t.Fatal(err)
	}
	defer func() { _ = conn.Close(j.t.Context()) }()
	rows, err := conn.Query(j.t.Context(), storiesSQL)
	if err != nil {
		j.t.Fatal(err)
	}
	stories, err := pgx.CollectRows(rows, pgx.RowToStructByName[story])
	if err != nil {
		j.t.Fatal(err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	var f figures
	byID := make(map[string]*story, len(stories))
	byMark := make(map[string][]*story, len(stories))
	byParent := make(map[string][]*story)
	for i := range stories {
		s := &stories[i]
		byID[s.ID] = s
		if s.CallbackOf != nil {
			byParent[*s.CallbackOf] = append(byParent[*s.CallbackOf], s)
		} else if s.Mark != nil {
			byMark[*s.Mark] = append(byMark[*s.Mark], s)
		}
	}
	f.stored = len(stories)
	j.checkSubmissions(&f, byID, byMark)
	j.checkArrivals(&f, byID)
	j.checkTransitions(&f, conn, byID)
	j.checkCallbacks(&f, byID, byParent)
	for _, s := range byID {
		j.checkStory(&f, s)
	}
	j.t.Log(f)
	return f
}

func (j *journal) checkSubmissions(f *figures, byID map[string]*story, byMark map[string][]*story) {
	f.submitted = len(j.submissions)
	marks := make(map[string]bool, f.submitted)
	for _, s := range j.submissions {
		marks[s.mark] = true
		stored := byMark[s.mark]
		if len(stored) > 1 {
			j.t.Errorf("%s was submitted once and is stored %d times", s.mark, len(stored))
		}
		switch s.status {
		case http.StatusAccepted, http.StatusOK:
			f.accepted++
			if s.status == http.StatusOK {
				f.replayed++
			}
			if byID[s.id] == nil || len(stored) != 1 || stored[0].ID != s.id {
				f.lost++
				j.t.Errorf("%s was acknowledged as %s and is lost", s.mark, s.id)
			}
			continue
		case 0, http.StatusServiceUnavailable:
			f.unanswered++
			if len(stored) == 1 && len(j.arrivals[stored[0].ID]) > 0 {
				f.recovered++
			}
		default:
			f.refused++
			if len(stored) > 0 {
				j.t.Errorf("%s was refused with %d and is stored", s.mark, s.status)
			}
		}
	}
	for mark := range byMark {
		if !marks[mark] {
			f.unexpected++
			j.t.Errorf("%s is stored, and was not submitted", mark)
		}
	}
}

// checkCallbacks wants one callback for each end that is to be told; where a
// task was redriven, there may be one for each of its ends.
func (j *journal) checkCallbacks(f *figures, byID map[string]*story, byParent map[string][]*story) {
	for id, callbacks := range byParent {
		f.callbacks += len(callbacks)
		if byID[id] == nil {
			f.unexpected++
			j.t.Errorf("the end of task %s is told, which is not in the tables", id)
		}
	}
	for id, s := range byID {
		least := 0
		if s.TellsSuccess && s.State == "succeeded" || s.TellsFailure && s.State == "failed" {
			least = 1
		}
		most := least
		if s.TellsSuccess || s.TellsFailure {
			most += len(s.redriven)
		}
		switch n := len(byParent[id]); {
		case n < least:
			f.lost++
			j.t.Errorf("task %s has %s, and its callback is lost", id, s.State)
		case n > most:
			f.duplicated++
			j.t.Errorf("task %s has %s after it was redriven %d times, and has %d callbacks", id, s.State, len(s.redriven), n)
		}
	}
}

func (j *journal) checkArrivals(f *figures, byID map[string]*story) {
	for id, arrivals := range j.arrivals {
		f.calls += len(arrivals)
		s := byID[id]
		for _, a := range arrivals {
			switch {
			case s == nil || s.Mark == nil || a.mark != *s.Mark:
				f.unexpected++
				j.t.Errorf("the target got %s as task %s, which is not in the tables", a.mark, id)
			case a.at.Before(a.runAt):
				j.t.Errorf("%s was called %v before it was due", a.mark, a.runAt.Sub(a.at))
			}
		}
	}
}

func (j *journal) checkStory(f *figures, s *story) {
	arrivals := j.arrivals[s.ID]
	complain := func(format string, args ...any) {
		j.t.Errorf("%s: %s\n  %+v\n  target: %s", s.ID, fmt.Sprintf(format, args...), *s, describeArrivals(arrivals))
	}
	// Attempts count since it was last redriven; those before stay in its story.
	since := 0
	if n := len(s.redriven); n > 0 {
		since = s.redriven[n-1]
	}
	if s.State == "cancelled" {
		f.cancelled++
	}
	counted, repeated := 0, false
	recorded, answered := map[int]int{}, map[int][]int{}
	for i, a := range s.Attempts {
		recorded[a.Number]++
		if a.StatusCode != 0 {
			answered[a.Number] = append(answered[a.Number], a.StatusCode)
		}
		if a.Outcome != "interrupted" && i >= since {
			counted++
		}
		repeated = repeated || a.Outcome == "lost" || a.Outcome == "interrupted"
		if a.Outcome == "lost" {
			f.lostAttempts++
		}
		// The target is always there: what it did not refuse may be tried again only
		// when its answer did not come in time.
		if a.Outcome == "retryable" && a.StatusCode == 0 && !strings.Contains(a.Error, " within ") {
			complain("attempt %d failed without a fault of the target: %s", a.Number, a.Error)
		}
		if a.Outcome == "retryable" && a.StatusCode == http.StatusOK && !strings.Contains(a.Error, " within ") {
			complain("attempt %d succeeded and counts as failed: %s", a.Number, a.Error)
		}
		if a.Outcome == "succeeded" && !slices.ContainsFunc(arrivals, func(got *arrival) bool {
			return got.attempt == a.Number && got.status == a.StatusCode && got.status == http.StatusOK && got.whole
		}) {
			complain("attempt %d succeeded, which the target does not know of", a.Number)
		}
		last := i == len(s.Attempts)-1
		if !last && (a.Outcome == "succeeded" || a.Outcome == "permanent" && !slices.Contains(s.redriven, i+1)) {
			complain("attempt %d was final and others followed", a.Number)
		}
		if last && (a.Outcome == "succeeded") != (s.State == "succeeded") {
			complain("the last attempt does not fit the state")
		}
	}
	if repeated {
		f.repeated++
	}
	if s.State == "failed" {
		f.failed++
	}
	got := map[int]int{}
	for _, a := range arrivals {
		got[a.attempt]++
		if i := slices.Index(answered[a.attempt], a.status); i >= 0 {
			answered[a.attempt] = slices.Delete(answered[a.attempt], i, i+1)
		}
	}
	for number, calls := range got {
		if calls > recorded[number] {
			f.duplicated++
			complain("attempt %d reached the target %d times and is recorded %d times", number, calls, recorded[number])
		}
	}
	for number, statuses := range answered {
		if len(statuses) > 0 {
			complain("attempt %d claims answers of %v that the target never gave", number, statuses)
		}
	}
	if counted != s.Counted || s.Counted > s.Most {
		complain("%d attempts count, %d are written down, %d are allowed", counted, s.Counted, s.Most)
	}
	switch s.Reason {
	case "attempts_exhausted":
		if s.Counted != s.Most {
			complain("exhausted after %d attempts of %d", s.Counted, s.Most)
		}
	case "expired":
		if !s.Expires {
			complain("expired without expires_at")
		}
	case "retry_duration_exhausted":
		if s.RetryDuration == 0 {
			complain("retry duration exhausted, and it has no limit")
		}
	}
	if s.State == "succeeded" && len(arrivals) == 0 {
		complain("succeeded without a call")
	}
}

func describeArrivals(arrivals []*arrival) string {
	var b strings.Builder
	for _, a := range arrivals {
		fmt.Fprintf(&b, "[attempt %d at %s: %d, whole: %t] ", a.attempt, a.at.UTC().Format(time.RFC3339Nano), a.status, a.whole)
	}
	return b.String()
}

// A task that waits in a lane is pending for callers. held says that it moved to one.
const transitionsSQL = `SELECT a.id::text, replace(a.was, 'waiting', 'pending'), replace(a.became, 'waiting', 'pending'), a.was = 'pending' AND a.became = 'waiting' AS held, a.old_claim, a.claim, a.run_at, a.at, CASE WHEN a.lost THEN w.last_seen END AS last_seen, a.told
FROM audit a LEFT JOIN audit_workers w ON w.id = a.worker_id ORDER BY a.seq`

func (j *journal) checkTransitions(f *figures, conn *pgx.Conn, byID map[string]*story) {
	var audited bool
	if err := conn.QueryRow(j.t.Context(), "SELECT to_regclass('audit') IS NOT NULL").Scan(&audited); err != nil || !audited {
		j.t.Fatalf("the database was not audited: %v", err)
	}
	type open struct {
		state    string
		claim    int64
		lostFrom time.Time // the holder's last sign of life
	}
	tasks := map[string]*open{}
	var id string
	var was, became *string
	var held *bool
	var oldClaim, claim *int64
	var runAt, at time.Time
	var lastSeen *time.Time
	var told *int
	rows, err := conn.Query(j.t.Context(), transitionsSQL)
	if err != nil {
		j.t.Fatal(err)
	}
	_, err = pgx.ForEachRow(rows, []any{&id, &was, &became, &held, &oldClaim, &claim, &runAt, &at, &lastSeen, &told}, func() error {
		illegal := func() {
			j.t.Errorf("task %s went from %s (claim %d) to %s (claim %d)", id, or(was, "nothing"), or(oldClaim, 0), or(became, "its end"), or(claim, 0))
		}
		if or(became, "") == "running" && at.Before(runAt) {
			j.t.Errorf("task %s was claimed %v before it was due", id, runAt.Sub(at))
		}
		o := tasks[id]
		switch {
		case was == nil && o != nil: // redriven
			if o.state != "ended" && o.state != "cancelled" || *became != "pending" || *claim <= o.claim {
				illegal()
			}
			if s := byID[id]; s != nil {
				s.redriven = append(s.redriven, *told)
			}
			f.redriven++
			o.state, o.claim = *became, *claim
			return nil
		case was == nil: // submitted
			o = &open{state: or(became, ""), claim: or(claim, -1)}
			claimed := o.state == "running" && o.claim == 1 // by the instance that it was submitted to
			if !claimed && (o.state != "pending" || o.claim != 0) {
				illegal()
			}
			tasks[id] = o
			return nil
		case o == nil || o.state != *was || o.claim != *oldClaim:
			illegal()
			return nil
		case became == nil && *was == "pending": // cancelled
			o.state, o.lostFrom = "cancelled", time.Time{}
			o.claim++ // in the history
			return nil
		case became == nil: // ended
			if o.state != "running" || byID[id] == nil {
				illegal()
			}
			o.state = "ended"
			return nil
		case or(held, false) && *claim == o.claim:
		case *was == "pending" && *became == "pending": // changed by request
			if *claim != o.claim+1 {
				illegal()
			}
			o.lostFrom = time.Time{}
		case *was == "running" && *became == "running": // to be cancelled
			if *claim != o.claim {
				illegal()
			}
		case *was == "pending" && *became == "running": // claimed
			if *claim != o.claim+1 {
				illegal()
			}
			if !o.lostFrom.IsZero() {
				f.takeovers = append(f.takeovers, at.Sub(o.lostFrom))
				o.lostFrom = time.Time{}
			}
		case *was == "running" && *became == "pending": // given back
			if *claim != o.claim {
				illegal()
			}
			if lastSeen != nil {
				o.lostFrom = *lastSeen
			}
		default:
			illegal()
		}
		o.state, o.claim = *became, *claim
		return nil
	})
	if err != nil {
		j.t.Fatal(err)
	}
	for id, s := range byID {
		o := tasks[id]
		switch {
		case o == nil || o.state != "ended" && o.state != "cancelled" || o.claim != s.Claim:
			j.t.Errorf("task %s is in the history under claim %d, but its transitions end otherwise: %+v", id, s.Claim, o)
		case o.state == "cancelled" && s.State != "cancelled":
			j.t.Errorf("task %s went from pending to its end as %s", id, s.State)
		}
	}
	slices.SortFunc(f.takeovers, cmp.Compare[time.Duration])
}

// checkTakeovers fails the test when no task of a lost instance was taken over, or one
// much later than after its lease, one interval of reaping (a third of the lease, varied
// by 20 %) and one poll. How exactly that holds shows in internal/dispatch, where the time
// is the test's own: here the machine may be busy with something else.
func (j *journal) checkTakeovers(f figures, lease, poll time.Duration) {
	j.t.Helper()
	if len(f.takeovers) == 0 {
		j.t.Error("no task was taken over: the faults hit nothing")
		return
	}
	bound := lease + lease*2/5 + poll
	median, worst := f.takeovers[len(f.takeovers)/2], f.takeovers[len(f.takeovers)-1]
	j.t.Logf("taken over: %d tasks, median %.2f s, worst %.2f s, promised %.2f s", len(f.takeovers), median.Seconds(), worst.Seconds(), bound.Seconds())
	if worst > bound+patience/2 {
		j.t.Errorf("a task lay for %v after its instance's last sign of life, promised are %v", worst, bound)
	}
}

func or[T any](v *T, otherwise T) T {
	if v == nil {
		return otherwise
	}
	return *v
}

// awaitEmpty waits until every task has ended.
func awaitEmpty(t *testing.T, databaseURL string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	left := ""
	awaitCount(t, func() int {
		var live int
		if err := conn.QueryRow(t.Context(), "SELECT count(*), coalesce(left(string_agg(id || ' ' || state, ', '), 500), '') FROM tasks").Scan(&live, &left); err != nil {
			t.Fatal(err)
		}
		return -live
	}, 0, func() string { return "tasks did not end: " + left })
}

package postgres

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// taskColumns are all columns of a task. The statements that insert, claim, read,
// change, redrive and call back, and those that move a task to the history, are made
// from this list (see newStatements): a new column is an entry here, a migration, and
// a field of [task.Task].
var taskColumns = columns{
	{"id", "uuid", both, useCall, direct(func(t *task.Task) *[16]byte { return (*[16]byte)(&t.ID) })},
	{"claim", "bigint", both, useClaim | useShow | useRedrive, direct(func(t *task.Task) *int64 { return &t.LastClaim })},
	{"state", "text", both, useShow, stateField},
	{"reason", "text", history, useShow, orNull(func(t *task.Task) *task.Reason { return &t.Reason })},
	{"worker_id", "uuid", live, 0, field{}},
	{"claimed_at", "timestamptz", live, 0, field{}},       // of a task.Claim
	{"first_claimed_at", "timestamptz", live, 0, field{}}, // of a task.Claim
	{"run_at", "timestamptz", both, useCall, moment(func(t *task.Task) *time.Time { return &t.RunAt })},
	{"created_at", "timestamptz", both, useClaim | useShow | useRedrive, direct(func(t *task.Task) *time.Time { return &t.CreatedAt })},
	{"finished_at", "timestamptz", history, useShow, moment(func(t *task.Task) *time.Time { return &t.FinishedAt })},
	{"cancel_requested_at", "timestamptz", live, useClaim | useShow, moment(func(t *task.Task) *time.Time { return &t.CancelRequestedAt })},
	{"snooze_count", "smallint", live, useClaim | useShow, orNull(func(t *task.Task) *int { return &t.SnoozeCount })},
	{"attempt_count", "integer", both, useClaim | useShow, direct(func(t *task.Task) *int { return &t.AttemptCount })},
	{"attempts", "jsonb", both, useShow | useRedrive, attemptsField},

	{"expires_at", "timestamptz", both, useCallOption, moment(func(t *task.Task) *time.Time { return &t.ExpiresAt })},
	{"timeout_seconds", "double precision", both, useCallOption | useSetting, span(func(t *task.Task) *time.Duration { return &t.Timeout })},
	{"max_retry_duration_seconds", "double precision", both, useCallOption | useSetting, span(func(t *task.Task) *time.Duration { return &t.Retry.MaxRetryDuration })},
	{"min_backoff_seconds", "double precision", both, useCallOption | useSetting, span(func(t *task.Task) *time.Duration { return &t.Retry.MinBackoff })},
	{"max_backoff_seconds", "double precision", both, useCallOption | useSetting, span(func(t *task.Task) *time.Duration { return &t.Retry.MaxBackoff })},
	{"max_attempts", "integer", both, useCallOption | useSetting, direct(func(t *task.Task) *int { return &t.Retry.MaxAttempts })},
	{"max_doublings", "integer", both, useCallOption | useSetting, direct(func(t *task.Task) *int { return &t.Retry.MaxDoublings })},
	{"retry_client_errors", "boolean", both, useCallOption | useSetting, direct(func(t *task.Task) *bool { return &t.Retry.RetryClientErrors })},
	{"method", "text", both, useCall, direct(func(t *task.Task) *string { return &t.Method })},
	{"url", "text", both, useCall, direct(func(t *task.Task) *string { return &t.URL })},
	{"content_type", "text", both, useCall | useContent, direct(func(t *task.Task) *string { return &t.ContentType })},
	{"headers", "jsonb", both, useCallOption | useObject, textMap(func(t *task.Task) *map[string]string { return &t.Headers })},
	{"labels", "jsonb", both, useInsert | useShow | useRedrive | useChange | useObject, textMap(func(t *task.Task) *map[string]string { return &t.Labels })},
	{"body", "bytea", both, useInsert | useClaim | useRedrive | useContent, bodyField},
	{bodyBytes, "integer", nowhere, useShow, orNull(func(t *task.Task) *int { return &t.BodyBytes })},
	{"callbacks", "jsonb", both, useInsert | useShow | useRedrive, callbacksField},
	{"oidc_audience", "text", both, useCall, orNull(func(t *task.Task) *string { return &t.OIDCAudience })},
	{"jwt", "jsonb", both, useCall, jwtField},
	{"created_by", "text", both, useInsert | useShow | useRedrive | useInherit, orNull(func(t *task.Task) *string { return &t.CreatedBy })},
	{"idempotency_key", "text", both, useInsert | useShow | useRedrive, orNull(func(t *task.Task) *string { return &t.IdempotencyKey })},
	{"parent_id", "uuid", both, useInsert | useShow | useRedrive, orNull(func(t *task.Task) *[16]byte { return (*[16]byte)(&t.ParentID) })},
	{"root_id", "uuid", both, useShow | useRedrive, orNull(func(t *task.Task) *[16]byte { return (*[16]byte)(&t.RootID) })},
	{"hops", "smallint", both, useCall, orNull(func(t *task.Task) *int { return &t.Hops })},
	{"round", "integer", both, useClaim | useShow | useRedrive, orNull(func(t *task.Task) *int { return &t.Round })},
	{"queue", "text", both, useFlow, orNull(func(t *task.Task) *string { return &t.Queue })},
	{"flow_key", "text", both, useFlow, orNull(func(t *task.Task) *string { return &t.FlowKey })},
	{"priority", "smallint", both, useFlow, priorityField},
	{"lane", "text", live, useQueued | useShow | useChange, laneField},
	{"completion", "jsonb", both, useQueued | useClaim | useShow | useRedrive, completionField},
	{"completion_tokens", "bytea", both, 0, field{}},
	{"completion_until", "timestamptz", live, useShow, moment(func(t *task.Task) *time.Time { return &t.CompletionUntil })},
	{"completion_ends_at", "timestamptz", live, useShow, moment(func(t *task.Task) *time.Time { return &t.CompletionEndsAt })},
	{"completion_report", "jsonb", live, useShow, reportField},
	{"result", "bytea", both, useShow, resultField},
	{"delay_seconds", "double precision", nowhere, useInsert, delayField}, // sent for run_at
}

// bodyBytes is the size of body, which is shown in its place: a body may be of 1 MiB
// and is seldom asked for. The server knows the size without fetching what it keeps
// apart from the row.
const bodyBytes = "body_bytes"

// column is a column of a task.
type column struct {
	name, sqlType string
	in            place
	use           use
	field
}

// place says which tables have a column.
type place int

const (
	live    place = 1 << iota // tasks
	history                   // task_history, to which a task takes what both have
	both    = live | history
	nowhere = place(0)
)

// use says which statements read or write a column. A new column has the uses of labels where
// the call does not need it, of oidc_audience where it does, and of created_by where a
// callback inherits it; useChange beside them where a change may set it.
type use int

const (
	useInsert  use = 1 << iota // a submission writes it
	useClaim                   // a claim returns it, for the call
	useShow                    // every read of a task returns it
	useChange                  // PATCH writes it
	useContent                 // PATCH writes it where the request has a body for the call
	useRedrive                 // a redrive copies it from task_history to tasks
	useSetting                 // a callback's value is from Options.Callbacks
	useInherit                 // a callback's value is that of its task
	useObject                  // an argument of NULL is stored as {}
	useQueued                  // a submission to a queue, or for a target that may take its task, writes it; in a plain task it is NULL

	// useCall is of a column that a submission writes and the call needs; useCallOption, of
	// one that PATCH writes, too.
	useCall       = useInsert | useClaim | useShow | useRedrive
	useCallOption = useCall | useChange

	// useFlow is of a column for flow control.
	useFlow = useQueued | useShow | useChange | useRedrive
)

// field writes a column's values from tasks, and reads them into tasks. Its functions
// are nil for a column that is only read, or neither read nor written.
type field struct {
	// array returns the column's values of some tasks, as an argument of a statement: nil,
	// and so NULL, where all of them are NULL. Beside longer arrays unnest gives NULLs then.
	array func([]newTask) any
	// value returns the column's value of one task.
	value func(*task.Task) any
	// dest returns where to scan a value to, and a function that then sets the task's
	// field. The function is nil where the value is scanned into the field itself.
	dest func(*task.Task) (dest any, done func() error)
}

// direct is a NOT NULL column whose values are those of a task's field.
func direct[V any](at func(*task.Task) *V) field {
	f := notNull(func(t *task.Task) V { return *at(t) }, func(*task.Task, V) error { return nil })
	f.dest = func(t *task.Task) (any, func() error) { return at(t), nil }
	return f
}

// orNull is a column that is NULL where the task's field is zero.
func orNull[V comparable](at func(*task.Task) *V) field {
	return nullable(func(t *task.Task) *V { return null(*at(t)) }, func(t *task.Task, v *V) error { *at(t) = zeroNull(v); return nil })
}

// moment is orNull of a time, which may be zero in any zone.
func moment(at func(*task.Task) *time.Time) field {
	return nullable(func(t *task.Task) *time.Time { return nullTime(*at(t)) }, func(t *task.Task, v *time.Time) error { *at(t) = zeroNull(v); return nil })
}

// span is a duration, NOT NULL and kept as seconds.
func span(at func(*task.Task) *time.Duration) field {
	return notNull(func(t *task.Task) float64 { return seconds(*at(t)) }, func(t *task.Task, v float64) error { *at(t) = duration(v); return nil })
}

// textMap is a JSON object of texts, sent as NULL where it is empty.
func textMap(at func(*task.Task) *map[string]string) field {
	return nullable(func(t *task.Task) *string { return nullMap(*at(t)) }, func(t *task.Task, b []byte) (err error) {
		*at(t), err = decodeMap(b)
		return err
	})
}

var (
	attemptsField = field{dest: scanInto(func(t *task.Task, b []byte) (err error) {
		t.Attempts, err = decodeAttempts(b)
		return err
	})}
	bodyField = notNull(func(t *task.Task) []byte { return t.Body }, func(t *task.Task, b []byte) error {
		t.Body, t.BodyBytes = b, len(b)
		return nil
	})
	callbacksField = nullable(func(t *task.Task) *string { return encodeCallbacks(&t.Spec) }, func(t *task.Task, b []byte) (err error) {
		t.OnSuccess, t.OnFailure, err = decodeCallbacks(b)
		return err
	})
	jwtField = nullable(func(t *task.Task) *string { return encodeJWT(t.JWT) }, func(t *task.Task, b []byte) (err error) {
		t.JWT, err = decodeJWT(b)
		return err
	})
	stateField = field{dest: func(t *task.Task) (any, func() error) {
		return &t.State, func() error {
			switch t.State {
			case waiting:
				t.State = task.Pending
			case awaiting:
				t.State, t.Awaiting = task.Running, true
			}
			return nil
		}
	}}
	laneField = nullable(func(t *task.Task) *string { return null(string(t.Lane())) }, func(t *task.Task, v *string) error {
		t.HeldHost = task.Lane(zeroNull(v)).Host()
		return nil
	})
	priorityField = nullable(func(t *task.Task) *int16 { return encodePriority(t.Priority) }, func(t *task.Task, v *int16) (err error) {
		t.Priority, err = decodePriority(v)
		return err
	})
	delayField = nullable(func(t *task.Task) *float64 { return null(seconds(t.Delay)) }, func(*task.Task, *float64) error { return nil })
)

// notNull is a column whose values are sent as W and scanned as R.
func notNull[W, R any](get func(*task.Task) W, set func(*task.Task, R) error) field {
	return field{
		array: func(tasks []newTask) any {
			values := make([]W, len(tasks))
			for i, t := range tasks {
				values[i] = get(t.Task)
			}
			return values
		},
		value: func(t *task.Task) any { return get(t) },
		dest:  scanInto(set),
	}
}

// nullable is notNull where nil stands for NULL.
func nullable[W, R any](get func(*task.Task) *W, set func(*task.Task, R) error) field {
	return field{
		array: func(tasks []newTask) any {
			var values []*W
			for i, t := range tasks {
				setNullable(&values, i, len(tasks), get(t.Task))
			}
			return values
		},
		value: func(t *task.Task) any { return get(t) },
		dest:  scanInto(set),
	}
}

func scanInto[R any](set func(*task.Task, R) error) func(*task.Task) (any, func() error) {
	return func(t *task.Task) (any, func() error) {
		v := new(R)
		return v, func() error { return set(t, *v) }
	}
}

// stored returns the SQL expression for the value to store in c. sent is the expression for
// the argument, which has the type sentType.
func (c column) stored(sent string) string {
	if c.sqlType != "jsonb" {
		return sent
	}
	if c.use&useObject != 0 {
		return "COALESCE(" + sent + "::jsonb, '{}')"
	}
	return sent + "::jsonb"
}

// sentType is the SQL type of c's values where they are sent.
func (c column) sentType() string {
	if c.sqlType == "jsonb" {
		return "text"
	}
	return c.sqlType
}

// columns is some of them, or all.
type columns []column

// with returns those that have the use.
func (l columns) with(u use) columns {
	return slices.DeleteFunc(slices.Clone(l), func(c column) bool { return c.use&u == 0 })
}

// of returns those that a table has.
func (l columns) of(p place) columns {
	return slices.DeleteFunc(slices.Clone(l), func(c column) bool { return c.in&p == 0 })
}

// names is the columns by their names, as INSERT takes them.
func (l columns) names() string {
	return l.exprs(func(column) string { return "" })
}

// exprs is the columns as a select list: each as what expr says, or by its name where
// that is "".
func (l columns) exprs(expr func(column) string) string {
	var b strings.Builder
	line := 0
	for i, c := range l {
		next := c.name
		switch e := expr(c); e {
		case "":
		case "t." + c.name, "r." + c.name:
			next = e
		default:
			next = e + " AS " + c.name
		}
		switch {
		case i == 0:
		case line+len(next) > 120:
			line = 0
			b.WriteString(",\n        ")
		default:
			b.WriteString(", ")
		}
		line += len(next)
		b.WriteString(next)
	}
	return b.String()
}

// instead is exprs where some columns, by name, are something else than those of the
// table (t., or nothing).
func (l columns) instead(table string, exprs map[string]string) string {
	return l.exprs(func(c column) string {
		if e, ok := exprs[c.name]; ok {
			return e
		}
		if table == "" {
			return ""
		}
		return table + c.name
	})
}

// shownOf is what is shown of a task in one of the tables.
func (l columns) shownOf(p place) string {
	return l.with(useShow).exprs(func(c column) string {
		switch {
		case c.name == bodyBytes:
			return "octet_length(body)"
		case c.in&p == 0:
			return "NULL::" + c.sqlType
		}
		return ""
	})
}

// reader reads rows of some columns.
type reader struct {
	task  task.Task // the row's, until the next one is read
	dests []any
	done  []func() error
}

// reader returns one for rows in which the columns stand in this order. Further
// values of a row go to more, as with Scan.
func (l columns) reader(more ...any) *reader {
	r := &reader{dests: make([]any, 0, len(l)+len(more)), done: make([]func() error, 0, len(l))}
	for _, c := range l {
		dest, done := c.dest(&r.task)
		r.dests = append(r.dests, dest)
		if done != nil {
			r.done = append(r.done, done)
		}
	}
	r.dests = append(r.dests, more...)
	return r
}

// read reads a row.
func (r *reader) read(row pgx.CollectableRow) (*task.Task, error) {
	if err := row.Scan(r.dests...); err != nil {
		return nil, err
	}
	var errs error
	for _, done := range r.done {
		if err := done(); err != nil {
			errs = errors.Join(errs, err)
		}
	}
	t := r.task
	return &t, errs
}

// parameters are the names of a statement's parameters.
type parameters []string

// of returns a parameter's place: $1, $2, …
func (p *parameters) of(name string) string {
	i := slices.Index(*p, name)
	if i < 0 {
		i = len(*p)
		*p = append(*p, name)
	}
	return "$" + strconv.Itoa(i+1)
}

// statement returns the statement with these parameters.
func (p *parameters) statement(sql string) statement { return statement{sql, *p} }

// statement is SQL whose parameters have names.
type statement struct {
	sql string
	parameters
}

// arguments returns the parameters' values in their order.
func (s *statement) arguments(values map[string]any) []any {
	out := make([]any, len(s.parameters))
	for i, name := range s.parameters {
		v, ok := values[name]
		if !ok {
			panic("no value for the parameter " + name)
		}
		out[i] = v
	}
	return out
}

// statements are those that are made from the list of columns.
type statements struct {
	inserted, claimed, shown, changed, settings columns

	insert, insertOnce, insertBatchOnce        insertion
	claimDue, claimOne                         string
	lockLanes, queueLimits, waitingInLanes     string
	claimLanes                                 string
	get, getWithBody, getMany, explain         string
	whole                                      selection
	cancel, cancelMany, makeDue                string
	redrive, redriveMany                       string
	change                                     statement
	finish, finishCallingBack, finishCancelled statement
	completion                                 completionSQL
}

func newStatements(l columns) *statements {
	q := &statements{
		inserted: l.with(useInsert | useQueued), claimed: l.with(useClaim), shown: l.with(useShow), changed: l.with(useChange | useContent), settings: l.with(useSetting),
		insert: insertSQL(l), insertOnce: insertOnceSQL(l), insertBatchOnce: insertBatchOnceSQL(l),
		getWithBody: getWithBodySQL(l), explain: explainSQL(l), whole: wholeTasks(l),
		makeDue: makeDueSQL(l), change: changeSQL(l),
		completion: newCompletionSQL(l),
		finish:     finishSQL(l), finishCallingBack: finishCallingBackSQL(l), finishCancelled: finishCancelledSQL(l),
	}
	q.claimDue, q.claimOne = claimSQL(l)
	q.lockLanes, q.queueLimits, q.waitingInLanes, q.claimLanes = lockLanesSQL, queueLimitsSQL(queueRow), waitingInLanesSQL, claimLanesSQL(l)
	q.get, q.getMany = getSQL(l)
	q.cancel, q.cancelMany = cancelSQL(l)
	q.redrive, q.redriveMany = redriveSQL(l)
	return q
}

// taskSQL are the statements of all columns.
var taskSQL = newStatements(taskColumns)

// setNullable sets the value of task i of n in a column that is nil while all are NULL.
func setNullable[T any](column *[]*T, i, n int, v *T) {
	if v == nil {
		return
	}
	if *column == nil {
		*column = make([]*T, n)
	}
	(*column)[i] = v
}

// nullTime makes the zero time NULL.
func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	there := t // as in null
	return &there
}

// null makes the zero value NULL.
func null[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	there := v // v itself would be allocated where it is zero, too: of most columns of most tasks
	return &there
}

// zeroNull makes NULL the zero value.
func zeroNull[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// callbacksRow is the callbacks column.
type callbacksRow struct {
	OnSuccess *task.Callback `json:"on_success,omitempty"`
	OnFailure *task.Callback `json:"on_failure,omitempty"`
}

func encodeCallbacks(s *task.Spec) *string {
	if s.OnSuccess == nil && s.OnFailure == nil {
		return nil
	}
	b, err := json.Marshal(callbacksRow{s.OnSuccess, s.OnFailure})
	if err != nil {
		panic(err) // strings always encode
	}
	text := string(b)
	return &text
}

func decodeCallbacks(b []byte) (onSuccess, onFailure *task.Callback, err error) {
	if b == nil {
		return nil, nil, nil
	}
	var c callbacksRow
	err = json.Unmarshal(b, &c)
	return c.OnSuccess, c.OnFailure, err
}

func encodeJWT(j *task.JWT) *string {
	if j == nil {
		return nil
	}
	b, err := json.Marshal(j)
	if err != nil {
		panic(err) // strings always encode
	}
	text := string(b)
	return &text
}

func decodeJWT(b []byte) (j *task.JWT, err error) {
	if b == nil {
		return nil, nil
	}
	err = json.Unmarshal(b, &j)
	return j, err
}

// nullMap makes the empty map NULL.
func nullMap(m map[string]string) *string {
	if len(m) == 0 {
		return nil
	}
	text := encodeMap(m)
	return &text
}

func encodeMap(m map[string]string) string {
	if len(m) == 0 {
		return "{}"
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic(err) // a map of strings always encodes
	}
	return string(b)
}

func decodeMap(b []byte) (map[string]string, error) {
	if len(b) <= len("{}") {
		return nil, nil
	}
	var m map[string]string
	err := json.Unmarshal(b, &m)
	return m, err
}

// encodePriority makes a priority a number, of which a higher one is the more urgent;
// NULL is none.
func encodePriority(p task.Priority) *int16 {
	var n int16
	switch p {
	case task.High:
		n = 1
	case task.Normal:
	case task.Low:
		n = -1
	default:
		return nil
	}
	return &n
}

func decodePriority(n *int16) (task.Priority, error) {
	switch {
	case n == nil:
		return "", nil
	case *n == 1:
		return task.High, nil
	case *n == 0:
		return task.Normal, nil
	case *n == -1:
		return task.Low, nil
	}
	return "", fmt.Errorf("%d is no priority", *n)
}

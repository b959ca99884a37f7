package httpapi

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/task"
)

// QueueRequest is settings of a queue. Left out and null both stand for none where
// the settings are written as a whole. In a merge patch what is left out stays.
type QueueRequest struct {
	MaxConcurrent **int                  `json:"max_concurrent,omitempty" minimum:"1" maximum:"1000000" nullable:"true" example:"5" doc:"How many calls for tasks of the queue are under way at a time, of all instances together. null: any number."`
	MaxPerSecond  **float64              `json:"max_per_second,omitempty" minimum:"0.001" maximum:"10000" nullable:"true" example:"2.5" doc:"How many calls start a second in the long run. null: any number."`
	Burst         **int                  `json:"burst,omitempty" minimum:"1" maximum:"1000000" nullable:"true" example:"10" doc:"How many calls may start at once after a rest: in any w seconds at most burst + max_per_second x w start. null: max_per_second, rounded up."`
	PerKey        **KeyLimitsRequest     `json:"per_key,omitempty" doc:"The limits of each flow key of the queue that has none of its own. null: none."`
	Defaults      **QueueDefaultsRequest `json:"defaults,omitempty" doc:"What tasks of the queue have that do not say, from their submission on. null: the service's defaults."`
}

// KeyLimitsRequest is the limits of a flow key.
type KeyLimitsRequest struct {
	_             struct{}  `nullable:"true"`
	MaxConcurrent **int     `json:"max_concurrent,omitempty" minimum:"1" maximum:"1000000" nullable:"true" example:"2" doc:"How many calls for tasks of the key are under way at a time. null: any number, as far as the queue allows it."`
	MaxPerSecond  **float64 `json:"max_per_second,omitempty" minimum:"0.001" maximum:"10000" nullable:"true" example:"1" doc:"How many calls for tasks of the key start a second in the long run. null: any number."`
	Burst         **int     `json:"burst,omitempty" minimum:"1" maximum:"1000000" nullable:"true" example:"3" doc:"How many of them may start at once after a rest. null: max_per_second, rounded up."`
	Ordered       **bool    `json:"ordered,omitempty" nullable:"true" example:"false" doc:"true: one task of the key at a time, in the order in which they are due; while the first one is retried the others wait."`
}

// QueueDefaultsRequest is what tasks of a queue have that do not say.
type QueueDefaultsRequest struct {
	_              struct{}            `nullable:"true"`
	TimeoutSeconds **float64           `json:"timeout_seconds,omitempty" minimum:"0.1" maximum:"1800" nullable:"true" example:"10" doc:"Bounds a whole attempt. null: the service's default."`
	Retry          **QueueRetryRequest `json:"retry,omitempty" doc:"When a failed attempt is tried again. null: the service's defaults."`
}

// QueueRetryRequest is the retry policy of tasks of a queue that do not say.
type QueueRetryRequest struct {
	_                       struct{}  `nullable:"true"`
	For                     *string   `json:"for,omitempty" maxLength:"32" pattern:"^([0-9]{1,8}[dhms])+$" patternDescription:"a duration such as 6h, 90s, 15m, 2d or 1d12h" example:"6h" doc:"For how long retries go on, as in a task; it sets max_attempts, max_retry_duration_seconds and, unless that is given, max_backoff_seconds."`
	MaxAttempts             **int     `json:"max_attempts,omitempty" minimum:"1" maximum:"100" nullable:"true" example:"5" doc:"How many calls are made at most, the first included."`
	MaxRetryDurationSeconds **float64 `json:"max_retry_duration_seconds,omitempty" minimum:"0" maximum:"31536000" nullable:"true" example:"86400" doc:"No retry starts later than this after the first attempt. 0: no limit."`
	MinBackoffSeconds       **float64 `json:"min_backoff_seconds,omitempty" minimum:"0.01" maximum:"86400" nullable:"true" example:"2" doc:"The wait before the first retry."`
	MaxBackoffSeconds       **float64 `json:"max_backoff_seconds,omitempty" minimum:"0.01" maximum:"86400" nullable:"true" example:"600" doc:"The longest wait; not below min_backoff_seconds."`
	MaxDoublings            **int     `json:"max_doublings,omitempty" minimum:"0" maximum:"30" nullable:"true" example:"8" doc:"How often the wait doubles before it grows by equal steps."`
	RetryClientErrors       **bool    `json:"retry_client_errors,omitempty" nullable:"true" example:"false" doc:"Also retry answers 400 to 499 that count as permanent otherwise."`
}

// patch is a merge patch (RFC 7396) of one member: what is left out stays, null clears.
func patch[T any](target *T, member **T) {
	if member != nil {
		*target = *orZero(member)
	}
}

// patchOptional is patch of a member that may be missing in the target too.
func patchOptional[T, V any](target **T, member **V, convert func(V) T) {
	switch {
	case member == nil:
	case *member == nil:
		*target = nil
	default:
		v := convert(**member)
		*target = &v
	}
}

// patchObject is patch of a member that is an object: with is its own patch.
func patchObject[T, V any](target *T, member **V, with func(*V, *T)) {
	switch {
	case member == nil:
	case *member == nil:
		*target = *new(T)
	default:
		with(*member, target)
	}
}

// orZero is what a member that was given stands for; zero for null.
func orZero[T any](member **T) *T {
	if *member == nil {
		return new(T)
	}
	return *member
}

func same[T any](v T) T { return v }

func secondsOf(v float64) (d time.Duration) {
	setDuration(&d, &v)
	return d
}

// patch makes the settings what the request says, member by member.
func (r *QueueRequest) patch(s *task.QueueSettings) {
	patch(&s.MaxConcurrent, r.MaxConcurrent)
	patch(&s.MaxPerSecond, r.MaxPerSecond)
	patch(&s.Burst, r.Burst)
	patchObject(&s.PerKey, r.PerKey, (*KeyLimitsRequest).patch)
	patchObject(&s.Defaults, r.Defaults, (*QueueDefaultsRequest).patch)
}

func (r *KeyLimitsRequest) patch(l *task.KeyLimits) {
	patch(&l.MaxConcurrent, r.MaxConcurrent)
	patch(&l.MaxPerSecond, r.MaxPerSecond)
	patch(&l.Burst, r.Burst)
	patch(&l.Ordered, r.Ordered)
}

func (r *QueueDefaultsRequest) patch(d *task.QueueDefaults) {
	patchOptional(&d.Timeout, r.TimeoutSeconds, secondsOf)
	patchObject(&d.Retry, r.Retry, func(r *QueueRetryRequest, c *task.RetryChange) {
		if c.For, _ = r.retryFor(); c.For != nil { // retryMistakes has what is wrong with it
			c.MaxBackoff = nil
		}
		patchOptional(&c.MaxAttempts, r.MaxAttempts, same)
		patchOptional(&c.MaxRetryDuration, r.MaxRetryDurationSeconds, secondsOf)
		patchOptional(&c.MinBackoff, r.MinBackoffSeconds, secondsOf)
		patchOptional(&c.MaxBackoff, r.MaxBackoffSeconds, secondsOf)
		patchOptional(&c.MaxDoublings, r.MaxDoublings, same)
		patchOptional(&c.RetryClientErrors, r.RetryClientErrors, same)
	})
}

// retryFor is [retryFor] of a queue's retry policy.
func (r *QueueRetryRequest) retryFor() (*time.Duration, task.Errors) {
	return retryFor(r.For, r.MaxAttempts != nil && *r.MaxAttempts != nil, r.MaxRetryDurationSeconds != nil && *r.MaxRetryDurationSeconds != nil)
}

// retryMistakes returns what is wrong with retry.for, if that is there.
func (r *QueueRequest) retryMistakes() task.Errors {
	if r.Defaults == nil || *r.Defaults == nil || (*r.Defaults).Retry == nil || *(*r.Defaults).Retry == nil {
		return nil
	}
	_, errs := (*(*r.Defaults).Retry).retryFor()
	for i := range errs {
		errs[i].Path = append([]string{"defaults"}, errs[i].Path...)
	}
	return errs
}

// QueueSettings are the settings of a queue, and whether it is paused.
type QueueSettings struct {
	Name          string        `json:"name" example:"mail" doc:"The queue's name."`
	Paused        bool          `json:"paused" example:"false" doc:"Whether no task of the queue is started."`
	PausedAt      Timestamp     `json:"paused_at" nullable:"true" example:"2026-11-24T12:00:00.000000Z" doc:"Since when it is paused. Null: it is not."`
	MaxConcurrent *int          `json:"max_concurrent" example:"5" doc:"How many calls for its tasks are under way at a time, of all instances together. Null: any number."`
	MaxPerSecond  *float64      `json:"max_per_second" example:"2.5" doc:"How many calls start a second in the long run. Null: any number."`
	Burst         *int          `json:"burst" example:"10" doc:"How many calls may start at once after a rest. Null: any number."`
	PerKey        KeyLimits     `json:"per_key" doc:"The limits of each flow key that has none of its own."`
	Defaults      QueueDefaults `json:"defaults" doc:"What tasks of the queue have that do not say."`
}

// KeyLimits are the limits of a flow key.
type KeyLimits struct {
	MaxConcurrent *int     `json:"max_concurrent" example:"2" doc:"How many calls for tasks of the key are under way at a time. Null: any number, as far as the queue allows it."`
	MaxPerSecond  *float64 `json:"max_per_second" example:"1" doc:"How many calls for tasks of the key start a second in the long run. Null: any number."`
	Burst         *int     `json:"burst" example:"3" doc:"How many of them may start at once after a rest. Null: any number."`
	Ordered       bool     `json:"ordered" example:"false" doc:"Whether its tasks are carried out one at a time, in the order in which they are due."`
}

// QueueDefaults are what tasks of a queue have that do not say; what is null is the
// service's default.
type QueueDefaults struct {
	TimeoutSeconds *float64   `json:"timeout_seconds" example:"10" doc:"Bounds a whole attempt. Null: the service's default."`
	Retry          QueueRetry `json:"retry" doc:"When a failed attempt is tried again."`
}

// QueueRetry is the retry policy of tasks of a queue that do not say; what is null is
// the service's default.
type QueueRetry struct {
	MaxAttempts             *int     `json:"max_attempts" example:"5" doc:"How many calls are made at most, the first included. Null: the service's default."`
	MaxRetryDurationSeconds *float64 `json:"max_retry_duration_seconds" example:"86400" doc:"No retry starts later than this after the first attempt; 0: no limit. Null: the service's default."`
	MinBackoffSeconds       *float64 `json:"min_backoff_seconds" example:"2" doc:"The wait before the first retry. Null: the service's default."`
	MaxBackoffSeconds       *float64 `json:"max_backoff_seconds" example:"600" doc:"The longest wait. Null: the service's default."`
	MaxDoublings            *int     `json:"max_doublings" example:"8" doc:"How often the wait doubles before it grows by equal steps. Null: the service's default."`
	RetryClientErrors       *bool    `json:"retry_client_errors" example:"false" doc:"Whether permanent answers 400 to 499 are retried too. Null: the service's default."`
}

// Queue is a queue and how much it has to do.
type Queue struct {
	QueueSettings
	QueueLoad
	KeysInUse int `json:"keys_in_use" example:"17" doc:"How many flow keys the waiting and running tasks have, counted up to 10000."`
}

// QueueLoad is how much a queue, or a flow key, has to do.
type QueueLoad struct {
	Waiting          int     `json:"waiting" example:"211" doc:"How many tasks are pending, due or not, counted up to 10000."`
	Running          int     `json:"running" example:"5" doc:"How many tasks are running, counted up to 10000. It may be above max_concurrent: lowering a limit cuts no call off, and /tasks/{id}/run at /worker-endpoint ignores it."`
	OldestDueSeconds float64 `json:"oldest_due_seconds" example:"3.2" doc:"For how long the longest waiting task has been due. 0: none is due."`
}

// QueueList is a page of queues.
type QueueList struct {
	Queues     []Queue `json:"queues" nullable:"false" doc:"In the order of their names."`
	NextCursor *string `json:"next_cursor" example:"mail" doc:"Send it as cursor for the queues behind these. Null when there are none."`
}

// QueueKey is a flow key that has limits of its own.
type QueueKey struct {
	Queue string `json:"queue" example:"mail" doc:"The queue."`
	Key   string `json:"key" example:"tenant-42" doc:"The flow key."`
	KeyLimits
}

// QueueKeyList is a page of flow keys that have limits of their own.
type QueueKeyList struct {
	Keys       []QueueKey `json:"keys" nullable:"false" doc:"In the order of their bytes."`
	NextCursor *string    `json:"next_cursor" example:"tenant-42" doc:"Send it as cursor for the keys behind these. Null when there are none."`
}

func queueView(q task.Queue) QueueSettings {
	d := q.Defaults
	return QueueSettings{
		Name: q.Name, Paused: !q.PausedAt.IsZero(), PausedAt: Timestamp(q.PausedAt),
		MaxConcurrent: present(q.MaxConcurrent), MaxPerSecond: present(q.MaxPerSecond), Burst: present(q.EffectiveBurst()),
		PerKey: keyLimitsView(q.PerKey),
		Defaults: QueueDefaults{TimeoutSeconds: inSeconds(d.Timeout), Retry: QueueRetry{
			MaxAttempts: d.Retry.MaxAttempts, MaxRetryDurationSeconds: inSeconds(d.Retry.MaxRetryDuration), MinBackoffSeconds: inSeconds(d.Retry.MinBackoff),
			MaxBackoffSeconds: inSeconds(d.Retry.MaxBackoff), MaxDoublings: d.Retry.MaxDoublings, RetryClientErrors: d.Retry.RetryClientErrors,
		}},
	}
}

func keyLimitsView(l task.KeyLimits) KeyLimits {
	return KeyLimits{MaxConcurrent: present(l.MaxConcurrent), MaxPerSecond: present(l.MaxPerSecond), Burst: present(l.EffectiveBurst()), Ordered: l.Ordered}
}

// inSeconds is a duration as callers see it; nil stays nil.
func inSeconds(d *time.Duration) *float64 {
	if d == nil {
		return nil
	}
	seconds := d.Seconds()
	return &seconds
}

func queueKeyView(k task.QueueKey) QueueKey {
	return QueueKey{Queue: k.Queue, Key: k.Key, KeyLimits: keyLimitsView(k.KeyLimits)}
}

func queueWithLoad(q task.Queue, l task.QueueLoad) Queue {
	return Queue{QueueSettings: queueView(q), KeysInUse: l.Keys,
		QueueLoad: QueueLoad{Waiting: l.Waiting, Running: l.Running, OldestDueSeconds: l.OldestDue.Seconds()}}
}

// versionTag is the entity tag of settings.
func versionTag(version int64) string { return `"` + strconv.FormatInt(version, 10) + `"` }

// QueuePath is the path of an operation on one queue.
type QueuePath struct {
	Name string `path:"name" maxLength:"100" pattern:"^[A-Za-z0-9._-]+$" patternDescription:"letters, digits, dots, hyphens and underscores" example:"mail" doc:"The queue's name."`
}

// QueueKeyPath is the path of an operation on one flow key of a queue.
type QueueKeyPath struct {
	QueuePath
	Key string `path:"key" maxLength:"200" pattern:"^[!-~]+$" patternDescription:"visible ASCII characters" example:"tenant-42" doc:"The flow key. What a path cannot hold is percent-encoded: / is %2F."`
}

// settingsMatch is for operations that write settings.
type settingsMatch struct {
	IfMatch string `header:"If-Match" example:"\"1764518400000000\"" doc:"Write only over settings that have one of these ETags; * stands for any. Without it what others wrote meanwhile may be overwritten."`
}

type (
	queueWriteInput struct {
		QueuePath
		settingsMatch
	}
	queueKeyWriteInput struct {
		QueueKeyPath
		settingsMatch
	}
	listInput struct {
		Limit  int    `query:"limit" minimum:"1" maximum:"200" default:"50" example:"50" doc:"How many to answer with at most."`
		Cursor string `query:"cursor" example:"mail" doc:"The next_cursor of the answer before: goes on behind it."`
	}
	queueKeyListInput struct {
		QueuePath
		listInput
	}
)

// noPathName says that a part of the path is no name, although its pattern lets it pass.
func noPathName(part string) error {
	return invalid([]FieldProblem{{Loc: Loc{"path", part}, Msg: "must not be . or .. alone", Type: "invalid"}})
}

func errQueueVersion() error {
	return newProblem(http.StatusPreconditionFailed, "The settings are not in a version that If-Match names. Read them again, with their ETag, and decide anew.")
}

// queueOperation declares an operation on queues. All of them need the scope manage.
func (a *API) queueOperation(method, path, id, summary, description string) huma.Operation {
	return huma.Operation{
		OperationID: id, Method: method, Path: path, Tags: []string{"queues"}, Security: needs(scopeManage),
		Summary: summary, Description: description, Errors: readErrors,
	}
}

func (a *API) queueAnswer() map[string]*huma.Response {
	return a.responses(http.StatusOK, QueueSettings{}, settingsTag)
}

var settingsTag = header{"ETag", `"1764518400000000"`, "The version of the settings, for If-Match. A pause does not change it."}

func (a *API) answerQueue(w http.ResponseWriter, r *http.Request, q task.Queue) error {
	w.Header()["Etag"] = []string{versionTag(q.Version)}
	return a.answer(w, r, http.StatusOK, queueView(q))
}

// settingsErrors are the statuses that a request to write settings can be answered with,
// besides 422 and 500.
var settingsErrors = append([]int{http.StatusNotFound, http.StatusConflict, http.StatusPreconditionFailed}, submitErrors...)

func (a *API) putQueueOperation() huma.Operation {
	o := a.queueOperation(http.MethodPut, "/queues/{name}", "put-queue", "Write the settings of a queue",
		"Writes all settings of a queue: a limit that is left out is none. The queue need not exist. Limits hold at once, for all instances together, and a retry counts like a first call. "+
			"Lowering one cuts no call off: tasks wait until enough calls have ended. Waiting costs a task no attempt. Defaults reach the tasks that are submitted from then on. "+
			"A pause stays as it is. 412: others wrote the settings since the version that If-Match names.")
	o.RequestBody = jsonBody(a.body(QueueRequest{}), map[string]*huma.Example{
		"concurrency": example("At most 5 calls at a time", `{"max_concurrent":5}`),
		"rate":        example("At most 10 calls a second, 20 at once after a rest", `{"max_per_second":10,"burst":20}`),
		"tenants":     example("At most 50 calls at a time, 2 for each tenant", `{"max_concurrent":50,"per_key":{"max_concurrent":2}}`),
		"order":       example("In order within each key", `{"per_key":{"ordered":true}}`),
		"defaults":    example("With defaults for its tasks", `{"max_concurrent":5,"defaults":{"timeout_seconds":120,"retry":{"max_attempts":3}}}`),
	})
	o.Parameters, o.Responses, o.Errors = a.parameters(queueWriteInput{}), a.queueAnswer(), settingsErrors
	return o
}

func (a *API) putQueue(w http.ResponseWriter, r *http.Request) error {
	return a.writeQueue(w, r, "queue settings written", func(q *task.Queue, request *QueueRequest) {
		q.QueueSettings = task.QueueSettings{}
		request.patch(&q.QueueSettings)
	})
}

func (a *API) patchQueueOperation() huma.Operation {
	o := a.queueOperation(http.MethodPatch, "/queues/{name}", "change-queue", "Change settings of a queue",
		"Changes the settings that are given, and nothing else: a merge patch by RFC 7396 (application/json, or application/merge-patch+json), in which null takes a limit away. "+
			"404: the queue does not exist; PUT writes settings for one that does not. 412: others wrote the settings since the version that If-Match names.")
	o.RequestBody = jsonBody(a.body(QueueRequest{}), map[string]*huma.Example{
		"faster":  example("Another limit", `{"max_concurrent":20}`),
		"without": example("Without a rate, and another limit for each key", `{"max_per_second":null,"burst":null,"per_key":{"max_concurrent":4}}`),
	})
	o.Parameters, o.Responses, o.Errors = a.parameters(queueWriteInput{}), a.queueAnswer(), settingsErrors
	return o
}

func (a *API) patchQueue(w http.ResponseWriter, r *http.Request) error {
	return a.writeQueue(w, r, "queue settings changed", func(q *task.Queue, request *QueueRequest) { request.patch(&q.QueueSettings) })
}

// writeQueue writes settings of the queue that a request names, and answers with them.
func (a *API) writeQueue(w http.ResponseWriter, r *http.Request, done string, change func(*task.Queue, *QueueRequest)) error {
	var in queueWriteInput
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	if !task.IsQueueName(in.Name) {
		return noPathName("name")
	}
	request := new(QueueRequest)
	if err := a.readBody(r, request); err != nil {
		return err
	}
	if errs := request.retryMistakes(); errs != nil {
		return errs
	}
	q, err := written(func() (task.Queue, error) {
		q, err := a.Store.Queue(r.Context(), in.Name)
		switch {
		case errors.Is(err, task.ErrQueueNotFound) && r.Method == http.MethodPut && in.IfMatch == "":
			q = task.Queue{Name: in.Name}
		case errors.Is(err, task.ErrQueueNotFound) && in.IfMatch != "":
			return q, errQueueVersion()
		case err != nil:
			return q, err
		case !ifMatch(in.IfMatch, versionTag(q.Version)):
			return q, errQueueVersion()
		}
		change(&q, request)
		if err := q.Check(a.Defaults); err != nil {
			return q, err
		}
		q.Defaults.Retry = q.Defaults.Retry.Resolved(a.Defaults.Retry)
		return a.Store.PutQueue(r.Context(), q)
	})
	if err != nil {
		return err
	}
	a.logQueue(r.Context(), done, q.Name)
	a.Dispatcher.Wake()
	return a.answerQueue(w, r, q)
}

// written writes settings, and tries it again where others wrote them at the same moment.
func written[T any](write func() (T, error)) (v T, err error) {
	for range writeTries {
		if v, err = write(); !errors.Is(err, task.ErrQueueChanged) {
			break
		}
	}
	return v, err
}

const writeTries = 3

func (a *API) logQueue(ctx context.Context, done, name string, args ...any) {
	a.Log.InfoContext(ctx, done, append([]any{"queue", name, "caller", httpserver.Principal(ctx)}, args...)...) //nolint:sloglint // one of a few constants
}

func (a *API) getQueueOperation() huma.Operation {
	o := a.queueOperation(http.MethodGet, "/queues/{name}", "get-queue", "See a queue",
		"The settings of a queue, and how much it has to do. A queue exists from the first task that names it, or from the first time its settings are written.")
	o.Parameters, o.Responses, o.Errors = a.parameters(QueuePath{}), a.responses(http.StatusOK, Queue{}, settingsTag), append([]int{http.StatusNotFound}, readErrors...)
	return o
}

func (a *API) getQueue(w http.ResponseWriter, r *http.Request) error {
	var in QueuePath
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	q, err := a.Store.Queue(r.Context(), in.Name)
	if err != nil {
		return err
	}
	loads, err := a.Store.QueueLoads(r.Context(), []string{in.Name})
	if err != nil {
		return err
	}
	w.Header()["Etag"] = []string{versionTag(q.Version)}
	return a.answer(w, r, http.StatusOK, queueWithLoad(q, loads[0]))
}

func (a *API) listQueuesOperation() huma.Operation {
	o := a.queueOperation(http.MethodGet, "/queues", "list-queues", "List queues", "The queues with their settings, and how much each has to do.")
	o.Parameters, o.Responses = a.parameters(listInput{}), a.responses(http.StatusOK, QueueList{})
	return o
}

func (a *API) listQueues(w http.ResponseWriter, r *http.Request) error {
	var in listInput
	if err := a.readList(r, &in, &in); err != nil {
		return err
	}
	queues, err := a.Store.Queues(r.Context(), in.Cursor, in.Limit+1)
	if err != nil {
		return err
	}
	var found QueueList
	if len(queues) > in.Limit {
		queues = queues[:in.Limit]
		found.NextCursor = &queues[in.Limit-1].Name
	}
	names := make([]string, len(queues))
	for i, q := range queues {
		names[i] = q.Name
	}
	loads, err := a.Store.QueueLoads(r.Context(), names)
	if err != nil {
		return err
	}
	found.Queues = make([]Queue, len(queues))
	for i, q := range queues {
		found.Queues[i] = queueWithLoad(q, loads[i])
	}
	return a.answer(w, r, http.StatusOK, found)
}

// readList reads parameters into a pointer to a struct that has list in it.
func (a *API) readList(r *http.Request, into any, list *listInput) error {
	if err := a.readParams(r, into); err != nil {
		return err
	}
	if list.Limit < 1 || list.Limit > maxLimit {
		return invalid([]FieldProblem{{Loc: Loc{"query", "limit"}, Msg: "must be between 1 and " + strconv.Itoa(maxLimit), Type: "out_of_range"}})
	}
	return nil
}

func (a *API) pauseQueueOperation() huma.Operation {
	o := a.queueOperation(http.MethodPost, "/queues/{name}/pause", "pause-queue", "Pause a queue",
		"No task of the queue is started until it is resumed; calls that are under way go on. Tasks can be submitted, and wait. 200 also where it is paused already.")
	o.Parameters, o.Responses, o.Errors = a.parameters(QueuePath{}), a.queueAnswer(), append([]int{http.StatusNotFound}, readErrors...)
	return o
}

func (a *API) resumeQueueOperation() huma.Operation {
	o := a.queueOperation(http.MethodPost, "/queues/{name}/resume", "resume-queue", "Resume a queue",
		"The tasks of the queue are started again, as far as its limits allow. 200 also where it is not paused.")
	o.Parameters, o.Responses, o.Errors = a.parameters(QueuePath{}), a.queueAnswer(), append([]int{http.StatusNotFound}, readErrors...)
	return o
}

func (a *API) pauseQueue(w http.ResponseWriter, r *http.Request) error {
	return a.setPaused(w, r, "queue paused", true)
}

func (a *API) resumeQueue(w http.ResponseWriter, r *http.Request) error {
	return a.setPaused(w, r, "queue resumed", false)
}

func (a *API) setPaused(w http.ResponseWriter, r *http.Request, done string, paused bool) error {
	var in QueuePath
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	q, err := a.Store.PauseQueue(r.Context(), in.Name, paused)
	if err != nil {
		return err
	}
	a.logQueue(r.Context(), done, q.Name)
	a.Dispatcher.Wake()
	return a.answerQueue(w, r, q)
}

// PurgeRequest says which waiting tasks of a queue to cancel.
type PurgeRequest struct {
	Filter *Filter `json:"filter,omitempty" doc:"Which of its tasks: the parameters of GET /tasks, as in /tasks/cancel. Left out: all that are pending."`
	DryRun *bool   `json:"dry_run,omitempty" example:"true" doc:"Only say which tasks match. It must be false to do anything. Default: true."`
}

func (a *API) purgeQueueOperation() huma.Operation {
	o := a.bulkOperation("purge-queue", "/queues/{name}/purge", "Cancel the waiting tasks of a queue",
		"Cancels the pending tasks of the queue, or those of them that match a filter, as /tasks/{id}/cancel does; calls that are under way go on.", PurgeRequest{}, map[string]*huma.Example{
			"ask":    example("How many tasks wait?", `{}`),
			"do":     example("Cancel them", `{"dry_run":false}`),
			"tenant": example("Cancel those of one key", `{"filter":{"flow_key":"tenant-42"},"dry_run":false}`),
		})
	o.Tags, o.Parameters, o.Errors = []string{"queues"}, a.parameters(QueuePath{}), append([]int{http.StatusNotFound}, o.Errors...)
	return o
}

func (a *API) purgeQueue(w http.ResponseWriter, r *http.Request) error {
	var in QueuePath
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	request := new(PurgeRequest)
	if err := a.readBody(r, request); err != nil {
		return err
	}
	f, err := request.filter(in.Name)
	if err != nil {
		return err
	}
	if _, err := a.Store.Queue(r.Context(), in.Name); err != nil {
		return err
	}
	result, err := a.bulk(r.Context(), f, &BulkRequest{DryRun: request.DryRun}, "queue purged", func(ids []task.ID, _, _ int) (int, error) {
		count, running, err := a.Store.CancelMany(r.Context(), ids)
		a.Dispatcher.CutOff(running)
		return count, err
	})
	if err != nil {
		return err
	}
	return a.answer(w, r, http.StatusOK, result)
}

// filter returns which pending tasks of a queue are meant, in the domain's terms.
func (r *PurgeRequest) filter(queue string) (f task.Filter, err error) {
	within := BulkRequest{Filter: Filter{Queue: queue}}
	if r.Filter != nil {
		within.Filter = *r.Filter
		if within.Filter.Queue == "" {
			within.Filter.Queue = queue
		}
	}
	f, err = within.filter(task.Pending)
	if err == nil && f.Queue != queue {
		err = task.Errors{{Path: []string{"filter", "queue"}, Kind: "conflict", Message: "must be the queue of the path, or be left out"}}
	}
	return f, err
}

func (a *API) deleteQueueOperation() huma.Operation {
	o := a.queueOperation(http.MethodDelete, "/queues/{name}", "delete-queue", "Delete a queue",
		"Deletes the settings of a queue, those of its flow keys, and a pause. 409: tasks of it are pending or running; purge it, and wait until the calls under way have ended. "+
			"A task that names it later makes it anew, without any limit. Tasks that have ended keep its name.")
	o.Parameters, o.Errors = a.parameters(queueWriteInput{}), append([]int{http.StatusNotFound, http.StatusConflict, http.StatusPreconditionFailed}, readErrors...)
	o.Responses = noContent("The queue is deleted.")
	return o
}

// noContent documents the answer 204.
func noContent(description string) map[string]*huma.Response {
	return map[string]*huma.Response{strconv.Itoa(http.StatusNoContent): {Description: description}}
}

func (a *API) deleteQueue(w http.ResponseWriter, r *http.Request) error {
	var in queueWriteInput
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	_, err := written(func() (struct{}, error) {
		q, err := a.Store.Queue(r.Context(), in.Name)
		if err == nil && !ifMatch(in.IfMatch, versionTag(q.Version)) {
			err = errQueueVersion()
		}
		if err == nil {
			err = a.Store.DeleteQueue(r.Context(), in.Name, q.Version)
		}
		return struct{}{}, err
	})
	if err != nil {
		return err
	}
	a.logQueue(r.Context(), "queue deleted", in.Name)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

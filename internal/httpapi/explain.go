package httpapi

import (
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/task"
)

// Explanation is why a task has not run, or how it ended.
type Explanation struct {
	Summary string `json:"summary" example:"It is due in 37 s for attempt 3 of 14, since attempt 2 failed: the target answered 503 Service Unavailable." doc:"One sentence for people."`
	Facts   Facts  `json:"facts" doc:"What it was made from."`
}

// Facts are what is known around a task at one moment.
type Facts struct {
	Now                   Timestamp        `json:"now" example:"2026-11-24T12:00:00.000000Z" doc:"The moment, by the database's clock."`
	State                 task.State       `json:"state" enum:"pending,running,succeeded,failed,cancelled" example:"pending" doc:"The task's state."`
	Reason                *task.Reason     `json:"reason" enum:"attempts_exhausted,retry_duration_exhausted,client_error,expired,target_refused" example:"attempts_exhausted" doc:"Why it failed. Null unless it did."`
	RunAt                 Timestamp        `json:"run_at" example:"2026-11-24T12:00:37.000000Z" doc:"When it is due next, or was due last."`
	DueInSeconds          *float64         `json:"due_in_seconds" example:"37" doc:"How long until run_at; negative when it has passed. Null unless the task is pending."`
	ExpiresAt             Timestamp        `json:"expires_at" nullable:"true" example:"2026-12-31T23:59:59.000000Z" doc:"No attempt starts after it. Null: never."`
	AttemptCount          int              `json:"attempt_count" example:"2" doc:"Ended attempts that count."`
	MaxAttempts           int              `json:"max_attempts" example:"14" doc:"How many there are at most."`
	LastOutcome           *task.Kind       `json:"last_outcome" enum:"succeeded,retryable,permanent,snoozed,interrupted,lost" example:"retryable" doc:"What the last attempt came to. Null before any."`
	LastStatusCode        *int             `json:"last_status_code" example:"503" doc:"The target's last answer. Null when none came."`
	LastError             *string          `json:"last_error" example:"the target answered 503 Service Unavailable" doc:"What went wrong last. Null when nothing did. After a success: what did not change it, such as a body that broke off."`
	RunningForSeconds     *float64         `json:"running_for_seconds" example:"3.2" doc:"How long the attempt under way has taken. Null unless the task is running."`
	Holder                *string          `json:"holder" example:"orchestrator-00042-abc 1.0.0" doc:"The instance that carries it out. Null unless the task is running, or when that instance is gone."`
	HolderSilentSeconds   *float64         `json:"holder_silent_seconds" example:"1.4" doc:"How long ago the holder was last seen. After lease_seconds others take its tasks. Null without a holder."`
	LeaseSeconds          float64          `json:"lease_seconds" example:"15" doc:"How long an instance may be silent."`
	AwaitingCompletion    bool             `json:"awaiting_completion,omitzero" example:"false" doc:"Whether the target has taken the task and not reported its end yet."`
	ReportBy              Timestamp        `json:"report_by,omitzero" example:"2026-11-24T12:01:00.000000Z" doc:"By when the target must report something. Only while it has the task."`
	CompleteBy            Timestamp        `json:"complete_by,omitzero" example:"2026-11-24T13:00:00.000000Z" doc:"By when it must report the end. Only while it has the task."`
	Progress              *float64         `json:"progress,omitzero" example:"0.4" doc:"How much is done, from 0 to 1, by its last report. Left out where it did not say."`
	Note                  *string          `json:"note,omitzero" example:"mixing" doc:"What its last report had for people. Left out: nothing."`
	ReportedAt            Timestamp        `json:"reported_at,omitzero" example:"2026-11-24T11:59:58.000000Z" doc:"When that came. Left out: none did."`
	CancelRequestedAt     Timestamp        `json:"cancel_requested_at" nullable:"true" example:"2026-11-24T11:59:58.000000Z" doc:"When a cancellation of the running task was requested. Null without one."`
	TasksAhead            *int             `json:"tasks_ahead" example:"12" doc:"How many tasks are due before it, counted up to 10000. Null unless it is pending and due. The same as ahead."`
	Queue                 *string          `json:"queue" example:"mail" doc:"Its queue. Null: none."`
	FlowKey               *string          `json:"flow_key" example:"tenant-42" doc:"Its flow key. Null: none."`
	WaitingFor            *task.WaitingFor `json:"waiting_for" enum:"queue_paused,queue_concurrency,queue_rate,key_concurrency,key_rate,key_order,host_share,host_breaker,host_retry_after,slots" example:"key_concurrency" doc:"What keeps it from being started, where it is pending and due: queue_paused; the limit of its queue or key of calls at a time (concurrency), or of starts a second (rate); key_order: another task of the key comes first; host_share: its host is slow and holds its share of the slots; host_breaker: its host failed, and gets no or few calls; host_retry_after: its host asked not to be called; slots: all instances are busy. Null: nothing is known to."`
	Limit                 *float64         `json:"limit" example:"5" doc:"The limit that is used up: calls at a time, or calls a second of a rate. Null: it waits for no limit."`
	Running               *int             `json:"running" example:"5" doc:"How many calls are under way that count towards that limit. Null: it waits for no limit."`
	NextPermitAt          Timestamp        `json:"next_permit_at" nullable:"true" example:"2026-11-24T12:00:00.300000Z" doc:"When another call may start there. Null: when one that is under way has ended, or when the queue is resumed."`
	Ahead                 *int             `json:"ahead" example:"211" doc:"How many tasks come before it there, counted up to 10000. Null unless it is pending and due."`
	Instances             int              `json:"instances" example:"3" doc:"How many instances carry out tasks."`
	Slots                 *int             `json:"slots" example:"600" doc:"How many tasks they carry out at a time. Null when one of them does not say, or there is none."`
	RunningTasks          int              `json:"running_tasks" example:"17" doc:"How many tasks are running."`
	InstanceSilentSeconds *float64         `json:"instance_silent_seconds" example:"0.4" doc:"How long ago any of them was last seen. Null when there is none."`
	ParentID              *string          `json:"parent_id" format:"uuid" example:"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2a" doc:"The task whose call led to this one, or whose end it tells. Null: none."`
	RootID                *string          `json:"root_id" format:"uuid" example:"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a29" doc:"The first task of that chain. Null without a parent."`
	Hops                  int              `json:"hops" example:"1" doc:"How many calls led to the request that submitted it."`
	FinishedAt            Timestamp        `json:"finished_at" nullable:"true" example:"2026-11-24T12:00:01.000000Z" doc:"When it ended. Null until then."`
}

func (a *API) explainOperation() huma.Operation {
	return huma.Operation{
		OperationID: "explain-task", Method: http.MethodGet, Path: "/tasks/{id}/explain", Tags: []string{"tasks"}, Security: needs(scopeRead),
		Summary:     "Why has it not run, or what happened?",
		Description: "Says in one sentence why a task has not run, or how it ended, and gives the facts.",
		Parameters:  a.parameters(TaskPath{}),
		Responses:   a.responses(http.StatusOK, Explanation{}),
		Errors:      append([]int{http.StatusNotFound}, readErrors...),
	}
}

func (a *API) explain(w http.ResponseWriter, r *http.Request) error {
	id, err := a.taskID(r)
	if err != nil {
		return err
	}
	t, facts, err := a.Store.Explain(r.Context(), id, a.Lease)
	if err != nil {
		return err
	}
	return a.answer(w, r, http.StatusOK, Explanation{Summary: task.Explain(t, facts), Facts: factsView(t, facts)})
}

// factsView is the facts as callers see them.
func factsView(t *task.Task, f task.Facts) Facts {
	v := Facts{
		Now:                   Timestamp(f.Now),
		State:                 t.State,
		Reason:                present(t.Reason),
		RunAt:                 Timestamp(t.RunAt),
		ExpiresAt:             Timestamp(t.ExpiresAt),
		AttemptCount:          t.AttemptCount,
		MaxAttempts:           t.Retry.MaxAttempts,
		RunningForSeconds:     since(f.ClaimedAt, f.Now),
		Holder:                present(f.Holder),
		HolderSilentSeconds:   since(f.HolderSeenAt, f.Now),
		LeaseSeconds:          f.Lease.Seconds(),
		CancelRequestedAt:     Timestamp(t.CancelRequestedAt),
		Instances:             f.Instances,
		Slots:                 present(f.Slots),
		RunningTasks:          f.Running,
		InstanceSilentSeconds: since(f.InstanceSeenAt, f.Now),
		ParentID:              idView(t.ParentID),
		RootID:                idView(t.RootID),
		Hops:                  t.Hops,
		FinishedAt:            Timestamp(t.FinishedAt),
		Queue:                 present(t.Queue),
		FlowKey:               present(t.FlowKey),
	}
	if v.AwaitingCompletion = t.Awaiting; t.Awaiting {
		v.ReportBy, v.CompleteBy = Timestamp(t.CompletionUntil), Timestamp(t.CompletionEndsAt)
	}
	if p := t.Progress; p != nil && t.State == task.Running {
		v.Progress, v.Note, v.ReportedAt = p.Part, present(p.Note), Timestamp(p.At)
	}
	if t.State == task.Pending {
		wait := t.RunAt.Sub(f.Now).Seconds()
		v.DueInSeconds = &wait
		if wait <= 0 {
			v.wait(task.WaitOf(t, f))
		}
	}
	if n := len(t.Attempts); n > 0 {
		last := t.Attempts[n-1]
		v.LastOutcome, v.LastStatusCode, v.LastError = present(last.Outcome), present(last.StatusCode), present(last.Error)
	}
	return v
}

// wait adds what a task waits for.
func (v *Facts) wait(w task.Wait) {
	v.TasksAhead, v.Ahead = &w.Ahead, &w.Ahead
	v.WaitingFor, v.Limit, v.NextPermitAt = present(w.For), present(w.Limit), Timestamp(w.NextPermitAt)
	if w.Limit > 0 {
		v.Running = &w.Running
	}
}

// since is the seconds from a moment to now; nil for no moment.
func since(moment, now time.Time) *float64 {
	if moment.IsZero() {
		return nil
	}
	seconds := max(now.Sub(moment).Seconds(), 0) // a search reads what was committed since its moment
	return &seconds
}

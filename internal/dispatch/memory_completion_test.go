package dispatch

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

func (m *memory) KeepToken(ctx context.Context, claim *task.Claim, hash [32]byte) (matched bool, err error) {
	err = m.do(ctx, asked{op: "KeepToken"}, func() {
		r := m.rows[claim.Task.ID]
		if matched = r.State == task.Running && !r.Awaiting && r.claim == claim.Number; matched {
			r.tokens = append(slices.Clip(r.tokens), hash[:]...)
			r.Progress, r.Result = nil, nil
		}
	})
	return matched && err == nil, err
}

// await is what a decision does by which a task stays running.
func (r *row) await(now time.Time) {
	r.Awaiting, r.worker = true, task.ID{}
	r.CompletionUntil, r.CompletionEndsAt = now.Add(r.Completion.Silence()), now.Add(r.Completion.Timeout)
}

func (m *memory) Awaited(ctx context.Context, id task.ID) (a *task.Awaited, err error) {
	var refused error
	err = m.do(ctx, asked{op: "Awaited"}, func() {
		r := m.rows[id]
		if r == nil {
			refused = fmt.Errorf("report on task %s: %w", id, task.ErrNotFound)
			return
		}
		a = &task.Awaited{Tokens: r.tokens}
		if !r.State.Terminal() {
			a = r.awaited(m.now())
		}
	})
	if err != nil || refused != nil {
		return nil, fmt.Errorf("%w%w", err, refused)
	}
	return a, nil
}

func (r *row) awaited(now time.Time) *task.Awaited {
	t := r.sent()
	t.Body = nil
	return &task.Awaited{
		Claim:  &task.Claim{Task: t, Number: r.claim, At: r.claimedAt, FirstAt: r.firstAt},
		Tokens: r.tokens, Open: r.State == task.Running, Now: now,
	}
}

func (m *memory) Report(ctx context.Context, claim *task.Claim, report *task.Report) (until time.Time, err error) {
	changed := false
	err = m.do(ctx, asked{op: "Report"}, func() {
		r := m.rows[claim.Task.ID]
		if changed = r.State != task.Running || r.claim != claim.Number; changed {
			return
		}
		r.Progress = &task.Progress{Part: report.Progress, Note: report.Note, At: m.now()}
		r.Result = report.Result
		if r.Awaiting {
			r.claim++
			r.CompletionUntil = m.now().Add(min(r.Completion.Silence(), r.CompletionEndsAt.Sub(m.now())))
			until = r.CompletionUntil
		}
		claim.Number = r.claim
	})
	if err == nil && changed {
		err = task.ErrChanged
	}
	return until, err
}

func (m *memory) Overdue(ctx context.Context, listening time.Duration, limit int) (overdue []*task.Awaited, now time.Time, err error) {
	err = m.do(ctx, asked{op: "Overdue"}, func() {
		now = m.now()
		for _, r := range m.rows {
			if r.State == task.Running && r.Awaiting && !r.CompletionUntil.After(now) && listening >= r.Completion.Heartbeat && len(overdue) < limit {
				overdue = append(overdue, r.awaited(now))
			}
		}
	})
	return overdue, now, err
}

package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
)

// One statement sees one snapshot: a task that ends meanwhile is in exactly
// one of the two tables.
func getSQL(l columns) (one, many string) {
	either := `SELECT ` + l.shownOf(live) + ` FROM tasks WHERE id = ANY ($1)
UNION ALL
SELECT ` + l.shownOf(history) + ` FROM task_history WHERE id = ANY ($1)`
	return `-- name: get tasks
` + either, `-- name: get many tasks
SELECT ` + wholeTasks(l).found + ` FROM (
` + either + `
) found`
}

// Get returns a task with its whole story and without its body, or
// [task.ErrNotFound]. As with Insert, [task.ErrOverloaded] comes at once when too
// many wait.
func (s *Store) Get(ctx context.Context, id task.ID) (*task.Task, error) {
	t, err := s.gets.Do(ctx, id)
	switch {
	case errors.Is(err, batch.ErrFull):
		return nil, fmt.Errorf("get task %s: %w: %w", id, task.ErrOverloaded, err)
	case err != nil:
		return nil, fmt.Errorf("get task %s: %w", id, classify(err))
	case t == nil:
		return nil, fmt.Errorf("get task %s: %w", id, task.ErrNotFound)
	}
	return t, nil
}

// get is the flush of Get: nil stands for a task that is not there.
func (s *Store) get(ctx context.Context, ids []task.ID) ([]*task.Task, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	rows, err := s.pool.Query(ctx, s.sql.get, uuids(ids))
	if err != nil {
		return nil, err
	}
	found, err := pgx.CollectRows(rows, s.scanTask())
	if err != nil {
		return nil, err
	}
	return inOrder(ids, found), nil
}

func getWithBodySQL(l columns) string {
	return `-- name: get task with its body
SELECT ` + l.shownOf(live) + `, body FROM tasks WHERE id = $1
UNION ALL
SELECT ` + l.shownOf(history) + `, body FROM task_history WHERE id = $1`
}

// GetWithBody is Get of a task with its body. One request of this kind reads at a time.
func (s *Store) GetWithBody(ctx context.Context, id task.ID) (*task.Task, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout) // waiting for a slot included
	defer cancel()
	t, err := s.getWithBody(ctx, id)
	if errors.Is(err, pgx.ErrNoRows) {
		err = task.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("get task %s with its body: %w", id, classify(err))
	}
	return t, nil
}

func (s *Store) getWithBody(ctx context.Context, id task.ID) (*task.Task, error) {
	if err := s.managing.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.managing.release()
	rows, err := s.pool.Query(ctx, s.sql.getWithBody, [16]byte(id))
	if err != nil {
		return nil, err
	}
	var body []byte
	r := s.sql.shown.reader(&body)
	return pgx.CollectExactlyOneRow(rows, func(row pgx.CollectableRow) (*task.Task, error) {
		t, err := r.read(row)
		if err == nil {
			t.Body = body
		}
		return t, err
	})
}

// GetMany returns some hundred tasks in the order of ids, as [Store.Find] does, or
// [task.ErrNotFound] where one of them is not there.
func (s *Store) GetMany(ctx context.Context, ids []task.ID) ([]*task.Task, error) {
	var found []*task.Task
	err := s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, s.sql.getMany, uuids(ids))
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, s.scanTask())
		return err
	})
	if err == nil && len(found) < len(ids) {
		err = task.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("get %d tasks: %w", len(ids), err)
	}
	return inOrder(ids, found), nil
}

// inOrder sorts tasks by ids; nil stands for one that was not found.
func inOrder(ids []task.ID, found []*task.Task) []*task.Task {
	byID := make(map[task.ID]*task.Task, len(found))
	for _, t := range found {
		byID[t.ID] = t
	}
	tasks := make([]*task.Task, len(ids))
	for i, id := range ids {
		tasks[i] = byID[id]
	}
	return tasks
}

// scanTask returns what reads the rows of a statement that shows tasks. They come
// without their bodies.
func (s *Store) scanTask() pgx.RowToFunc[*task.Task] { return s.sql.shown.reader().read }

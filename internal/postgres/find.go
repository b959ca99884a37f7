package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	// searchTimeout bounds what a search may cost the database.
	searchTimeout = 3 * time.Second
	// maxSearching is the most searches that wait. One runs at a time, so that
	// searches never delay tasks.
	maxSearching = 16
)

// Find returns up to limit tasks that match f, in its order (see
// [task.Filter.Order]), from behind a position on. They come without their
// bodies, and of their attempts with the last one alone. [task.ErrOverloaded]
// comes at once when too many search; [task.ErrTooBroad] after some seconds.
//
// One statement sees one snapshot: a task that ends meanwhile is found once.
func (s *Store) Find(ctx context.Context, f *task.Filter, behind task.Position, limit int) ([]*task.Task, error) {
	sql, args := s.sql.find(f, behind, limit)
	if sql == "" {
		return nil, nil // a failed task that is running, say
	}
	var found []*task.Task
	err := s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, sql, append([]any{searchMode}, args...)...)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, s.scanTask())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("find tasks: %w", err)
	}
	return found, nil
}

// Match returns the ids of up to limit tasks that match f, the newest first as
// with Find, and the errors of that.
func (s *Store) Match(ctx context.Context, f *task.Filter, limit int) ([]task.ID, error) {
	sql, args := searchSQL(idsAlone, f, task.Position{}, limit)
	if sql == "" {
		return nil, nil
	}
	var found []task.ID
	err := s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (id task.ID, err error) {
			return id, row.Scan((*[16]byte)(&id))
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("match tasks: %w", err)
	}
	return found, nil
}

// selection is what a search reads of either table, and what it returns of that.
type selection struct{ live, finished, found string }

var idsAlone = selection{"id, run_at, NULL::timestamptz AS finished_at", "id, run_at, finished_at", "id"}

// wholeTasks is what a list shows of tasks: of the attempts the last one.
func wholeTasks(l columns) selection {
	return selection{l.shownOf(live), l.shownOf(history), l.with(useShow).instead("", map[string]string{
		"attempts": `CASE WHEN jsonb_array_length(attempts) > 1
        THEN jsonb_build_array(attempts -> -1 || jsonb_build_object('round', ` + lastRound + `)) ELSE attempts END`,
	})}
}

// find is the statement of Find.
func (q *statements) find(f *task.Filter, behind task.Position, limit int) (sql string, args []any) {
	return searchSQL(q.whole, f, behind, limit)
}

// searchSQL puts a search together: from each table, and for each state that has
// an index of its own, the first rows in the order of an index, and of those
// the first. "" says that nothing can match.
func searchSQL(columns selection, f *task.Filter, behind task.Position, limit int) (sql string, args []any) {
	key := map[task.Order]string{task.ByID: "", task.ByRunAt: "run_at DESC, ", task.ByFinishedAt: "finished_at DESC, "}[f.Order()]
	c := &conditions{}
	first := c.arg(limit)
	var branches []string
	branch := func(columns, table string, f task.Filter, match func(*conditions, *task.Filter) bool) {
		if c.terms = nil; !match(c, &f) {
			return
		}
		switch {
		case behind == task.Position{}:
		case key == "":
			c.add("id < %s", [16]byte(behind.ID))
		default:
			c.add("("+strings.ReplaceAll(key, " DESC", "")+"id) < (%s, %s)", behind.At, [16]byte(behind.ID))
		}
		branches = append(branches, "(SELECT "+columns+" FROM "+table+" WHERE "+c.sql()+
			"\n    ORDER BY "+key+"id DESC LIMIT "+first+")")
	}
	one, states := *f, f.States
	if len(states) == 0 {
		branch(columns.finished, "task_history", one, matchFinished)
		states = []task.State{task.Pending, task.Running} // what is running has an index of its own: it is little
	}
	for _, state := range states {
		one.States = []task.State{state}
		branch(columns.live, "tasks", one, matchLive)
		if also := map[task.State]task.State{task.Pending: waiting, task.Running: awaiting}[state]; also != "" {
			one.States = []task.State{also}
			branch(columns.live, "tasks", one, matchLive)
		}
		branch(columns.finished, "task_history", one, matchFinished)
	}
	if branches == nil {
		return "", nil
	}
	return "-- name: find tasks\nSELECT " + columns.found + " FROM (\n" + strings.Join(branches, "\nUNION ALL\n") +
		"\n) found ORDER BY " + key + "id DESC LIMIT " + first, c.args
}

// beginSearch makes the planner look at the values that are searched for, and
// lets it read a whole table where no index leads to them.
var beginSearch = fmt.Sprintf(`BEGIN READ ONLY; SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL enable_seqscan = on;
SET LOCAL jit = off; SET LOCAL statement_timeout = %d`, searchTimeout.Milliseconds())

// searchMode leaves nothing prepared behind: there are many kinds of searches,
// and each is planned anew.
const searchMode = pgx.QueryExecModeCacheDescribe

// search waits for the searches before this one, and runs f in a transaction for
// searching, whether or not ctx ends then: the server would go on with a statement
// that is broken off, beside the next search.
func (s *Store) search(ctx context.Context, f func(context.Context, pgx.Tx) error) error {
	waiting, stopWaiting := context.WithTimeout(ctx, callTimeout)
	defer stopWaiting()
	if err := s.searching.acquire(waiting); err != nil {
		return err
	}
	defer s.searching.release()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	err := pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{BeginQuery: beginSearch}, func(tx pgx.Tx) error { return f(ctx, tx) })
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "57014" { // statement timeout
		return fmt.Errorf("%w: %w", task.ErrTooBroad, err)
	}
	return classify(err)
}

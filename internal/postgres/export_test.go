package postgres

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/task"
)

// The hot statements, for tests of their plans.
var (
	ClaimDueSQL = taskSQL.claimDue
	FinishSQL   = taskSQL.finish.sql
	NextDueSQL  = nextDueSQL
	ExpireSQL   = expireSQL

	OverdueSQL = taskSQL.completion.overdue
	AwaitSQL   = taskSQL.completion.await
	AwaitedSQL = taskSQL.completion.awaited
	ReportSQL  = reportSQL

	CancelledSQL         = cancelledSQL
	FinishCancelledSQL   = taskSQL.finishCancelled.sql
	FinishCallingBackSQL = taskSQL.finishCallingBack.sql
	CancelManySQL        = taskSQL.cancelMany
)

// SessionSettings are those of a direct connection.
var SessionSettings = sessionSettings

// LookBack makes looks for due tasks begin at the very first one when again
// yields something, and then only.
func (s *Store) LookBack(again <-chan time.Time) { s.lowWater.back = again }

// FindSQL makes the statement of Find, and BeginSearch what comes before it.
var (
	FindSQL     = taskSQL.find
	BeginSearch = beginSearch
)

// QueueLoadsSQL is the statement of QueueLoads.
var QueueLoadsSQL = queueLoadsSQL

// OverdueInLanesSQL is what Health and Counts ask about queues.
var OverdueInLanesSQL = overdueInLanesSQL

// CreatePartition are the statements that make one.
var CreatePartition = createPartition

// FinishTogether finishes results in one flush, and returns which matched and
// the errors of those that failed alone.
func (s *Store) FinishTogether(ctx context.Context, results []Result) (matched []bool, errs []error, err error) {
	out, err := s.finish(ctx, results)
	for _, w := range out {
		matched, errs = append(matched, w.matched), append(errs, w.err)
	}
	return matched, errs, err
}

// TakeConnections takes all connections but that of heartbeats.
func (s *Store) TakeConnections(t *testing.T) (release func()) {
	t.Helper()
	var taken []*pgxpool.Conn
	for range s.pool.Config().MaxConns {
		conn, err := s.pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, conn)
	}
	return func() {
		for _, conn := range taken {
			conn.Release()
		}
	}
}

// EncodeAttempt writes an attempt, and DecodeAttempts reads some.
var (
	EncodeAttempt  = encodeAttempt
	DecodeAttempts = decodeAttempts
)

// Wrap has each statement run as behind a pooler whose default isolation is another.
func (s *Store) Wrap() { s.pool.wrapped, s.leases.wrapped = true, true }

// AddColumn makes the statements from a list with one more column, "fingerprint", a
// task's Fingerprint: submissions send it, changes set it, and all that reads tasks
// reads it.
func (s *Store) AddColumn() {
	s.sql = newStatements(append(slices.Clone(taskColumns), column{"fingerprint", "bytea", both, useCallOption | useInherit,
		notNull(func(t *task.Task) []byte { return t.Fingerprint }, func(t *task.Task, b []byte) error { t.Fingerprint = b; return nil })}))
}

// Columns returns the names of the columns in the list that tasks and task_history have.
func Columns() (tasks, taskHistory []string) {
	for _, c := range taskColumns.of(live) {
		tasks = append(tasks, c.name)
	}
	for _, c := range taskColumns.of(history) {
		taskHistory = append(taskHistory, c.name)
	}
	return tasks, taskHistory
}

// The statements of ClaimLanes, and LanesSQL that of Lanes.
var (
	LockLanesSQL       = taskSQL.lockLanes
	QueueLimitsSQL     = taskSQL.queueLimits
	KeyLimitsSQL       = keyLimitsSQL
	HostLimitsSQL      = hostLimitsSQL
	WaitingInLanesSQL  = waitingInLanesSQL
	ClaimLanesSQL      = taskSQL.claimLanes
	HoldBackClaimedSQL = holdBackClaimedSQL
	KeepLanesSQL       = keepLanesSQL
	LanesSQL           = lanesSQL

	HoldBackSQL       = holdBackSQL
	HoldBackInLaneSQL = holdBackInLaneSQL
)

// LockLanesWhen has claims from lanes lock a queue when a condition of SQL is met, which may wait.
// With countFirst they count what runs in the statement that locks, and so as it was before.
func (s *Store) LockLanesWhen(condition string, countFirst bool) {
	sql := *s.sql
	const lock = "FOR NO KEY UPDATE"
	sql.lockLanes = strings.Replace(sql.lockLanes, lock, "AND "+condition+" "+lock, 1)
	if countFirst {
		sql.lockLanes = strings.Replace(taskSQL.lockLanes, lock+" SKIP LOCKED", "", 1)
		sql.queueLimits = queueLimitsSQL(strings.Replace(queueRow, "LIMIT", "AND "+condition+" LIMIT", 1) + " " + lock)
	}
	s.sql = &sql
}

// LookIntoLanesUntil has claims from lanes wait for a condition of SQL once they have looked into the lanes.
func (s *Store) LookIntoLanesUntil(condition string) {
	sql := *s.sql
	sql.waitingInLanes += " UNION ALL SELECT 0, NULL, NULL, 0, 0, NULL WHERE NOT (" + condition + ")"
	s.sql = &sql
}

// ForgetMarks has counts and looks into lanes begin at the very first task.
func (s *Store) ForgetMarks() { s.laneMarks = newLaneMarks() }

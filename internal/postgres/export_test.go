package postgres

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// The hot statements, for tests of their plans.
const (
	ClaimDueSQL = claimDueSQL
	FinishSQL   = finishSQL
	NextDueSQL  = nextDueSQL

	CancelledSQL         = cancelledSQL
	FinishCancelledSQL   = finishCancelledSQL
	FinishCallingBackSQL = finishCallingBackSQL
	CancelManySQL        = cancelManySQL
)

// SessionSettings are those of a direct connection.
var SessionSettings = sessionSettings

// LookBack makes looks for due tasks begin at the very first one when again
// yields something, and then only.
func (s *Store) LookBack(again <-chan time.Time) { s.lowWater.back = again }

// FindSQL makes the statement of Find, and BeginSearch what comes before it.
var (
	FindSQL     = findSQL
	BeginSearch = beginSearch
)

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

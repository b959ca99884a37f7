package postgres

import "time"

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

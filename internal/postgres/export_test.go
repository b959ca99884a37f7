package postgres

// The hot statements, for tests of their plans.
const (
	ClaimDueSQL = claimDueSQL
	FinishSQL   = finishSQL
	NextDueSQL  = nextDueSQL
)

// SessionSettings are those of a direct connection.
var SessionSettings = sessionSettings

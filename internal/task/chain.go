package task

import (
	"math"
	"strconv"
	"strings"
)

// MaxHops is the most that is counted of the calls that led to a task; any more
// are counted as so many.
const MaxHops = math.MaxInt16

// ParseHops reads a count of hops: decimal digits and nothing else. It reports
// false for any other text. A count above [MaxHops] is MaxHops.
func ParseHops(s string) (hops int, ok bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > MaxHops {
		return MaxHops, true // digits alone fail only beyond the range
	}
	return int(n), true //nolint:gosec // at most MaxHops
}

// NumberRounds gives a Round to each attempt of a story, oldest first, that has
// none. Such an attempt begins a round where its number is below the one that
// would follow the attempt before: a redrive numbers attempts from 1 again.
func NumberRounds(attempts []Attempt) {
	round := 1
	for i := range attempts {
		a := &attempts[i]
		if i > 0 && a.Round == 0 {
			before := &attempts[i-1]
			next := before.Number
			if before.Outcome.Counts() {
				next++
			}
			if a.Number < next {
				round++
			}
		}
		if a.Round == 0 {
			a.Round = round
		}
		round = a.Round
	}
}

package main

import (
	"math"
	"testing"
)

// Where descriptors are few, callers get those that calls and the database leave, and
// a quarter at least.
func TestConnectionsWithin(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		limit          uint64
		wanted, others int
		want           int
	}{
		{math.MaxUint64, 4096, 510, 4096}, // no limit
		{4606, 4096, 510, 4096},
		{4605, 4096, 510, 4095},
		{1024, 4096, 510, 514},
		{600, 4096, 510, 150},
		{72, 4096, 510, 18},
		{1024, 100, 3000, 100},
		{3, 4096, 510, 1},
		{0, 4096, 510, 1},
	} {
		if got := connectionsWithin(tt.limit, tt.wanted, tt.others); got != tt.want {
			t.Errorf("connectionsWithin(%d, %d, %d) = %d, want %d", tt.limit, tt.wanted, tt.others, got, tt.want)
		}
	}
}

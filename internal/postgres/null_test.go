package postgres

import (
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Most columns of most tasks are NULL: that takes no memory of its own.
func TestNullDoesNotAllocate(t *testing.T) {
	texts, ids, times := make([]*string, 1), make([]*task.ID, 1), make([]*time.Time, 1)
	if n := testing.AllocsPerRun(100, func() { texts[0], ids[0], times[0] = null(""), null(task.ID{}), nullTime(time.Time{}) }); n != 0 {
		t.Errorf("three columns that are NULL take %v allocations, want 0", n)
	}
}

package task_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

func TestParseHops(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int{
		"0": 0, "1": 1, "007": 7, "32767": task.MaxHops, "32768": task.MaxHops, "9223372036854775808": task.MaxHops,
		"18446744073709551616": task.MaxHops, strings.Repeat("9", 5000): task.MaxHops, strings.Repeat("0", 5000) + "3": 3,
	} {
		if got, ok := task.ParseHops(text); got != want || !ok {
			t.Errorf("ParseHops(%.30q) = %d, %t, want %d", text, got, ok, want)
		}
	}
	for _, text := range []string{"", " ", "-1", "+1", " 1", "1 ", "1.0", "1e3", "0x1", "1_000", "one", "1,1", "\u0661"} {
		if got, ok := task.ParseHops(text); ok {
			t.Errorf("ParseHops(%q) = %d, want it refused", text, got)
		}
	}
}

func TestNumberRounds(t *testing.T) {
	t.Parallel()
	const (
		retryable, permanent = task.OutcomeRetryable, task.OutcomePermanent
		interrupted, snoozed = task.OutcomeInterrupted, task.OutcomeSnoozed
		lost                 = task.OutcomeLost
		kept                 = true
	)
	type attempt struct {
		number  int
		outcome task.Kind
		round   int // the one that it is to have
		kept    bool
	}
	for name, attempts := range map[string][]attempt{
		"none":                           {},
		"one round":                      {{1, retryable, 1, !kept}, {2, lost, 1, !kept}, {3, permanent, 1, !kept}},
		"uncounted ones":                 {{1, interrupted, 1, !kept}, {1, snoozed, 1, !kept}, {1, retryable, 1, !kept}, {2, interrupted, 1, !kept}, {2, permanent, 1, !kept}},
		"redriven":                       {{1, retryable, 1, !kept}, {2, permanent, 1, !kept}, {1, retryable, 2, !kept}, {2, retryable, 2, !kept}},
		"redriven after one attempt":     {{1, permanent, 1, !kept}, {1, permanent, 2, !kept}, {1, permanent, 3, !kept}},
		"cancelled at the third":         {{1, retryable, 1, !kept}, {2, retryable, 1, !kept}, {3, interrupted, 1, !kept}, {1, retryable, 2, !kept}},
		"the oldest were dropped":        {{9, retryable, 1, !kept}, {10, retryable, 1, !kept}, {1, retryable, 2, !kept}},
		"rounds are kept":                {{1, permanent, 1, !kept}, {1, permanent, 4, kept}, {1, permanent, 5, kept}},
		"redriven by an older version":   {{1, permanent, 4, kept}, {1, retryable, 5, !kept}, {2, permanent, 5, !kept}, {1, permanent, 6, !kept}},
		"an older version goes on":       {{1, retryable, 4, kept}, {2, retryable, 4, !kept}},
		"the oldest that are kept go on": {{7, retryable, 3, kept}, {8, permanent, 3, kept}},
	} {
		var got, want []int
		story := make([]task.Attempt, len(attempts))
		for i, a := range attempts {
			story[i] = task.Attempt{Number: a.number, Outcome: a.outcome}
			if a.kept {
				story[i].Round = a.round
			}
			want = append(want, a.round)
		}
		task.NumberRounds(story)
		for _, a := range story {
			got = append(got, a.Round)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: rounds (-want +got):\n%s", name, diff)
		}
	}
}

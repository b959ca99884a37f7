package postgres

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/melodia/orchestrator/internal/task"
)

// conditions are the terms of a WHERE and the statement's arguments.
type conditions struct {
	terms []string
	args  []any
}

// add adds a term in which each %s is an argument.
func (c *conditions) add(term string, args ...any) {
	places := make([]any, len(args))
	for i, arg := range args {
		places[i] = c.arg(arg)
	}
	c.terms = append(c.terms, fmt.Sprintf(term, places...))
}

// arg adds an argument and returns its place: $1, $2, …
func (c *conditions) arg(v any) string {
	c.args = append(c.args, v)
	return fmt.Sprintf("$%d", len(c.args))
}

// sql returns what stands behind WHERE.
func (c *conditions) sql() string {
	if len(c.terms) == 0 {
		return "true"
	}
	return strings.Join(c.terms, "\n    AND ")
}

// idSlack is how far the moment in an id may lie from created_at: ids are made
// by a clock that follows the database's (see clock), some seconds before the
// task is stored.
const idSlack = time.Minute

// matchLive adds what f asks of rows of tasks to c. It reports false where none
// can match.
func matchLive(c *conditions, f *task.Filter) bool {
	if f.Order() == task.ByFinishedAt || len(f.Reasons) > 0 {
		return false
	}
	if len(f.States) > 0 {
		live := slices.DeleteFunc(slices.Clone(f.States), task.State.Terminal)
		if len(live) == 0 {
			return false
		}
		matchAny(c, "state", live)
		if f.Queue != "" && slices.Equal(live, []task.State{waiting}) {
			c.add("lane >= %s AND lane < %s", f.Queue+"/", f.Queue+"0") // the order of an index
		}
	}
	matchBoth(c, f)
	return true
}

// matchFinished is matchLive for rows of task_history.
func matchFinished(c *conditions, f *task.Filter) bool {
	states := f.States
	if len(f.Reasons) > 0 {
		if len(states) > 0 && !slices.Contains(states, task.Failed) {
			return false
		}
		states = []task.State{task.Failed}
		matchAny(c, "reason", f.Reasons)
	}
	if len(states) > 0 {
		finished := slices.DeleteFunc(slices.Clone(states), func(s task.State) bool { return !s.Terminal() })
		if len(finished) == 0 {
			return false
		}
		matchAny(c, "state", finished)
	}
	matchRange(c, "finished_at", f.FinishedAfter, f.FinishedBefore)
	if !f.CreatedAfter.IsZero() {
		c.add("finished_at >= %s", f.CreatedAfter) // which spares the partitions of the days before
	}
	matchBoth(c, f)
	return true
}

func matchBoth(c *conditions, f *task.Filter) {
	if len(f.Labels) > 0 {
		c.add("labels @> %s::text::jsonb AND labels <> '{}'", encodeMap(f.Labels))
	}
	if f.Host != "" {
		// Behind the host comes nothing, or one of / : ? (2F, 3A, 3F): a range up to
		// 40, in which other hosts lie that only begin alike.
		const arm = "url ~>=~ %s AND url ~<~ %s AND substr(url, %s, 1) IN ('', '/', ':', '?')"
		http, https := "http://"+f.Host, "https://"+f.Host
		c.add("("+arm+" OR "+arm+")", http, http+"@", len(http)+1, https, https+"@", len(https)+1)
	}
	if f.URLPrefix != "" {
		c.add("url ~>=~ %s", f.URLPrefix)
		if next := following(f.URLPrefix); next != "" {
			c.add("url ~<~ %s", next)
		}
	}
	if !f.CreatedAfter.IsZero() {
		c.add("id >= %s", [16]byte(task.FirstID(f.CreatedAfter.Add(-idSlack))))
	}
	if !f.CreatedBefore.IsZero() {
		c.add("id < %s", [16]byte(task.FirstID(f.CreatedBefore.Add(idSlack))))
	}
	matchRange(c, "created_at", f.CreatedAfter, f.CreatedBefore)
	matchRange(c, "run_at", f.RunAfter, f.RunBefore)
	if f.MinAttempts > 0 {
		c.add("attempt_count >= %s", f.MinAttempts)
	}
	if f.CreatedBy != "" {
		c.add("created_by = %s", f.CreatedBy)
	}
	if f.Queue != "" {
		c.add("queue = %s", f.Queue)
	}
	if f.FlowKey != "" {
		c.add("flow_key = %s", f.FlowKey)
	}
}

// matchAny asks for any of some words. One alone is compared with, so that an
// index that it leads to gives rows in its order.
func matchAny[T ~string](c *conditions, column string, words []T) {
	if len(words) == 1 {
		c.add(column+" = %s", string(words[0]))
		return
	}
	texts := make([]string, len(words))
	for i, word := range words {
		texts[i] = string(word)
	}
	c.add(column+" = ANY (%s)", texts)
}

func matchRange(c *conditions, column string, after, before time.Time) {
	if !after.IsZero() {
		c.add(column+" >= %s", after)
	}
	if !before.IsZero() {
		c.add(column+" < %s", before)
	}
}

// following returns the first text behind all that begin with prefix, by bytes;
// "" where there is none.
func following(prefix string) string {
	runes := []rune(prefix)
	for i := len(runes) - 1; i >= 0; i-- {
		next := runes[i] + 1
		if next == 0xd800 {
			next = 0xe000 // what lies between are no characters
		}
		if next <= utf8.MaxRune {
			return string(append(runes[:i], next))
		}
	}
	return ""
}

package postgres_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// searches are those that people make: by a state or a time, and by anything else.
func searches(now time.Time, days int) (common, others map[string]task.Filter) {
	middle := now.AddDate(0, 0, -days/2)
	only := func(s ...task.State) task.Filter { return task.Filter{States: s} }
	common = map[string]task.Filter{
		"all":               {},
		"pending":           only(task.Pending),
		"running":           only(task.Running),
		"succeeded":         only(task.Succeeded),
		"failed":            only(task.Failed),
		"cancelled":         only(task.Cancelled),
		"failed, cancelled": only(task.Failed, task.Cancelled),
		"every state":       only(task.Pending, task.Running, task.Succeeded, task.Failed, task.Cancelled),
		"created after":     {CreatedAfter: middle},
		"created before":    {CreatedBefore: middle},
		"created between":   {CreatedAfter: middle, CreatedBefore: middle.Add(12 * time.Hour)},
		"run after":         {RunAfter: middle},
		"run before":        {RunBefore: middle},
		"run between":       {RunAfter: middle, RunBefore: middle.Add(12 * time.Hour)},
		"run ahead":         {RunAfter: now.AddDate(0, 0, days/2)},
		"finished after":    {FinishedAfter: middle},
		"finished before":   {FinishedBefore: middle},
		"finished between":  {FinishedAfter: middle, FinishedBefore: middle.Add(12 * time.Hour)},
	}
	others = map[string]task.Filter{
		"failed, before":       {States: []task.State{task.Failed}, CreatedBefore: middle},
		"failed, run":          {States: []task.State{task.Failed}, RunBefore: middle},
		"failed, finished":     {States: []task.State{task.Failed}, FinishedBefore: middle},
		"pending, before":      {States: []task.State{task.Pending}, CreatedBefore: middle},
		"common label":         {Labels: map[string]string{"kind": "play"}},
		"rare label":           {Labels: map[string]string{"user": "7919"}},
		"no such label":        {Labels: map[string]string{"user": "nobody"}},
		"common label, failed": {States: []task.State{task.Failed}, Labels: map[string]string{"kind": "play"}},
		"rare label, time":     {Labels: map[string]string{"user": "7919"}, CreatedBefore: middle},
		"common host":          {Host: "plays1.melodia.app"},
		"rare host":            {Host: "rare.melodia.app"},
		"no such host":         {Host: "melodia.app"},
		"common url":           {URLPrefix: "https://plays1.melodia.app/"},
		"rare url":             {URLPrefix: "https://plays1.melodia.app/songs/7919/"},
		"no such url":          {URLPrefix: "https://plays1.melodia.app/none/"},
		"common caller":        {CreatedBy: "plays@melodia.app"},
		"rare caller":          {CreatedBy: "rare"},
		"no such caller":       {CreatedBy: "nobody"},
		"common queue":         {Queue: "mail"},
		"rare queue":           {Queue: "rare"},
		"no such queue":        {Queue: "nobody"},
		"flow key":             {FlowKey: "k3"},
		"no such flow key":     {FlowKey: "nobody"},
		"key of a queue":       {Queue: "mail", FlowKey: "k3"},
		"key of another queue": {Queue: "rare", FlowKey: "k3"},
		"queue, failed":        {States: []task.State{task.Failed}, Queue: "mail"},
		"2 attempts":           {MinAttempts: 2},
		"9 attempts":           {MinAttempts: 9},
		"no such attempts":     {MinAttempts: 10},
		"common reason":        {Reasons: []task.Reason{task.ClientError}},
		"rare reason":          {Reasons: []task.Reason{task.AttemptsExhausted}},
		"no such reason":       {Reasons: []task.Reason{task.Expired}},
		"two reasons":          {Reasons: []task.Reason{task.Expired, task.AttemptsExhausted}},
	}
	return common, others
}

// explainFind returns the plan of a search, carried out, and the pages that it touched.
func explainFind(t *testing.T, pool *pgxpool.Pool, f task.Filter) (plan map[string]any, pages float64) {
	t.Helper()
	tx, err := pool.BeginTx(t.Context(), pgx.TxOptions{BeginQuery: postgres.BeginSearch})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	sql, args := postgres.FindSQL(&f, task.Position{}, 51)
	var explained []struct{ Plan map[string]any }
	err = tx.QueryRow(t.Context(), "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+sql, append([]any{pgx.QueryExecModeCacheDescribe}, args...)...).Scan(&explained)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	plan = explained[0].Plan
	return plan, plan["Shared Hit Blocks"].(float64) + plan["Shared Read Blocks"].(float64)
}

// The first page is found by an index: it touches few pages by a state or a
// time, and by anything else none of the history but what matches. tasks, which
// has no index for that, may be read whole.
func TestFindPlans(t *testing.T) {
	t.Parallel()
	_, pool := newStore(t)
	const days = 6
	fill(t, pool, filling{live: 20_000, ended: 120_000, failed: 33, cancelled: 100, days: days})
	live := query[float64](t, pool, "SELECT relpages FROM pg_class WHERE relname = 'tasks'")
	common, others := searches(query[time.Time](t, pool, "SELECT now()"), days)
	for name, f := range common {
		if plan, pages := explainFind(t, pool, f); pages > 1000 {
			t.Errorf("%s: touches %.0f pages, want at most 1000:\n%s", name, pages, indented(plan))
		}
	}
	for name, f := range others {
		plan, pages := explainFind(t, pool, f)
		if most := 1.5*live + 2000; pages > most {
			t.Errorf("%s: touches %.0f pages, want at most %.0f:\n%s", name, pages, most, indented(plan))
		}
		for _, read := range wholeReads(plan) {
			if strings.HasPrefix(read, "task_history_") {
				t.Errorf("%s: reads %s whole:\n%s", name, read, indented(plan))
			}
		}
	}
}

// wholeReads are the tables that a plan reads from end to end. Those of a few
// pages do not count, where that is the cheapest: at some times of the day the
// first or last partition is one.
func wholeReads(plan map[string]any) (tables []string) {
	const few = 2000 // rows, of 20,000 in a whole day's partition
	removed, _ := plan["Rows Removed by Filter"].(float64)
	if plan["Node Type"] == "Seq Scan" && removed+plan["Actual Rows"].(float64) > few {
		tables = append(tables, plan["Relation Name"].(string))
	}
	below, _ := plan["Plans"].([]any)
	for _, p := range below {
		tables = append(tables, wholeReads(p.(map[string]any))...)
	}
	return tables
}

func indented(plan map[string]any) string {
	b, err := json.MarshalIndent(plan, "", " ")
	if err != nil {
		return err.Error()
	}
	return string(b)
}

package migrations

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

// released are the SHA-256 sums of the migrations that a release contains, by
// file: databases have gone through them, so a change would reach no one. A
// release adds its own. Before 1.0 there are none.
var released = map[string]string{}

// No migration has a number from 7 to 9, and none may get one: goose refuses to
// migrate a database that has 10 and lacks a lower one.
const beforeGap, gap = 6, 3

func TestMigrationsOnlyExpand(t *testing.T) {
	t.Parallel()
	for _, mistake := range review(t, files, released) {
		t.Error(mistake)
	}
}

// review returns what is wrong with migrations: what breaks the version before,
// which is still at work while they run, or keeps it waiting.
func review(t *testing.T, migrations fs.FS, released map[string]string) (mistakes []string) {
	t.Helper()
	names, err := fs.Glob(migrations, "*.sql") // in the order of their versions
	if err != nil || len(names) == 0 {
		t.Fatalf("no migrations: %v", err)
	}
	for i, name := range names {
		want := i + 1
		if want > beforeGap {
			want += gap
		}
		if number, _, _ := strings.Cut(strings.TrimSuffix(name, ".sql"), "_"); strings.TrimLeft(number, "0") != strconv.Itoa(want) {
			mistakes = append(mistakes, fmt.Sprintf("%s: the numbers have a gap or a repeat, this one must be %d", name, want))
		}
		b, err := fs.ReadFile(migrations, name)
		if err != nil {
			t.Fatal(err)
		}
		if sum := fmt.Sprintf("%x", sha256.Sum256(b)); released[name] != "" && released[name] != sum {
			mistakes = append(mistakes, name+": was released and is changed; its sum is now "+sum)
		}
		for _, complaint := range reviewOne(string(b)) {
			mistakes = append(mistakes, name+": "+complaint)
		}
	}
	for name := range released {
		if !slices.Contains(names, name) {
			mistakes = append(mistakes, name+": was released and is gone")
		}
	}
	return mistakes
}

var (
	// A migration that contracts says what needs it no more, since which version.
	contract      = regexp.MustCompile(`(?m)^-- contract: \S.* since v?\d+\.\d+`)
	noTransaction = regexp.MustCompile(`(?m)^-- \+goose NO TRANSACTION`)
	noise         = regexp.MustCompile(`--[^\n]*|(?s:/\*.*?\*/)`)
	literal       = regexp.MustCompile(`'(?:[^']|'')*'`)
	parentheses   = regexp.MustCompile(`\([^()]*\)`)

	createTable = regexp.MustCompile(`^CREATE (?:UNLOGGED )?TABLE (?:IF NOT EXISTS )?(\S+)`)
	alterTable  = regexp.MustCompile(`^ALTER TABLE (?:IF EXISTS )?(?:ONLY )?(\S+) (.*)`)
	createIndex = regexp.MustCompile(`^CREATE (UNIQUE )?INDEX (CONCURRENTLY )?.*?\bON (ONLY )?(\S+)`)
	lockTimeout = regexp.MustCompile(`^SET LOCAL LOCK_TIMEOUT\b`)
	rows        = regexp.MustCompile(`^(?:UPDATE (?:ONLY )?|DELETE FROM (?:ONLY )?|TRUNCATE (?:TABLE )?)(\S+)`)

	column     = regexp.MustCompile(`^ADD (?:COLUMN )?(?:IF NOT EXISTS )?`)
	constraint = regexp.MustCompile(`^ADD (?:CONSTRAINT|CHECK|UNIQUE|PRIMARY KEY|FOREIGN KEY|EXCLUDE)\b`)
	inline     = regexp.MustCompile(`\b(?:CHECK|UNIQUE|PRIMARY KEY|REFERENCES)\b`)
	notNull    = regexp.MustCompile(`\bNOT NULL\b`)
	harmless   = regexp.MustCompile(`^DROP CONSTRAINT\b|\bDROP NOT NULL$`)
)

// reviewOne reviews one migration. A migration may do anything to tables that it creates
// itself. reviewOne reads text, not SQL: it finds mistakes, not what an author hides.
func reviewOne(text string) (complaints []string) {
	if contract.MatchString(text) {
		return nil
	}
	up, _, _ := strings.Cut(text, "-- +goose Down")
	inTransaction := !noTransaction.MatchString(up)
	up = literal.ReplaceAllString(noise.ReplaceAllString(up, " "), "''")
	created := map[string]bool{}
	altered, impatient := false, false
	for statement := range strings.SplitSeq(up, ";") {
		s := strings.ToUpper(strings.Join(strings.Fields(statement), " "))
		for parentheses.MatchString(s) { // what they hold is not of interest, and its commas are in the way
			s = parentheses.ReplaceAllString(s, "")
		}
		complain := func(why string) { complaints = append(complaints, why+": "+s) }
		switch {
		case lockTimeout.MatchString(s):
			impatient = inTransaction
		case createTable.MatchString(s):
			created[createTable.FindStringSubmatch(s)[1]] = true
		case strings.HasPrefix(s, "DROP "):
			complain("the version before may need what is dropped")
		case strings.Contains(s, " RENAME "):
			complain("the version before knows the old name only")
		case alterTable.MatchString(s):
			m := alterTable.FindStringSubmatch(s)
			if created[m[1]] {
				continue
			}
			if altered && inTransaction {
				complain("what is locked by the first ALTER TABLE stays locked meanwhile; give it a migration of its own")
			}
			altered = true
			// VALIDATE alone takes a lock that keeps only other changes of the table waiting.
			if !impatient && !strings.HasPrefix(m[2], "VALIDATE ") {
				complain("all statements on the table queue behind its lock; begin a transaction with SET LOCAL lock_timeout")
			}
			for action := range strings.SplitSeq(m[2], ",") {
				if why := reviewAction(strings.TrimSpace(action)); why != "" {
					complain(why)
				}
			}
		case createIndex.MatchString(s):
			m := createIndex.FindStringSubmatch(s)
			unique, concurrently, only := m[1] != "", m[2] != "", m[3] != ""
			switch {
			case created[m[4]]:
			case unique:
				complain("the version before does not know that these must be unique")
			case !concurrently && !only: // an index of the partitioned table alone is made at once
				complain("writes wait for an index that is not made CONCURRENTLY")
			case concurrently && inTransaction:
				complain("CONCURRENTLY needs -- +goose NO TRANSACTION")
			}
		case rows.MatchString(s):
			if !created[rows.FindStringSubmatch(s)[1]] && !strings.Contains(s, " WHERE ") {
				complain("writes wait while a whole table is changed")
			}
		}
	}
	return complaints
}

// reviewAction says what is wrong with one action of an ALTER TABLE.
func reviewAction(action string) string {
	words := strings.Fields(action)
	switch {
	case constraint.MatchString(action):
		if !strings.HasSuffix(action, " NOT VALID") {
			return "writes wait while a new constraint is checked; add it NOT VALID and VALIDATE it"
		}
	case column.MatchString(action):
		switch {
		case notNull.MatchString(action) && !strings.Contains(action, " DEFAULT "):
			return "the version before inserts without this column; give it a DEFAULT"
		case inline.MatchString(action):
			return "writes wait while a new constraint is checked; add it NOT VALID and VALIDATE it"
		case strings.Contains(action, " GENERATED "):
			return "the whole table is written anew, and the partitions that the version before makes do not fit"
		}
	case slices.Contains(words, "DROP") && !harmless.MatchString(action):
		return "the version before may need what is dropped"
	case slices.Contains(words, "TYPE"):
		return "the version before expects the old type, and the whole table may be written anew"
	case strings.HasSuffix(action, " SET NOT NULL"):
		return "the version before may write NULL"
	}
	return ""
}

func TestReview(t *testing.T) {
	t.Parallel()
	const (
		dropped    = "the version before may need what is dropped"
		renamed    = "the version before knows the old name only"
		checked    = "writes wait while a new constraint is checked; add it NOT VALID and VALIDATE it"
		indexed    = "writes wait for an index that is not made CONCURRENTLY"
		whole      = "writes wait while a whole table is changed"
		noDefault  = "the version before inserts without this column; give it a DEFAULT"
		otherType  = "the version before expects the old type, and the whole table may be written anew"
		queued     = "all statements on the table queue behind its lock; begin a transaction with SET LOCAL lock_timeout"
		transacted = "CONCURRENTLY needs -- +goose NO TRANSACTION"
	)
	for name, tt := range map[string]struct {
		sql  string
		want []string
	}{
		"a new table with all that belongs to it": {sql: `CREATE TABLE notes (id uuid PRIMARY KEY, body text NOT NULL);
			CREATE UNIQUE INDEX notes_body ON notes (body); ALTER TABLE notes ADD CHECK (body <> ''); UPDATE notes SET body = ''`},
		"a nullable column":                 {sql: "ALTER TABLE tasks ADD COLUMN note text"},
		"a column with a default":           {sql: "ALTER TABLE tasks ADD note text NOT NULL DEFAULT ''"},
		"a wider check":                     {sql: "ALTER TABLE tasks DROP CONSTRAINT c, ADD CONSTRAINT c CHECK (state IN ('a', 'b')) NOT VALID"},
		"one statement after the other":     {sql: "-- +goose NO TRANSACTION\nALTER TABLE tasks VALIDATE CONSTRAINT c; ALTER TABLE workers VALIDATE CONSTRAINT d"},
		"NULL where there was none":         {sql: "ALTER TABLE tasks ALTER COLUMN url DROP NOT NULL"},
		"a default":                         {sql: "ALTER TABLE tasks ALTER url SET DEFAULT ''"},
		"an index that keeps nobody":        {sql: "-- +goose NO TRANSACTION\nCREATE INDEX CONCURRENTLY i ON tasks (url)"},
		"an index of new partitions":        {sql: "CREATE INDEX i ON ONLY task_history (url)"},
		"some rows":                         {sql: "UPDATE tasks SET url = '' WHERE id = '1'; DELETE FROM tasks WHERE id = '1'"},
		"words in a comment and a text":     {sql: "-- DROP TABLE tasks;\nINSERT INTO notes VALUES ('; DROP TABLE tasks') /* ; DROP TABLE tasks */"},
		"the way back":                      {sql: "SELECT 1;\n-- +goose Down\nDROP TABLE tasks"},
		"a contraction that gives a reason": {sql: "-- contract: nothing reads tasks.note since v1.4\nALTER TABLE tasks DROP COLUMN note"},

		"a contraction that gives none":   {"-- contract: \nDROP TABLE tasks", []string{dropped}},
		"a contraction without a version": {"-- contract: nobody reads it\nDROP TABLE tasks", []string{dropped}},
		"a dropped table":                 {"drop table\n tasks", []string{dropped}},
		"a dropped index":                 {"DROP INDEX tasks_due", []string{dropped}},
		"a dropped column":                {"ALTER TABLE ONLY tasks DROP COLUMN url", []string{dropped}},
		"a dropped column, briefly":       {"ALTER TABLE IF EXISTS tasks ADD note text, DROP url", []string{dropped}},
		"a dropped default":               {"ALTER TABLE tasks ALTER claim DROP DEFAULT", []string{dropped}},
		"a renamed table":                 {"ALTER TABLE tasks RENAME TO jobs", []string{renamed}},
		"a renamed column":                {"ALTER TABLE tasks RENAME COLUMN url TO target", []string{renamed}},
		"another type":                    {"ALTER TABLE tasks ALTER COLUMN claim TYPE numeric (10, 2)", []string{otherType}},
		"another type, at length":         {"ALTER TABLE tasks ALTER claim SET DATA TYPE numeric", []string{otherType}},
		"NULL is allowed no more":         {"ALTER TABLE tasks ALTER body SET NOT NULL", []string{"the version before may write NULL"}},
		"a column that must be named":     {"ALTER TABLE tasks ADD COLUMN IF NOT EXISTS note text NOT NULL", []string{noDefault}},
		"a generated column":              {"ALTER TABLE tasks ADD n int GENERATED ALWAYS AS (claim + 1) STORED", []string{"the whole table is written anew, and the partitions that the version before makes do not fit"}},
		"a column with a constraint":      {"ALTER TABLE tasks ADD note text CHECK (note <> '')", []string{checked}},
		"a constraint":                    {"ALTER TABLE tasks ADD CONSTRAINT c CHECK (a > 0)", []string{checked}},
		"a constraint without a name":     {"ALTER TABLE tasks ADD FOREIGN KEY (worker_id) REFERENCES workers", []string{checked}},
		"a unique index":                  {"-- +goose NO TRANSACTION\nCREATE UNIQUE INDEX CONCURRENTLY i ON tasks (url)", []string{"the version before does not know that these must be unique"}},
		"an index":                        {"CREATE INDEX ON tasks (url)", []string{indexed}},
		"an index in a transaction":       {"CREATE INDEX CONCURRENTLY i ON tasks (url)", []string{transacted}},
		"two tables in a transaction": {"ALTER TABLE tasks ADD note text; ALTER TABLE workers ADD note text",
			[]string{"what is locked by the first ALTER TABLE stays locked meanwhile; give it a migration of its own"}},
		"a lock outside a transaction":      {"-- +goose NO TRANSACTION\nALTER TABLE tasks ADD note text", []string{queued}},
		"all rows":                          {"UPDATE tasks SET url = ''; DELETE FROM tasks; TRUNCATE workers", []string{whole, whole, whole}},
		"all rows of a table made long ago": {"CREATE TABLE notes (id int); UPDATE tasks SET url = ''", []string{whole}},
	} {
		var got []string
		for _, complaint := range reviewOne("-- +goose Up\nSET LOCAL lock_timeout = '1s';\n" + tt.sql) {
			why, _, _ := strings.Cut(complaint, ": ")
			got = append(got, why)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestReviewOfLocks(t *testing.T) {
	t.Parallel()
	const alter = "-- +goose Up\nALTER TABLE tasks ADD note text"
	if got := reviewOne(alter); len(got) != 1 || !strings.Contains(got[0], "lock_timeout") {
		t.Errorf("without a lock_timeout: %q, want a complaint about it", got)
	}
}

func TestReleasedMigrationsStayAsTheyAre(t *testing.T) {
	t.Parallel()
	const sumOfNothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	released := map[string]string{"1.sql": sumOfNothing, "2.sql": sumOfNothing}
	for name, tt := range map[string]struct {
		files fstest.MapFS
		want  int
	}{
		"untouched, with one that is new": {fstest.MapFS{"1.sql": {}, "2.sql": {}, "3.sql": {Data: []byte("SELECT 3")}}, 0},
		"changed":                         {fstest.MapFS{"1.sql": {}, "2.sql": {Data: []byte("SELECT 2")}}, 1},
		"gone":                            {fstest.MapFS{"1.sql": {}}, 1},
		"a gap":                           {fstest.MapFS{"1.sql": {}, "2.sql": {}, "4_later.sql": {}}, 1},
		"a number that is taken":          {fstest.MapFS{"1.sql": {}, "2.sql": {}, "2_again.sql": {}}, 1},
	} {
		if got := review(t, tt.files, released); len(got) != tt.want {
			t.Errorf("%s: %q, want %d mistakes", name, got, tt.want)
		}
	}
}

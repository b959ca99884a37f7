package config

import (
	"os"
	"reflect"
	"slices"
	"strings"
)

// Misspelt returns the names in an environment (entries of NAME=value) that are no
// setting but nearly one that is not set, with the setting that may be meant. It
// looks at names alone.
func Misspelt(environ []string) map[string]string {
	set := map[string]bool{}
	for _, entry := range environ {
		name, _, _ := strings.Cut(entry, "=")
		set[name] = true
	}
	found := map[string]string{}
	for name := range set {
		if slices.Contains(othersNames, name) || slices.Contains(names(), name) {
			continue
		}
		for _, setting := range names() {
			if !set[setting] && isNear(name, setting) {
				found[name] = setting
				break
			}
		}
	}
	return found
}

// othersNames are common in environments and nearly a setting of ours.
var othersNames = []string{"API_KEY", "DATABASE_URI"}

// names returns those of all settings.
func names() []string {
	var all []string
	for field := range reflect.TypeFor[Config]().Fields() {
		all = append(all, field.Tag.Get("envconfig"))
	}
	return all
}

// minNear is how long a name must be to be near another: short ones all are.
const minNear = 6

// isNear reports whether a name may be a slip for a setting: another case, the same
// words in another order, or one or (from 10 letters on) two edits.
func isNear(name, setting string) bool {
	name = strings.ToUpper(name)
	if name == setting {
		return true
	}
	if len(setting) < minNear || len(name) < minNear {
		return false
	}
	words := func(s string) []string { return slices.Sorted(slices.Values(strings.Split(s, "_"))) }
	if slices.Equal(words(name), words(setting)) {
		return true
	}
	most := 1
	if len(setting) >= 10 {
		most = 2
	}
	return edits(name, setting, most) <= most
}

// edits is the optimal string alignment distance of a and b: how many letters must be
// inserted, deleted, replaced or swapped with their neighbour. More than most is not
// counted exactly.
func edits(a, b string, most int) int {
	if len(a)-len(b) > most || len(b)-len(a) > most {
		return most + 1
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

// MisspeltHere is [Misspelt] of this process's environment.
func MisspeltHere() map[string]string { return Misspelt(os.Environ()) }

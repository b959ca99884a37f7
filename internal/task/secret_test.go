package task_test

import (
	"strings"
	"testing"

	"github.com/melodia/orchestrator/internal/task"
)

func TestCutSecret(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		value, before, name, after string
		found                      bool
	}{
		{"", "", "", "", false},
		{"Bearer x", "Bearer x", "", "", false},
		{"${secret}", "${secret}", "", "", false},
		{"${secret:a}", "", "a", "", true},
		{"Bearer ${secret:a-B_9}, b", "Bearer ", "a-B_9", ", b", true},
		{"$${secret:a}", "$", "a", "", true},
		{"${secret:a}${secret:b}", "", "a", "${secret:b}", true},
		{"x ${secret:a/b} y", "x ", "", "a/b} y", true},
		{"x ${secret:", "x ", "", "", true},
	} {
		before, name, after, found := task.CutSecret(tt.value)
		if before != tt.before || name != tt.name || after != tt.after || found != tt.found {
			t.Errorf("CutSecret(%q) = %q, %q, %q, %t; want %q, %q, %q, %t", tt.value, before, name, after, found, tt.before, tt.name, tt.after, tt.found)
		}
	}
}

// Whatever the value, cutting ends, and no name is anything but a name.
func FuzzCutSecret(f *testing.F) {
	f.Add("Basic ${secret:a}:${secret:b} ${secret:../c}")
	f.Fuzz(func(t *testing.T, value string) {
		for _, name, rest, found := task.CutSecret(value); found; _, name, rest, found = task.CutSecret(rest) {
			if strings.ContainsAny(name, "./\\\x00") || len(name) > task.MaxSecretName {
				t.Fatalf("CutSecret found the name %q in %q", name, value)
			}
		}
	})
}

func TestDefaultAudience(t *testing.T) {
	t.Parallel()
	for rawURL, want := range map[string]string{
		"https://plays.melodia.app/v1/plays?a=b": "https://plays.melodia.app",
		"HTTPS://Plays.Melodia.APP":              "https://plays.melodia.app",
		"https://plays.melodia.app:8443/":        "https://plays.melodia.app:8443",
		"http://[::1]:80/":                       "http://[::1]",
		"https://[::1]:80/":                      "https://[::1]:80",
		"https://plays.melodia.app:443/a":        "https://plays.melodia.app",
		"https://plays.melodia.app/a%zz|?%":      "https://plays.melodia.app",
		"":                                       "",
		"plays":                                  "",
		"http://[":                               "",
	} {
		if got := task.DefaultAudience(rawURL); got != want {
			t.Errorf("DefaultAudience(%q) = %q, want %q", rawURL, got, want)
		}
	}
}

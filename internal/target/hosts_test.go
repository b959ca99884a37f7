package target

import (
	"net/url"
	"strings"
	"testing"
)

func hosts(t testing.TB, entries ...string) *Hosts {
	t.Helper()
	l := new(Hosts)
	for _, entry := range entries {
		if err := l.Add(entry); err != nil {
			t.Fatalf("Add(%q): %v", entry, err)
		}
	}
	return l
}

// Each way to write a URL whose host is not what it seems.
func TestHostList(t *testing.T) {
	t.Parallel()
	l := hosts(t, "plays.melodia.app", "Billing.Melodia.APP.", ".run.app", "8.8.8.8", "2001:4860:4860::8888")
	for rawURL, want := range map[string]bool{
		"https://plays.melodia.app":                        true,
		"https://plays.melodia.app:8443/":                  true,
		"https://PLAYS.melodia.App./":                      true,
		"https://billing.melodia.app/":                     true,
		"https://a.run.app/":                               true,
		"https://a.b.run.app./":                            true,
		"https://8.8.8.8/":                                 true,
		"https://[::ffff:8.8.8.8]/":                        true,
		"https://[2001:4860:4860:0::8888]/":                true,
		"https://evil.example@plays.melodia.app/":          true, // that is the host; task.New refuses user info
		"https://melodia.app/":                             false,
		"https://x.plays.melodia.app/":                     false,
		"https://run.app/":                                 false,
		"https://evilrun.app/":                             false,
		"https://.run.app/":                                false,
		"https://..run.app/":                               false,
		"https://plays.melodia.app../":                     false,
		"https://plays.melodia.app.evil.example/":          false,
		"https://plays.melodia.app@evil.example/":          false,
		"https://plays.melodia.app:443@evil.example/":      false,
		"https://plays.melodia.app%40evil.example/":        false,
		"https://evil.example/.run.app":                    false,
		"https://evil.example?.run.app":                    false,
		"https://evil.example#.run.app":                    false,
		`https://evil.example\.run.app/`:                   false,
		"https://evil.example%2f.run.app/":                 false,
		"https://evil.example%00.run.app/":                 false,
		"https://evil.example:80.run.app/":                 false,
		"https://evil.example,a.run.app/":                  false,
		"https://evil.example .run.app/":                   false,
		"https://plays。melodia.app/":                       false, // an ideographic full stop
		"https://plays.melodia.app\u200b/":                 false,
		"https://plаys.melodia.app/":                       false, // a Cyrillic а
		"https://134744072/":                               false, // 8.8.8.8 to some resolvers
		"https://0x8.8.8.8/":                               false,
		"https://8.8.8.8./":                                false,
		"https://8.8.8.8.run.app.8/":                       false,
		"https://8.8.4.4/":                                 false,
		"https://[64:ff9b::8.8.8.8]/":                      false,
		"https://" + strings.Repeat("a.", 130) + "run.app": false,
		"https:///plays.melodia.app":                       false,
		"https:plays.melodia.app":                          false,
		"//plays.melodia.app":                              true, // no scheme: Confidential refuses it
	} {
		u, err := url.Parse(rawURL)
		if got := err == nil && l.Contains(u); got != want {
			t.Errorf("Contains(%q) = %t, want %t", rawURL, got, want)
		}
	}
	if u, _ := url.Parse("https://plays.melodia.app"); new(Hosts).Contains(u) {
		t.Error("the empty list has a host")
	}
}

func TestConfidential(t *testing.T) {
	t.Parallel()
	for rawURL, want := range map[string]bool{
		"https://plays.melodia.app": true,
		"HTTPS://plays.melodia.app": true,
		"http://127.0.0.1:8081/":    true,
		"http://[::1]/":             true,
		"http://plays.melodia.app":  false,
		"http://localhost/":         false,
		"http://10.0.0.1/":          false,
		"http://127.0.0.1.:80/":     false,
		"http://0.0.0.0/":           false,
		"ftp://127.0.0.1/":          false,
		"//127.0.0.1/":              false,
	} {
		u, err := url.Parse(rawURL)
		if err != nil {
			t.Fatal(err)
		}
		if got := Confidential(u); got != want {
			t.Errorf("Confidential(%q) = %t, want %t", rawURL, got, want)
		}
	}
}

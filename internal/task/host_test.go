package task

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestHostOf(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]string{
		"https://plays.melodia.app/plays?a=b":     "https://plays.melodia.app",
		"https://plays.melodia.app":               "https://plays.melodia.app",
		"https://plays.melodia.app?x=http://y/":   "https://plays.melodia.app",
		"https://plays.melodia.app:8443/plays":    "https://plays.melodia.app:8443",
		"https://plays.melodia.app:443/plays":     "https://plays.melodia.app",
		"https://plays.melodia.app:80/plays":      "https://plays.melodia.app:80",
		"http://plays.melodia.app:80/a:b":         "http://plays.melodia.app",
		"http://plays.melodia.app:0080/":          "http://plays.melodia.app",
		"http://plays.melodia.app:08080/":         "http://plays.melodia.app:8080",
		"HTTP://Plays.Melodia.App:80/Plays":       "http://plays.melodia.app",
		"http://127.0.0.1:9000/":                  "http://127.0.0.1:9000",
		"http://[::1]/x":                          "http://[::1]",
		"http://[::1]:80/x":                       "http://[::1]",
		"http://[FD00::1]:9000/x":                 "http://[fd00::1]:9000",
		"https://plays.melodia.app/x?u=https://z": "https://plays.melodia.app",
	} {
		if got := HostOf(url); got != want {
			t.Errorf("HostOf(%q) = %q, want %q", url, got, want)
		}
	}
}

// Two readers of a URL must not see two hosts: HostOf reads what ParseURL reads.
func TestHostOfReadsLikeParseURL(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		url := rapid.StringMatching(`(?i:https?)://([A-Za-z0-9._-]{1,12}|\[[0-9A-Fa-f:]{2,8}\])(:0{0,2}(80|443|8080|[1-9][0-9]{0,3}))?([/?][a-z:/?@\[\]]{0,12})?`).Filter(func(url string) bool { return checkURL(url) == "" }).Draw(t, "url")
		u, err := ParseURL(url)
		if err != nil {
			t.Fatal(err)
		}
		want := u.Scheme + "://" + strings.ToLower(u.Host)
		if port := u.Port(); strings.HasPrefix(port, "0") {
			want = strings.TrimSuffix(want, port) + strings.TrimLeft(port, "0")
		}
		if got := HostOf(url); got != want {
			t.Fatalf("HostOf(%q) = %q, want %q", url, got, want)
		}
	})
}

func TestHostOfDoesNotAllocate(t *testing.T) {
	for _, url := range []string{"https://plays.melodia.app/plays?a=b", "http://127.0.0.1:9000/x", "http://plays.melodia.app:80/"} {
		if n := testing.AllocsPerRun(100, func() { HostOf(url) }); n != 0 {
			t.Errorf("HostOf(%q) allocates %v times, want 0", url, n)
		}
	}
}

func TestHostStatus(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		host Host
		want HostStatus
		wait time.Duration
	}{
		"healthy":                 {Host{}, HostHealthy, 0},
		"congested":               {Host{CongestedFor: time.Second}, HostCongested, 0},
		"recovering":              {Host{CongestedFor: time.Second, Opened: 1, Allowed: 2}, HostRecovering, 0},
		"open":                    {Host{OpenFor: time.Minute, Opened: 1, Allowed: 1}, HostBroken, time.Minute},
		"held":                    {Host{HeldFor: time.Minute, Allowed: 1}, HostHeld, time.Minute},
		"open for longer":         {Host{HeldFor: time.Second, OpenFor: time.Minute, Opened: 1, Allowed: 1}, HostBroken, time.Minute},
		"held for longer":         {Host{HeldFor: time.Hour, OpenFor: time.Minute, Opened: 1, Allowed: 1}, HostHeld, time.Hour},
		"held, and congested too": {Host{HeldFor: time.Hour, CongestedFor: time.Second}, HostHeld, time.Hour},
	} {
		if got, wait := test.host.Status(); got != test.want || wait != test.wait {
			t.Errorf("%s: status %s for %v, want %s for %v", name, got, wait, test.want, test.wait)
		}
	}
}

package deliver

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/credentials"
	"github.com/melodia/orchestrator/internal/task"
)

// sentAs is the request target for a path and query, by the grammar of RFC 3986
// (§2.1, §2.2, §2.3, §3.3, §3.4): what it does not allow there is encoded, and
// everything else goes out as it is.
func sentAs(given string) string {
	const pcharAndMore = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~" + "!$&'()*+,;=" + ":@" + "/?"
	const digits = "0123456789abcdefABCDEF"
	var sent strings.Builder
	for i, c := range []byte(given) {
		escape := c == '%' && len(given) > i+2 && strings.Contains(digits, given[i+1:i+2]) && strings.Contains(digits, given[i+2:i+3])
		if escape || strings.Contains(pcharAndMore, string(rune(c))) && c < 0x80 {
			sent.WriteByte(c)
		} else {
			fmt.Fprintf(&sent, "%%%02X", c)
		}
	}
	return sent.String()
}

// places are paths and queries with § where a character is put.
var places = []string{
	"/§", "/§a", "/a§", "/a§b", "/a/§/b", "/§/", "//§", "/a/../§", "/%2F§", "/§%2f", "/%§", "/%4§", "/%§1", "/%e§%E", "/é§%2F", "/|§%7C",
	"/?§", "?§", "/a?§", "/a?§=1", "/a?b=§", "/a?b=§&c=%2F", "/a?b=%§", "/a?b=1?§", "/a%2F?b=é§", "/§?§", "/§§?§§", "/a/./§//?§&&=",
}

// A URL goes out byte by byte as it was given, but for what may not stand there.
func TestRequestTarget(t *testing.T) {
	t.Parallel()
	lines := make(chan string, 1)
	address := newRawServer(t, func(conn net.Conn, _ int) {
		for r := bufio.NewReader(conn); ; {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			for rest := line; rest != "\r\n" && err == nil; {
				rest, err = r.ReadString('\n')
			}
			lines <- line
			io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	})
	d := newDeliverer(t)
	characters := []string{"", "é", "ß", "世", "🎵", "\u00a0", "\u2028", "\ufeff", "\u202e", "%%", "%25", "%2", "%zz", "%C3%A9", "%00", "../", "[redacted]"}
	for c := '!'; c <= '~'; c++ {
		if c != '#' { // it begins a fragment, which no URL of a task has
			characters = append(characters, string(c))
		}
	}
	for _, place := range places {
		for _, c := range characters {
			given := strings.ReplaceAll(place, "§", c)
			raw := "http://" + address + given
			spec := task.Spec{URL: raw, Method: "GET", Timeout: patience, Retry: task.RetryPolicy{MaxAttempts: 1, MinBackoff: time.Second, MaxBackoff: time.Second}}
			if _, err := task.New(task.ID{}, spec, task.When{}, time.Now()); err != nil {
				t.Fatalf("%q is refused: %v", raw, err)
			}
			if o := d.Deliver(t.Context(), newCall("GET", raw, nil)); o.Kind != task.OutcomeSucceeded {
				t.Fatalf("%q: outcome = %+v, want success", raw, o)
			}
			want := sentAs(given)
			if !strings.HasPrefix(want, "/") {
				want = "/" + want // RFC 9112 §3.2.1
			}
			if got, want := <-lines, "GET "+want+" HTTP/1.1\r\n"; got != want {
				t.Errorf("%q was sent as %q, want %q", given, got, want)
			}
		}
	}
}

// The same for whatever text, by the head alone; text that no request should
// hold does not get out of the request line either.
func TestRequestTargetOfAnyText(t *testing.T) {
	t.Parallel()
	d := newDeliverer(t)
	alphabet := rapid.OneOf(
		rapid.RuneFrom([]rune("%%%%0aF/?&=.;:@[]|\\^`{}<>\"'+*~é世🎵\u0085\u2028 \t\r\n\x00\x7f")),
		rapid.Rune(),
	).Filter(func(r rune) bool { return r != '#' })
	rapid.Check(t, func(t *rapid.T) {
		given := rapid.SampledFrom([]string{"/", "?"}).Draw(t, "first") + rapid.StringOf(alphabet).Draw(t, "rest") +
			rapid.SampledFrom([]string{"", "\xff", "\xed\xa0\x80"}).Draw(t, "last")
		c := newCall("POST", "http://127.0.0.1:8081"+given, nil)
		u, err := d.policy.Parse(c.Task.URL)
		if err != nil {
			t.Fatalf("%q is refused: %v", c.Task.URL, err)
		}
		want := sentAs(given)
		if given[0] == '?' {
			want = "/" + want
		}
		line, _, _ := strings.Cut(string(d.appendHead(nil, u, c, credentials.Added{})), "\r\n")
		if line != "POST "+want+" HTTP/1.1" {
			t.Errorf("%q is sent as %q, want %q", given, line, want)
		}
	})
}

func TestHostField(t *testing.T) {
	t.Parallel()
	d := newDeliverer(t)
	d.policy = policy(t, nil, "0.0.0.0/0", "::/0")
	for raw, want := range map[string]string{
		"http://plays.melodia.app":           "plays.melodia.app",
		"http://plays.melodia.app:80/x":      "plays.melodia.app",
		"http://plays.melodia.app:0080":      "plays.melodia.app",
		"HTTP://Plays.Melodia.App:80?x":      "Plays.Melodia.App",
		"http://plays.melodia.app:443/":      "plays.melodia.app:443",
		"http://plays.melodia.app:8080/:80":  "plays.melodia.app:8080",
		"https://plays.melodia.app/":         "plays.melodia.app",
		"https://plays.melodia.app:443/":     "plays.melodia.app",
		"https://plays.melodia.app:80/":      "plays.melodia.app:80",
		"https://plays.melodia.app.:443/":    "plays.melodia.app.",
		"http://[2001:db8::80]:80/":          "[2001:db8::80]",
		"http://[2001:db8::80]/":             "[2001:db8::80]",
		"https://[2001:db8::1]:8443/":        "[2001:db8::1]:8443",
		"https://192.0.2.1:443/computers?:8": "192.0.2.1",
	} {
		c := newCall("GET", raw, nil)
		u, err := d.policy.Parse(raw)
		if err != nil {
			t.Fatalf("%q is refused: %v", raw, err)
		}
		head := strings.Split(string(d.appendHead(nil, u, c, credentials.Added{})), "\r\n")
		if head[1] != "Host: "+want {
			t.Errorf("%q: sent %q, want Host: %s", raw, head[1], want)
		}
	}
}

// Names go out in the case that the caller gave them; what the service adds where
// they are missing is not added beside them.
func TestHeaderNamesKeepTheirCase(t *testing.T) {
	t.Parallel()
	d := newDeliverer(t)
	c := newCall("POST", "http://127.0.0.1/", []byte("<x/>"))
	c.Task.ContentType = "application/json"
	given := map[string]string{"x-trace": "a", "X-API-KEY": "b", "SOAPAction": "c", "content-TYPE": "text/xml", "uSER-aGENT": "caller", "x_under-Score": "d"}
	u, err := d.policy.Parse(c.Task.URL)
	if err != nil {
		t.Fatal(err)
	}
	head := strings.Split(string(d.appendHead(nil, u, c, credentials.Added{Headers: given})), "\r\n")
	for name, value := range given {
		if !slices.Contains(head, name+": "+value) {
			t.Errorf("no line %s: %s in %q", name, value, head)
		}
	}
	for _, line := range head[1:] {
		name, _, _ := strings.Cut(line, ":")
		if _, asGiven := given[name]; !asGiven && slices.Contains([]string{"content-type", "user-agent"}, strings.ToLower(name)) {
			t.Errorf("%q was added", line)
		}
	}
}

// Where a redirect points to is told as it came.
func TestLocationReadsBackAsItCame(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{
		"/a%2Fb|c?x=1":                       "https://plays.melodia.app/a%2Fb%7Cc",
		"https://other.example/%2f/é%zz#x":   "https://other.example/%2f/%C3%A9%25zz",
		"https://other.example:443/a;b,c":    "https://other.example:443/a;b,c",
		"c%2Fd^":                             "https://plays.melodia.app/a/c%2Fd%5E",
		"/token/[redacted]/%2F|":             "https://plays.melodia.app/token/[redacted]/%2F%7C",
		"https://u:[redacted]@h.example/a b": "",
	} {
		text := "the target answered 302 Found"
		if want != "" {
			text += " and points to " + want + "; redirects are not followed"
		}
		if got := statusError(response(http.StatusFound, given)); got != text {
			t.Errorf("statusError with location %q = %q, want %q", given, got, text)
		}
	}
}

package credentials

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must come; no test depends on its size.
const patience = time.Minute

// began is when the tests' first call is made, by the database's clock.
var began = time.Date(2026, 12, 24, 21, 0, 0, 0, time.UTC)

// jwt is a token that ends at expires; its signature is n.
func jwt(expires time.Time, n int) string {
	part := base64.RawURLEncoding.EncodeToString
	return part([]byte(`{"alg":"RS256"}`)) + "." + part(fmt.Appendf(nil, `{"exp":%d}`, expires.Unix())) + ".s1gn4tur3-" + strconv.Itoa(n)
}

// newMetadata is a metadata server that hands out a new token, good for an hour
// from began, whenever it is asked. It is where the environment says.
func newMetadata(t *testing.T) (questions *atomic.Int64) {
	questions = new(atomic.Int64)
	serveMetadata(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/computeMetadata/v1/instance/service-accounts/default/identity" || r.Header.Get("Metadata-Flavor") != "Google" || r.URL.Query().Get("format") != "full" {
			t.Errorf("question %s %v", r.URL, r.Header)
		}
		n := int(questions.Add(1))
		io.WriteString(w, jwt(began.Add(time.Hour), n)+"\n")
	})
	return questions
}

func serveMetadata(t *testing.T, handler http.HandlerFunc) {
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	t.Setenv("GCE_METADATA_HOST", s.Listener.Addr().String())
}

// newIdentified makes a set that may add tokens to calls to loopback.
func newIdentified(t testing.TB) *Set {
	t.Helper()
	identity, err := NewIdentity([]string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	return &Set{Identity: identity}
}

// identified asks for the ID token of attempt n, some time after began.
func identified(audience string, n int, after time.Duration) Wanted {
	return Wanted{Audience: audience, Retry: n > 1, At: began.Add(after), Deadline: time.Now().Add(patience)}
}

// wantToken fails unless a call gets a token, which it returns.
func wantToken(t *testing.T, s *Set, w Wanted) string {
	t.Helper()
	added, err := s.For(t.Context(), parse(t, "http://127.0.0.1/"), w)
	if err != nil || added.Token() == "" {
		t.Errorf("For = token %q, %v, want a token", added.Token(), err)
	}
	return added.Token()
}

func TestIDToken(t *testing.T) {
	questions := newMetadata(t)
	d := newIdentified(t)
	for i, step := range []struct {
		audience string
		attempt  int
		after    time.Duration
		want     int // the number of the token
		why      string
	}{
		{"a", 1, 0, 1, "the first is fetched"},
		{"a", 1, 30 * time.Minute, 1, "it is kept"},
		{"b", 1, 30 * time.Minute, 2, "another audience has another"},
		{"a", 1, 56*time.Minute - 1, 1, "it is kept until a little before its end"},
		{"a", 2, 55 * time.Minute, 3, "a retry has one that was just fetched"},
		{"a", 2, 55*time.Minute + freshFor, 3, "which it may share"},
		{"a", 2, 55*time.Minute + freshFor + 1, 4, "for a short time"},
		{"a", 1, 56*time.Minute - 1, 4, "a first attempt takes what is there"},
		{"a", 1, 56 * time.Minute, 5, "it is renewed before its end"},
		{"a b&c=d/ü", 1, 0, 6, "an audience may be anything"},
	} {
		got := wantToken(t, d, identified(step.audience, step.attempt, step.after))
		if want := jwt(began.Add(time.Hour), step.want); got != want {
			t.Errorf("step %d, %s: token %q, want %q", i, step.why, got, want)
		}
	}
	if n := questions.Load(); n != 6 {
		t.Errorf("%d questions to the metadata server, want 6", n)
	}
}

func TestAudienceIsAskedAsItIs(t *testing.T) {
	var asked atomic.Value
	serveMetadata(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.URL.Query()["audience"])
		io.WriteString(w, jwt(began.Add(time.Hour), 1))
	})
	d := newIdentified(t)
	for _, audience := range []string{"https://plays.melodia.app", "a&audience=b", "a#b", "a%26b", "a+b", "ü"} {
		wantToken(t, d, identified(audience, 1, 0))
		if diff := cmp.Diff([]string{audience}, asked.Load()); diff != "" {
			t.Errorf("audience (-want +got):\n%s", diff)
		}
	}
}

func TestMetadataServerThatFails(t *testing.T) {
	const none = "no ID token could be had: "
	saying := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "http://s3cret.example/")
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		want    string
	}{
		{"no account", saying(404, "s3cret"), none + "the metadata server answered 404: the service has no account there"},
		{"bad audience", saying(400, "s3cret"), none + "the metadata server answered 400"},
		{"forbidden", saying(403, "s3cret"), none + "the metadata server answered 403"},
		{"redirect", saying(302, ""), none + "the metadata server answered 302"},
		{"a page", saying(200, "<html>s3cret</html>"), none + "what the metadata server answered is none"},
		{"nothing", saying(200, ""), none + "what the metadata server answered is none"},
		{"no claims", saying(200, "a.s3cret.c"), none + "what the metadata server answered is none"},
		{"no expiry", saying(200, "a."+base64.RawURLEncoding.EncodeToString([]byte(`{"aud":"s3cret"}`))+".c"), none + "what the metadata server answered is none"},
		{"two lines", saying(200, jwt(began.Add(time.Hour), 1)+"\r\nX: s3cret"), none + "what the metadata server answered is none"},
		{"two words", saying(200, jwt(began.Add(time.Hour), 1)+" s3cret"), none + "what the metadata server answered is none"},
		{"too much", saying(200, jwt(began.Add(time.Hour), 1)+strings.Repeat("x", maxTokenBytes)), none + "what the metadata server answered is none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			serveMetadata(t, tt.handler)
			added, err := newIdentified(t).For(t.Context(), parse(t, "http://127.0.0.1/"), identified("a", 1, 0))
			if e, ok := errors.AsType[*Error](err); !ok || e.Error() != tt.want || e.Refused() || added.Token() != "" {
				t.Errorf("For = token %q, %#v, want %q, not refused", added.Token(), err, tt.want)
			}
		})
	}
	t.Run("when a token is to be renewed", func(t *testing.T) {
		var down atomic.Bool
		serveMetadata(t, func(w http.ResponseWriter, r *http.Request) {
			if down.Load() {
				w.WriteHeader(403)
				return
			}
			io.WriteString(w, jwt(began.Add(time.Hour), 1))
		})
		d := newIdentified(t)
		for _, step := range []struct {
			after time.Duration
			want  bool
		}{{0, true}, {time.Hour - 1, true}, {time.Hour, false}} {
			if _, err := d.For(t.Context(), parse(t, "http://127.0.0.1/"), identified("a", 1, step.after)); (err == nil) != step.want {
				t.Errorf("after %v: For = %v, want a token: %t", step.after, err, step.want)
			}
			down.Store(true)
		}
	})
}

// Many calls for one audience ask once; others do not wait for them.
func TestOneQuestionAtATime(t *testing.T) {
	release := make(chan struct{})
	var questions atomic.Int64
	serveMetadata(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("audience") == "slow" {
			questions.Add(1)
			<-release
		}
		io.WriteString(w, jwt(began.Add(time.Hour), 1))
	})
	d := newIdentified(t)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { wantToken(t, d, identified("slow", 1, 0)) })
	}
	wantToken(t, d, identified("quick", 1, 0))
	close(release)
	wg.Wait()
	if n := questions.Load(); n != 1 {
		t.Errorf("%d questions, want 1", n)
	}
}

// A call that waits for another call's question goes on where that other call ends.
func TestQuestionThatIsAbandoned(t *testing.T) {
	arrived, over := make(chan struct{}, 2), make(chan struct{})
	var questions atomic.Int64
	serveMetadata(t, func(w http.ResponseWriter, r *http.Request) {
		if questions.Add(1) == 1 {
			arrived <- struct{}{}
			<-over
		}
		io.WriteString(w, jwt(began.Add(time.Hour), 1))
	})
	d := newIdentified(t)
	first, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if added, err := d.For(first, parse(t, "http://127.0.0.1/"), identified("a", 1, 0)); !errors.Is(err, context.Canceled) {
			t.Errorf("For = token %q, %v, want the end of its context", added.Token(), err)
		}
	})
	<-arrived
	wg.Go(func() { wantToken(t, d, identified("a", 1, 0)) })
	cancel()
	wg.Wait()
	close(over)
	if len(d.Identity.fetching) != 0 {
		t.Errorf("%d questions are still known, want none", len(d.Identity.fetching))
	}
}

func TestTokensAreBounded(t *testing.T) {
	t.Parallel()
	i, err := NewIdentity(nil)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 3 * maxTokens {
		i.keep(&idToken{audience: strconv.Itoa(n), expires: began.Add(time.Hour)})
		if n > 0 {
			i.lookUp("0", began, anyAge) // is in use
		}
	}
	if len(i.tokens) != maxTokens {
		t.Errorf("%d tokens are kept, want %d", len(i.tokens), maxTokens)
	}
	for audience, want := range map[string]bool{"0": true, "1": false, strconv.Itoa(2*maxTokens + 1): true, strconv.Itoa(3*maxTokens - 1): true} {
		if got := i.tokens[audience] != nil; got != want {
			t.Errorf("token for %s is kept: %t, want %t", audience, got, want)
		}
	}
}

func TestNewIdentityRefuses(t *testing.T) {
	t.Parallel()
	for _, entry := range []string{"", "https://s3cret", "s3cret:443", "*", "*.s3cret"} {
		_, err := NewIdentity([]string{"plays.melodia.app", entry})
		if err == nil || !strings.HasPrefix(err.Error(), "entry 2: ") || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("entry %q: error %v, want one that numbers it and does not hold it", entry, err)
		}
	}
}

// A secret's file, or the metadata server, may be out of reach for lack of something
// on this machine: the cause must be known where the outcome is decided.
func TestCausesAreKept(t *testing.T) {
	s := newSecrets(t, map[string]string{"a": "x"})
	if err := os.Remove(filepath.Join(s.dir, "a")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a", filepath.Join(s.dir, "a")); err != nil {
		t.Fatal(err)
	}
	set := newIdentified(t)
	set.Secrets = s
	w := Wanted{Headers: map[string]string{"X-Api-Key": "${secret:a}"}}
	if _, err := set.For(t.Context(), parse(t, "https://plays.melodia.app/"), w); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("a secret's file: %v, want one that wraps ELOOP", err)
	}
	closed := httptest.NewServer(nil)
	closed.Close()
	t.Setenv("GCE_METADATA_HOST", closed.Listener.Addr().String())
	_, err := newIdentified(t).For(t.Context(), parse(t, "http://127.0.0.1/"), identified("a", 1, 0))
	if want := "no ID token could be had: the metadata server cannot be reached"; !errors.Is(err, syscall.ECONNREFUSED) || err.Error() != want {
		t.Errorf("the metadata server: %v, want %q that wraps ECONNREFUSED", err, want)
	}
}

package deliver

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

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
	t.Setenv("GCE_METADATA_HOST", newServer(t, handler).Listener.Addr().String())
}

// newIdentified makes a deliverer that may send tokens to loopback.
func newIdentified(t testing.TB) *Deliverer {
	t.Helper()
	identity, err := NewIdentity([]string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	d := New(Options{Policy: policy(t, nil, "127.0.0.0/8"), Identity: identity, Concurrency: 10})
	t.Cleanup(d.Close)
	return d
}

// identified is attempt n of a task with an ID token, some time after began.
func identified(url, audience string, n int, after time.Duration) task.Call {
	c := newCall("POST", url, []byte("x"))
	c.Task.OIDCAudience, c.Attempt, c.At = audience, n, began.Add(after)
	return c
}

func TestIDToken(t *testing.T) {
	questions := newMetadata(t)
	var got atomic.Value
	s := newServer(t, func(_ http.ResponseWriter, r *http.Request) {
		got.Store(strings.Join(r.Header["Authorization"], "|"))
	})
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
		o := d.Deliver(t.Context(), identified(s.URL, step.audience, step.attempt, step.after))
		if o.Kind != task.OutcomeSucceeded {
			t.Fatalf("step %d: outcome = %+v, want success", i, o)
		}
		if want := "Bearer " + jwt(began.Add(time.Hour), step.want); got.Load() != want {
			t.Errorf("step %d, %s: Authorization = %q, want %q", i, step.why, got.Load(), want)
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
	s := newServer(t, answer(200, ""))
	for _, audience := range []string{"https://plays.melodia.app", "a&audience=b", "a#b", "a%26b", "a+b", "ü"} {
		if o := d.Deliver(t.Context(), identified(s.URL, audience, 1, 0)); o.Kind != task.OutcomeSucceeded {
			t.Fatalf("outcome = %+v, want success", o)
		}
		if diff := cmp.Diff([]string{audience}, asked.Load()); diff != "" {
			t.Errorf("audience (-want +got):\n%s", diff)
		}
	}
}

// A token may be withdrawn before its end. The next attempt has a new one; then
// 401 is an answer as any.
func TestTokenThatIsRefused(t *testing.T) {
	questions := newMetadata(t)
	var calls atomic.Int64
	var accepted atomic.Value // the signature that is
	accepted.Store("none")
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		if !strings.HasSuffix(r.Header.Get("Authorization"), accepted.Load().(string)) {
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	d := newIdentified(t)
	retryable := task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 401, Error: "the target answered 401 Unauthorized; the next attempt has a new ID token"}
	permanent := task.Outcome{Kind: task.OutcomePermanent, StatusCode: 401, Error: "the target answered 401 Unauthorized"}
	succeeded := task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}
	for i, step := range []struct {
		accepted  string
		attempt   int
		after     time.Duration
		questions int64
		want      task.Outcome
	}{
		{"none", 1, 0, 1, permanent}, // it was just fetched
		{"-1", 1, time.Minute, 1, succeeded},
		{"-2", 1, 2 * time.Minute, 1, retryable},
		{"-2", 2, 3 * time.Minute, 2, succeeded},
		{"none", 1, 4 * time.Minute, 2, retryable},
		{"none", 2, 5 * time.Minute, 3, permanent},
		{"none", 3, 5 * time.Minute, 3, permanent}, // with retry_client_errors
		{"none", 1, 6 * time.Minute, 3, retryable},
		{"-4", 1, 7 * time.Minute, 4, succeeded}, // another task
		{"none", 2, 8 * time.Minute, 5, permanent},
	} {
		accepted.Store(step.accepted)
		calls.Store(0)
		got := d.Deliver(t.Context(), identified(s.URL, "a", step.attempt, step.after))
		got.Duration = 0
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("step %d: outcome (-want +got):\n%s", i, diff)
		}
		if n := calls.Load(); n != 1 {
			t.Errorf("step %d: %d requests within one attempt, want 1", i, n)
		}
		if n := questions.Load(); n != step.questions {
			t.Errorf("step %d: %d questions to the metadata server, want %d", i, n, step.questions)
		}
	}
	// Without a token of ours, 401 is permanent.
	if o := d.Deliver(t.Context(), newCall("POST", s.URL, nil)); o.Kind != task.OutcomePermanent {
		t.Errorf("outcome without a token = %+v, want permanent", o)
	}
}

func TestMetadataServerThatFails(t *testing.T) {
	const none = "no ID token could be had: "
	saying := func(status int, body string) http.HandlerFunc { return answer(status, body) }
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		want    string
	}{
		{"no account", saying(404, "s3cret"), none + "the metadata server answered 404: the service has no account there"},
		{"bad audience", saying(400, "s3cret"), none + "the metadata server answered 400"},
		{"forbidden", saying(403, "s3cret"), none + "the metadata server answered 403"},
		{"redirect", answer(302, "", "Location", "http://s3cret.example/"), none + "the metadata server answered 302"},
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
			s := newServer(t, func(http.ResponseWriter, *http.Request) { t.Error("the target was called") })
			got := newIdentified(t).Deliver(t.Context(), identified(s.URL, "a", 1, 0))
			wantCleanError(t, got)
			got.Duration = 0
			if diff := cmp.Diff(task.Outcome{Kind: task.OutcomeRetryable, Error: tt.want}, got); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("resets", func(t *testing.T) {
		t.Setenv("GCE_METADATA_HOST", newRawServer(t, func(conn net.Conn, _ int) { conn.(*net.TCPConn).SetLinger(0) }))
		got := newIdentified(t).Deliver(t.Context(), identified("http://127.0.0.1:1/", "a", 1, 0))
		if got.Kind != task.OutcomeRetryable || got.Error != none+"the metadata server cannot be reached" {
			t.Errorf("outcome = %+v, want retryable", got)
		}
	})
	t.Run("hangs", func(t *testing.T) {
		t.Setenv("GCE_METADATA_HOST", newRawServer(t, func(conn net.Conn, _ int) { hang(conn) }))
		c := identified("http://127.0.0.1:1/", "a", 1, 0)
		c.Task.Timeout = 100 * time.Millisecond
		got := newIdentified(t).Deliver(t.Context(), c)
		got.Duration = 0
		if diff := cmp.Diff(task.Outcome{Kind: task.OutcomeRetryable, TimedOut: true, Error: "no ID token within 0.1 s"}, got); diff != "" {
			t.Errorf("outcome (-want +got):\n%s", diff)
		}
	})
	t.Run("and we are stopped", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		t.Setenv("GCE_METADATA_HOST", newRawServer(t, func(conn net.Conn, _ int) {
			cancel()
			hang(conn)
		}))
		wantInterrupted(t, newIdentified(t).Deliver(ctx, identified("http://127.0.0.1:1/", "a", 1, 0)), 0)
	})
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
		s := newServer(t, answer(200, ""))
		for _, step := range []struct {
			after time.Duration
			want  task.Kind
		}{{0, task.OutcomeSucceeded}, {time.Hour - 1, task.OutcomeSucceeded}, {time.Hour, task.OutcomeRetryable}} {
			if o := d.Deliver(t.Context(), identified(s.URL, "a", 1, step.after)); o.Kind != step.want {
				t.Errorf("after %v: outcome = %+v, want %s", step.after, o, step.want)
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
	s := newServer(t, answer(200, ""))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if o := d.Deliver(t.Context(), identified(s.URL, "slow", 1, 0)); o.Kind != task.OutcomeSucceeded {
				t.Errorf("outcome = %+v, want success", o)
			}
		})
	}
	if o := d.Deliver(t.Context(), identified(s.URL, "quick", 1, 0)); o.Kind != task.OutcomeSucceeded {
		t.Errorf("outcome = %+v, want success", o)
	}
	close(release)
	wg.Wait()
	if n := questions.Load(); n != 1 {
		t.Errorf("%d questions, want 1", n)
	}
}

// Whoever waits for another's question does not share its end.
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
	s := newServer(t, answer(200, ""))
	first, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { wantInterrupted(t, d.Deliver(first, identified(s.URL, "a", 1, 0)), 0) })
	<-arrived
	wg.Go(func() {
		if o := d.Deliver(t.Context(), identified(s.URL, "a", 1, 0)); o.Kind != task.OutcomeSucceeded {
			t.Errorf("outcome = %+v, want success", o)
		}
	})
	cancel()
	wg.Wait()
	close(over)
	if len(d.identity.fetching) != 0 {
		t.Errorf("%d questions are still known, want none", len(d.identity.fetching))
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

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
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/credentials"
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
	s := newServer(t, func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, jwt(began.Add(time.Hour), int(questions.Add(1))))
	})
	t.Setenv("GCE_METADATA_HOST", s.Listener.Addr().String())
	return questions
}

// newIdentified makes a deliverer that may send tokens to loopback.
func newIdentified(t testing.TB) *Deliverer {
	t.Helper()
	d := newDeliverer(t)
	var err error
	if d.credentials.Identity, err = credentials.NewIdentity([]string{"127.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	return d
}

// identified is attempt n of a task with an ID token, some time after began.
func identified(url, audience string, n int, after time.Duration) task.Call {
	c := newCall("POST", url, []byte("x"))
	c.Task.OIDCAudience, c.Attempt, c.At = audience, n, began.Add(after)
	return c
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
	t.Run("resets", func(t *testing.T) {
		t.Setenv("GCE_METADATA_HOST", newRawServer(t, func(conn net.Conn, _ int) { conn.(*net.TCPConn).SetLinger(0) }))
		got := newIdentified(t).Deliver(t.Context(), identified("http://127.0.0.1:1/", "a", 1, 0))
		if got.Kind != task.OutcomeRetryable || !got.Untried || got.Error != "no ID token could be had: the metadata server cannot be reached" {
			t.Errorf("outcome = %+v, want retryable", got)
		}
	})
	t.Run("hangs", func(t *testing.T) {
		t.Setenv("GCE_METADATA_HOST", newRawServer(t, func(conn net.Conn, _ int) { hang(conn) }))
		c := identified("http://127.0.0.1:1/", "a", 1, 0)
		c.Task.Timeout = 100 * time.Millisecond
		got := newIdentified(t).Deliver(t.Context(), c)
		got.Duration = 0
		if diff := cmp.Diff(task.Outcome{Kind: task.OutcomeRetryable, TimedOut: true, Untried: true, NotSent: true, Error: "no ID token within 0.1 s"}, got); diff != "" {
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
}

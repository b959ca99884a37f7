package e2e

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	webhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// newMetadata is a metadata server that is away for its first question, as far
// as a refusal can show that, and hands out an ID token for each other one.
func newMetadata(t *testing.T) (address string) {
	t.Helper()
	part := base64.RawURLEncoding.EncodeToString
	var questions atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if questions.Add(1) == 1 {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		claims := fmt.Sprintf(`{"aud":%q,"exp":%d}`, r.URL.Query().Get("audience"), time.Now().Add(time.Hour).Unix())
		fmt.Fprint(w, "e30."+part([]byte(claims))+".s1gn4tur3")
	}))
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

// everything is what the tables hold.
func everything(t *testing.T, databaseURL string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	rows, err := conn.Query(t.Context(), `SELECT t::text FROM tasks t UNION ALL SELECT h::text FROM task_history h`)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

// Tokens, secrets and signatures from the settings to the target, and nowhere else.
func TestCredentials(t *testing.T) {
	t.Parallel()
	const signing = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	secrets := t.TempDir()
	secret := filepath.Join(secrets, "billing")
	rotate := func(value string) {
		t.Helper()
		if err := os.WriteFile(secret, []byte(value+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rotate("pl4nt3d-1")
	if err := os.WriteFile(filepath.Join(secrets, "other"), []byte("pl4nt3d-3"), 0o600); err != nil {
		t.Fatal(err)
	}
	verifier, err := webhooks.NewWebhook(signing)
	if err != nil {
		t.Fatal(err)
	}
	// It repeats all that it is sent.
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, _ int) { _ = r.Header.Write(w) })
	databaseURL := pgtest.URL(t)
	settings := []string{
		"DATABASE_URL=" + databaseURL, "RETRY_MIN_BACKOFF=10ms", "GCE_METADATA_HOST=" + newMetadata(t), "OIDC_TARGET_HOSTS=127.0.0.1",
		"SIGNING_SECRETS=" + signing, "SECRETS_DIR=" + secrets, "SECRET_HOSTS=billing=127.0.0.1,other=.melodia.app",
	}
	p := start(t, "serve", settings...)
	bearer := "Bearer e30." // and the claims

	submitted := p.submit("/enqueue", `{"url":"`+target.url+`/both","auth":{"type":"oidc"},"headers":{"X-Key":"key ${secret:billing}"},"payload":{"n": 1.0}}`)
	got := p.await(submitted.ID, ended)
	if got.State != "succeeded" || len(got.Attempts) != 2 {
		t.Fatalf("the task: %s, want success at the second attempt", compact(t, got))
	}
	if e, want := got.Attempts[0].Error, "no ID token could be had: the metadata server answered 403"; e == nil || *e != want {
		t.Errorf("error of the first attempt = %v, want %q", e, want)
	}
	if excerpt := got.Attempts[1].ResponseExcerpt; excerpt == nil || !strings.Contains(*excerpt, "X-Key: key [redacted]") || !strings.Contains(*excerpt, "Authorization: Bearer [redacted]") {
		t.Errorf("excerpt = %v, want what was sent, redacted", excerpt)
	}
	check := func(path, key, audience string) {
		t.Helper()
		calls := target.got(path)
		if len(calls) != 1 {
			t.Fatalf("%s: %d calls, want 1", path, len(calls))
		}
		h := calls[0].header
		if err := verifier.Verify([]byte(calls[0].body), h); err != nil {
			t.Errorf("%s: the signature: %v", path, err)
		}
		if h.Get("X-Key") != key {
			t.Errorf("%s: X-Key = %q, want %q", path, h.Get("X-Key"), key)
		}
		token, _ := strings.CutPrefix(h.Get("Authorization"), bearer)
		claims, _ := base64.RawURLEncoding.DecodeString(strings.TrimSuffix(token, ".s1gn4tur3"))
		if audience != "" && !strings.HasPrefix(string(claims), `{"aud":"`+audience+`"`) {
			t.Errorf("%s: the token's claims are %q, want the audience %q", path, claims, audience)
		}
	}
	check("/both", "key pl4nt3d-1", target.url)

	rotate("pl4nt3d-number-2")
	p.await(p.submit("/schedule", `{"url":"`+target.url+`/rotated","delay_seconds":0,"headers":{"x-key":"${secret:billing}"},"method":"GET"}`).ID, ended)
	check("/rotated", "pl4nt3d-number-2", "")
	if a := p.do(http.MethodPost, "/worker-endpoint", `{"url":"`+target.url+`/direct","headers":{"X-Key":"${secret:billing}"},"auth":{"type":"oidc","audience":"plays"}}`); a.status != http.StatusOK {
		t.Errorf("/worker-endpoint = %d %s, want 200", a.status, a.raw)
	}
	check("/direct", "pl4nt3d-number-2", "plays")

	elsewhere := strings.Replace(target.url, "127.0.0.1", "localhost", 1)
	for _, tt := range []struct{ body, want string }{
		{`{"url":"` + elsewhere + `/no","auth":{"type":"oidc"}}`, `OIDC_TARGET_HOSTS does not allow the url's host`},
		{`{"url":"` + elsewhere + `/no","headers":{"X-Key":"${secret:billing}"}}`, `needs a url that begins with https://`},
		{`{"url":"` + target.url + `/no","headers":{"X-Key":"${secret:other}"}}`, `SECRET_HOSTS does not allow for the url's host`},
		{`{"url":"` + target.url + `/no","headers":{"Webhook-Id":"mine"}}`, `reserved`},
	} {
		if a := p.do(http.MethodPost, "/enqueue", tt.body); a.status != http.StatusUnprocessableEntity || !strings.Contains(a.raw, tt.want) {
			t.Errorf("%s: %d %s, want 422 with %q", tt.body, a.status, a.raw, tt.want)
		}
	}

	// A change cannot send a stored task with a token or a secret to another host, nor add
	// a token or a secret to a stored task for another host.
	here := p.submit("/schedule", `{"url":"`+target.url+`/kept","delay_seconds":3600,"auth":{"type":"oidc"},"headers":{"X-Key":"${secret:billing}"}}`)
	there := p.submit("/schedule", `{"url":"`+elsewhere+`/no","delay_seconds":3600}`)
	for id, changes := range map[string]map[string]string{
		here.ID: {
			`{"url":"` + elsewhere + `/no"}`: "not a field", `{"auth":{"type":"oidc","audience":"other"}}`: "not a field", `{"headers":{"Host":"localhost"}}`: "reserved",
			`{"headers":{"x-key":"${secret:other}"}}`: "SECRET_HOSTS does not allow",
		},
		there.ID: {
			`{"url":"` + target.url + `/no"}`: "not a field", `{"auth":{"type":"oidc"}}`: "not a field", `{"headers":{"X-Key":"${secret:billing}"}}`: "needs a url that begins with https://",
			`{"headers":{"X-Key":"${secret:unheard-of}"}}`: "needs a url that begins with https://",
		},
	} {
		for body, want := range changes {
			if a := p.do(http.MethodPatch, "/tasks/"+id, body); a.status != http.StatusUnprocessableEntity || !strings.Contains(a.raw, want) {
				t.Errorf("PATCH %s: %d %s, want 422 with %q", body, a.status, a.raw, want)
			}
		}
		if a := p.do(http.MethodPost, "/tasks/"+id+"/run", ""); a.status != http.StatusOK {
			t.Errorf("run: %d %s", a.status, a.raw)
		}
		p.await(id, ended)
	}
	check("/kept", "pl4nt3d-number-2", target.url)

	// Whether a secret exists is not told at any door: one that may not be sent there
	// is refused as one that there is none of.
	waiting := p.submit("/schedule", `{"url":"`+target.url+`/never","delay_seconds":3600}`)
	for _, door := range []struct{ method, path, body string }{
		{http.MethodPost, "/enqueue", `{"url":"` + target.url + `/no","headers":{"X-Key":"a ${secret:NAME}"}}`},
		{http.MethodPost, "/schedule", `{"url":"` + target.url + `/no","delay_seconds":1,"headers":{"X-Key":"${secret:NAME}"}}`},
		{http.MethodPost, "/enqueue", `{"url":"` + target.url + `/no","on_success":{"url":"` + target.url + `/no","headers":{"X-Key":"${secret:NAME}"}}}`},
		{http.MethodPost, "/enqueue", `{"url":"` + target.url + `/no","on_failure":{"url":"` + target.url + `/no","headers":{"X-Key":"${secret:NAME}"}}}`},
		{http.MethodPost, "/enqueue", `{"url":"http://plays.melodia.app/no","headers":{"X-Key":"${secret:NAME}"}}`},
		{http.MethodPost, "/tasks/batch", `{"tasks":[{"url":"` + target.url + `/no","headers":{"X-Key":"${secret:NAME}"}}]}`},
		{http.MethodPost, "/worker-endpoint", `{"url":"` + target.url + `/no","headers":{"X-Key":"${secret:NAME}"}}`},
		{http.MethodPatch, "/tasks/" + waiting.ID, `{"headers":{"X-Key":"${secret:NAME}"}}`},
	} {
		answers := make(map[string]string)
		for _, name := range []string{"other", "unheard-of"} {
			a := p.do(door.method, door.path, strings.Replace(door.body, "NAME", name, 1))
			if a.status != http.StatusUnprocessableEntity {
				t.Errorf("%s %s of %s: %d %s, want 422", door.method, door.path, name, a.status, a.raw)
			}
			answers[name] = regexp.MustCompile(`"instance":"[^"]*"`).ReplaceAllString(a.raw, "")
		}
		if answers["other"] != answers["unheard-of"] || strings.Contains(answers["other"], "unheard-of") {
			t.Errorf("%s %s: a secret for another host is answered %s, one that there is none of %s", door.method, door.path, answers["other"], answers["unheard-of"])
		}
	}
	if calls := target.got("/no"); len(calls) != 1 || calls[0].header.Get("X-Key") != "" || calls[0].header.Get("Authorization") != "" {
		t.Errorf("the task for another host was called with %v, want once with neither", calls)
	}

	// Another instance, whose settings admit neither, is asked to make the calls.
	p.stop(syscall.SIGTERM)
	taker := start(t, "serve", append(settings, "DISPATCH=false")...)
	token := taker.submit("/enqueue", `{"url":"`+target.url+`/token","auth":{"type":"oidc"}}`)
	key := taker.submit("/enqueue", `{"url":"`+target.url+`/key","headers":{"X-Key":"${secret:billing}"}}`)
	strict := start(t, "serve", "DATABASE_URL="+databaseURL)
	for _, submitted := range []taskJSON{token, key} {
		if got := strict.await(submitted.ID, ended); got.Reason == nil || *got.Reason != "target_refused" {
			t.Errorf("the task: %s, want target_refused", compact(t, got))
		}
	}
	if n := len(target.got("/token")) + len(target.got("/key")); n != 0 {
		t.Errorf("%d calls that the settings do not admit", n)
	}

	kept := map[string]string{"the tables": everything(t, databaseURL), "the answers": compact(t, got)}
	for i, process := range []*process{p, taker, strict} {
		kept[fmt.Sprint("the log of instance ", i)] = strings.Join(process.lines(), "\n")
	}
	for where, text := range kept {
		for _, secret := range []string{"pl4nt3d", "s1gn4tur3", strings.TrimPrefix(signing, "whsec_")} {
			if strings.Contains(text, secret) {
				t.Errorf("%s hold %s:\n%s", where, secret, text)
			}
		}
	}
	if !strings.Contains(kept["the tables"], "${secret:billing}") {
		t.Error("the tables do not hold the references: this test looks in the wrong place")
	}
}

package e2e

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/auth/authtest"
	"github.com/melodia/orchestrator/internal/jwtkey"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// platformSecret is what all services of the platform share.
const platformSecret = "m3l0d14-s3cr3t-of-the-whole-platform"

// withSecret signs as HS256 does.
func withSecret(secret string) func([]byte) []byte {
	return func(input []byte) []byte {
		mac := hmac.New(sha256.New, []byte(secret))
		_, _ = mac.Write(input)
		return mac.Sum(nil)
	}
}

// platformClaims are those of a right token of the platform's auth service.
func platformClaims(subject any, role string) map[string]any {
	now := time.Now()
	return map[string]any{"iss": "auth-service", "sub": subject, "role": role, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
}

func platformToken(t *testing.T, claims map[string]any) string {
	t.Helper()
	return authtest.Token(t, map[string]any{"alg": "HS256", "typ": "JWT"}, claims, withSecret(platformSecret))
}

// calledWith returns what the token of a call says, if the platform's secret has signed it.
func calledWith(t *testing.T, c call) (claims map[string]any) {
	t.Helper()
	key, err := jwtkey.New(jwtkey.HS256, platformSecret)
	if err != nil {
		t.Fatal(err)
	}
	token, found := strings.CutPrefix(c.header.Get("Authorization"), "Bearer ")
	text, err := key.Verify(token)
	if !found || err != nil || json.Unmarshal(text, &claims) != nil {
		t.Fatalf("the call carries %q, want a token of the platform: %v", c.header["Authorization"], err)
	}
	return claims
}

// newRSAKey returns a new private key, and its PEM.
func newRSAKey(t *testing.T) (key *jwtkey.Key, text string) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	text = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if key, err = jwtkey.New(jwtkey.RS256, text); err != nil {
		t.Fatal(err)
	}
	return key, text
}

// A caller with a token of the platform submits a task, whose calls carry tokens of the
// platform that are made when each of them begins.
func TestTokensOfThePlatform(t *testing.T) {
	t.Parallel()
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		if strings.HasPrefix(r.URL.Path, "/twice") && nth == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		if strings.HasPrefix(r.URL.Path, "/401") {
			w.WriteHeader(http.StatusUnauthorized)
		}
		_ = r.Header.Write(w) // it repeats all that it is sent
	})
	database := pgtest.URL(t)
	settings := []string{
		"DATABASE_URL=" + database, "AUTH=jwt", "AUTH_SECRET=" + platformSecret, "AUTH_ROLES=admin:submit+read+manage+internal,artist:submit",
		"JWT_TARGET_HOSTS=127.0.0.1", "JWT_ROLES=user,admin", "RETRY_MIN_BACKOFF=10ms",
	}
	p := start(t, "serve", settings...)
	as := func(subject any, role string) http.Header {
		return http.Header{"Authorization": {"Bearer " + platformToken(t, platformClaims(subject, role))}}
	}
	submit := func(path, body string, header http.Header) taskJSON {
		t.Helper()
		a := p.send(http.MethodPost, path, body, header)
		if a.status != http.StatusAccepted {
			t.Fatalf("POST %s %s: %d %s", path, body, a.status, a.raw)
		}
		return a.task
	}
	await := func(id string) (got taskJSON) {
		t.Helper()
		eventually(t, func() bool {
			got = p.send(http.MethodGet, "/tasks/"+id, "", as("admin", "admin")).task
			return ended(got)
		}, func() string { return "the task does not end: " + compact(t, got) })
		return got
	}

	// Who the token names has submitted it, by an integer or a text; what else may they do?
	for subject, want := range map[any]string{42: "42", "artist-7": "artist-7"} {
		task := submit("/enqueue", `{"url":"`+target.url+`/plain"}`, as(subject, "artist"))
		if got := await(task.ID); got.CreatedBy == nil || *got.CreatedBy != want {
			t.Errorf("created_by = %v, want %s", got.CreatedBy, want)
		}
		if a := p.send(http.MethodGet, "/tasks/"+task.ID, "", as(subject, "artist")); a.status != http.StatusForbidden {
			t.Errorf("an artist reads: %d %s, want 403", a.status, a.raw)
		}
		if a := p.send(http.MethodPost, "/enqueue", `{"url":"`+target.url+`/no"}`, as(subject, "user")); a.status != http.StatusForbidden {
			t.Errorf("a user submits: %d %s, want 403", a.status, a.raw)
		}
	}
	expired := platformClaims("a", "admin")
	expired["exp"] = 1
	if a := p.send(http.MethodPost, "/enqueue", `{"url":"`+target.url+`/no"}`, http.Header{"Authorization": {"Bearer " + platformToken(t, expired)}}); a.status != http.StatusUnauthorized || !strings.Contains(a.raw, "the token's claim exp has passed; ask for a new token") {
		t.Errorf("an expired token: %d %s, want 401 by its claim exp", a.status, a.raw)
	}

	// Each call has a token of its own moment: at a date, at a retry, in the request.
	check := func(c call, due time.Time, role string, audience any) {
		t.Helper()
		claims := calledWith(t, c)
		for name, want := range map[string]any{"iss": "auth-service", "sub": "orchestrator", "role": role, "aud": audience} {
			if claims[name] != want {
				t.Errorf("%s of the token is %v, want %v", name, claims[name], want)
			}
		}
		// The database's clock is this machine's.
		made, ends := claims["iat"].(float64)+30, claims["exp"].(float64)-300
		if made != ends || made < float64(due.Unix()) || made > float64(c.at.Unix()) {
			t.Errorf("the token says that it was made at %.0f and ends 300 s after %.0f, want both between %d, when the call was due, and %d, when it came", made, ends, due.Unix(), c.at.Unix())
		}
	}
	twice := submit("/schedule", `{"url":"`+target.url+`/twice","delay_seconds":1.5,"auth":{"type":"jwt","role":"admin","audience":"catalogue"}}`, as("a", "artist"))
	if got := await(twice.ID); got.State != "succeeded" || got.Attempts[1].ResponseExcerpt == nil || !strings.Contains(*got.Attempts[1].ResponseExcerpt, "Authorization: Bearer [redacted]") {
		t.Errorf("the task: %s, want success at the second attempt without the token", compact(t, got))
	}
	calls := target.got("/twice")
	if len(calls) != 2 {
		t.Fatalf("%d calls, want 2", len(calls))
	}
	for _, c := range calls {
		check(c, twice.RunAt, "admin", "catalogue")
	}
	plain := submit("/enqueue", `{"url":"`+target.url+`/default","auth":{"type":"jwt"}}`, as("a", "artist"))
	await(plain.ID)
	check(target.got("/default")[0], plain.CreatedAt, "user", nil)
	if a := p.send(http.MethodPost, "/worker-endpoint", `{"url":"`+target.url+`/direct","auth":{"type":"jwt"}}`, as("a", "admin")); a.status != http.StatusOK || strings.Contains(a.raw, "eyJ") {
		t.Errorf("/worker-endpoint: %d %s, want 200 without the token", a.status, a.raw)
	}
	check(target.got("/direct")[0], plain.CreatedAt, "user", nil)
	for _, c := range append(target.got("/default"), target.got("/direct")...) { // a target sends it back to where it came from
		if a := p.send(http.MethodGet, "/tasks", "", http.Header{"Authorization": c.header["Authorization"]}); a.status != http.StatusUnauthorized || !strings.Contains(a.raw, "this service's own name") {
			t.Errorf("the service's own token: %d %s, want 401", a.status, a.raw)
		}
	}
	if got := await(submit("/enqueue", `{"url":"`+target.url+`/401","auth":{"type":"jwt"}}`, as("a", "artist")).ID); got.State != "failed" || len(got.Attempts) != 1 {
		t.Errorf("a token that is refused: %s, want one attempt", compact(t, got))
	}

	elsewhere := strings.Replace(target.url, "127.0.0.1", "localhost", 1)
	for body, want := range map[string]string{
		`{"url":"` + elsewhere + `/no","auth":{"type":"jwt"}}`:                                                "JWT_TARGET_HOSTS does not allow the url's host",
		`{"url":"` + target.url + `/no","auth":{"type":"jwt","role":"root"}}`:                                 "JWT_ROLES does not allow",
		`{"url":"` + target.url + `/no","auth":{"type":"oidc"}}`:                                              "OIDC_TARGET_HOSTS allows no host",
		`{"url":"` + target.url + `/no","auth":{"type":"jwt"},"headers":{"Authorization":"Bearer x"}}`:        "must not be there together with auth",
		`{"url":"` + target.url + `/no","auth":{"type":"jwt"},"on_success":{"url":"http://10.0.0.1/","x":1}}`: "on_success",
	} {
		if a := p.send(http.MethodPost, "/enqueue", body, as("a", "artist")); a.status != http.StatusUnprocessableEntity || !strings.Contains(a.raw, want) {
			t.Errorf("%s: %d %s, want 422 with %q", body, a.status, a.raw, want)
		}
	}

	// A stored task whose role or host the settings no longer allow is not called.
	p.stop(syscall.SIGTERM)
	taker := start(t, "serve", append(settings, "DISPATCH=false")...)
	p = taker
	role, host := submit("/enqueue", `{"url":"`+target.url+`/role","auth":{"type":"jwt","role":"admin"}}`, as("a", "artist")), submit("/enqueue", `{"url":"`+target.url+`/host","auth":{"type":"jwt"}}`, as("a", "artist"))
	strict := start(t, "serve", append(settings, "JWT_ROLES=user")...)
	if got := await(role.ID); got.Reason == nil || *got.Reason != "target_refused" {
		t.Errorf("the task with another role: %s, want target_refused", compact(t, got))
	}
	if got := await(host.ID); got.State != "succeeded" {
		t.Errorf("the task with the default role: %s, want success", compact(t, got))
	}
	if n := len(target.got("/role")) + len(target.got("/no")); n > 0 {
		t.Errorf("%d calls that the settings do not allow", n)
	}

	tokens := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"HS256","typ":"JWT"}`))
	for where, text := range map[string]string{"the tables": everything(t, database), "the answers": compact(t, await(twice.ID)), "a log": strings.Join(taker.lines(), "\n"), "another log": strings.Join(strict.lines(), "\n")} {
		for _, secret := range []string{platformSecret, tokens} {
			if strings.Contains(text, secret) {
				t.Errorf("%s hold %s:\n%s", where, secret, text)
			}
		}
	}
	if text := everything(t, database); !strings.Contains(text, `catalogue`) {
		t.Error("the tables do not hold what tokens are to say: this test looks in the wrong place")
	}
}

// Public keys at a URL let callers in, a private key signs towards targets.
func TestTokensOfThePlatformByKeys(t *testing.T) {
	t.Parallel()
	issuer := newIssuer(t)
	target := newTarget(t, statusOf)
	own, ownPEM := newRSAKey(t)
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "AUTH=jwt", "AUTH_ALGORITHM=RS256", "AUTH_JWKS_URL="+issuer.URL+"/keys", "AUTH_ISSUER=id", "AUTH_AUDIENCE=orchestrator",
		"AUTH_ROLES=artist:submit+read", "AUTH_SECRET="+ownPEM, "JWT_TARGET_HOSTS=127.0.0.1")
	claims := func(audience string) map[string]any {
		c := platformClaims("artist-7", "artist")
		c["iss"], c["aud"] = "id", audience
		return c
	}
	header := func(token string) http.Header { return http.Header{"Authorization": {"Bearer " + token}} }
	a := p.send(http.MethodPost, "/enqueue", `{"url":"`+target.url+`/200","auth":{"type":"jwt"}}`, header(issuer.Token(claims("orchestrator"))))
	if a.status != http.StatusAccepted {
		t.Fatalf("a right token: %d %s", a.status, a.raw)
	}
	eventually(t, func() bool { return len(target.got("/200")) == 1 }, func() string { return "no call" })
	token := strings.TrimPrefix(target.got("/200")[0].header.Get("Authorization"), "Bearer ")
	if text, err := own.Verify(token); err != nil || !strings.Contains(string(text), `"iss":"id"`) {
		t.Errorf("the call's token %q says %s, %v", token, text, err)
	}
	// Its own token is none of the auth service's.
	for name, tt := range map[string]struct{ token, want string }{
		"the service's own": {token, jwtkey.ErrSignature.Error()},
		"for another":       {issuer.Token(claims("catalogue")), "the token's claim aud must name this service"},
		"by a secret":       {platformToken(t, claims("orchestrator")), jwtkey.ErrAlgorithm.Error()},
	} {
		if a := p.send(http.MethodGet, "/tasks", "", header(tt.token)); a.status != http.StatusUnauthorized || !strings.Contains(a.raw, tt.want) {
			t.Errorf("%s: %d %s, want 401 with %q", name, a.status, a.raw, tt.want)
		}
	}
}

package e2e

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/auth/authtest"
	"github.com/melodia/orchestrator/internal/httpapi"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// newAPIKey makes a key by the command, as an operator does.
func newAPIKey(t *testing.T, name string, scopes ...string) (key, entry string) {
	t.Helper()
	stdout, err := exec.CommandContext(t.Context(), binary, "key", name, strings.Join(scopes, "+")).Output()
	if err != nil {
		t.Fatalf("key: %v", err)
	}
	printed := regexp.MustCompile(`(?s)\n\s+(ork_\S{43})\n.*\n\s+(\S+:\S+:[0-9a-f]{64})\n$`).FindStringSubmatch(string(stdout))
	if printed == nil {
		t.Fatalf("key prints %q, want a key and its entry", stdout)
	}
	return printed[1], printed[2]
}

// newIssuer serves an issuer of ID tokens.
func newIssuer(t *testing.T) *authtest.Issuer {
	t.Helper()
	issuer := authtest.New(t)
	server := httptest.NewServer(issuer)
	t.Cleanup(server.Close)
	issuer.URL = server.URL
	return issuer
}

// operation is one of the OpenAPI document.
type operation struct {
	method, path string
	scope        string // empty: it is open, or
	holders      bool   // only for who holds a token of the task
}

// operations returns what the running service says that it serves. A test of
// httpapi holds that against its routes.
func (p *process) operations() (all []operation) {
	p.t.Helper()
	var document struct {
		Paths map[string]map[string]struct{ Security []map[string][]string }
	}
	if err := json.Unmarshal([]byte(p.do(http.MethodGet, "/openapi.json", "").raw), &document); err != nil {
		p.t.Fatal(err)
	}
	for path, methods := range document.Paths {
		for method, o := range methods {
			op := operation{method: strings.ToUpper(method), path: regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(path, "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b")}
			for _, way := range o.Security {
				for _, scopes := range way {
					if op.holders = len(scopes) == 0; !op.holders {
						op.scope = scopes[0]
					}
				}
			}
			all = append(all, op)
			if op.method == http.MethodGet { // it answers HEAD too
				op.method = http.MethodHead
				all = append(all, op)
			}
		}
	}
	return all
}

// logs waits until a line of the log holds text.
func (p *process) logs(text string) {
	p.t.Helper()
	eventually(p.t, func() bool { return p.count(text) > 0 }, func() string { return "the log does not say " + text })
}

// Whatever an attacker sends, at whichever operation: no request without the right
// credentials is let in, and nothing they sent is stored or called.
func TestAttackers(t *testing.T) {
	t.Parallel()
	const audience = "https://orchestrator.example"
	const account = "plays@x.example"
	issuer := newIssuer(t)
	target := newTarget(t, statusOf)
	database := pgtest.URL(t)
	others := func(scope string) []string {
		return slices.DeleteFunc(httpapi.Scopes(), func(s string) bool { return s == scope })
	}
	var entries []string
	allow := []string{account + ":" + strings.Join(httpapi.Scopes(), "+")}
	keyWith, keyWithout := map[string]string{}, map[string]string{}
	addKey := func(name string, scopes ...string) string {
		key, entry := newAPIKey(t, name, scopes...)
		entries = append(entries, entry)
		return key
	}
	for _, scope := range httpapi.Scopes() {
		keyWith[scope] = addKey(scope, scope)
		keyWithout[scope] = addKey("all-but-"+scope, others(scope)...)
		allow = append(allow, "all-but-"+scope+"@x.example:"+strings.Join(others(scope), "+"))
	}
	all := addKey("all", httpapi.Scopes()...)
	roles := "admin:" + strings.Join(httpapi.Scopes(), "+")
	for _, scope := range httpapi.Scopes() {
		roles += ",all-but-" + scope + ":" + strings.Join(others(scope), "+")
	}
	p := start(t, "serve", "DATABASE_URL="+database, "AUTH=api_key,oidc,jwt", "API_KEYS="+strings.Join(entries, ","),
		"AUTH_SECRET="+platformSecret, "AUTH_ROLES="+roles, "OIDC_ISSUER="+issuer.URL, "OIDC_AUDIENCE="+audience, "OIDC_ALLOW="+strings.Join(allow, ","))

	claims := func(name string, value any) map[string]any {
		c := issuer.Claims(account, audience)
		c[name] = value
		return c
	}
	right := issuer.Token(issuer.Claims(account, audience))
	parts := strings.Split(right, ".")
	stranger := authtest.New(t)
	stranger.URL = issuer.URL
	publicKey, err := x509.MarshalPKIXPublicKey(issuer.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	none := func([]byte) []byte { return nil }
	symmetric := func(secret []byte) string {
		return authtest.Token(t, map[string]any{"alg": "HS256", "kid": "key-1"}, issuer.Claims(account, audience), func(input []byte) []byte {
			mac := hmac.New(sha256.New, secret)
			_, _ = mac.Write(input)
			return mac.Sum(nil)
		})
	}
	bearer := func(credentials ...string) http.Header {
		h := http.Header{}
		for _, c := range credentials {
			h.Add("Authorization", "Bearer "+c)
		}
		return h
	}
	platform := func(name string, value any) string {
		c := platformClaims("user-1", "admin")
		if c[name] = value; value == nil {
			delete(c, name)
		}
		return platformToken(t, c)
	}
	user := platformToken(t, platformClaims("user-1", "admin"))
	userParts := strings.Split(user, ".")
	forged := func(alg string, sign func([]byte) []byte) http.Header {
		return bearer(authtest.Token(t, map[string]any{"alg": alg}, platformClaims("user-1", "admin"), sign))
	}
	unknownKey, _ := newAPIKey(t, "all", httpapi.Scopes()...)
	attacks := map[string]struct {
		header http.Header
		query  string
		status int
	}{
		"no credentials":                   {header: http.Header{}},
		"empty credentials":                {header: http.Header{"Authorization": {""}, "X-Api-Key": {""}}},
		"a key that nobody has":            {header: bearer(unknownKey)},
		"a key that nobody has, X-Api-Key": {header: http.Header{"X-Api-Key": {unknownKey}}},
		"a key cut short":                  {header: bearer(all[:len(all)-1])},
		"a key's SHA-256":                  {header: bearer(entries[len(entries)-1][strings.LastIndex(entries[len(entries)-1], ":")+1:])},
		"an entry":                         {header: bearer(entries[len(entries)-1])},
		"a key in the query":               {header: http.Header{}, query: "?access_token=" + all + "&api_key=" + all + "&key=" + all + "&X-Api-Key=" + all + "&Authorization=Bearer%20" + all},
		"a key in a cookie":                {header: http.Header{"Cookie": {"Authorization=Bearer " + all + "; X-Api-Key=" + all}}},
		"a key as a password":              {header: http.Header{"Authorization": {"Basic " + all}}},
		"a key for a proxy":                {header: http.Header{"Proxy-Authorization": {"Bearer " + all}, "X-Forwarded-Authorization": {"Bearer " + all}}},
		"two Authorization headers":        {header: bearer(all, all)},
		"wrong, then right":                {header: bearer(unknownKey, all)},
		"two credentials in one header":    {header: http.Header{"Authorization": {"Bearer " + unknownKey + ", Bearer " + all}}},
		"two keys":                         {header: http.Header{"X-Api-Key": {all, all}}},
		"a key in either header":           {header: http.Header{"Authorization": {"Bearer " + all}, "X-Api-Key": {all}}},
		"a token and a key":                {header: http.Header{"Authorization": {"Bearer " + right}, "X-Api-Key": {all}}},
		"expired":                          {header: bearer(issuer.Token(claims("exp", time.Now().Add(-time.Minute).Unix())))},
		"another audience":                 {header: bearer(issuer.Token(claims("aud", "https://other.example")))},
		"several audiences":                {header: bearer(issuer.Token(claims("aud", []string{audience, "https://other.example"})))},
		"another issuer":                   {header: bearer(issuer.Token(claims("iss", "https://accounts.google.com")))},
		"another issuer's key":             {header: bearer(stranger.Token(stranger.Claims(account, audience)))},
		"unverified email":                 {header: bearer(issuer.Token(claims("email_verified", false)))},
		"alg none":                         {header: bearer(authtest.Token(t, map[string]any{"alg": "none"}, issuer.Claims(account, audience), none))},
		"HS256 with the public key":        {header: bearer(symmetric(publicKey))},
		"HS256 with the public key, PEM":   {header: bearer(symmetric(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: publicKey})))},
		"signature stripped":               {header: bearer(parts[0] + "." + parts[1] + ".SIGNATURE_REMOVED_BY_GOOGLE")},
		"stripped, in Cloud Run's header":  {header: http.Header{"X-Serverless-Authorization": {"Bearer " + parts[0] + "." + parts[1] + ".SIGNATURE_REMOVED_BY_GOOGLE"}}},
		"signature cut off":                {header: bearer(parts[0] + "." + parts[1] + ".")},
		"platform: none":                   {header: forged("none", none)},
		"platform: another secret":         {header: forged("HS256", withSecret("m3l0d14"))},
		"platform: no secret":              {header: forged("HS256", withSecret(""))},
		"platform: HS512":                  {header: forged("HS512", withSecret(platformSecret))},
		"platform: by the issuer's key":    {header: bearer(issuer.Token(platformClaims("user-1", "admin")))},
		"platform: the public key":         {header: forged("HS256", withSecret(string(publicKey)))},
		"platform: expired":                {header: bearer(platform("exp", time.Now().Add(-time.Second).Unix()))},
		"platform: without an end":         {header: bearer(platform("exp", nil))},
		"platform: Exp for exp":            {header: bearer(authtest.Token(t, map[string]any{"alg": "HS256"}, map[string]any{"iss": "auth-service", "sub": "user-1", "role": "admin", "Exp": 1 << 40}, withSecret(platformSecret)))},
		"platform: of the future":          {header: bearer(platform("iat", time.Now().Add(time.Hour).Unix()))},
		"platform: not valid yet":          {header: bearer(platform("nbf", time.Now().Add(time.Hour).Unix()))},
		"platform: another issuer":         {header: bearer(platform("iss", "auth"))},
		"platform: for another service":    {header: bearer(platform("aud", "catalogue"))},
		"platform: no subject":             {header: bearer(platform("sub", nil))},
		"platform: a key's name":           {header: bearer(platform("sub", "all"))},
		"platform: an account's email":     {header: bearer(platform("sub", account))},
		"platform: twice":                  {header: bearer(user, user)},
		"platform: a claim twice":          {header: bearer(authtest.Token(t, map[string]any{"alg": "HS256"}, json.RawMessage(`{"iss":"auth-service","sub":"user-1","role":"artist","role":"admin","exp":99999999999}`), withSecret(platformSecret)))},
		"platform: unsigned":               {header: bearer(userParts[0] + "." + userParts[1] + ".")},
		"platform: other claims":           {header: bearer(userParts[0] + "." + strings.Split(platform("sub", "root"), ".")[1] + "." + userParts[2])},
		"platform: large":                  {header: bearer(platform("x", strings.Repeat("x", 8<<10)))},
		"platform: huge":                   {header: bearer(platform("x", strings.Repeat("x", 1<<20))), status: http.StatusRequestHeaderFieldsTooLarge},
		"platform: another role":           {header: bearer(platform("role", "user")), status: http.StatusForbidden},
		"platform: Role for role":          {header: bearer(platformToken(t, map[string]any{"iss": "auth-service", "sub": "user-1", "Role": "admin", "exp": time.Now().Add(time.Hour).Unix()})), status: http.StatusForbidden},
		"another account":                  {header: bearer(issuer.Token(issuer.Claims("other@x.example", audience))), status: http.StatusForbidden},
		"an account written otherwise":     {header: bearer(issuer.Token(issuer.Claims("PLAYS@x.example", audience))), status: http.StatusForbidden},
	}
	body := `{"url":"` + target.url + `/200/attack","task_id":"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"}`
	secured := map[string]bool{}
	for _, op := range p.operations() {
		if op.scope == "" && !op.holders {
			if a := p.do(op.method, op.path, ""); a.status != http.StatusOK {
				t.Errorf("%s %s is open, and answers %d", op.method, op.path, a.status)
			}
			continue
		}
		sent := body
		if op.method == http.MethodGet || op.method == http.MethodHead {
			sent = ""
		}
		check := func(name string, a answer, want int) {
			if a.status != want {
				t.Errorf("%s: %s %s is answered %d %s, want %d", name, op.method, op.path, a.status, a.raw, want)
			}
			scheme := "Bearer "
			if op.holders {
				scheme = "Orchestrator-Completion-Token"
			}
			if (a.status == http.StatusUnauthorized || a.status == http.StatusForbidden) && !strings.HasPrefix(a.header.Get("WWW-Authenticate"), scheme) {
				t.Errorf("%s: %s %s has WWW-Authenticate %q", name, op.method, op.path, a.header.Get("WWW-Authenticate"))
			}
		}
		for name, attack := range attacks {
			want := attack.status
			if want == 0 || want == http.StatusForbidden && op.holders {
				want = http.StatusUnauthorized
			}
			check(name, p.send(op.method, op.path+attack.query, sent, attack.header), want)
		}
		if op.holders { // no caller of ours is one
			for name, header := range map[string]http.Header{"a key": bearer(all), "a token": bearer(right), "a token of the platform": bearer(user)} {
				check(name, p.send(op.method, op.path, sent, header), http.StatusUnauthorized)
			}
			continue
		}
		secured[op.scope] = true
		for name, header := range map[string]http.Header{
			"a key without the scope":    bearer(keyWithout[op.scope]),
			"a role without the scope":   bearer(platform("role", "all-but-"+op.scope)),
			"an email without the scope": bearer(issuer.Token(issuer.Claims("all-but-"+op.scope+"@x.example", audience))),
		} {
			a := p.send(op.method, op.path, sent, header)
			check(name, a, http.StatusForbidden)
			if op.method != http.MethodHead && !strings.Contains(a.raw, "lacks the scope "+op.scope+",") {
				t.Errorf("%s: %s %s does not name the scope %s: %s", name, op.method, op.path, op.scope, a.raw)
			}
		}
		// The same request is let in with the scope; no operation takes what is in it.
		for name, header := range map[string]http.Header{"a key": bearer(keyWith[op.scope]), "a token": bearer(right), "a token of the platform": bearer(user)} {
			if a := p.send(op.method, op.path, sent, header); a.status == http.StatusUnauthorized || a.status == http.StatusForbidden || a.status >= 500 {
				t.Errorf("%s: %s %s is answered %d %s, want it let in", name, op.method, op.path, a.status, a.raw)
			}
		}
	}
	for _, scope := range httpapi.Scopes() {
		if !secured[scope] {
			t.Errorf("no operation needs the scope %s (of %v)", scope, slices.Sorted(maps.Keys(secured)))
		}
	}
	if got := stored(t, database); len(got) > 0 {
		t.Errorf("attackers have stored %v", got)
	}
	if n := len(target.got("/200/attack")); n > 0 {
		t.Errorf("attackers have made %d calls", n)
	}
	if n := issuer.Fetches(); n > 10 {
		t.Errorf("the issuer was asked %d times", n)
	}

	// Who comes in is on record, and so is who did something to their tasks.
	for who, header := range map[string]http.Header{"submit": bearer(keyWith["submit"]), "all": {"X-Api-Key": {all}}, account: bearer(right), "user-1": bearer(user), "42": bearer(platform("sub", 42))} {
		a := p.send(http.MethodPost, "/schedule", `{"url":"`+target.url+`/200","delay_seconds":3600}`, header)
		if a.status != http.StatusAccepted || a.task.CreatedBy == nil || *a.task.CreatedBy != who {
			t.Errorf("a task by %s is answered %d %s", who, a.status, a.raw)
		}
		seen := p.send(http.MethodGet, "/tasks/"+a.task.ID, "", bearer(all)).task
		if diff := cmp.Diff(&who, seen.CreatedBy); diff != "" {
			t.Errorf("read back (-want +got):\n%s", diff)
		}
		found := p.send(http.MethodGet, "/tasks?created_by="+who, "", bearer(keyWith["read"]))
		if strings.Count(found.raw, `"created_by":`) != 1 || !strings.Contains(found.raw, a.task.ID) {
			t.Errorf("the tasks by %s are %s, want the one", who, found.raw)
		}
		if c := p.send(http.MethodPost, "/tasks/"+a.task.ID+"/cancel", "", bearer(keyWith["manage"])); c.status != http.StatusOK {
			t.Errorf("cancelling the task by %s is answered %d %s", who, c.status, c.raw)
		}
		p.logs(`"msg":"task cancelled","task_id":"` + a.task.ID + `","state":"cancelled","caller":"manage"`)
	}
	p.logs(`"msg":"callers refused"`)
}

// A caller above its rate does not keep other callers out.
func TestRates(t *testing.T) {
	t.Parallel()
	flood, floodEntry := newAPIKey(t, "flood", "read")
	calm, calmEntry := newAPIKey(t, "calm", "read")
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "AUTH=api_key", "API_KEYS="+floodEntry+","+calmEntry, "RATE_LIMIT=0.001", "RATE_BURST=3")
	get := func(key string) answer {
		return p.send(http.MethodGet, "/tasks/counts", "", http.Header{"X-Api-Key": {key}})
	}
	for i, want := range []int{200, 200, 200, 429, 429} {
		if a := get(flood); a.status != want || (want == 429) != (a.header.Get("Retry-After") != "") {
			t.Errorf("request %d: %d %s, want %d", i+1, a.status, a.raw, want)
		}
	}
	// Those who guess use up nothing of those who have a key.
	for range 10 {
		if a := get("ork_guess"); a.status != http.StatusUnauthorized {
			t.Errorf("a guess: %d %s, want 401", a.status, a.raw)
		}
	}
	for range 3 {
		if a := get(calm); a.status != http.StatusOK {
			t.Errorf("somebody else: %d %s, want 200", a.status, a.raw)
		}
	}
}

// What docs/security.md says that a test shows, a test of that name shows.
func TestThreatModelNamesTests(t *testing.T) {
	t.Parallel()
	model, err := os.ReadFile(filepath.Join(repository, "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, packages := range []string{"*/*", "*/*/*"} {
		found, err := filepath.Glob(filepath.Join(repository, packages, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	there := map[string]bool{}
	for _, file := range files {
		there[filepath.Base(file)] = true
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range regexp.MustCompile(`(?m)^func (Test\w+)\(t `).FindAllStringSubmatch(string(text), -1) {
			there[f[1]] = true
		}
	}
	named := regexp.MustCompile("`(Test\\w+|\\w+_test\\.go)`").FindAllStringSubmatch(string(model), -1)
	if len(named) == 0 {
		t.Error("it names no tests")
	}
	for _, name := range named {
		if !there[name[1]] {
			t.Errorf("there is no %s", name[1])
		}
	}
}

// While the issuer is away tokens are refused and API keys are accepted.
func TestIssuerAway(t *testing.T) {
	t.Parallel()
	issuer := newIssuer(t)
	issuer.SetAway(true)
	key, entry := newAPIKey(t, "plays", "read")
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "AUTH=oidc,api_key", "API_KEYS="+entry,
		"OIDC_ISSUER="+issuer.URL, "OIDC_AUDIENCE=x", "OIDC_ALLOW=plays@x.example:read")
	get := func(credential string) answer {
		return p.send(http.MethodGet, "/tasks/01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b", "", http.Header{"Authorization": {"Bearer " + credential}})
	}
	token := issuer.Token(issuer.Claims("plays@x.example", "x"))
	if a := get(token); a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
		t.Errorf("a token: %d %s, want 503 with Retry-After", a.status, a.raw)
	}
	if a := get(key); a.status != http.StatusNotFound {
		t.Errorf("a key: %d %s, want 404", a.status, a.raw)
	}
	issuer.SetAway(false)
	eventually(t, func() bool { return get(token).status == http.StatusNotFound }, func() string { return "the issuer's return is not noticed: " + get(token).raw })
}

// Behind Cloud Run's IAM what counts is what that has checked.
func TestBehindIAM(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "AUTH=iam", "K_SERVICE=orchestrator")
	target := newTarget(t, statusOf)
	token := func(email string) string {
		signed := authtest.Token(t, map[string]any{"alg": "RS256"}, map[string]any{"email": email}, func([]byte) []byte { return []byte("signature") })
		return "Bearer " + signed
	}
	stripped := func(email string) string {
		signed := token(email)
		return signed[:strings.LastIndex(signed, ".")] + ".SIGNATURE_REMOVED_BY_GOOGLE"
	}
	submit := func(header http.Header) answer {
		return p.send(http.MethodPost, "/schedule", `{"url":"`+target.url+`/200","delay_seconds":3600}`, header)
	}
	for name, header := range map[string]http.Header{
		"nothing": {}, "a signature that nobody has checked": {"Authorization": {token("plays@x.example")}},
		"two": {"Authorization": {stripped("plays@x.example"), stripped("root@x.example")}},
	} {
		if a := submit(header); a.status != http.StatusUnauthorized {
			t.Errorf("%s: %d %s, want 401", name, a.status, a.raw)
		}
	}
	for name, header := range map[string]http.Header{
		"checked": {"Authorization": {stripped("plays@x.example")}},
		// Cloud Run passes the other header on as it came.
		"beside an unchecked one": {"X-Serverless-Authorization": {stripped("plays@x.example")}, "Authorization": {stripped("root@x.example")}},
	} {
		if a := submit(header); a.status != http.StatusAccepted || a.task.CreatedBy == nil || *a.task.CreatedBy != "plays@x.example" {
			t.Errorf("%s: %d %s, want 202 by plays@x.example", name, a.status, a.raw)
		}
	}
}

//go:build faults

package e2e

import (
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// makeToken prints a token as a service of the platform makes one with PyJWT.
const makeToken = `
import datetime, jwt, os
now = datetime.datetime.now(datetime.timezone.utc)
print(jwt.encode(
    {"iss": "auth-service", "sub": "user-1", "role": "artist", "iat": now, "exp": now + datetime.timedelta(minutes=15)},
    os.environ["AUTH_SECRET"], algorithm=os.environ["AUTH_ALGORITHM"]))
`

// readTokens prints what two libraries read in a token, with what a service of the platform
// demands of one: by PyJWT and by python-jose. AUDIENCE is empty where none is expected.
const readTokens = `
import json, os, sys
import jose.jwt, jwt
token, audience = sys.stdin.read(), os.environ["AUDIENCE"] or None
demands = {"algorithms": [os.environ["AUTH_ALGORITHM"]], "issuer": "auth-service", "audience": audience}
by_pyjwt = jwt.decode(token, os.environ["PUBLIC"], options={"require": ["exp", "iat", "iss", "sub"]}, **demands)
by_jose = jose.jwt.decode(token, os.environ["PUBLIC"], **demands)
assert by_pyjwt == by_jose, (by_pyjwt, by_jose)
header = jwt.get_unverified_header(token)
assert header == {"alg": os.environ["AUTH_ALGORITHM"], "typ": "JWT"}, header
print(json.dumps(by_pyjwt))
`

// newKeys prints a private and a public key in PEM, as JSON.
const newKeys = `
import json, sys
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
key = rsa.generate_private_key(65537, 2048) if sys.argv[1] == "RS256" else ec.generate_private_key(ec.SECP256R1())
print(json.dumps([
    key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode(),
    key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode(),
]))
`

// Services in Python, with PyJWT or python-jose, take the service's tokens, and it
// takes theirs.
func TestTokensInPython(t *testing.T) {
	t.Parallel()
	interpreter := python(t, "jwt, jose, cryptography", "python3-jwt python3-jose python3-cryptography")
	run := func(t *testing.T, script, stdin string, environ []string, args ...string) string {
		t.Helper()
		command := exec.Command(interpreter, append([]string{"-c", script}, args...)...)
		command.Env, command.Stdin = append(os.Environ(), environ...), strings.NewReader(stdin)
		out, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("%v:\n%s\n%s", err, script, out)
		}
		return strings.TrimSpace(string(out))
	}
	for _, algorithm := range []string{"HS256", "RS256", "ES256"} {
		t.Run(algorithm, func(t *testing.T) {
			t.Parallel()
			private, public := platformSecret, platformSecret
			if algorithm != "HS256" {
				var keys []string
				if err := json.Unmarshal([]byte(run(t, newKeys, "", nil, algorithm)), &keys); err != nil {
					t.Fatal(err)
				}
				private, public = keys[0], keys[1]
			}
			environ := []string{"AUTH_ALGORITHM=" + algorithm, "AUTH_SECRET=" + private, "PUBLIC=" + public}
			target := newTarget(t, statusOf)
			p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "AUTH=jwt", "AUTH_ALGORITHM="+algorithm, "AUTH_SECRET="+private,
				"AUTH_ROLES=artist:submit+read", "JWT_TARGET_HOSTS=127.0.0.1", "JWT_ROLES=admin")
			header := http.Header{"Authorization": {"Bearer " + run(t, makeToken, "", environ)}}
			for audience, member := range map[string]string{"": "", "catalogue": `,"audience":"catalogue"`} {
				a := p.send(http.MethodPost, "/enqueue", `{"url":"`+target.url+`/200/`+audience+`","auth":{"type":"jwt"`+member+`}}`, header)
				if a.status != http.StatusAccepted || a.task.CreatedBy == nil || *a.task.CreatedBy != "user-1" {
					t.Fatalf("a token by PyJWT: %d %s, want a task of user-1", a.status, a.raw)
				}
				eventually(t, func() bool { return len(target.got("/200/"+audience)) == 1 }, func() string { return "no call" })
				token := strings.TrimPrefix(target.got("/200/" + audience)[0].header.Get("Authorization"), "Bearer ")
				var claims map[string]any
				if err := json.Unmarshal([]byte(run(t, readTokens, token, append(environ, "AUDIENCE="+audience))), &claims); err != nil {
					t.Fatal(err)
				}
				if claims["sub"] != "orchestrator" || claims["role"] != "admin" || (claims["aud"] != nil) != (audience != "") {
					t.Errorf("Python reads %v", claims)
				}
			}
		})
	}
}

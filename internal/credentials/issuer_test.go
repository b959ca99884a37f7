package credentials

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/jwtkey"
	"github.com/melodia/orchestrator/internal/task"
)

const platformSecret = "melodia-s3cr3t-of-32-bytes-or-more"

func platform(change func(*IssuerOptions)) IssuerOptions {
	o := IssuerOptions{Hosts: []string{"catalogue.melodia.app", "127.0.0.1"}, Roles: []string{"service", "admin"}, Name: "auth-service", Algorithm: "HS256", Secret: platformSecret}
	change(&o)
	return o
}

// claimsOf returns what a token says, if the platform's secret has signed it.
func claimsOf(t *testing.T, token string) map[string]any {
	t.Helper()
	key, err := jwtkey.New(jwtkey.HS256, platformSecret)
	if err != nil {
		t.Fatal(err)
	}
	text, err := key.Verify(token)
	if err != nil {
		t.Fatalf("token %q: %v", token, err)
	}
	var claims map[string]any
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&claims); err != nil {
		t.Fatal(err)
	}
	return claims
}

// A token is made for the moment of the call: a little back, since clocks differ, and for
// five minutes. It names an audience only where one is asked for.
func TestTokensOfThePlatform(t *testing.T) {
	t.Parallel()
	issuer, err := NewIssuer(platform(func(*IssuerOptions) {}))
	if err != nil {
		t.Fatal(err)
	}
	set := &Set{Issuer: issuer}
	at := time.Date(2026, 12, 24, 21, 0, 0, 999_999_999, time.UTC)
	number := func(at time.Time) json.Number {
		b, _ := json.Marshal(at.Unix())
		return json.Number(b)
	}
	for _, tt := range []struct {
		want     task.JWT
		role     string
		audience any
	}{
		{task.JWT{}, "service", nil},
		{task.JWT{Role: "admin"}, "admin", nil},
		{task.JWT{Audience: "catalogue"}, "service", "catalogue"},
		{task.JWT{Role: "service", Audience: "https://catálogo.melodia.app/?a=b&c"}, "service", "https://catálogo.melodia.app/?a=b&c"},
	} {
		added, err := set.For(t.Context(), parse(t, "https://catalogue.melodia.app/x"), Wanted{JWT: &tt.want, At: at, Retry: true})
		if err != nil {
			t.Errorf("%+v: %v", tt.want, err)
			continue
		}
		want := map[string]any{"iss": "auth-service", "sub": "orchestrator", "role": tt.role, "iat": number(at.Add(-30 * time.Second)), "exp": number(at.Add(5 * time.Minute))}
		if tt.audience != nil {
			want["aud"] = tt.audience
		}
		if diff := cmp.Diff(want, claimsOf(t, added.Token())); diff != "" {
			t.Errorf("%+v: claims (-want +got):\n%s", tt.want, diff)
		}
		if !added.Replaces("authorization") || added.Replaces("X-Authorization") {
			t.Errorf("%+v: the token does not take the place of Authorization alone", tt.want)
		}
		// A 401 is an answer as any: another token would be no other.
		if set.TokenRefused(added, at) {
			t.Errorf("%+v: a refused token is to be tried again", tt.want)
		}
		body := `{"you sent":"Bearer ` + added.Token() + `"}`
		if kept, _, _ := added.Read(strings.NewReader(body), make([]byte, 4<<10), 1<<20); string(kept) != `{"you sent":"Bearer [redacted]"}` {
			t.Errorf("%+v: of an answer that repeats the token %q is kept", tt.want, kept)
		}
	}
	// Each call has one of its own moment.
	first, _ := set.For(t.Context(), parse(t, "https://catalogue.melodia.app/"), Wanted{JWT: &task.JWT{}, At: at})
	second, _ := set.For(t.Context(), parse(t, "https://catalogue.melodia.app/"), Wanted{JWT: &task.JWT{}, At: at.Add(time.Hour)})
	if a, b := claimsOf(t, first.Token())["exp"], claimsOf(t, second.Token())["exp"]; a == b {
		t.Errorf("calls an hour apart have tokens with the same end %v", a)
	}
}

// The rules are asked again when the call is made: the settings may have changed since.
func TestTokensOfThePlatformGoNowhereElse(t *testing.T) {
	t.Parallel()
	issuer, err := NewIssuer(platform(func(*IssuerOptions) {}))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		issuer    *Issuer
		url, role string
		want      string // "" is allowed
	}{
		{issuer, "https://catalogue.melodia.app/x", "", ""},
		{issuer, "https://CATALOGUE.melodia.app.:8443/x", "admin", ""},
		{issuer, "http://127.0.0.1:8080/", "service", ""},
		{nil, "https://catalogue.melodia.app/x", "", errIssuerOff.Error()},
		{issuer, "https://evil.example/", "", errIssuerHost.Error()},
		{issuer, "https://catalogue.melodia.app.evil.example/", "admin", errIssuerHost.Error()},
		{issuer, "https://x.catalogue.melodia.app/", "admin", errIssuerHost.Error()},
		{issuer, "http://catalogue.melodia.app/", "", errIssuerHTTP.Error()},
		{issuer, "https://catalogue.melodia.app/x", "root", errIssuerRole.Error()},
		{issuer, "https://catalogue.melodia.app/x", "Admin", errIssuerRole.Error()},
		{issuer, "https://evil.example/", "root", errIssuerHost.Error()}, // whether there is such a role is not told there
	} {
		got := ""
		if err := tt.issuer.Check(tt.url, tt.role); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("Check(%s, %s) = %q, want %q", tt.url, tt.role, got, tt.want)
		}
		set := &Set{Issuer: tt.issuer}
		added, err := set.For(t.Context(), parse(t, tt.url), Wanted{JWT: &task.JWT{Role: tt.role}, At: began})
		e, refused := err.(*Error)
		if (tt.want == "") != (err == nil) || (added.Token() != "") != (tt.want == "") {
			t.Errorf("For %s, %s = token %q, %v", tt.url, tt.role, added.Token(), err)
		}
		if err != nil && (!refused || !e.Refused() || e.Error() != "the task's auth "+tt.want) {
			t.Errorf("For %s, %s: %v, want it refused: %s", tt.url, tt.role, err, tt.want)
		}
	}
}

func TestNewIssuer(t *testing.T) {
	t.Parallel()
	const marker = "s3cr3t-m4rk3r"
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	public := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	for name, tt := range map[string]struct {
		change func(*IssuerOptions)
		want   []string // the start of each line
	}{
		"right":        {func(*IssuerOptions) {}, nil},
		"off":          {func(o *IssuerOptions) { *o = IssuerOptions{Secret: marker} }, nil},
		"nothing else": {func(o *IssuerOptions) { *o = IssuerOptions{Hosts: o.Hosts} }, []string{"JWT_ROLES must name a role", "JWT_TARGET_HOSTS: AUTH_ISSUER must be", "JWT_TARGET_HOSTS: AUTH_ALGORITHM must be"}},
		"no secret":    {func(o *IssuerOptions) { o.Secret = "" }, []string{"JWT_TARGET_HOSTS: AUTH_SECRET must be what tokens are signed with"}},
		"a public key": {func(o *IssuerOptions) { o.Algorithm, o.Secret = "RS256", public }, []string{"JWT_TARGET_HOSTS: AUTH_SECRET must be a private key in PEM"}},
		"no key":       {func(o *IssuerOptions) { o.Algorithm, o.Secret = "ES256", marker }, []string{"JWT_TARGET_HOSTS: AUTH_SECRET must be a key of the curve P-256"}},
		"wrong hosts": {func(o *IssuerOptions) { o.Hosts = []string{"https://" + marker, "a.example", marker + ":1"} },
			[]string{"JWT_TARGET_HOSTS: entry 1: ", "JWT_TARGET_HOSTS: entry 3: "}},
		"wrong roles": {func(o *IssuerOptions) {
			o.Roles = []string{"a", marker + " ", "", "a", strings.Repeat("r", 65), marker + "\n"}
		},
			[]string{"JWT_ROLES: entry 2: ", "JWT_ROLES: entry 3: ", "JWT_ROLES: entry 4: ", "JWT_ROLES: entry 5: ", "JWT_ROLES: entry 6: "}},
	} {
		_, err := NewIssuer(platform(tt.change))
		var got []string
		if err != nil {
			got = strings.Split(err.Error(), "\n")
		}
		same := len(got) == len(tt.want)
		for i := range got {
			same = same && strings.HasPrefix(got[i], tt.want[i])
		}
		if !same || err != nil && strings.Contains(err.Error(), marker) {
			t.Errorf("%s: got %q, want %q and no value", name, got, tt.want)
		}
	}
}

func BenchmarkTokenOfThePlatform(b *testing.B) {
	issuer, err := NewIssuer(platform(func(*IssuerOptions) {}))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := issuer.token(&task.JWT{}, began); err != nil {
			b.Fatal(err)
		}
	}
}

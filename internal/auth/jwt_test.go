package auth

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"hash"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/auth/authtest"
	"github.com/melodia/orchestrator/internal/jwtkey"
	"github.com/melodia/orchestrator/internal/task"
)

// platformSecret is what all services of the platform share.
const platformSecret = "melodia-" + marker + "-of-32-bytes-or-more"

// platform are settings that let tokens of the platform in.
func platform(change func(*Options)) Options {
	o := Options{
		Methods: []string{"jwt"}, AuthSecret: platformSecret, AuthAlgorithm: "HS256", AuthIssuer: "auth-service",
		AuthRoles: []string{"admin:submit+read+manage", " artist:submit", "urn:melodia:reader:read"},
	}
	change(&o)
	return o
}

func unchanged(*Options) {}

// userClaims are those of a right token.
func userClaims() map[string]any {
	now := time.Now()
	return map[string]any{"iss": "auth-service", "sub": "user-1", "role": "artist", "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
}

// withClaim returns the claims of a right token, and one more or another; nil leaves it out.
func withClaim(name string, value any) map[string]any {
	c := userClaims()
	if c[name] = value; value == nil {
		delete(c, name)
	}
	return c
}

func byHMAC(h func() hash.Hash, secret []byte) func([]byte) []byte {
	return func(input []byte) []byte {
		mac := hmac.New(h, secret)
		_, _ = mac.Write(input)
		return mac.Sum(nil)
	}
}

func byRSA(t *testing.T, key *rsa.PrivateKey) func([]byte) []byte {
	return func(input []byte) []byte {
		sum := sha256.Sum256(input)
		signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return signature
	}
}

func byECDSA(t *testing.T, key *ecdsa.PrivateKey) func([]byte) []byte {
	return func(input []byte) []byte {
		sum := sha256.Sum256(input)
		r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	}
}

// hs256 signs claims as the platform's auth service does.
func hs256(t *testing.T, claims any) string {
	return authtest.Token(t, map[string]any{"alg": "HS256", "typ": "JWT"}, claims, byHMAC(sha256.New, []byte(platformSecret)))
}

// Every claim is judged by its own name, and a refusal says by which.
func TestPlatformTokens(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthenticator(t, platform(unchanged))
		now := time.Now()
		const (
			issuer  = "the token's claim iss must be the issuer that this service knows"
			subject = "the token's claim sub must be a text of 1 to 254 bytes without spaces, or a whole number"
			noEnd   = "the token's claim exp must be there: a token that never ends is not taken"
			ended   = "the token's claim exp has passed; ask for a new token"
			future  = " is in the future: the token does not count yet, or the clocks differ"
			number  = " must be a number of seconds since 1970"
			text    = " must be a text or a list of texts"
			in      = "user-1[submit]"
		)
		claims := func(name string, value any) string { return hs256(t, withClaim(name, value)) }
		raw := func(claims string) string { return hs256(t, json.RawMessage(claims)) }
		long := strings.Repeat("x", 255)
		for name, tt := range map[string]struct{ token, want string }{
			"right":                          {hs256(t, userClaims()), in},
			"an integer as subject":          {claims("sub", 42), "42[submit]"},
			"a large one":                    {claims("sub", json.RawMessage("12345678901234567890123")), "12345678901234567890123[submit]"},
			"a negative one":                 {claims("sub", -1), "-1[submit]"},
			"a UUID as subject":              {claims("sub", "0190a6c1-7d4e-7a3b-8f6e-2b9d4c1a5e70"), "0190a6c1-7d4e-7a3b-8f6e-2b9d4c1a5e70[submit]"},
			"a fraction as subject":          {claims("sub", 1.5), subject},
			"an exponent as subject":         {claims("sub", json.RawMessage("1e3")), subject},
			"a flag as subject":              {claims("sub", true), subject},
			"a list as subject":              {claims("sub", []string{marker}), subject},
			"the service's own":              {claims("sub", "orchestrator"), errOwn.Error()},
			"no subject":                     {claims("sub", nil), subject},
			"null as subject":                {claims("sub", json.RawMessage("null")), subject},
			"an empty subject":               {claims("sub", ""), subject},
			"a subject with a line feed":     {claims("sub", marker+"\n"), subject},
			"a subject that is too long":     {claims("sub", long), subject},
			"a longest subject":              {claims("sub", long[1:]), long[1:] + "[submit]"},
			"another issuer":                 {claims("iss", marker), issuer},
			"the issuer in other letters":    {claims("iss", "Auth-Service"), issuer},
			"the issuer in a list":           {claims("iss", []string{"auth-service"}), issuer},
			"no issuer":                      {claims("iss", nil), issuer},
			"expired":                        {claims("exp", now.Unix()), ended},
			"about to expire":                {claims("exp", now.Unix()+1), in},
			"ends at a fraction":             {claims("exp", float64(now.Unix())+0.5), in},
			"expired long ago":               {claims("exp", 0), ended},
			"a negative end":                 {claims("exp", -1), ended},
			"no end":                         {claims("exp", nil), noEnd},
			"null as end":                    {claims("exp", json.RawMessage("null")), "the token's claim exp" + number},
			"the end as a text":              {claims("exp", "99999999999"), "the token's claim exp" + number},
			"an end beyond all numbers":      {claims("exp", json.RawMessage("1e999")), "the token's claim exp" + number},
			"an end beyond all calendars":    {claims("exp", 1e300), "the token's claim exp" + number},
			"the end as a list":              {claims("exp", []int64{now.Unix() + 60}), "the token's claim exp" + number},
			"not valid yet":                  {claims("nbf", now.Unix()+31), "the token's claim nbf" + future},
			"not valid yet by another clock": {claims("nbf", now.Unix()+30), in},
			"nbf of no sort":                 {claims("nbf", marker), "the token's claim nbf" + number},
			"made in the future":             {claims("iat", now.Unix()+31), "the token's claim iat" + future},
			"made by a clock ahead":          {claims("iat", now.Unix()+30), in},
			"without iat":                    {claims("iat", nil), in},
			"for others":                     {claims("aud", marker), "the token's claim aud must not be there: the token is for others, or AUTH_AUDIENCE of this service is to be set"},
			"with a null aud":                {claims("aud", json.RawMessage("null")), in},
			"two roles":                      {claims("role", []string{"urn:melodia:reader", "artist", "artist"}), "user-1[read submit]"},
			"roles":                          {hs256(t, map[string]any{"iss": "auth-service", "sub": "u", "exp": now.Unix() + 9, "roles": []string{"admin", "artist"}}), "u[submit read manage]"},
			"a role that is in no setting":   {claims("role", marker), "user-1[]"},
			"a role in other letters":        {claims("role", "Admin"), "user-1[]"},
			"no role":                        {claims("role", nil), "user-1[]"},
			"an empty role":                  {claims("role", ""), "user-1[]"},
			"null as role":                   {claims("role", json.RawMessage("null")), "user-1[]"},
			"null among roles":               {claims("role", json.RawMessage(`["artist",null]`)), in},
			"a number as role":               {claims("role", 1), "the token's claim role" + text},
			"an object among roles":          {claims("roles", []any{map[string]string{"admin": "admin"}}), "the token's claim roles" + text},

			// What is spelt otherwise is another claim, which says nothing to us.
			"a private claim Exp":         {claims("Exp", 0), in},
			"a private claim EXP as text": {claims("EXP", "soon"), in},
			"Exp for exp":                 {raw(`{"iss":"auth-service","sub":"user-1","Exp":99999999999}`), noEnd},
			"Sub for sub":                 {raw(`{"iss":"auth-service","Sub":"user-1","exp":99999999999}`), subject},
			"Iss beside iss":              {claims("Iss", "someone-else"), in},
			"a long s":                    {raw(`{"i\u017fs":"auth-service","sub":"user-1","exp":99999999999}`), issuer},
			"Role for role":               {raw(`{"iss":"auth-service","sub":"user-1","exp":99999999999,"Role":"admin"}`), "user-1[]"},
			"an escaped name":             {raw(`{"iss":"auth-service","sub":"user-1","\u0065xp":99999999999}`), "user-1[]"},

			// A claim that is there twice is read by some as the first, by others as the last.
			"exp twice":          {raw(`{"iss":"auth-service","sub":"user-1","exp":1,"exp":99999999999}`), errClaims.Error()},
			"sub twice":          {raw(`{"iss":"auth-service","sub":"user-1","exp":99999999999,"sub":"root"}`), errClaims.Error()},
			"twice, one escaped": {raw(`{"iss":"auth-service","sub":"user-1","exp":99999999999,"r\u006fle":"admin","role":"artist"}`), errClaims.Error()},
			"a list of claims":   {raw(`[{"iss":"auth-service"}]`), errClaims.Error()},
			"claims of no sort":  {authtest.Token(t, map[string]any{"alg": "HS256"}, marker, byHMAC(sha256.New, []byte(platformSecret))), errClaims.Error()},
		} {
			header := bearing(tt.token)
			if got := identity(a, header); got != tt.want {
				t.Errorf("%s: got %q, want %q", name, got, tt.want)
			} else if strings.Contains(got, marker) {
				t.Errorf("%s: the answer holds a value that was sent: %q", name, got)
			}
		}
	})
}

// The algorithm is the setting's, whatever the token says, and so is the key.
func TestPlatformTokensForged(t *testing.T) {
	t.Parallel()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	strangerRSA, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	strangerEC, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pkix := func(key any) []byte {
		b, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	inPEM := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	rsaPublic, ecPublic := inPEM("PUBLIC KEY", pkix(&rsaKey.PublicKey)), inPEM("PUBLIC KEY", pkix(&ecKey.PublicKey))
	none := func([]byte) []byte { return nil }
	const form, algorithm, signature = "form", "algorithm", "signature"
	refusals := map[string]string{form: jwtkey.ErrForm.Error(), algorithm: jwtkey.ErrAlgorithm.Error(), signature: jwtkey.ErrSignature.Error(), "in": "user-1[submit]"}

	for _, service := range []struct {
		algorithm, secret string
		sign, stranger    func([]byte) []byte
	}{
		{"HS256", platformSecret, byHMAC(sha256.New, []byte(platformSecret)), byHMAC(sha256.New, []byte(strings.ToUpper(platformSecret)))},
		{"HS256", "short", byHMAC(sha256.New, []byte("short")), byHMAC(sha256.New, []byte("short!"))},
		{"RS256", rsaPublic, byRSA(t, rsaKey), byRSA(t, strangerRSA)},
		{"ES256", ecPublic, byECDSA(t, ecKey), byECDSA(t, strangerEC)},
	} {
		a := newAuthenticator(t, platform(func(o *Options) { o.AuthAlgorithm, o.AuthSecret = service.algorithm, service.secret }))
		token := func(header map[string]any, sign func([]byte) []byte) string {
			return authtest.Token(t, header, userClaims(), sign)
		}
		right := token(map[string]any{"alg": service.algorithm}, service.sign)
		parts := strings.Split(right, ".")
		other := strings.Split(authtest.Token(t, map[string]any{"alg": service.algorithm}, withClaim("role", "admin"), service.sign), ".")
		jwk, err := json.Marshal(map[string]any{"kty": "oct", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U"})
		if err != nil {
			t.Fatal(err)
		}
		attacks := map[string]struct{ token, want string }{
			"right":                     {right, "in"},
			"right, with a type":        {token(map[string]any{"alg": service.algorithm, "typ": "at+jwt", "kid": "any"}, service.sign), "in"},
			"none":                      {token(map[string]any{"alg": "none"}, none), algorithm},
			"None":                      {token(map[string]any{"alg": "None"}, none), algorithm},
			"none, but signed":          {token(map[string]any{"alg": "none"}, service.sign), algorithm},
			"no algorithm":              {token(map[string]any{"typ": "JWT"}, service.sign), algorithm},
			"an algorithm of no sort":   {token(map[string]any{"alg": 1}, service.sign), algorithm},
			"in small letters":          {token(map[string]any{"alg": strings.ToLower(service.algorithm)}, service.sign), algorithm},
			"Alg for alg":               {token(map[string]any{"Alg": service.algorithm}, service.sign), algorithm},
			"HS512 with the secret":     {token(map[string]any{"alg": "HS512"}, byHMAC(sha512.New, []byte(service.secret))), algorithm},
			"PS256":                     {token(map[string]any{"alg": "PS256"}, service.sign), algorithm},
			"by another":                {token(map[string]any{"alg": service.algorithm}, service.stranger), signature},
			"by its own key":            {token(map[string]any{"alg": service.algorithm, "jwk": json.RawMessage(jwk)}, service.stranger), form},
			"by a key elsewhere":        {token(map[string]any{"alg": service.algorithm, "jku": "https://evil.example/keys"}, service.stranger), signature},
			"with something critical":   {token(map[string]any{"alg": service.algorithm, "crit": []string{"exp"}, "exp": 1}, service.sign), signature},
			"other claims":              {parts[0] + "." + other[1] + "." + parts[2], signature},
			"another header":            {other[0] + "." + parts[1] + "." + other[2], signature},
			"without its signature":     {parts[0] + "." + parts[1] + ".", signature},
			"a part of its signature":   {right[:len(right)-4], signature},
			"two parts":                 {parts[0] + "." + parts[1], form},
			"four parts":                {right + "." + parts[2], form},
			"many parts":                {strings.Repeat(".", 8000), form},
			"encrypted":                 {strings.Repeat("e30.", 4) + "e30", form},
			"no token":                  {marker, form},
			"in JSON":                   {`{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`, form},
			"with padding":              {parts[0] + "=." + parts[1] + "." + parts[2], form},
			"huge":                      {authtest.Token(t, map[string]any{"alg": service.algorithm}, withClaim("x", strings.Repeat("x", 8<<10)), service.sign), form},
			"large":                     {authtest.Token(t, map[string]any{"alg": service.algorithm}, withClaim("x", strings.Repeat("x", 5<<10)), service.sign), "in"},
			"alg twice":                 {encoded(`{"alg":"none","alg":"`+service.algorithm+`"}`) + "." + parts[1] + "." + parts[2], form},
			"HS256 with an empty key":   {token(map[string]any{"alg": "HS256"}, byHMAC(sha256.New, nil)), algorithm},
			"HS256 with the public key": {token(map[string]any{"alg": "HS256"}, byHMAC(sha256.New, []byte(service.secret))), algorithm},
		}
		if service.algorithm == "HS256" {
			delete(attacks, "HS256 with the public key") // it is the secret
			attacks["HS256 with an empty key"] = struct{ token, want string }{attacks["HS256 with an empty key"].token, signature}
			attacks["RS256"] = struct{ token, want string }{token(map[string]any{"alg": "RS256"}, byRSA(t, strangerRSA)), algorithm}
		} else {
			block, _ := pem.Decode([]byte(service.secret))
			for name, secret := range map[string]string{"in DER": string(block.Bytes), "without the last line feed": strings.TrimSpace(service.secret), "in one line": strings.ReplaceAll(service.secret, "\n", "")} {
				attacks["HS256 with the public key "+name] = struct{ token, want string }{token(map[string]any{"alg": "HS256"}, byHMAC(sha256.New, []byte(secret))), algorithm}
			}
		}
		for name, attack := range attacks {
			if got, want := identity(a, bearing(attack.token)), refusals[attack.want]; got != want {
				t.Errorf("%s, %s: got %q, want %q", service.algorithm, name, got, want)
			}
		}
		want(t, a, http.Header{"Authorization": {"Bearer " + right, "Bearer " + right}}, errSeveral.Error())
		want(t, a, http.Header{"Authorization": {"Bearer " + right}, "X-Api-Key": {right}}, errSeveral.Error())
		want(t, a, http.Header{"X-Api-Key": {right}}, errKey.Error())
		want(t, a, http.Header{}, errNone.Error())
		want(t, a, bearing(parts[0]+"."+parts[1]+stripped), errStripped.Error())
	}
}

func encoded(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }

// With an audience of its own the service takes tokens for itself.
func TestPlatformAudience(t *testing.T) {
	t.Parallel()
	a := newAuthenticator(t, platform(func(o *Options) { o.AuthAudience = "orchestrator" }))
	const refused = "the token's claim aud must name this service"
	for name, tt := range map[string]struct {
		audience any
		want     string
	}{
		"its own":          {"orchestrator", "user-1[submit]"},
		"among others":     {[]string{"catalogue", "orchestrator"}, "user-1[submit]"},
		"others":           {[]string{"catalogue", "Orchestrator", ""}, refused},
		"another":          {marker, refused},
		"none":             {nil, refused},
		"null":             {json.RawMessage("null"), refused},
		"an empty list":    {[]string{}, refused},
		"a number":         {1, "the token's claim aud must be a text or a list of texts"},
		"a list of a list": {[]any{[]string{"orchestrator"}}, "the token's claim aud must be a text or a list of texts"},
	} {
		if got := identity(a, bearing(hs256(t, withClaim("aud", tt.audience)))); got != tt.want {
			t.Errorf("%s: got %q, want %q", name, got, tt.want)
		}
	}
}

// Public keys at a URL: fetched once, again when a token names an unknown one, and
// nobody comes in while they cannot be had.
func TestPlatformKeysAtURL(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		issuer := authtest.New(t)
		a := newAuthenticator(t, platform(func(o *Options) {
			o.AuthSecret, o.AuthAlgorithm, o.AuthJWKSURL = "", "RS256", issuerURL+"/keys"
		}))
		a.jwt.client = newIssuerClient(serve(issuer))
		unavailable := func(token string) {
			t.Helper()
			name, _, err := a.Authenticate(t.Context(), bearing(token))
			if !errors.Is(err, task.ErrUnavailable) || name != "" || strings.Contains(err.Error(), token) {
				t.Errorf("got %q and %v, want that it is unavailable", name, err)
			}
		}
		const in = "user-1[submit]"
		issuer.SetAway(true)
		unavailable(issuer.Token(userClaims()))
		want(t, a, bearing(hs256(t, userClaims())), jwtkey.ErrAlgorithm.Error()) // needs no key
		want(t, a, bearing(marker), jwtkey.ErrForm.Error())
		issuer.SetAway(false)
		time.Sleep(failedFor + time.Nanosecond)
		old := issuer.Token(userClaims())
		for range 10 {
			want(t, a, bearing(old), in)
		}
		if n := issuer.Fetches(); n != 2 {
			t.Errorf("the keys were asked for %d times, want twice", n)
		}
		issuer.Rotate()
		time.Sleep(freshFor + time.Nanosecond)
		want(t, a, bearing(old), in) // its key is kept
		issuer.SetAway(true)
		unavailable(issuer.Token(userClaims()))
		want(t, a, bearing(old), in)
		issuer.SetAway(false)
		time.Sleep(failedFor + time.Nanosecond)
		want(t, a, bearing(issuer.Token(userClaims())), in)
		want(t, a, bearing(old), jwtkey.ErrSignature.Error())
		want(t, a, bearing(issuer.Token(withClaim("iss", issuerURL))), "the token's claim iss must be the issuer that this service knows")
		stranger := authtest.New(t)
		stranger.Rotate()
		before := issuer.Fetches()
		for range 100 {
			want(t, a, bearing(stranger.Token(userClaims())), jwtkey.ErrSignature.Error())
		}
		if n := issuer.Fetches() - before; n > 1 {
			t.Errorf("a flood of unknown keys asked %d times", n)
		}
		synctest.Wait()
	})
}

// However the keys fail to come, it is not the caller's fault.
func TestPlatformKeysFail(t *testing.T) {
	t.Parallel()
	for name, w := range map[string]wire{
		"no connection": func(*http.Request) (*http.Response, error) { return nil, errors.New("no route to host") },
		"no answer": func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		},
		"no key set": func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(`{"keys":"none"}`))}, nil
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			issuer := authtest.New(t)
			a := newAuthenticator(t, platform(func(o *Options) {
				o.AuthSecret, o.AuthAlgorithm, o.AuthJWKSURL = "", "RS256", issuerURL+"/keys"
			}))
			a.jwt.client = newIssuerClient(w)
			begin := time.Now()
			if _, _, err := a.Authenticate(t.Context(), bearing(issuer.Token(userClaims()))); !errors.Is(err, task.ErrUnavailable) {
				t.Errorf("%s: got %v, want that it is unavailable", name, err)
			}
			if took := time.Since(begin); took > issuerTimeout {
				t.Errorf("%s: took %v", name, took)
			}
			synctest.Wait()
		})
	}
}

// All ways beside each other: a token is told by its issuer, and the subject of one is
// never taken for the caller of another way.
func TestPlatformBesideOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		issuer := authtest.New(t)
		issuer.URL = issuerURL
		key, entry := newKey(t, "plays", "read")
		a := newAuthenticator(t, platform(func(o *Options) {
			o.Methods, o.APIKeys = []string{"api_key", "oidc", "jwt"}, []string{entry}
			o.OIDCIssuer, o.OIDCAudience, o.OIDCAllow = issuerURL, audience, []string{"plays@x.example:manage"}
		}))
		a.tokens.client = newIssuerClient(serve(issuer))
		want(t, a, bearing(key), "plays[read]")
		want(t, a, http.Header{"X-Api-Key": {key}}, "plays[read]")
		want(t, a, bearing(key+"x"), errKey.Error())
		want(t, a, bearing(hs256(t, userClaims())), "user-1[submit]")
		want(t, a, bearing(issuer.Token(issuer.Claims("plays@x.example", audience))), "plays@x.example[manage]")
		want(t, a, bearing(hs256(t, withClaim("sub", "plays"))), errTaken.Error())
		want(t, a, bearing(hs256(t, withClaim("sub", "plays@x.example"))), errTaken.Error())
		want(t, a, bearing(hs256(t, withClaim("sub", "Plays"))), "Plays[submit]")
		// Either kind of token by the other's means.
		claims := issuer.Claims("plays@x.example", audience)
		want(t, a, bearing(hs256(t, claims)), errToken.Error())
		maps.Copy(claims, userClaims())
		want(t, a, bearing(issuer.Token(claims)), jwtkey.ErrAlgorithm.Error())
		want(t, a, bearing(marker), errToken.Error())
		synctest.Wait()
	})
}

func TestPlatformSettings(t *testing.T) {
	t.Parallel()
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
		change func(*Options)
		want   []string // the start of each line
	}{
		"right": {unchanged, nil},
		"a key": {func(o *Options) { o.AuthAlgorithm, o.AuthSecret = "RS256", public }, nil},
		"a URL": {func(o *Options) {
			o.AuthAlgorithm, o.AuthSecret, o.AuthJWKSURL = "ES256", "", "https://id.example/keys"
		}, nil},
		"nothing":           {func(o *Options) { *o = Options{Methods: []string{"jwt"}} }, []string{"AUTH_ISSUER must be", "AUTH_ALGORITHM must be", "AUTH_ROLES is not set"}},
		"no secret":         {func(o *Options) { o.AuthSecret = "" }, []string{"AUTH_SECRET is not set, and AUTH names jwt"}},
		"no roles":          {func(o *Options) { o.AuthRoles = nil }, []string{"AUTH_ROLES is not set, and AUTH names jwt"}},
		"another algorithm": {func(o *Options) { o.AuthAlgorithm = "HS512" }, []string{"AUTH_ALGORITHM must be HS256, RS256 or ES256"}},
		"none":              {func(o *Options) { o.AuthAlgorithm = "none" }, []string{"AUTH_ALGORITHM must be HS256, RS256 or ES256"}},
		"a public secret":   {func(o *Options) { o.AuthSecret = public }, []string{"AUTH_SECRET is a key or certificate in PEM, which HS256"}},
		"a secret as key":   {func(o *Options) { o.AuthAlgorithm = "RS256" }, []string{"AUTH_SECRET must be an RSA key"}},
		"a key of RSA":      {func(o *Options) { o.AuthAlgorithm, o.AuthSecret = "ES256", public }, []string{"AUTH_SECRET must be a key of the curve P-256"}},
		"a URL for secrets": {func(o *Options) { o.AuthSecret, o.AuthJWKSURL = "", "https://id.example/keys" }, []string{"AUTH_JWKS_URL has public keys"}},
		"a URL and a key": {func(o *Options) {
			o.AuthAlgorithm, o.AuthSecret, o.AuthJWKSURL = "RS256", public, "https://id.example/keys"
		}, []string{"AUTH_SECRET and AUTH_JWKS_URL must not both be set"}},
		"a URL, and to sign": {func(o *Options) {
			o.AuthAlgorithm, o.AuthSecret, o.AuthJWKSURL, o.AuthSecretSigns = "RS256", public, "https://id.example/keys", true
		}, nil},
		"a URL without TLS": {func(o *Options) {
			o.AuthAlgorithm, o.AuthSecret, o.AuthJWKSURL = "RS256", "", "http://"+marker+".example/keys"
		}, []string{"AUTH_JWKS_URL must be an https URL"}},
		"wrong roles": {func(o *Options) {
			o.AuthRoles = []string{marker, marker + ":" + marker, ":read", "a b:read", "a:read", "a:submit", "a:read+read", "b:"}
		}, []string{
			"AUTH_ROLES, entry 1: scopes", "AUTH_ROLES, entry 2: scopes", "AUTH_ROLES, entry 3: it must be role:scopes", "AUTH_ROLES, entry 4: it must be",
			"AUTH_ROLES, entry 6: it must be", "AUTH_ROLES, entry 7: scopes", "AUTH_ROLES, entry 8: scopes",
		}},
		"two issuers in one": {func(o *Options) {
			o.Methods, o.OIDCIssuer, o.OIDCAudience, o.OIDCAllow, o.AuthIssuer = []string{"oidc", "jwt"}, issuerURL, audience, []string{"a@x.example:read"}, issuerURL
		}, []string{"AUTH_ISSUER and OIDC_ISSUER must not be the same"}},
		"beside IAM": {func(o *Options) { o.Methods, o.OnCloudRun = []string{"jwt", "iam"}, true }, []string{"AUTH: none and iam stand alone"}},
	} {
		o := platform(tt.change)
		o.Scopes = scopes
		a, err := New(o)
		a.Close()
		var got []string
		if err != nil {
			got = strings.Split(err.Error(), "\n")
		}
		same := len(got) == len(tt.want)
		for i := range tt.want {
			same = same && strings.HasPrefix(got[i], tt.want[i])
		}
		if !same || err != nil && strings.Contains(err.Error(), marker) {
			t.Errorf("%s: got %q, want %q and no value", name, got, tt.want)
		}
	}
}

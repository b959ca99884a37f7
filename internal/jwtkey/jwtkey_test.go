package jwtkey_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"sync"
	"testing"

	"github.com/melodia/orchestrator/internal/jwtkey"
)

const (
	claims = `{"sub":"orchestrator"}`
	marker = "s3cr3t"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func inPEM(kind string, b []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
}

// A key signs what it verifies itself, in whichever form of PEM it comes; a public one
// verifies what the private one has signed.
func TestKeys(t *testing.T) {
	t.Parallel()
	rsaKey := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	ecKey := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	bytesOf := must[[]byte](t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	rsaPrivate, ecPrivate := inPEM("PRIVATE KEY", bytesOf(x509.MarshalPKCS8PrivateKey(rsaKey))), inPEM("PRIVATE KEY", bytesOf(x509.MarshalPKCS8PrivateKey(ecKey)))
	rsaPublic, ecPublic := inPEM("PUBLIC KEY", bytesOf(x509.MarshalPKIXPublicKey(&rsaKey.PublicKey))), inPEM("PUBLIC KEY", bytesOf(x509.MarshalPKIXPublicKey(&ecKey.PublicKey)))
	for name, tt := range map[string]struct {
		algorithm jwtkey.Algorithm
		secret    string
		verifier  string
		signs     bool
	}{
		"a secret":                 {jwtkey.HS256, strings.Repeat("x", 32), strings.Repeat("x", 32), true},
		"a short secret":           {jwtkey.HS256, "x", "x", true},
		"a long secret":            {jwtkey.HS256, strings.Repeat("ñ☃", 100), strings.Repeat("ñ☃", 100), true},
		"RSA in PKCS 8":            {jwtkey.RS256, rsaPrivate, rsaPublic, true},
		"RSA in PKCS 1":            {jwtkey.RS256, inPEM("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)), rsaPublic, true},
		"RSA, in one line":         {jwtkey.RS256, strings.ReplaceAll(rsaPrivate, "\n", `\n`), rsaPublic, true},
		"RSA, public, in PKCS 1":   {jwtkey.RS256, rsaPrivate, inPEM("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&rsaKey.PublicKey)), true},
		"RSA, a certificate":       {jwtkey.RS256, rsaPrivate, inPEM("CERTIFICATE", bytesOf(x509.CreateCertificate(rand.Reader, template, template, &rsaKey.PublicKey, rsaKey))), true},
		"RSA, public":              {jwtkey.RS256, rsaPublic, rsaPublic, false},
		"ECDSA in PKCS 8":          {jwtkey.ES256, ecPrivate, ecPublic, true},
		"ECDSA in SEC 1":           {jwtkey.ES256, inPEM("EC PRIVATE KEY", bytesOf(x509.MarshalECPrivateKey(ecKey))), ecPublic, true},
		"ECDSA, behind other text": {jwtkey.ES256, "# of 2026\n" + ecPrivate, ecPublic, true},
		"ECDSA, public":            {jwtkey.ES256, ecPublic, ecPublic, false},
	} {
		key, verifier := must[*jwtkey.Key](t)(jwtkey.New(tt.algorithm, tt.secret)), must[*jwtkey.Key](t)(jwtkey.New(tt.algorithm, tt.verifier))
		if key.CanSign() != tt.signs {
			t.Errorf("%s: CanSign() = %t, want %t", name, key.CanSign(), tt.signs)
		}
		if !tt.signs {
			continue
		}
		var calls sync.WaitGroup
		for range 4 {
			calls.Go(func() {
				token, err := key.Sign([]byte(claims))
				if err != nil {
					t.Errorf("%s: Sign: %v", name, err)
					return
				}
				for _, k := range []*jwtkey.Key{key, verifier} {
					if got, err := k.Verify(token); err != nil || string(got) != claims {
						t.Errorf("%s: Verify = %q, %v", name, got, err)
					}
				}
				header, _, _ := strings.Cut(token, ".")
				if text, err := base64.RawURLEncoding.DecodeString(header); err != nil || string(text) != `{"alg":"`+string(tt.algorithm)+`","typ":"JWT"}` {
					t.Errorf("%s: the header is %s, %v", name, text, err)
				}
			})
		}
		calls.Wait()
	}
}

// A short secret is filled up with zeros, which HMAC does as well.
func TestShortSecret(t *testing.T) {
	t.Parallel()
	token, err := must[*jwtkey.Key](t)(jwtkey.New(jwtkey.HS256, marker)).Sign([]byte(claims))
	if err != nil {
		t.Fatal(err)
	}
	at := strings.LastIndex(token, ".")
	mac := hmac.New(sha256.New, []byte(marker))
	_, _ = mac.Write([]byte(token[:at]))
	if want := base64.RawURLEncoding.EncodeToString(mac.Sum(nil)); token[at+1:] != want {
		t.Errorf("the signature is %s, want %s", token[at+1:], want)
	}
	for secret, want := range map[string]bool{"": true, strings.Repeat("x", 31): true, strings.Repeat("x", 32): false} {
		if got := jwtkey.IsShort(jwtkey.HS256, secret); got != want {
			t.Errorf("IsShort of %d bytes = %t", len(secret), got)
		}
	}
	if jwtkey.IsShort(jwtkey.RS256, "") {
		t.Error("IsShort of no secret")
	}
}

func TestKeysThatDoNotFit(t *testing.T) {
	t.Parallel()
	bytesOf := must[[]byte](t)
	pkcs8 := func(key any) string { return inPEM("PRIVATE KEY", bytesOf(x509.MarshalPKCS8PrivateKey(key))) }
	small := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 1024)) //nolint:gosec // it must be refused
	rsaKey := pkcs8(must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)))
	p256 := pkcs8(must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
	p384 := pkcs8(must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)))
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const rs, es, hs = "AUTH_SECRET must be an RSA key", "AUTH_SECRET must be a key of the curve P-256", "AUTH_SECRET is a key or certificate in PEM"
	for name, tt := range map[string]struct {
		algorithm jwtkey.Algorithm
		secret    string
		want      string
	}{
		"a small RSA key":   {jwtkey.RS256, pkcs8(small), rs},
		"a text for RSA":    {jwtkey.RS256, marker, rs},
		"nothing for RSA":   {jwtkey.RS256, "", rs},
		"ECDSA for RSA":     {jwtkey.RS256, p256, rs},
		"Ed25519 for RSA":   {jwtkey.RS256, pkcs8(ed), rs},
		"half a key":        {jwtkey.RS256, rsaKey[:len(rsaKey)/2], rs},
		"PEM of no sort":    {jwtkey.RS256, inPEM("PRIVATE KEY", []byte(marker)), rs},
		"RSA for ECDSA":     {jwtkey.ES256, rsaKey, es},
		"another curve":     {jwtkey.ES256, p384, es},
		"Ed25519 for ECDSA": {jwtkey.ES256, pkcs8(ed), es},
		"a text for ECDSA":  {jwtkey.ES256, marker, es},
		"RSA for a secret":  {jwtkey.HS256, rsaKey, hs},
		"ECDSA in one line": {jwtkey.HS256, strings.ReplaceAll(p256, "\n", `\n`), hs},
	} {
		_, err := jwtkey.New(tt.algorithm, tt.secret)
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), marker) {
			t.Errorf("%s: got %v, want %q", name, err, tt.want)
		}
	}
	for _, name := range []string{"", "none", "hs256", "HS512", "PS256", "EdDSA", marker} {
		if a, err := jwtkey.ParseAlgorithm(name); err == nil || a != "" || strings.Contains(err.Error(), marker) {
			t.Errorf("ParseAlgorithm(%q) = %q, %v", name, a, err)
		}
	}
}

// Whatever a caller sends is refused with one of three texts.
func FuzzVerify(f *testing.F) {
	key, err := jwtkey.New(jwtkey.HS256, strings.Repeat("x", 32))
	if err != nil {
		f.Fatal(err)
	}
	token, err := key.Sign([]byte(claims))
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{"", ".", "..", "...", token, token + ".", token[:len(token)-1], `{"payload":"e30","signatures":[]}`, "e30.e30.e30", "eyJhbGciOiJub25lIn0.e30."} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := key.Verify(text)
		if err == nil && string(got) != claims {
			t.Errorf("a token that was never signed says %q", got)
		}
		if err != nil && !errors.Is(err, jwtkey.ErrForm) && !errors.Is(err, jwtkey.ErrAlgorithm) && !errors.Is(err, jwtkey.ErrSignature) {
			t.Errorf("%q: %v", text, err)
		}
	})
}

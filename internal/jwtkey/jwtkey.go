// Package jwtkey is the key by which the services of the platform know each other's
// tokens: JSON Web Tokens (RFC 7519), all signed with one algorithm that the settings
// name. What a token says is for others to judge.
package jwtkey

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// Algorithm is how tokens are signed (RFC 7518 §3.1). A token cannot choose it.
type Algorithm string

// The algorithms that there are.
const (
	HS256 Algorithm = "HS256"
	RS256 Algorithm = "RS256"
	ES256 Algorithm = "ES256"
)

// Errors of the settings. They hold nothing of them.
var (
	errAlgorithm = errors.New("AUTH_ALGORITHM must be HS256, RS256 or ES256")
	errPEMSecret = errors.New("AUTH_SECRET is a key or certificate in PEM, which HS256 would take for a secret, though others may know it: AUTH_ALGORITHM must be RS256 or ES256")
	errRSA       = errors.New("AUTH_SECRET must be an RSA key of 2048 bits or more in PEM (BEGIN PUBLIC KEY or BEGIN PRIVATE KEY), since AUTH_ALGORITHM is RS256")
	errECDSA     = errors.New("AUTH_SECRET must be a key of the curve P-256 in PEM (BEGIN PUBLIC KEY or BEGIN PRIVATE KEY), since AUTH_ALGORITHM is ES256")
)

// Errors of [Key.Verify] and [Algorithm.Parse], as the end of a sentence for the caller.
var (
	// ErrForm is of what is no token.
	ErrForm = errors.New("the credentials are no token: it must be a JWT in compact form, three parts joined by dots, of at most 8 KiB")
	// ErrAlgorithm is of a token that names another algorithm, or none.
	ErrAlgorithm = errors.New("the token's alg is not the one that this service's tokens are signed with")
	// ErrSignature is of a token that another key has signed, or that was changed.
	ErrSignature = errors.New("the token's signature does not fit: another key has signed it, or it was changed")
)

// Subject is what the tokens that the service makes say of who calls.
const Subject = "orchestrator"

// maxBytes bounds a token. All headers of a request together have 16 KiB.
const maxBytes = 8 << 10

// leastSecret is how many bytes a secret for HS256 must have (RFC 7518 §3.2).
const leastSecret = 32

// minRSABits is how many bits an RSA key must have (RFC 7518 §3.3).
const minRSABits = 2048

// ParseAlgorithm reads AUTH_ALGORITHM.
func ParseAlgorithm(name string) (Algorithm, error) {
	switch a := Algorithm(name); a {
	case HS256, RS256, ES256:
		return a, nil
	}
	return "", errAlgorithm
}

// Parse reads a token, which must be signed with a and no other algorithm. It does not
// check the signature. The error is [ErrForm] or [ErrAlgorithm].
func (a Algorithm) Parse(token string) (*jose.JSONWebSignature, error) {
	if len(token) > maxBytes {
		return nil, ErrForm
	}
	// The JSON form may be signed several times, and have headers that are not signed.
	parsed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(a)})
	if _, other := errors.AsType[*jose.ErrUnexpectedSignatureAlgorithm](err); other {
		return nil, ErrAlgorithm
	}
	if err != nil {
		return nil, ErrForm
	}
	return parsed, nil
}

// Key verifies tokens, and may sign some. Any number of goroutines may use it.
type Key struct {
	algorithm Algorithm
	public    any         // what verifies: []byte, *rsa.PublicKey or *ecdsa.PublicKey
	signer    jose.Signer // nil: the key verifies only
}

// New reads AUTH_SECRET: for HS256 the secret, else a key in PEM. A public key, or a
// certificate, verifies only. The error has no value of the settings.
func New(a Algorithm, secret string) (*Key, error) {
	k := &Key{algorithm: a}
	var private any
	switch isPEM := strings.Contains(secret, "-----BEGIN "); {
	case a == HS256 && isPEM:
		return nil, errPEMSecret
	case a == HS256:
		// go-jose refuses a secret that is too short. The platform may have one all the
		// same (see [IsShort]), and HMAC itself fills a key up with zeros (RFC 2104 §2).
		b := append([]byte(secret), make([]byte, max(0, leastSecret-len(secret)))...)
		k.public, private = b, b
	default:
		k.public, private = parsePEM(secret)
		rsaKey, isRSA := k.public.(*rsa.PublicKey)
		ecdsaKey, isECDSA := k.public.(*ecdsa.PublicKey)
		if a == RS256 && (!isRSA || rsaKey.N.BitLen() < minRSABits) {
			return nil, errRSA
		}
		if a == ES256 && (!isECDSA || ecdsaKey.Curve != elliptic.P256()) {
			return nil, errECDSA
		}
	}
	if private == nil {
		return k, nil
	}
	var err error
	k.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(a), Key: private}, (&jose.SignerOptions{}).WithType("JWT"))
	return k, err
}

// IsShort reports whether a secret is shorter than its algorithm allows: one who has a
// token can try all secrets of that length.
func IsShort(a Algorithm, secret string) bool { return a == HS256 && len(secret) < leastSecret }

// parsePEM returns the first key in a text; private is nil where it has none.
func parsePEM(text string) (public, private any) {
	if !strings.Contains(text, "\n") {
		text = strings.ReplaceAll(text, `\n`, "\n") // as a text in one line is often written
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, nil
	}
	if certificate, err := x509.ParseCertificate(block.Bytes); err == nil {
		return certificate.PublicKey, nil
	}
	for _, parse := range []func([]byte) (any, error){
		x509.ParsePKCS8PrivateKey,
		func(b []byte) (any, error) { return x509.ParsePKCS1PrivateKey(b) },
		func(b []byte) (any, error) { return x509.ParseECPrivateKey(b) },
	} {
		key, err := parse(block.Bytes)
		if err != nil {
			continue
		}
		switch key := key.(type) {
		case *rsa.PrivateKey:
			return &key.PublicKey, key
		case *ecdsa.PrivateKey:
			return &key.PublicKey, key
		}
	}
	if key, err := x509.ParsePKIXPublicKey(block.Bytes); err == nil {
		return key, nil
	}
	if key, err := x509.ParsePKCS1PublicKey(block.Bytes); err == nil {
		return key, nil
	}
	return nil, nil
}

// Verify returns what a token says, if the key has signed it. The error is [ErrForm],
// [ErrAlgorithm] or [ErrSignature].
func (k *Key) Verify(token string) (claims []byte, err error) {
	parsed, err := k.algorithm.Parse(token)
	if err != nil {
		return nil, err
	}
	if claims, err = parsed.Verify(k.public); err != nil {
		return nil, ErrSignature
	}
	return claims, nil
}

// CanSign reports whether [Key.Sign] may be called.
func (k *Key) CanSign() bool { return k.signer != nil }

// Sign makes a token of claims, which are JSON.
func (k *Key) Sign(claims []byte) (token string, err error) {
	signed, err := k.signer.Sign(claims)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

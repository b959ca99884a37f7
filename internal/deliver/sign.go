package deliver

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
)

// Sizes of a signing secret, by Standard Webhooks.
const (
	minSigningBytes = 24
	maxSigningBytes = 64
)

// Signer signs calls as Standard Webhooks says (https://www.standardwebhooks.com).
// It never changes, so that many goroutines may share it.
type Signer struct{ keys [][]byte }

// NewSigner takes secrets in the form of Standard Webhooks: whsec_ and the
// base64 of 24 to 64 bytes. It returns nil, which signs nothing, where there are
// none. The first is the current one; each signs, so that targets may change
// from one to the next at any time. Errors number the secrets and do not hold them.
func NewSigner(secrets []string) (*Signer, error) {
	if len(secrets) == 0 {
		return nil, nil
	}
	s := new(Signer)
	for i, secret := range secrets {
		encoded, found := strings.CutPrefix(secret, "whsec_")
		key, err := base64.StdEncoding.Strict().DecodeString(encoded)
		if !found || err != nil || strings.ContainsAny(encoded, "\r\n") || len(key) < minSigningBytes || len(key) > maxSigningBytes {
			return nil, fmt.Errorf("secret %d: must be whsec_ and the base64 of %d to %d bytes", i+1, minSigningBytes, maxSigningBytes)
		}
		s.keys = append(s.keys, key)
	}
	return s, nil
}

// sign returns the header webhook-signature for a body with its id and
// timestamp: a signature with each secret, in their order.
func (s *Signer) sign(id, timestamp string, body []byte) string {
	var b strings.Builder
	var sum [sha256.Size]byte
	for i, key := range s.keys {
		if i > 0 {
			b.WriteByte(' ')
		}
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(id + "." + timestamp + "."))
		mac.Write(body)
		b.WriteString("v1,")
		b.WriteString(base64.StdEncoding.EncodeToString(mac.Sum(sum[:0])))
	}
	return b.String()
}

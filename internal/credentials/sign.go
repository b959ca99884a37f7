package credentials

import (
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/melodia/orchestrator/internal/target"
)

// Sizes of a signing secret, by Standard Webhooks.
const (
	minSigningBytes = 24
	maxSigningBytes = 64
)

const secretPrefix = "whsec_"

// Signer signs calls as Standard Webhooks says (https://www.standardwebhooks.com),
// with the secrets that are for the called host. It never changes, so that many
// goroutines may share it.
type Signer struct {
	exact    map[string]signingKeys // by host
	suffixes []suffixKeys           // the longest first
	others   signingKeys            // for every other host
}

type suffixKeys struct {
	suffix string
	keys   signingKeys
}

// signingKeys are those for one host; the first is the current one.
type signingKeys [][]byte

// Errors of [NewSigner], without the entry: that is a secret.
var (
	errBadSecret = fmt.Errorf("must be whsec_ and the base64 of %d to %d bytes, or a host, an equals sign and such a secret, like plays.melodia.app=whsec_…", minSigningBytes, maxSigningBytes)
	errSameKey   = errors.New("is the secret of an earlier entry for the same host; remove one of the two")
)

// NewSigner takes secrets in the form of Standard Webhooks: whsec_ and the
// base64 of 24 to 64 bytes. Behind a host and an equals sign (see [target.Hosts] for
// the form of hosts), a secret is for that host; alone, for all hosts that no other
// entry names. Of the entries that name a host those count that name it most
// exactly: the host itself, then the longest suffix. Several secrets for the
// same host, or suffix, all sign, so that targets may change from one to the next at
// any time; the first is the current one. Where there are no secrets NewSigner
// returns nil, which signs nothing. Errors number the entries and do not hold them.
func NewSigner(entries []string) (*Signer, error) {
	if len(entries) == 0 {
		return nil, nil
	}
	s := &Signer{exact: make(map[string]signingKeys)}
	for i, entry := range entries {
		if err := s.add(entry); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i+1, err)
		}
	}
	slices.SortFunc(s.suffixes, func(a, b suffixKeys) int { return cmp.Compare(len(b.suffix), len(a.suffix)) })
	return s, nil
}

func (s *Signer) add(entry string) (err error) {
	if strings.HasPrefix(entry, secretPrefix) { // its base64 may end in equals signs
		s.others, err = s.others.with(entry)
		return err
	}
	name, secret, _ := strings.Cut(entry, "=")
	if !strings.HasPrefix(secret, secretPrefix) {
		return errBadSecret
	}
	host, isSuffix, err := target.ParseHost(name)
	if err != nil {
		return fmt.Errorf("its host is %w", err)
	}
	if !isSuffix {
		s.exact[host], err = s.exact[host].with(secret)
		return err
	}
	at := slices.IndexFunc(s.suffixes, func(k suffixKeys) bool { return k.suffix == host })
	if at < 0 {
		at = len(s.suffixes)
		s.suffixes = append(s.suffixes, suffixKeys{suffix: host})
	}
	s.suffixes[at].keys, err = s.suffixes[at].keys.with(secret)
	return err
}

// with returns k and the key in a secret.
func (k signingKeys) with(secret string) (signingKeys, error) {
	encoded, found := strings.CutPrefix(secret, secretPrefix)
	key, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if !found || err != nil || strings.ContainsAny(encoded, "\r\n") || len(key) < minSigningBytes || len(key) > maxSigningBytes {
		return nil, errBadSecret
	}
	if slices.ContainsFunc(k, func(other []byte) bool { return bytes.Equal(other, key) }) {
		return nil, errSameKey
	}
	return append(k, key), nil
}

// keysFor returns the keys that sign a call to u; nil where it is not signed.
func (s *Signer) keysFor(u *url.URL) signingKeys {
	if s == nil {
		return nil
	}
	if len(s.exact) == 0 && s.suffixes == nil {
		return s.others
	}
	host, named := target.HostOf(u)
	if keys := s.exact[host]; keys != nil {
		return keys
	}
	if named {
		for _, k := range s.suffixes {
			if strings.HasSuffix(host, k.suffix) {
				return k.keys
			}
		}
	}
	return s.others
}

// sign returns the header webhook-signature for a body with its id and
// timestamp: a signature with each key, in their order.
func (k signingKeys) sign(id, timestamp string, body []byte) string {
	var b strings.Builder
	var sum [sha256.Size]byte
	for i, key := range k {
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

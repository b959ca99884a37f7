package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// keyPrefix tells API keys from ID tokens, and lets scanners for secrets find them.
const keyPrefix = "ork_"

// apiKey is an entry of API_KEYS. The sum is no secret: a key has 256 random bits, which
// cannot be found by trying.
type apiKey struct {
	name   string
	scopes []string
	sum    [sha256.Size]byte
}

var keyName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,99}$`)

const keyNameRule = "the name must be of letters, digits and . _ @ -, at most 100 of them"

// NewKey makes a key with scopes, joined by + and of the known ones. The entry is what to
// add to API_KEYS. The key itself is stored nowhere.
func NewKey(name, scopes string, known []string) (key, entry string, err error) {
	if !keyName.MatchString(name) {
		return "", "", errors.New(keyNameRule)
	}
	if _, err := parseScopes(scopes, known); err != nil {
		return "", "", err
	}
	random := make([]byte, 32)
	_, _ = rand.Read(random) // it never fails
	key = keyPrefix + base64.RawURLEncoding.EncodeToString(random)
	sum := sha256.Sum256([]byte(key))
	return key, name + ":" + scopes + ":" + hex.EncodeToString(sum[:]), nil
}

func parseKeys(entries, known []string) (keys []apiKey, err error) {
	if len(entries) == 0 {
		return nil, errors.New("API_KEYS is not set, and AUTH names api_key: make an entry with orchestrator key NAME SCOPES")
	}
	var errs []error
	for i, entry := range entries {
		key, err := parseKey(strings.TrimSpace(entry), known)
		if err == nil && slices.ContainsFunc(keys, func(other apiKey) bool { return other.sum == key.sum }) {
			err = errors.New("the key is in an earlier entry already")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("API_KEYS, entry %d: %w", i+1, err))
		}
		keys = append(keys, key)
	}
	return keys, errors.Join(errs...)
}

func parseKey(entry string, known []string) (k apiKey, err error) {
	parts := strings.Split(entry, ":")
	if len(parts) != 3 {
		return k, errors.New("it must be name:scopes:sha256; orchestrator key NAME SCOPES makes one")
	}
	if k.name = parts[0]; !keyName.MatchString(k.name) {
		return k, errors.New(keyNameRule)
	}
	if k.scopes, err = parseScopes(parts[1], known); err != nil {
		return k, err
	}
	sum, err := hex.DecodeString(parts[2])
	if err != nil || len(sum) != sha256.Size {
		return k, errors.New("the SHA-256 must have 64 hexadecimal digits")
	}
	copy(k.sum[:], sum)
	return k, nil
}

// byKey finds the entry of a key. The time it takes depends on how many entries
// there are, and on nothing else.
func (a *Authenticator) byKey(key string) (principal string, scopes []string, err error) {
	var short [64]byte // room for our own keys, without an allocation
	sum := sha256.Sum256(append(short[:0], key...))
	found := -1
	for i := range a.keys {
		same := subtle.ConstantTimeCompare(sum[:], a.keys[i].sum[:])
		found = subtle.ConstantTimeSelect(same, i, found)
	}
	if found < 0 {
		return "", nil, errKey
	}
	return a.keys[found].name, a.keys[found].scopes, nil
}

package task

import "strings"

// MaxSecretName is how long the name of a secret may be.
const MaxSecretName = 64

// secretOpening begins a reference to a secret. There is no way to write it
// without meaning one.
const secretOpening = "${secret:"

// CutSecret splits a header's value around its first reference to a secret,
// ${secret:name}. Without one, found is false and before is the whole value. name is
// empty where the reference is malformed.
func CutSecret(value string) (before, name, after string, found bool) {
	before, rest, found := strings.Cut(value, secretOpening)
	if !found {
		return value, "", "", false
	}
	name, after, closed := strings.Cut(rest, "}")
	if !closed || !IsSecretName(name) {
		return before, "", rest, true
	}
	return before, name, after, true
}

// IsSecretName reports whether a secret may be called so. A path is no name.
func IsSecretName(s string) bool {
	return s != "" && len(s) <= MaxSecretName && !strings.ContainsFunc(s, func(r rune) bool {
		return !isAlphanumeric(r) && r != '-' && r != '_'
	})
}

// areSecretReferences reports whether every reference in a header's value is
// well formed.
func areSecretReferences(value string) bool {
	for {
		_, name, after, found := CutSecret(value)
		if !found || name == "" {
			return !found
		}
		value = after
	}
}

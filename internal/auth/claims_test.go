package auth

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/auth/authtest"
)

// The issuer's own names of claims count, and each once: a token that has a claim
// in two spellings, or twice, is refused whichever of the two comes last.
func TestClaimsAreExact(t *testing.T) {
	t.Parallel()
	withIssuer(t, func(t *testing.T, issuer *authtest.Issuer, a *Authenticator) {
		now := time.Now()
		plain := map[string]any{
			"iss": issuerURL, "aud": audience, "sub": "1", "email": "plays@x.example", "email_verified": true, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		}
		// with returns a token with one more member, before or behind the others.
		with := func(claims map[string]any, name string, value any, first bool) string {
			b, err := json.Marshal(claims)
			if err != nil {
				t.Fatal(err)
			}
			more, err := json.Marshal(map[string]any{name: value})
			if err != nil {
				t.Fatal(err)
			}
			x, y := string(b[1:len(b)-1]), string(more[1:len(more)-1])
			if first {
				x, y = y, x
			}
			return issuer.Token(json.RawMessage("{" + x + "," + y + "}"))
		}
		const in = "plays@x.example[submit read]"
		if got := identity(a, bearing(with(plain, "hd", "x.example", false))); got != in {
			t.Errorf("with a claim that is not looked at: got %q, want %q", got, in)
		}
		if got := identity(a, bearing(with(plain, "email_Verified_by", "x", false))); got != in {
			t.Errorf("with a claim whose name is longer: got %q, want %q", got, in)
		}
		values := map[string]any{"nbf": now.Unix(), "nonce": "n", "at_hash": "h", "hd": "x", "_claim_names": map[string]string{}, "_claim_sources": map[string]any{}}
		maps.Copy(values, plain)
		for name, value := range values {
			other := value
			if name == "email" {
				other = "root@x.example"
			}
			spellings := []string{name, strings.ToUpper(name), strings.ToUpper(name[:1]) + name[1:], strings.ToLower(name[:len(name)-1]) + strings.ToUpper(name[len(name)-1:])}
			if strings.Contains(name, "s") {
				spellings = append(spellings, strings.Replace(name, "s", "ſ", 1))
			}
			claims := maps.Clone(plain)
			claims[name] = value
			for _, spelling := range spellings {
				for _, first := range []bool{true, false} {
					// What stands beside the right one.
					if got := identity(a, bearing(with(claims, spelling, other, first))); got != errToken.Error() {
						t.Errorf("%s beside %s (first: %t): got %q, want it refused", spelling, name, first, got)
					}
				}
				// What stands in its place.
				if _, known := readClaims[fold(name)]; spelling == name || !known {
					continue
				}
				alone := maps.Clone(claims)
				delete(alone, name)
				if got := identity(a, bearing(with(alone, spelling, claims[name], false))); got != errToken.Error() {
					t.Errorf("%s in the place of %s: got %q, want it refused", spelling, name, got)
				}
			}
		}
	})
}

func TestParseIDClaims(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{}`:                                  "map[]",
		` {"a": 1, "b": {"a": 2, "a": 3}} `:   `map[a:1 b:{"a": 2, "a": 3}]`,
		`{"aud":["x"]}`:                       `map[aud:["x"]]`,
		`{"\u0065mail":"x"}`:                  `map[email:"x"]`,
		`{"email":"x","\u0065mail":"y"}`:      "",
		`{"a":1,"a":1}`:                       "",
		`{"a":1,"A":1}`:                       "",
		`{"k":1,"` + "\u212a" + `":1}`:        "", // the sign of kelvin
		`{"i` + "\u017f" + `s":1}`:            "", // a long s
		`{"Iss":1}`:                           "",
		`{"EXP":1}`:                           "",
		`{"Foo":1}`:                           "map[Foo:1]",
		``:                                    "",
		`null`:                                "",
		`[]`:                                  "",
		`"x"`:                                 "",
		`{"a":1`:                              "",
		`{"a":1}x`:                            "",
		`{"a":1}{"a":2}`:                      "",
		`{"a":}`:                              "",
		`{1:2}`:                               "",
		`{"a":1,}`:                            "",
		`{"` + strings.Repeat("x", 70) + `":`: "",
	} {
		got := ""
		if c, err := parseIDClaims([]byte(text)); err == nil {
			shown := make(map[string]string)
			for name, value := range c {
				shown[name] = string(value)
			}
			got = fmt.Sprint(shown)
		}
		if got != want {
			t.Errorf("parseIDClaims(%s) = %q, want %q", text, got, want)
		}
	}
}

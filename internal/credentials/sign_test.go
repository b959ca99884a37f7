package credentials

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
)

// signingSecret is a secret of n bytes.
func signingSecret(first byte, n int) string {
	return "whsec_" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{first}, n))
}

// verify is Standard Webhooks as its specification says
// (https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md).
func verify(secret string, header http.Header, body []byte) bool {
	key, err := base64.StdEncoding.DecodeString(secret[len("whsec_"):])
	if err != nil {
		return false
	}
	moment, err := strconv.ParseInt(header.Get("webhook-timestamp"), 10, 64)
	if age := time.Since(time.Unix(moment, 0)); err != nil || age > 5*time.Minute || age < -5*time.Minute {
		return false
	}
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%d.%s", header.Get("webhook-id"), moment, body)
	for signature := range strings.SplitSeq(header.Get("webhook-signature"), " ") {
		version, encoded, _ := strings.Cut(signature, ",")
		if got, err := base64.StdEncoding.DecodeString(encoded); version == "v1" && err == nil && hmac.Equal(got, mac.Sum(nil)) {
			return true
		}
	}
	return false
}

// What one target got does not verify at a target with another secret.
func TestSignaturesByHost(t *testing.T) {
	t.Parallel()
	secrets := make(map[string]string) // by a letter
	for i, letter := range []string{"A", "a", "B", "b", "C", "D", "E", "F", "G"} {
		secrets[letter] = signingSecret(byte(i+1), 24)
	}
	entries := func(list ...string) (expanded []string) {
		for _, entry := range list {
			host, letter, found := strings.Cut(entry, "=")
			if !found {
				host, letter = "", entry
			} else {
				host += "="
			}
			expanded = append(expanded, host+secrets[letter])
		}
		return expanded
	}
	all := []string{
		"localhost=A", "a", "localhost=b", "LOCALHOST.=B", ".melodia.app=C", ".Internal.Melodia.app=D", ".plays.internal.melodia.app=E",
		"plays.internal.melodia.app=F", "127.0.0.1=G", "::1=A",
	}
	for _, tt := range []struct {
		entries []string
		host    string
		want    string // letters
	}{
		{all, "localhost", "AbB"},
		{all, "LocalHost", "AbB"},
		{all, "localhost.", "AbB"},
		{all, "localhost:8443", "AbB"},
		{all, "127.0.0.1", "G"},
		{all, "127.0.0.1:80", "G"},
		{all, "[::ffff:127.0.0.1]", "G"},
		{all, "[::1]:80", "A"},
		{all, "127.0.0.2", "a"},
		{all, "melodia.app", "a"},
		{all, "notmelodia.app", "a"},
		{all, "melodia.app.evil.example", "a"},
		{all, "x.melodia.app", "C"},
		{all, "x.y.melodia.app:1", "C"},
		{all, "internal.melodia.app", "C"},
		{all, "x.INTERNAL.melodia.app.", "D"},
		{all, "plays.internal.melodia.app", "F"},
		{all, "x.plays.internal.melodia.app", "E"},
		{all, "other.example", "a"},
		{[]string{"localhost=A"}, "127.0.0.1", ""},
		{[]string{".melodia.app=A"}, "melodia.app", ""},
		{[]string{"a", "b"}, "melodia.app", "ab"},
		{nil, "melodia.app", ""},
	} {
		signer, err := NewSigner(entries(tt.entries...))
		if err != nil {
			t.Fatal(err)
		}
		header := http.Header{"Webhook-Id": {"id"}, "Webhook-Timestamp": {strconv.FormatInt(time.Now().Unix(), 10)}}
		keys := signer.keysFor(&url.URL{Scheme: "https", Host: tt.host})
		header.Set("Webhook-Signature", keys.sign("id", header.Get("Webhook-Timestamp"), []byte("x")))
		got := ""
		for _, letter := range []string{"A", "a", "b", "B", "C", "D", "E", "F", "G"} {
			if verify(secrets[letter], header, []byte("x")) {
				got += letter
			}
		}
		if got != tt.want || len(keys) != len(tt.want) {
			t.Errorf("with %q, a call to %s verifies with the secrets %q of %d, want %q", tt.entries, tt.host, got, len(keys), tt.want)
		}
	}
}

func TestNewSignerRefuses(t *testing.T) {
	t.Parallel()
	good := signingSecret(1, 24)
	for name, secret := range map[string]string{
		"empty":             "",
		"no prefix":         strings.TrimPrefix(good, "whsec_"),
		"another prefix":    strings.Replace(good, "whsec_", "WHSEC_", 1),
		"too short":         signingSecret(1, 23),
		"too long":          signingSecret(1, 65),
		"not base64":        "whsec_s3cret!!s3cret!!s3cret!!s3cret!!",
		"base64 of URLs":    "whsec_" + base64.URLEncoding.EncodeToString(bytes.Repeat([]byte{0xff}, 24)),
		"line break":        good[:12] + "\n" + good[12:],
		"space":             " " + good,
		"padding left out":  strings.TrimRight(signingSecret(1, 25), "="),
		"bits left over":    "whsec_" + strings.Repeat("A", 34) + "B=",
		"asymmetric secret": "whsk_" + strings.TrimPrefix(good, "whsec_"),
	} {
		for _, host := range []string{"", "plays.melodia.app=", ".melodia.app=", "10.0.0.1="} {
			_, err := NewSigner([]string{good, host + secret})
			if want := "entry 2: must be whsec_ and the base64 of 24 to 64 bytes, or a host, an equals sign and such a secret, like plays.melodia.app=whsec_…"; err == nil || err.Error() != want {
				t.Errorf("%s, %q: error %v, want %q", name, host, err, want)
			}
		}
	}
	for _, host := range []string{"", ".", "https://plays.melodia.app", "plays.melodia.app:443", "plays.melodia.app/", "*.melodia.app", "plays..app", "plays melodia", "127.1", "a@b"} {
		_, err := NewSigner([]string{good, host + "=" + good})
		if want := "entry 2: its host is not a name (plays.melodia.app), a suffix (.melodia.app) or an IP address"; err == nil || err.Error() != want {
			t.Errorf("host %q: error %v, want %q", host, err, want)
		}
	}
	for _, same := range [][2]string{
		{"", ""}, {"plays.melodia.app=", "Plays.Melodia.App.="}, {".melodia.app=", ".MELODIA.app="}, {"10.0.0.1=", "::ffff:10.0.0.1="}, {"::1=", "0:0::1="},
	} {
		_, err := NewSigner([]string{same[0] + good, signingSecret(2, 24), same[1] + good})
		if want := "entry 3: is the secret of an earlier entry for the same host; remove one of the two"; err == nil || err.Error() != want {
			t.Errorf("%q: error %v, want %q", same, err, want)
		}
	}
	if s, err := NewSigner(nil); s != nil || err != nil {
		t.Errorf("NewSigner of none = %v, %v, want nil, nil", s, err)
	}
}

func BenchmarkSign(b *testing.B) {
	s, err := NewSigner([]string{signingSecret(1, 32)})
	if err != nil {
		b.Fatal(err)
	}
	body := make([]byte, 500)
	u := &url.URL{Scheme: "https", Host: "plays.melodia.app"}
	b.ReportAllocs()
	for b.Loop() {
		s.keysFor(u).sign("01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b", "1800000000", body)
	}
}

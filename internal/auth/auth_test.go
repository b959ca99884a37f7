package auth

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// marker is in every wrong value. No error may contain it.
const marker = "s3cr3t-m4rk3r"

var scopes = []string{"submit", "read", "manage", "internal"}

// newKey makes a key and its entry.
func newKey(t testing.TB, name, scopeList string) (key, entry string) {
	t.Helper()
	key, entry, err := NewKey(name, scopeList, scopes)
	if err != nil {
		t.Fatal(err)
	}
	return key, entry
}

func newAuthenticator(t testing.TB, o Options) *Authenticator {
	t.Helper()
	o.Scopes = scopes
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

// identity is what Authenticate says, as name[scopes], or the error's text.
func identity(a *Authenticator, header http.Header) string {
	name, scopes, err := a.Authenticate(context.Background(), header)
	if err != nil {
		if name != "" || scopes != nil {
			return fmt.Sprintf("an error together with %s%v", name, scopes)
		}
		return err.Error()
	}
	return fmt.Sprint(name, scopes)
}

func want(t *testing.T, a *Authenticator, header http.Header, want string) {
	t.Helper()
	got := identity(a, header)
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if strings.Contains(got, marker) {
		t.Errorf("a value that was sent comes back: %q", got)
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	_, plays := newKey(t, "plays", "submit+read")
	_, other := newKey(t, "other", "manage")
	sum := plays[strings.LastIndex(plays, ":")+1:]
	for name, tt := range map[string]struct {
		o    Options
		want []string // the start of each line
	}{
		"not set":           {Options{}, []string{"AUTH is not set: "}},
		"none":              {Options{Methods: []string{"none"}}, nil},
		"none on Cloud Run": {Options{Methods: []string{"none"}, OnCloudRun: true}, []string{"AUTH must not be none on Cloud Run"}},
		"iam":               {Options{Methods: []string{"iam"}, OnCloudRun: true}, nil},
		"iam elsewhere":     {Options{Methods: []string{"iam"}}, []string{"AUTH must not be iam outside of Cloud Run"}},
		"iam beside a key":  {Options{Methods: []string{"api_key", "iam"}, APIKeys: []string{plays}, OnCloudRun: true}, []string{"AUTH: none and iam stand alone"}},
		"none beside a key": {Options{Methods: []string{"none", "api_key"}, APIKeys: []string{plays}}, []string{"AUTH: none and iam stand alone"}},
		"unknown":           {Options{Methods: []string{marker}}, []string{"AUTH must be none, iam, "}},
		"keys":              {Options{Methods: []string{"api_key"}, APIKeys: []string{plays, " " + other}}, nil},
		"no keys":           {Options{Methods: []string{"api_key"}}, []string{"API_KEYS is not set"}},
		"a key without scopes": {Options{Methods: []string{"api_key"}, APIKeys: []string{"plays::" + sum}},
			[]string{"API_KEYS, entry 1: scopes must be of submit, read, manage, internal"}},
		"wrong keys": {Options{Methods: []string{"api_key"}, APIKeys: []string{
			marker, "a:" + marker + ":" + sum, marker + "!:read:" + sum, "a:read:" + marker, "a:read:" + sum + "00", "a:read:" + sum[2:], "a:read+read:" + sum, "a:read:" + sum + ":x", plays, plays,
		}}, []string{
			"API_KEYS, entry 1: it must be name:scopes:sha256", "API_KEYS, entry 2: scopes", "API_KEYS, entry 3: the name", "API_KEYS, entry 4: the SHA-256",
			"API_KEYS, entry 5: the SHA-256", "API_KEYS, entry 6: the SHA-256", "API_KEYS, entry 7: scopes", "API_KEYS, entry 8: it must be",
			"API_KEYS, entry 10: the key is in an earlier entry already",
		}},
		"tokens": {Options{Methods: []string{"oidc"}, OIDCIssuer: "https://id.example", OIDCAudience: "x", OIDCAllow: []string{"a@x.example:submit+read", "b@x.example:read"}}, nil},
		"tokens without anything": {Options{Methods: []string{"oidc"}},
			[]string{"OIDC_ISSUER must be an https URL", "OIDC_AUDIENCE is not set", "OIDC_ALLOW is not set"}},
		"wrong emails": {Options{Methods: []string{"oidc"}, OIDCIssuer: "http://127.0.0.1:1", OIDCAudience: "x", OIDCAllow: []string{marker, "a@x.example:" + marker, marker + ":read", "a@x.example:read", "a@x.example:read"}},
			[]string{"OIDC_ALLOW, entry 1: scopes", "OIDC_ALLOW, entry 2: scopes", "OIDC_ALLOW, entry 3: it must be email:scopes", "OIDC_ALLOW, entry 5: it must be email:scopes"}},
		"an issuer without TLS": {Options{Methods: []string{"oidc"}, OIDCIssuer: "http://id.example", OIDCAudience: "x", OIDCAllow: []string{"a@x.example:read"}}, []string{"OIDC_ISSUER must be"}},
		"everything at once":    {Options{Methods: []string{"api_key", "oidc"}, OIDCIssuer: "https://id.example"}, []string{"API_KEYS is not set", "OIDC_AUDIENCE", "OIDC_ALLOW"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tt.o.Scopes = scopes
			_, err := New(tt.o)
			var lines []string
			if err != nil {
				lines = strings.Split(err.Error(), "\n")
			}
			if !slices.EqualFunc(lines, tt.want, strings.HasPrefix) {
				t.Errorf("got %q, want %q", lines, tt.want)
			}
			if strings.Contains(strings.Join(lines, ""), marker) {
				t.Errorf("an error holds a value: %q", lines)
			}
		})
	}
}

func TestAPIKeys(t *testing.T) {
	t.Parallel()
	old, oldEntry := newKey(t, "plays", "submit")
	current, currentEntry := newKey(t, "plays", "submit+read")
	other, otherEntry := newKey(t, "other", "manage")
	stranger, _ := newKey(t, "plays", "submit")
	a := newAuthenticator(t, Options{Methods: []string{"api_key"}, APIKeys: []string{oldEntry, currentEntry, otherEntry}})
	for key, is := range map[string]string{
		old: "plays[submit]", current: "plays[submit read]", other: "other[manage]",
		stranger: errKey.Error(), marker: errKey.Error(), old[:len(old)-1]: errKey.Error(), old + "A": errKey.Error(), strings.ToUpper(old): errKey.Error(),
	} {
		want(t, a, http.Header{"Authorization": {"Bearer " + key}}, is)
		want(t, a, http.Header{"Authorization": {"bearer  " + key + " "}}, is)
		want(t, a, http.Header{"X-Api-Key": {key}}, is)
	}
	for text, header := range map[error][]http.Header{
		errNone:     {nil, {"X-Auth": {old}}, {"Cookie": {old}}, {"Proxy-Authorization": {"Bearer " + old}}},
		errSeveral:  {{"Authorization": {"Bearer " + old, "Bearer " + old}}, {"X-Api-Key": {old, old}}, {"Authorization": {"Bearer " + old}, "X-Api-Key": {old}}},
		errScheme:   {{"Authorization": {old}}, {"Authorization": {"Basic " + old}}, {"Authorization": {"Bearer"}}, {"Authorization": {"Bearer "}}, {"Authorization": {""}}, {"Authorization": {"Bearer\t" + old}}},
		errKey:      {{"X-Api-Key": {""}}},
		errStripped: {{"Authorization": {"Bearer e30.e30" + stripped}}},
	} {
		for _, h := range header {
			want(t, a, h, text.Error())
		}
	}
	if strings.Contains(fmt.Sprint(oldEntry, currentEntry), old) {
		t.Error("the entry holds the key")
	}
	if _, _, err := NewKey("plays:x", "submit", scopes); err == nil || err.Error() != keyNameRule {
		t.Errorf("a name with a colon: got %v", err)
	}
	if _, _, err := NewKey("plays", "submit,read", scopes); err == nil {
		t.Error("scopes joined by a comma: got no error")
	}
}

func TestNobodyIsAsked(t *testing.T) {
	t.Parallel()
	a := newAuthenticator(t, Options{Methods: []string{"none"}})
	want(t, a, nil, "[submit read manage internal]")
	want(t, a, http.Header{"Authorization": {marker}}, "[submit read manage internal]")
}

func TestIAM(t *testing.T) {
	t.Parallel()
	a := newAuthenticator(t, Options{Methods: []string{"iam"}, OnCloudRun: true})
	token := func(claims string) string {
		return "Bearer e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + stripped
	}
	all := "[submit read manage internal]"
	plays, other := token(`{"email":"plays@x.example","sub":"1"}`), token(`{"email":"other@x.example"}`)
	for name, tt := range map[string]struct {
		header http.Header
		want   string
	}{
		"checked":             {http.Header{"Authorization": {plays}}, "plays@x.example" + all},
		"without an email":    {http.Header{"Authorization": {token(`{"sub":"42"}`)}}, "42" + all},
		"in the other header": {http.Header{"X-Serverless-Authorization": {plays}}, "plays@x.example" + all},
		// Cloud Run has not looked at the second.
		"in both":                {http.Header{"X-Serverless-Authorization": {plays}, "Authorization": {other}}, "plays@x.example" + all},
		"unchecked beside wrong": {http.Header{"X-Serverless-Authorization": {marker}, "Authorization": {other}}, errScheme.Error()},
		"nothing":                {nil, errNone.Error()},
		"two":                    {http.Header{"Authorization": {plays, other}}, errSeveral.Error()},
		"with a signature":       {http.Header{"Authorization": {strings.TrimSuffix(plays, stripped) + ".c2ln"}}, errIAM.Error()},
		"no token":               {http.Header{"Authorization": {"Bearer " + marker + stripped}}, errIAM.Error()},
		"no claims":              {http.Header{"Authorization": {token(marker)}}, errIAM.Error()},
		"nobody":                 {http.Header{"Authorization": {token(`{"aud":"x"}`)}}, errIAM.Error()},
		"Email":                  {http.Header{"Authorization": {token(`{"email":"plays@x.example","Email":"boss@x.example"}`)}}, errIAM.Error()},
		"only Email":             {http.Header{"Authorization": {token(`{"Email":"boss@x.example","sub":"1"}`)}}, errIAM.Error()},
		"two subjects":           {http.Header{"Authorization": {token(`{"sub":"1","sub":"2"}`)}}, errIAM.Error()},
		"a name with NUL":        {http.Header{"Authorization": {token(`{"email":"a\u0000@x"}`)}}, errIAM.Error()},
		"a name with a line end": {http.Header{"Authorization": {token(`{"email":"a\nb@x"}`)}}, errIAM.Error()},
		"a long name":            {http.Header{"Authorization": {token(`{"email":"` + strings.Repeat("a", 255) + `"}`)}}, errIAM.Error()},
		"an API key":             {http.Header{"X-Api-Key": {"ork_x"}}, errNone.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want(t, a, tt.header, tt.want)
		})
	}
}

// BenchmarkAPIKey is what a request pays with AUTH=api_key.
func BenchmarkAPIKey(b *testing.B) {
	var entries []string
	var key string
	for i := range 10 {
		k, entry := newKey(b, fmt.Sprint("caller", i), "submit+read")
		key, entries = k, append(entries, entry)
	}
	a := newAuthenticator(b, Options{Methods: []string{"api_key"}, APIKeys: entries})
	header := http.Header{"Authorization": {"Bearer " + key}, "Content-Type": {"application/json"}}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := a.Authenticate(b.Context(), header); err != nil {
			b.Fatal(err)
		}
	}
}

// Nothing is allocated, so that nothing has to be collected.
func TestAPIKeyAllocatesNothing(t *testing.T) {
	key, entry := newKey(t, "plays", "submit")
	a := newAuthenticator(t, Options{Methods: []string{"api_key"}, APIKeys: []string{entry}})
	header := http.Header{"Authorization": {"Bearer " + key}}
	if n := testing.AllocsPerRun(100, func() {
		if _, _, err := a.Authenticate(t.Context(), header); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

package deliver

import (
	"errors"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

func TestRedact(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		text             string
		values, literals []string
		want             string
	}{
		{"no secret", []string{"abc"}, []string{"def"}, "no secret"},
		{"key abc, key abc", []string{"abc"}, nil, "key [redacted], key [redacted]"},
		{"key abc, key abc", nil, []string{"abc"}, "key [redacted], key [redacted]"},
		{"key abc", slices.Repeat([]string{"e", "d"}, 1000), nil, "k[redacted]y abc"},
		{"abcdef", []string{"abc", "abcdef"}, nil, "[redacted]"},
		{"abcdef", []string{"abcd", "cdef"}, nil, "[redacted]"},
		{"abcdef", nil, []string{"abcd", "cdef"}, "[redacted]"},
		{"abcabc", []string{"abc"}, nil, "[redacted]"},
		{"xababax", []string{"aba"}, nil, "x[redacted]x"},
		{"it ends in ab", []string{"abc"}, nil, "it ends in ab"},
		{`{"key":"a\/b+c"}, a%2fb%2bc, a%2Fb%2Bc, a\u002Fb`, []string{"a/b+c"}, nil, `{"key":"[redacted]"}, [redacted], [redacted], a\u002Fb`},
		// A literal around a value, beside it, and across its ends.
		{"xabcx", []string{"abc"}, []string{"xabcx"}, "[redacted]"},
		{"xabcx", []string{"abc"}, []string{"x"}, "[redacted]"},
		{"xabcx", []string{"abc"}, []string{"xa"}, "x[redacted]x"},
		{"xabcx", []string{"abc"}, []string{"cx"}, "x[redacted]x"},
		{"xabcx", []string{"abc"}, []string{"b"}, "x[redacted]x"},
	} {
		if got := redact(tt.text, len(tt.text), spellings(tt.values), spellings(tt.literals)); got != tt.want {
			t.Errorf("redact(%.50q, %.20q, %q) = %.50q, want %.50q", tt.text, tt.values, tt.literals, got, tt.want)
		}
	}
}

func TestRedactBody(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	e := strings.Repeat("é", excerptBytes/2-1)
	for _, tt := range []struct {
		name, body string
		err        error // with which it ends
		value      string
		want       string
	}{
		{"whole", "key abc", io.EOF, "abc", "key [redacted]"},
		{"whole and shorter", "key", io.EOF, "abcd", "key"},
		{"whole, with a part of it", "key ab", io.EOF, "abc", "key ab"},
		{"broken off", "key ab", broken, "abc", "key "},
		{"broken off elsewhere", "key of", broken, "abc", "key "},
		{"broken off behind it", "key abc", broken, "abc", "key [redacted]"},
		{"broken off at once", "a", broken, "abc", ""},
		{"broken off in a character", "key é", broken, "ab", "key "},
		{"across the end", strings.Repeat("x", excerptBytes-2) + "abc.", io.EOF, "abc", strings.Repeat("x", excerptBytes-2) + "[r"},
		{"behind the end", strings.Repeat("x", excerptBytes) + "abc.", io.EOF, "abc", strings.Repeat("x", excerptBytes)},
		{"a part at the end", strings.Repeat("x", excerptBytes-2) + "ab.", io.EOF, "abc", strings.Repeat("x", excerptBytes-2) + "ab"},
		{"broken off behind the end", strings.Repeat("x", excerptBytes) + "a", broken, "abc", strings.Repeat("x", excerptBytes-1)},
		{"grown", e + "ab", io.EOF, "b", e + "a["},
		{"grown in a character", strings.Repeat("a", excerptBytes-11) + "b" + strings.Repeat("é", 5), io.EOF, "b", strings.Repeat("a", excerptBytes-11) + "[redacted]"},
		{"larger than what is read", strings.Repeat("x", excerptBytes+drainBytes+1), io.EOF, strings.Repeat("<", 20_000), ""},
	} {
		for way, wrap := range map[string]func(io.Reader) io.Reader{"": iotest.DataErrReader, ", byte by byte": iotest.OneByteReader} {
			body := wrap(io.MultiReader(strings.NewReader(tt.body), iotest.ErrReader(tt.err)))
			text, _, err := newDeliverer(t).read(body, &hidden{values: []string{tt.value}})
			if text != tt.want || tt.err != io.EOF && err != tt.err {
				t.Errorf("%s%s: read = %.30q… (%d bytes), %v, want %.30q… (%d bytes), %v", tt.name, way, text, len(text), err, tt.want, len(tt.want), tt.err)
			}
		}
	}
}

// A caller has its task send a secret to a target that repeats the body, and
// chooses the body. What is kept of the answer tells nothing about the secret
// until the body holds all of it: neither at the end of what is kept, nor where
// the answer breaks off, nor by a literal that begins before the secret.
func TestGuessesTellNothing(t *testing.T) {
	t.Parallel()
	server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if at, err := strconv.Atoi(r.URL.Query().Get("break")); err == nil {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			body = body[:at]
		}
		switch r.URL.Path {
		case "/refuse":
			w.WriteHeader(http.StatusUnprocessableEntity)
		case "/moved":
			w.Header().Set("Location", "/"+string(body))
			w.WriteHeader(http.StatusFound)
		}
		_, _ = w.Write(body)
	})
	d := newDeliverer(t)
	folder := t.TempDir()
	write(t, folder+"/billing", planted)
	var err error
	if d.secrets, err = NewSecrets(folder, []string{"billing=127.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	call := func(query, body, literal string) task.Outcome {
		c := newCall("POST", server.URL+query, []byte(body))
		c.Task.Headers = map[string]string{"X-Key": "${secret:billing}", "X-Token": literal}
		o := d.Deliver(t.Context(), c)
		o.Duration = 0
		return o
	}
	for n := 1; n < len(planted); n++ {
		// Wrong guesses differ from the right one in one character, which no secret here has.
		right := planted[:n]
		for _, wrong := range []string{"~" + right[1:], right[:n-1] + "~"} {
			for name, tt := range map[string]struct{ query, before, after string }{
				"where the excerpt ends":             {"/ok", strings.Repeat("x", excerptBytes-n), strings.Repeat("x", 100)},
				"where that of a refusal ends":       {"/refuse", strings.Repeat("x", excerptBytes-n), strings.Repeat("x", 100)},
				"across the end":                     {"/ok", strings.Repeat("x", excerptBytes-1), strings.Repeat("x", 100)},
				"where the answer ends":              {"/ok", strings.Repeat("x", excerptBytes-n), ""},
				"where the answer breaks off":        {"/ok?break=" + strconv.Itoa(1000+n), strings.Repeat("x", 1000), "!"},
				"where a refusal breaks off":         {"/refuse?break=" + strconv.Itoa(1000+n), strings.Repeat("x", 1000), "!"},
				"where it breaks off behind the end": {"/ok?break=" + strconv.Itoa(excerptBytes+10), strings.Repeat("x", excerptBytes+10-n), "!"},
				"in a short answer":                  {"/ok", "", ""},
				"in a redirect":                      {"/moved", "", "/"},
				"in a long redirect":                 {"/moved", strings.Repeat("x", 120-n), strings.Repeat("x", 200)},
			} {
				got := call(tt.query, tt.before+right+tt.after, "")
				want := call(tt.query, tt.before+wrong+tt.after, "")
				want.ResponseExcerpt = strings.ReplaceAll(want.ResponseExcerpt, wrong, right)
				want.Error = strings.ReplaceAll(want.Error, wrong, right)
				// Of a guess that is kept in part, the other part differs.
				if kept, _, found := strings.Cut(want.ResponseExcerpt, "~"); found {
					want.ResponseExcerpt = kept + got.ResponseExcerpt[min(len(kept), len(got.ResponseExcerpt)):]
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Fatalf("%s, %d characters (-wrong +right):\n%s", name, n, diff)
				}
			}
			// The secret itself is there, and a literal reaches into it.
			for name, literal := range map[string]func(guess string) string{
				"from the front": func(guess string) string { return "in front:" + guess },
				"from behind":    nil,
			} {
				body, g, w := "in front:"+planted+":behind", right, wrong
				if literal == nil {
					g, w = planted[len(planted)-n:], "~"+planted[len(planted)-n+1:]
					literal = func(guess string) string { return guess + ":behind" }
				}
				for _, at := range []int{0, 1000, excerptBytes - 20, excerptBytes - 12, excerptBytes - 5} {
					inside := at + len("in front:") + len(planted)/2
					for _, query := range []string{"/ok", "/refuse", "/moved", "/ok?break=" + strconv.Itoa(inside), "/ok?break=" + strconv.Itoa(at+len(body)-3)} {
						long := strings.Repeat("x", at) + body + strings.Repeat("x", 200)
						if diff := cmp.Diff(call(query, long, literal(w)), call(query, long, literal(g))); diff != "" {
							t.Fatalf("a literal %s, %d characters at %d, %s (-wrong +right):\n%s", name, n, at, query, diff)
						}
					}
				}
			}
		}
	}
	// All of it is hidden, and nothing else.
	if o := call("/ok", "in front:"+planted+":behind", ""); o.ResponseExcerpt != "in front:[redacted]:behind" {
		t.Errorf("excerpt = %q", o.ResponseExcerpt)
	}
}

func BenchmarkRedactBody(b *testing.B) {
	h := &hidden{values: []string{planted}, literals: []string{"Bearer l1t3ral-1", "l1t3ral-1"}}
	body := []byte(strings.Repeat("an answer ", excerptBytes/10))
	b.ReportAllocs()
	for b.Loop() {
		h.redactBody(body, nil, io.EOF)
	}
}

// A caller may choose literals and answers that overlap themselves everywhere.
func BenchmarkRedactOverlaps(b *testing.B) {
	var h hidden
	for n := 1; n <= 50; n++ {
		h.literals = append(h.literals, strings.Repeat("a", 100+n))
	}
	body := []byte(strings.Repeat("a", excerptBytes))
	for b.Loop() {
		h.redactBody(body, nil, io.EOF)
	}
}

package credentials

import (
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
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

func TestRead(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	const excerptBytes, drainBytes = 4 << 10, 64 << 10
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
		{"grown in a character", strings.Repeat("a", excerptBytes-11) + "b" + strings.Repeat("é", 5), io.EOF, "b", strings.Repeat("a", excerptBytes-11) + "[redacted]\xc3"},
		{"larger than what is read", strings.Repeat("x", excerptBytes+drainBytes+1), io.EOF, strings.Repeat("<", 20_000), ""},
	} {
		for way, wrap := range map[string]func(io.Reader) io.Reader{"": iotest.DataErrReader, ", byte by byte": iotest.OneByteReader} {
			body := wrap(io.MultiReader(strings.NewReader(tt.body), iotest.ErrReader(tt.err)))
			kept, ahead, err := Added{hidden: &hidden{values: []string{tt.value}}}.Read(body, make([]byte, excerptBytes), drainBytes)
			if ahead > drainBytes {
				t.Errorf("%s%s: %d bytes are read ahead, want %d at most", tt.name, way, ahead, drainBytes)
			}
			if text := string(kept); text != tt.want || err != nil && err != tt.err {
				t.Errorf("%s%s: Read = %.30q… (%d bytes), %v, want %.30q… (%d bytes), %v", tt.name, way, text, len(text), err, tt.want, len(tt.want), tt.err)
			}
		}
	}
}

func BenchmarkRedactBody(b *testing.B) {
	added := Added{hidden: &hidden{values: []string{"pl4nt3d-s3cr3t"}, literals: []string{"Bearer l1t3ral-1", "l1t3ral-1"}}}
	body, buf := strings.Repeat("an answer ", 400), make([]byte, 4<<10)
	b.ReportAllocs()
	for b.Loop() {
		added.Read(strings.NewReader(body), buf, 0)
	}
}

// A principal may choose literals and answers that overlap themselves everywhere.
func BenchmarkRedactOverlaps(b *testing.B) {
	var h hidden
	added := Added{hidden: &h}
	for n := 1; n <= 50; n++ {
		h.literals = append(h.literals, strings.Repeat("a", 100+n))
	}
	body, buf := strings.Repeat("a", 4<<10), make([]byte, 4<<10)
	for b.Loop() {
		added.Read(strings.NewReader(body), buf, 0)
	}
}

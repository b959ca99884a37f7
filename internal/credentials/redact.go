package credentials

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/melodia/orchestrator/internal/task"
)

// hidden are the secrets of one call, which must not be stored when its target
// sends them back. It is for targets that repeat what they were sent, as it was
// or quoted for JSON or a URL: a target that means to give a secret away can do so
// in other ways.
//
// A principal may not know a secret that its task refers to, and yet choose what the
// target repeats, and read what is stored of it. So what is stored may depend on
// whether the whole secret stands there, and never on whether a part of it does:
// that would let the principal guess the secret character by character.
type hidden struct {
	// values are secrets of the service: contents of files, and an ID token.
	values []string
	// literals are what the task itself has in its secret headers.
	literals []string
}

// Redacted is what stands in the place of secrets.
const Redacted = "[redacted]"

// leastLiteral is the length from which on the value of a secret header is
// looked for in answers. Shorter ones stand in every text: X-Max-Tokens: 5.
const leastLiteral = 8

// literals returns the values of secret headers, and what follows the scheme in
// those that have one.
func literals(headers map[string]string) (values []string) {
	for name, value := range headers {
		if len(value) < leastLiteral || !task.IsSecretHeader(name) {
			continue
		}
		values = append(values, value)
		if _, credential, _ := strings.Cut(value, " "); len(credential) >= leastLiteral {
			values = append(values, credential)
		}
	}
	return values
}

// Read reads the start of an answer's body into buf, and returns what may be stored
// of it: at most len(buf) bytes, without the secrets of the call. Where the body goes
// on behind buf, Read reads ahead bytes more of it, most at most. err is the error
// with which reading ended, [io.EOF] at the end of the body.
//
// What may be the start of a secret must not be told from what is none. So the
// decision about each byte that is kept needs all bytes that a secret could
// reach from there: they are read ahead, and where the body breaks off before,
// as many bytes are left out at its end, whatever they are.
func (a Added) Read(body io.Reader, buf []byte, most int) (kept []byte, ahead int, err error) {
	n, err := readFull(body, buf)
	b, h := buf[:n], a.hidden
	if h == nil || err == io.EOF && !h.fits(n) {
		return b, 0, err
	}
	values, literals := spellings(h.values), spellings(h.literals)
	end := len(b)
	if !errors.Is(err, io.EOF) {
		// A literal counts only where it meets no part of a value: see redact.
		reach := reachOf(values) + reachOf(literals)
		if err == nil {
			b = append(make([]byte, 0, len(b)+reach), b...)
			ahead, err = readFull(body, b[len(b):len(b)+min(reach, most)])
			b = b[:len(b)+ahead]
		}
		if !errors.Is(err, io.EOF) {
			end = min(end, max(len(b)-reach, 0))
		}
		for range utf8.UTFMax - 1 { // not within a character
			if end > 0 && end < len(b) && !utf8.RuneStart(b[end]) {
				end--
			}
		}
	}
	text := redact(string(b), end, values, literals)
	return []byte(text[:min(len(text), len(buf))]), ahead, err // it may have grown
}

// readFull reads until buf is full or r ends, whose error it returns as it is.
func readFull(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var m int
		m, err = r.Read(buf[n:])
		n += m
	}
	return n, err
}

// fits reports whether any of the secrets can be in a text of n bytes. No spelling
// of one is shorter than the secret.
func (h *hidden) fits(n int) bool {
	shorter := func(s string) bool { return len(s) <= n }
	return slices.ContainsFunc(h.values, shorter) || slices.ContainsFunc(h.literals, shorter)
}

// reachOf returns how far the longest text goes beyond its first byte.
func reachOf(texts []string) (n int) {
	for _, s := range texts {
		n = max(n, len(s)-1)
	}
	return n
}

// redact returns the first end bytes of text, where each stretch that is made
// up of values and literals is replaced. A literal that shares only a part of a
// value with it is none: a principal that chooses the literal would see which part.
func redact(text string, end int, values, literals []string) string {
	var hide, within marks // within: the byte before it belongs to the same value
	for _, value := range values {
		done := 0 // a value may overlap itself, and each byte is marked once
		for from := range occurrences(text, value) {
			to := from + len(value)
			hide.set(len(text), max(from, done), to)
			within.set(len(text), max(from+1, done), to)
			done = to
		}
	}
	for _, literal := range literals {
		done := 0
		for from := range occurrences(text, literal) {
			if to := from + len(literal); within == nil || !within[from] && !within[to] {
				hide.set(len(text), max(from, done), to)
				done = to
			}
		}
	}
	if hide == nil {
		return text[:end] // nearly always
	}
	var b strings.Builder
	for i := 0; i < end; i++ {
		switch {
		case !hide[i]:
			b.WriteByte(text[i])
		case i == 0 || !hide[i-1]:
			b.WriteString(Redacted)
		}
	}
	return b.String()
}

// marks are bytes of a text; nil: none of them.
type marks []bool

// set marks the bytes between from and to of a text of n bytes, whose end can be
// asked about too.
func (m *marks) set(n, from, to int) {
	if *m == nil {
		*m = make(marks, n+1)
	}
	for i := from; i < to; i++ {
		(*m)[i] = true
	}
}

// occurrences yields where s begins in text, also where it overlaps itself.
func occurrences(text, s string) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for from := 0; ; from++ {
			i := strings.Index(text[from:], s)
			if i < 0 {
				return
			}
			if from += i; !yield(from) {
				return
			}
		}
	}
}

// spellings returns how secrets may stand in an answer: as they are, and quoted
// for JSON or a URL.
func spellings(secrets []string) (spelled []string) {
	for _, s := range secrets {
		var quoted bytes.Buffer
		encoder := json.NewEncoder(&quoted)
		_ = encoder.Encode(s) // a string always can be
		encoder.SetEscapeHTML(false)
		_ = encoder.Encode(s)
		for _, escaped := range []string{url.QueryEscape(s), url.PathEscape(s)} {
			spelled = append(spelled, escaped, percentEscape.ReplaceAllStringFunc(escaped, strings.ToLower)) // as .NET does
		}
		spelled = append(spelled, s)
		for line := range strings.Lines(quoted.String()) {
			line = line[1 : len(line)-len("\"\n")]
			spelled = append(spelled, line, strings.ReplaceAll(line, "/", `\/`)) // as PHP does
		}
	}
	slices.Sort(spelled)
	return slices.Compact(spelled)
}

var percentEscape = regexp.MustCompile(`%[0-9A-F]{2}`)

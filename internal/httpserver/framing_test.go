package httpserver

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
)

// lines are n header lines.
func lines(n int) string { return strings.Repeat("A:\r\n", n) }

// flow gives text to a framing in pieces of a length that cut chooses, and returns
// what went on, how many requests became whole, and the error.
func flow(text string, cut func(left int) int) (passed string, whole int, err error) {
	var f framing
	var held []byte
	for len(text) > 0 {
		n := max(1, min(cut(len(text)), len(text)))
		held = append(held, text[:n]...)
		text = text[n:]
		ready, more, err := f.follow(held)
		passed += string(held[:ready])
		whole += more
		held = held[ready:]
		if err != nil {
			return passed, whole, err
		}
		if len(held) > MaxHead {
			return passed, whole, fmt.Errorf("%d bytes are held", len(held))
		}
	}
	return passed, whole, nil
}

// cuts are ways in which bytes may come.
var cuts = map[string]func(int) int{
	"at once":        func(left int) int { return left },
	"byte by byte":   func(int) int { return 1 },
	"three by three": func(int) int { return 3 },
	"at random":      func(int) int { return 1 + rand.IntN(20) }, //nolint:gosec // not a secret
	"in packets":     func(int) int { return 1448 },
}

func TestFraming(t *testing.T) {
	t.Parallel()
	const get = "GET / HTTP/1.1\r\nHost: x\r\n"
	longest := get + "X: " + strings.Repeat("x", MaxHead-len(get)-len("X: \r\n\r\n")) + "\r\n\r\n"
	chunked := "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
	for name, tt := range map[string]struct {
		text  string
		whole int
		held  int // of the last bytes, but for the first four
		err   error
	}{
		"a request":              {get + "\r\n", 1, 0, nil},
		"bare line feeds":        {"GET / HTTP/1.1\nHost: x\n\n", 1, 0, nil},
		"two":                    {get + "\r\n" + get + "\r\n", 2, 0, nil},
		"empty lines before":     {"\r\n\r\n" + get + "\r\n\r\n" + get + "\r\n", 2, 0, nil},
		"not whole":              {get, 0, len(get) - 4, nil},
		"the second is not":      {get + "\r\n" + get, 1, len(get) - 4, nil},
		"a line that is not":     {get + "\r\nGET / HTT", 1, len("/ HTT"), nil},
		"little of it":           {get + "\r\nGE", 1, 0, nil},
		"a body":                 {"POST / HTTP/1.1\r\ncontent-LENGTH: 5\r\n\r\nabcde" + get + "\r\n", 2, 0, nil},
		"a body with lines":      {"POST / HTTP/1.1\r\nContent-Length:404\r\n\r\n" + lines(101) + get + "\r\n", 2, 0, nil},
		"half a body":            {"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nab", 0, 0, nil},
		"no body":                {"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n" + get + "\r\n", 2, 0, nil},
		"chunks":                 {chunked + "5\r\nabcde\r\n1F4;x=\"y\"\r\n" + lines(125) + "\r\n0\r\n\r\n" + get + "\r\n", 2, 0, nil},
		"a trailer":              {chunked + "1\r\na\r\n0\r\nX: y\r\n\r\n" + get + "\r\n", 2, 0, nil},
		"half a trailer":         {chunked + "1\r\na\r\n0\r\nX: y\r\n", 0, 0, nil},
		"most lines":             {"GET / HTTP/1.1\r\n" + lines(MaxHeadLines) + "\r\n", 1, 0, nil},
		"too many lines":         {"GET / HTTP/1.1\r\n" + lines(MaxHeadLines+1), 0, 0, errHeadTooLarge},
		"too many, the second":   {get + "\r\nGET / HTTP/1.1\r\n" + lines(MaxHeadLines+1), 1, 0, errHeadTooLarge},
		"too many behind a body": {"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\naGET / HTTP/1.1\r\n" + lines(MaxHeadLines+1), 1, 0, errHeadTooLarge},
		"too many behind chunks": {chunked + "1\r\na\r\n0\r\n\r\nGET / HTTP/1.1\r\n" + lines(MaxHeadLines+1), 1, 0, errHeadTooLarge},
		"longest":                {longest, 1, 0, nil},
		"too long":               {get + "X: " + strings.Repeat("x", MaxHead-len(get)), 0, 0, errHeadTooLarge},
		"too long by its end":    {strings.Replace(longest, "X: ", "XX: ", 1), 0, 0, errHeadTooLarge},
		"a long request line":    {"GET /" + strings.Repeat("x", MaxHead), 0, 0, errHeadTooLarge},
		"a trailer's lines":      {chunked + "0\r\n" + lines(MaxHeadLines+1) + "\r\n", 0, 0, errTrailerLarge},
		"a long trailer":         {chunked + "0\r\nX:" + strings.Repeat("x", MaxHead), 0, 0, errTrailerLarge},
		"two lengths":            {"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 0, 0, errTwoLengths},
		"two lengths, reversed":  {"POST / HTTP/1.1\r\ntransfer-encoding:chunked\r\nHost: x\r\ncontent-length:0\r\n\r\n", 0, 0, errTwoLengths},
		"two lengths, identity":  {"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: identity\r\n\r\n", 0, 0, errTwoLengths},
		"two lengths, no number": {"POST / HTTP/1.1\r\nContent-Length: x\r\nTransfer-Encoding: chunked\r\n\r\n", 0, 0, errTwoLengths},
		"a length twice":         {"POST / HTTP/1.1\r\nContent-Length: 5\r\nHost: x\r\ncontent-length: 5\r\n\r\nabcde", 0, 0, errLengthTwice},
		"a length thrice":        {"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde", 0, 0, errLengthTwice},
		"a folded length":        {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n 5\r\n\r\nabcde", 0, 0, errFolded},
		"folded with a tab":      {get + "X: y\r\n\tz\r\n\r\n", 0, 0, errFolded},
		"chunks in HTTP/1.0":     {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 0, 0, errOldEncoding},
		"chunks in HTTP/0.9":     {"POST / HTTP/0.9\r\nTransfer-Encoding: chunked\r\n\r\n", 0, 0, errOldEncoding},
	} {
		for how, cut := range cuts {
			t.Run(name+", "+how, func(t *testing.T) {
				t.Parallel()
				passed, whole, err := flow(tt.text, cut)
				if whole != tt.whole || !errors.Is(err, tt.err) {
					t.Fatalf("%d requests are whole (%v), want %d (%v)", whole, err, tt.whole, tt.err)
				}
				if !strings.HasPrefix(tt.text, passed) {
					t.Errorf("got %.100q, want the beginning of %.100q", passed, tt.text)
				}
				if held := len(tt.text) - len(passed); err == nil && held != tt.held {
					t.Errorf("%d bytes are held, want %d", held, tt.held)
				}
			})
		}
	}
}

// What net/http takes for a head is never larger than it may be.
func FuzzFraming(f *testing.F) {
	for _, text := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /2 HTTP/1.0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcPOST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nA: b\r\n\r\n\r\n",
		"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"GET / HTTP/1.1\r\n a: b\r\nContent-Length : 4\r\n\r\nabcd",
		"GET / HTTP/0.9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"HTTP/1.1\nTransfer-Encoding:\n\r\n",
	} {
		f.Add(text, uint8(3))
	}
	f.Fuzz(func(t *testing.T, text string, size uint8) {
		passed, whole, err := flow(text, func(int) int { return int(size) })
		if !strings.HasPrefix(text, passed) {
			t.Fatalf("got %q of %q", passed, text)
		}
		if _, all, other := flow(text, func(left int) int { return left }); !errors.Is(err, other) || all != whole {
			t.Fatalf("in pieces %d requests (%v), at once %d (%v)", whole, err, all, other)
		}
		// net/http finds the same requests, as far as it takes them for legal.
		r := bufio.NewReader(strings.NewReader(passed))
		for n := 0; ; n++ {
			request, err := http.ReadRequest(r)
			if err != nil {
				break
			}
			if _, err := io.Copy(io.Discard, request.Body); err != nil {
				break
			}
			count := 0
			for _, values := range request.Header {
				count += len(values)
			}
			if n >= whole || count > MaxHeadLines {
				t.Fatalf("net/http finds request %d of %d with %d lines in %q", n+1, whole, count, passed)
			}
		}
	})
}

// The bytes of requests are looked at without allocating.
func TestFramingAllocates(t *testing.T) {
	text := []byte("POST /enqueue HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer " + strings.Repeat("x", 60) + "\r\nContent-Length: 200\r\n\r\n")
	text = append(text, bytes.Repeat([]byte("b"), 200)...)
	var f framing
	if n := testing.AllocsPerRun(100, func() {
		if ready, whole, err := f.follow(text); ready != len(text) || whole != 1 || err != nil {
			t.Fatalf("%d of %d bytes, %d requests (%v)", ready, len(text), whole, err)
		}
	}); n > 0 {
		t.Errorf("it allocates %v times", n)
	}
}

func BenchmarkFraming(b *testing.B) {
	text := []byte("POST /enqueue HTTP/1.1\r\nHost: x\r\nUser-Agent: Go-http-client/1.1\r\nContent-Type: application/json\r\nAccept-Encoding: gzip\r\nContent-Length: 200\r\n\r\n")
	text = append(text, bytes.Repeat([]byte("b"), 200)...)
	var f framing
	b.ReportAllocs()
	for b.Loop() {
		_, _, _ = f.follow(text)
	}
}

package httpserver

import (
	"bytes"
	"errors"
	"net/http"
	"strconv"
)

const (
	// MaxHead is how many bytes a request's line and header lines may have.
	MaxHead = 16 << 10
	// MaxHeadLines is how many header lines a request may have. Once parsed, a
	// line takes some hundred bytes of memory, however short it is.
	MaxHeadLines = 100
	// maxEarly is how many bytes of a head go on before it is whole: net/http
	// counts ReadHeaderTimeout from the fourth on.
	maxEarly = 4
)

var (
	errHeadTooLarge = &Refusal{Status: http.StatusRequestHeaderFieldsTooLarge, Detail: "The request line and the headers must be at most 16 KiB (16384 bytes) and at most 100 header lines."}
	// A proxy before the service may have gone by the other one of the two, and
	// take what follows for another request (RFC 9112 §6.3).
	errTwoLengths = &Refusal{Status: http.StatusBadRequest, Detail: "The request must not have both Content-Length and Transfer-Encoding."}
	// Where they differ one of them is wrong, and equal ones may be refused (§6.3).
	errLengthTwice = &Refusal{Status: http.StatusBadRequest, Detail: "The request must have Content-Length once at most."}
	errOldEncoding = &Refusal{Status: http.StatusBadRequest, Detail: "A request with Transfer-Encoding must be HTTP/1.1."}
	// net/http would join the lines, and find a Content-Length that is not in one (§5.2).
	errFolded       = &Refusal{Status: http.StatusBadRequest, Detail: "A header line must not begin with a space or a tab."}
	errTrailerLarge = errors.New("the trailer of a chunked body is too large")
)

// framing follows the bytes of a connection, to know where its requests begin
// and end (RFC 9112 §6). Of what is malformed, net/http says so afterwards.
type framing struct {
	part  part
	size  int // bytes of the head or trailer: of its whole lines, and the early ones
	lines int // of the head or trailer, the request line included

	// Of a head.
	early                [maxEarly]byte // its bytes that went on
	earlyCount           int
	scanned              int  // how many of its other bytes are whole lines
	old, chunked, length bool // not HTTP/1.1; has Transfer-Encoding; has Content-Length
	lengthTwice, folded  bool // has Content-Length twice; has a line that goes on with the one before

	left  int64 // bytes of the body, or of the chunk with its line's end
	sized bool  // the digits of the chunk's size are over; the trailer's line is not empty
}

type part uint8

const (
	inHead part = iota
	inBody
	inChunkSize
	inChunk
	inTrailer
)

// between reports that no request has begun that is not whole.
func (f *framing) between() bool { return f.part == inHead && f.size == 0 }

// follow looks at b: what could not go on the last time, and what came after
// it. It returns how many bytes may go on, which are all but an unfinished head,
// and how many requests became whole. Where it returns an error, what may not
// go on is refused.
func (f *framing) follow(b []byte) (ready, whole int, err error) {
	at := f.scanned
	for at < len(b) {
		switch f.part {
		case inHead:
			end := bytes.IndexByte(b[at:], '\n')
			if f.size+len(b)-at > MaxHead && (end < 0 || f.size+end+1 > MaxHead) {
				return ready, whole, errHeadTooLarge
			}
			if f.size == 0 && (b[at] == '\r' || b[at] == '\n') { // net/http passes over it, or refuses it
				at++
				ready = at
				continue
			}
			if end < 0 {
				return f.pause(b, ready, at), whole, nil
			}
			line := bytes.TrimSuffix(b[at:at+end], []byte{'\r'})
			at += end + 1
			f.size += end + 1
			if len(line) > 0 || f.lines == 0 {
				if f.lines > MaxHeadLines {
					return ready, whole, errHeadTooLarge
				}
				f.headLine(line)
				continue
			}
			switch {
			case f.chunked && f.length:
				return ready, whole, errTwoLengths
			case f.lengthTwice:
				return ready, whole, errLengthTwice
			case f.folded:
				return ready, whole, errFolded
			case f.chunked && f.old:
				return ready, whole, errOldEncoding
			case f.chunked:
				f.begin(inChunkSize)
			case f.left > 0:
				f.part = inBody
			default:
				f.next()
				whole++
			}
			ready = at
		case inBody:
			at += f.skip(len(b) - at)
			ready = at
			if f.left == 0 {
				f.next()
				whole++
			}
		case inChunkSize:
			f.chunkSize(b[at])
			at++
			ready = at
		case inChunk:
			at += f.skip(len(b) - at)
			ready = at
			if f.left == 0 {
				f.begin(inChunkSize)
			}
		case inTrailer:
			c := b[at]
			at++
			ready = at
			if f.size++; f.size > MaxHead || f.lines > MaxHeadLines {
				return ready, whole, errTrailerLarge
			}
			if f.trailer(c) {
				f.next()
				whole++
			}
		}
	}
	return f.pause(b, ready, at), whole, nil
}

// pause keeps in mind where to go on, and lets the first bytes of a head go on.
// at is where its first line begins that is not whole.
func (f *framing) pause(b []byte, ready, at int) int {
	if f.part != inHead || ready == len(b) {
		f.scanned = 0
		return ready
	}
	n := min(maxEarly-f.earlyCount, len(b)-ready)
	if f.lines == 0 {
		f.size += n
	} else {
		n = min(n, at-ready) // of whole lines, which are counted already
	}
	f.earlyCount += copy(f.early[f.earlyCount:], b[ready:ready+n])
	ready += n
	f.scanned = max(at-ready, 0)
	return ready
}

// headLine takes the request line, or a header line.
func (f *framing) headLine(line []byte) {
	f.lines++
	if f.lines == 1 {
		if len(line) < len("HTTP/1.1") { // malformed: what went on early ends in the version
			line = append(f.early[:f.earlyCount:f.earlyCount], line...)
		}
		f.old = !bytes.HasSuffix(line, []byte("HTTP/1.1"))
		return
	}
	if line[0] == ' ' || line[0] == '\t' {
		f.folded = true
	} else if value, ok := field(line, "content-length:"); ok {
		f.lengthTwice, f.length = f.length, true
		// net/http refuses what is no number.
		n, _ := strconv.ParseUint(string(bytes.TrimSpace(value)), 10, 63)
		f.left = int64(n) //nolint:gosec // of 63 bits
	} else if _, ok := field(line, "transfer-encoding:"); ok {
		f.chunked = true // net/http refuses any other coding
	}
}

// field returns the value of a header line where its name, with the colon and in
// lower case, is prefix.
func field(line []byte, prefix string) (value []byte, ok bool) {
	if len(line) < len(prefix) || line[0]|0x20 != prefix[0] || !bytes.EqualFold(line[:len(prefix)], []byte(prefix)) {
		return nil, false
	}
	return line[len(prefix):], true
}

// next begins a head.
func (f *framing) next() { *f = framing{} }

// begin begins another part of a chunked body.
func (f *framing) begin(p part) { f.part, f.left, f.sized, f.size, f.lines = p, 0, false, 0, 0 }

// skip passes over up to n bytes of what is left.
func (f *framing) skip(n int) int {
	n = int(min(int64(n), f.left))
	f.left -= int64(n)
	return n
}

// chunkSize takes a byte of the line that says how large a chunk is (RFC 9112 §7.1).
func (f *framing) chunkSize(c byte) {
	const most = 1 << 58 // net/http refuses more
	digit := int64(-1)
	switch {
	case c == '\n' && f.left == 0:
		f.begin(inTrailer)
		return
	case c == '\n':
		f.part = inChunk
		f.left += int64(len("\r\n"))
		return
	case '0' <= c && c <= '9':
		digit = int64(c - '0')
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		digit = int64(c|0x20-'a') + 10
	}
	if f.sized = f.sized || digit < 0; !f.sized && f.left < most {
		f.left = f.left<<4 | digit
	}
}

// trailer takes a byte behind the last chunk, and reports whether it is the last one.
func (f *framing) trailer(c byte) (over bool) {
	switch {
	case c == '\n' && !f.sized:
		return true
	case c == '\n':
		f.sized = false
		f.lines++
	case c != '\r':
		f.sized = true
	}
	return false
}

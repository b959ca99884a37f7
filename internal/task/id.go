package task

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"time"
)

// ID names a task for good: a UUID (version 7 when this service made it).
// The zero ID names no task.
type ID [16]byte

// NewID makes a UUID of version 7 (RFC 9562 §5.7) out of a moment and random
// bits. It begins with the milliseconds since 1970, and goes on with their
// fraction in 12 bits (§6.2, method 3), so that IDs sort by the moment.
func NewID(at time.Time, random uint64) ID {
	var id ID
	const perMilli = int64(time.Millisecond)
	millis, rest := at.UnixMilli(), int64(at.Nanosecond())%perMilli
	binary.BigEndian.PutUint64(id[:8], uint64(millis)<<16|0x7000|uint64(rest<<12/perMilli)) //nolint:gosec // 48 and 12 bits, not negative after 1970
	binary.BigEndian.PutUint64(id[8:], random>>2|1<<63)
	return id
}

// FirstID returns the lowest ID that [NewID] makes at a moment; of one before 1970,
// the lowest of all.
func FirstID(at time.Time) ID {
	if at.Before(time.Unix(0, 0)) {
		at = time.Unix(0, 0)
	}
	id := NewID(at, 0)
	id[6], id[7] = 0x70, 0
	return id
}

// ParseID reads the canonical form of a UUID (RFC 9562 §4), in either case:
// 36 characters with hyphens, without braces or prefix.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return ID{}, errNotUUID
	}
	digits := s[0:8] + s[9:13] + s[14:18] + s[19:23] + s[24:36]
	if _, err := hex.Decode(id[:], []byte(digits)); err != nil {
		return ID{}, errNotUUID
	}
	return id, nil
}

var errNotUUID = errors.New("not a UUID of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")

// String returns the canonical form in lower case.
func (id ID) String() string {
	var b [36]byte
	hex.Encode(b[0:8], id[0:4])
	b[8] = '-'
	hex.Encode(b[9:13], id[4:6])
	b[13] = '-'
	hex.Encode(b[14:18], id[6:8])
	b[18] = '-'
	hex.Encode(b[19:23], id[8:10])
	b[23] = '-'
	hex.Encode(b[24:36], id[10:16])
	return string(b[:])
}

//go:build unix

package httpserver

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// arrived reports whether a read from a connection, or an Accept of a listener, would
// not wait: there are bytes, an end or a connection.
func arrived(c any) (yes bool) {
	conn, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0) //nolint:gosec // a descriptor
		yes = n > 0 || err != nil                                                   // EINTR: the next look will tell
	})
	return yes && err == nil // else it is closed
}

package http1

import "golang.org/x/sys/unix"

// unacknowledged is how many bytes of what was sent the host's system has not
// acknowledged; 0 where that is not known.
func (c *Conn) unacknowledged() (n int) {
	if c.raw == nil {
		return 0
	}
	_ = c.raw.Control(func(fd uintptr) {
		n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
	})
	return n
}

// ended reports whether the connection is over in both directions, so that
// nothing more will be acknowledged. Reading does not tell: after the host's
// orderly end it says nothing of a reset that follows.
func (c *Conn) ended() (over bool) {
	const closed = 7 // TCP_CLOSE in Linux' include/net/tcp_states.h
	_ = c.raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		over = err == nil && info.State == closed
	})
	return over
}

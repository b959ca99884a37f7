//go:build unix

package http1

import "syscall"

// reusable reports whether an idle connection is open and nothing has arrived on
// it: neither its end, nor bytes that answer no request.
func (c *Conn) reusable() bool {
	if c.in.Buffered() > 0 || c.raw == nil {
		return false
	}
	var (
		one     [1]byte
		arrived error
	)
	err := c.raw.Control(func(fd uintptr) {
		_, _, arrived = syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	})
	return err == nil && (arrived == syscall.EAGAIN || arrived == syscall.EWOULDBLOCK)
}

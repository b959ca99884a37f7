//go:build unix

package deliver

import "syscall"

// quiet reports whether an idle connection is open and nothing has arrived on
// it: not its end, and no bytes that nobody asked for.
func (c *connection) quiet() bool {
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

//go:build !unix

package http1

// reusable reports that the connection cannot be looked at: none is used twice.
func (c *Conn) reusable() bool { return false }

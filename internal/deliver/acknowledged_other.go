//go:build !linux

package deliver

// unacknowledged cannot be told here: what was sent counts as acknowledged.
func (c *connection) unacknowledged() int { return 0 }

// ended is not asked where everything counts as acknowledged.
func (c *connection) ended() bool { return true }

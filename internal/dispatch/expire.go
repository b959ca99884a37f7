package dispatch

import "context"

// maxExpired is how many waiting tasks expire in one POLL_INTERVAL at most. Claims end them
// beside the plain tasks that are due, which so many do not delay.
const maxExpired = 1000

// expireWaiting ends tasks that expire while they wait in a lane, until ctx ends: soon after
// their expires_at, as plain tasks do, and not once a permit is free or a queue is resumed.
func (d *Dispatcher) expireWaiting(ctx context.Context) {
	for {
		n, err := d.store.Expire(ctx, maxExpired)
		switch {
		case err != nil && ctx.Err() == nil:
			d.log.Error("expiring waiting tasks failed", "error", err)
		case n > 0:
			d.Wake()
		}
		if !sleep(ctx, jitter(d.options.PollInterval)) {
			return
		}
	}
}

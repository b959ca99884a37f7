package deliver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	errRefused    = errors.New("the target policy refuses the address that the host name stands for")
	errPassedOver = errors.New("address passed over")
)

// keepAlive has the system ask after 30 s without a byte, and every 15 s from then on, whether
// the other side is still there. Load balancers and NAT of clouds drop connections that carry
// nothing for some minutes (AWS NAT gateway: 350 s; Google Cloud: 10 min), and a call may wait
// for its answer for longer. A target whose machine is gone costs no whole timeout.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 15 * time.Second, Count: 6}

// dial connects to addr; the policy is asked about each address that is really
// dialled. Where a name stands for several addresses, those that the policy closes are
// passed over; the call is refused only where there was no other to try. Where the
// lookup takes long, the name servers are asked meanwhile (see nameServers).
func (d *Deliverer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var refused, allowed atomic.Bool
	dialer := net.Dialer{
		Resolver:        d.resolver,
		KeepAliveConfig: keepAlive,
		Control: func(_, address string, _ syscall.RawConn) error {
			a, err := netip.ParseAddrPort(address)
			if err != nil || !d.policy.Allows(a.Addr()) {
				refused.Store(true)
				return errPassedOver
			}
			allowed.Store(true)
			return nil
		},
	}
	conn, err := dialer.DialContext(d.nameServers.watchLookup(ctx, d.resolver), network, addr)
	if err != nil && refused.Load() && !allowed.Load() {
		return nil, errRefused
	}
	return conn, err
}

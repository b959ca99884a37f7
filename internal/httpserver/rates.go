package httpserver

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// maxRates is how many callers have a limiter of their own. Those who come
// when there are so many share one, which keeps memory within bounds and
// starves none of the others.
const maxRates = 10_000

// rates limits the requests of each caller.
type rates struct {
	limit rate.Limit // zero: there is no limit
	burst int

	mu       sync.Mutex
	limiters map[string]*rate.Limiter
	shared   *rate.Limiter
	swept    time.Time
}

func newRates(perSecond float64, burst int) *rates {
	return &rates{
		limit: rate.Limit(perSecond), burst: burst,
		limiters: make(map[string]*rate.Limiter), shared: rate.NewLimiter(rate.Limit(perSecond), burst),
	}
}

// take takes one request of the caller with this name, or with this address
// where there is no name. It returns how long they have to wait where that is
// too soon.
func (s *rates) take(name, remoteAddress string, now time.Time) (wait time.Duration) {
	if s.limit == 0 {
		return 0
	}
	if name == "" {
		name = network(remoteAddress)
	}
	limiter := s.limiter(name, now)
	reservation := limiter.ReserveN(now, 1)
	if wait = reservation.DelayFrom(now); wait > 0 {
		reservation.CancelAt(now)
	}
	return wait
}

func (s *rates) limiter(name string, now time.Time) *rate.Limiter {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l, ok := s.limiters[name]; ok {
		return l
	}
	if len(s.limiters) >= maxRates && now.Sub(s.swept) >= time.Second {
		s.swept = now
		for other, l := range s.limiters {
			if l.TokensAt(now) >= float64(s.burst) { // as a new one would be
				delete(s.limiters, other)
			}
		}
	}
	if len(s.limiters) >= maxRates {
		return s.shared
	}
	l := rate.NewLimiter(s.limit, s.burst)
	s.limiters[name] = l
	return l
}

// network is what one caller has of an address: of IPv6 that is a network of
// 64 bits, in which they can take any address.
func network(remoteAddress string) string {
	address, err := netip.ParseAddrPort(remoteAddress)
	if err != nil {
		return remoteAddress
	}
	ip := address.Addr().Unmap().WithZone("")
	if ip.Is4() {
		return ip.String()
	}
	return netip.PrefixFrom(ip, 64).Masked().String()
}

package deliver

import (
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/melodia/orchestrator/internal/task"
)

// Policy says which targets may be called. It never changes, so that many
// goroutines may share it. The zero Policy admits every public address.
type Policy struct {
	hosts        hostList
	networks     []netip.Prefix
	requireHTTPS bool

	// admitted are URLs that were read and checked of late, each in the place that
	// its hash gives it: tasks have few targets, and each asks twice about its own.
	admitted [64]atomic.Pointer[admittedURL]
}

type admittedURL struct {
	raw string
	url *url.URL
}

var urlSeed = maphash.MakeSeed()

// closed are the networks that no call reaches unless the operator opens them.
// Source: the IANA special-purpose address registries for IPv4 and IPv6
// (RFC 6890) and IANA's registry of global unicast IPv6 space. The few
// addresses in them that are reachable from everywhere are anycast services
// (AMT, TURN, PCP), never targets, so each network is closed as a whole.
var closed = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),       // "this network", RFC 791
	netip.MustParsePrefix("10.0.0.0/8"),      // private, RFC 1918
	netip.MustParsePrefix("100.64.0.0/10"),   // carrier-grade NAT, RFC 6598
	netip.MustParsePrefix("127.0.0.0/8"),     // loopback, RFC 1122
	netip.MustParsePrefix("169.254.0.0/16"),  // link-local, RFC 3927
	netip.MustParsePrefix("172.16.0.0/12"),   // private, RFC 1918
	netip.MustParsePrefix("192.0.0.0/24"),    // protocol assignments, RFC 6890
	netip.MustParsePrefix("192.0.2.0/24"),    // documentation, RFC 5737
	netip.MustParsePrefix("192.88.99.0/24"),  // 6to4 relays, RFC 7526
	netip.MustParsePrefix("192.168.0.0/16"),  // private, RFC 1918
	netip.MustParsePrefix("198.18.0.0/15"),   // benchmarking, RFC 2544
	netip.MustParsePrefix("198.51.100.0/24"), // documentation, RFC 5737
	netip.MustParsePrefix("203.0.113.0/24"),  // documentation, RFC 5737
	netip.MustParsePrefix("224.0.0.0/4"),     // multicast, RFC 5771
	netip.MustParsePrefix("240.0.0.0/4"),     // reserved, and broadcast, RFC 1112 and 8190

	// Only 2000::/3 is handed out. The rest holds unspecified, loopback,
	// IPv4-compatible, NAT64 (64:ff9b::/96, 64:ff9b:1::/48), discard (100::/64),
	// SRv6 (5f00::/16), unique local (fc00::/7), link-local (fe80::/10),
	// site-local (fec0::/10), multicast (ff00::/8), and the reserved space.
	netip.MustParsePrefix("::/3"),
	netip.MustParsePrefix("4000::/2"),
	netip.MustParsePrefix("8000::/1"),
	netip.MustParsePrefix("2001::/23"),     // protocol assignments with Teredo and ORCHID, RFC 2928
	netip.MustParsePrefix("2001:db8::/32"), // documentation, RFC 3849
	netip.MustParsePrefix("2002::/16"),     // 6to4, RFC 3056
	netip.MustParsePrefix("3fff::/20"),     // documentation, RFC 9637
}

// The metadata server hands out the service's own credentials; nothing opens it.
var (
	metadataAddrs = []netip.Addr{
		netip.MustParseAddr("169.254.169.254"),
		netip.MustParseAddr("fd20:ce::254"),
	}
)

const metadataName = "metadata.google.internal"

var (
	loopback4 = netip.MustParseAddr("127.0.0.1")
	loopback6 = netip.IPv6Loopback()
)

// Errors of [Policy.CheckURL]. Their texts complete "url …".
var (
	errNotURL   = errors.New("must be a valid absolute URL that begins with http:// or https://")
	errNotHTTPS = errors.New("must begin with https://: the target policy requires it")
	errBadHost  = errors.New("must name its host by an IP address or by a name of letters, digits, hyphens and dots")
	errOddIPv4  = errors.New("must write an IPv4 address as four decimal numbers without leading zeros")
	errMetadata = errors.New("must not point to the metadata server")
	errHost     = errors.New("must name a host that the target policy allows")
	errNetwork  = errors.New("must not point to an address of a network that the target policy closes")
)

// NewPolicy makes a policy.
//
// allowHosts, unless empty, admits only those hosts: exact names and IP
// addresses, and suffixes such as ".melodia.app", which stand for every name
// below melodia.app but not for melodia.app itself. Case and one trailing dot
// do not count. An entry that is none of these is an error that names it.
//
// allowNetworks opens networks that are closed otherwise, whatever the host is
// called. An IPv6 address that carries an IPv4 address (NAT64, 6to4, Teredo)
// is admitted only where both are.
func NewPolicy(allowHosts []string, allowNetworks []netip.Prefix, requireHTTPS bool) (*Policy, error) {
	p := &Policy{requireHTTPS: requireHTTPS}
	for _, entry := range allowHosts {
		if err := p.hosts.add(entry); err != nil {
			return nil, fmt.Errorf("allowed host %q: %w", entry, err)
		}
	}
	for _, network := range allowNetworks {
		if !network.IsValid() {
			return nil, errors.New("allowed network: not a valid prefix")
		}
		// Addresses are unmapped before they are compared.
		if a := network.Addr(); a.Is4In6() && network.Bits() >= 96 {
			network = netip.PrefixFrom(a.Unmap(), network.Bits()-96)
		}
		p.networks = append(p.networks, network)
	}
	return p, nil
}

// CheckURL returns an error unless rawURL may be called as far as its text
// shows; what its host name stands for shows at dial time. The error's text
// completes "url …" and never holds what was sent. CheckURL does no I/O.
func (p *Policy) CheckURL(rawURL string) error {
	_, err := p.parse(rawURL)
	return err
}

// parse reads and checks a URL. Nobody may change what it returns.
func (p *Policy) parse(rawURL string) (*url.URL, error) {
	place := &p.admitted[maphash.String(urlSeed, rawURL)%uint64(len(p.admitted))]
	if a := place.Load(); a != nil && a.raw == rawURL {
		return a.url, nil
	}
	u, err := p.parseAnew(rawURL)
	if err == nil {
		place.Store(&admittedURL{rawURL, u})
	}
	return u, err
}

func (p *Policy) parseAnew(rawURL string) (*url.URL, error) {
	u, err := task.ParseURL(rawURL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Opaque != "" {
		return nil, errNotURL // not the parser's error, which quotes the URL
	}
	if p.requireHTTPS && u.Scheme != "https" {
		return nil, errNotHTTPS
	}
	if addr, err := netip.ParseAddr(u.Hostname()); err == nil {
		if addr.Zone() != "" {
			return nil, errBadHost // no Host header has one (RFC 6874 §4)
		}
		return u, p.checkAddr(addr)
	}
	return u, p.checkName(canonicalName(u.Hostname()))
}

func (p *Policy) checkAddr(addr netip.Addr) error {
	switch {
	case isMetadata(plain(addr)):
		return errMetadata
	case !p.hosts.empty() && !p.hosts.hasAddr(addr):
		return errHost
	case !p.admits(addr):
		return errNetwork
	}
	return nil
}

func (p *Policy) checkName(name string) error {
	switch {
	case !isName(name):
		return errBadHost
	case endsInNumber(name):
		// Some resolvers read 2130706433, 0177.1 or 0x7f.1 as addresses.
		return errOddIPv4
	case name == metadataName:
		return errMetadata
	case !p.hosts.empty() && !p.hosts.hasName(name):
		return errHost
	case (name == "localhost" || strings.HasSuffix(name, ".localhost")) && !p.admits(loopback4) && !p.admits(loopback6):
		return errNetwork // RFC 6761 §6.3
	}
	return nil
}

// admits reports whether addr may be dialled.
func (p *Policy) admits(addr netip.Addr) bool {
	addr = plain(addr)
	if isMetadata(addr) {
		return false
	}
	if v4, ok := carried(addr); ok && !p.admits(v4) {
		return false
	}
	return !containedIn(closed, addr) || containedIn(p.networks, addr)
}

// plain strips what would keep a prefix from matching: the IPv4-mapped form
// and the zone.
func plain(addr netip.Addr) netip.Addr { return addr.Unmap().WithZone("") }

func isMetadata(addr netip.Addr) bool { return slices.Contains(metadataAddrs, addr) }

func containedIn(networks []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// carried returns the IPv4 address that traffic to addr ends up at, where addr
// belongs to a transition mechanism: NAT64 (RFC 6052 §2.2, RFC 8215),
// IPv4-compatible (RFC 4291 §2.5.5.1), IPv4-translated (RFC 2765), 6to4
// (RFC 3056) and Teredo (RFC 4380 §4).
func carried(addr netip.Addr) (v4 netip.Addr, ok bool) {
	if !addr.Is6() || addr == loopback6 || addr == netip.IPv6Unspecified() {
		return netip.Addr{}, false
	}
	b := addr.As16()
	last := [4]byte(b[12:])
	switch {
	case compatible.Contains(addr), translated.Contains(addr), nat64.Contains(addr), localNAT64.Contains(addr):
		return netip.AddrFrom4(last), true
	case sixToFour.Contains(addr):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	case teredo.Contains(addr):
		for i := range last {
			last[i] = ^last[i]
		}
		return netip.AddrFrom4(last), true
	}
	return netip.Addr{}, false
}

var (
	compatible = netip.MustParsePrefix("::/96")
	translated = netip.MustParsePrefix("::ffff:0:0:0/96")
	nat64      = netip.MustParsePrefix("64:ff9b::/96")
	localNAT64 = netip.MustParsePrefix("64:ff9b:1::/48")
	sixToFour  = netip.MustParsePrefix("2002::/16")
	teredo     = netip.MustParsePrefix("2001::/32")
)

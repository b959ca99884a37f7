package target

import (
	"net/netip"
	"slices"
)

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

	// Only 2000::/3 is allocated. The rest holds unspecified, loopback,
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

// The metadata server gives the service's own credentials away; no setting opens it.
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

// Allows reports whether addr may be dialled. It is for the address that a host
// name stands for at that moment; [Policy.Parse] has seen the URL alone.
func (p *Policy) Allows(addr netip.Addr) bool {
	addr = plain(addr)
	if isMetadata(addr) {
		return false
	}
	if v4, ok := carried(addr); ok && !p.Allows(v4) {
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

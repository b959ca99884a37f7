package target

import (
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"testing"
)

func policy(t testing.TB, hosts []string, networks ...string) *Policy {
	t.Helper()
	var prefixes []netip.Prefix
	for _, n := range networks {
		prefixes = append(prefixes, netip.MustParsePrefix(n))
	}
	p, err := NewPolicy(hosts, prefixes, false)
	if err != nil {
		t.Fatalf("NewPolicy: %v", err)
	}
	return p
}

// notations4 writes an IPv4 address in every way that some program reads.
func notations4(a netip.Addr) []string {
	b := a.As4()
	n := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	hex := func(format string) string { return fmt.Sprintf(format, b[0], b[1], b[2], b[3]) }
	return []string{
		a.String(),
		a.String() + ".",
		fmt.Sprint(n),
		fmt.Sprintf("0x%x", n),
		fmt.Sprintf("0X%08X", n),
		fmt.Sprintf("0%o", n),
		hex("0%o.0%o.0%o.0%o"),
		hex("0x%x.0x%x.0x%x.0x%x"),
		hex("%d.%d.%d.0x%x"),
		hex("%03d.%03d.%03d.%03d"),
		fmt.Sprintf("%d.%d", b[0], n&0xffffff),
		fmt.Sprintf("%d.%d.%d", b[0], b[1], n&0xffff),
		"[::ffff:" + a.String() + "]",
		fmt.Sprintf("[::ffff:%x:%x]", n>>16, n&0xffff),
		fmt.Sprintf("[0:0:0:0:0:FFFF:%X:%X]", n>>16, n&0xffff),
		"[::" + a.String() + "]",
		"[::ffff:0:" + a.String() + "]",
		"[64:ff9b::" + a.String() + "]",
		"[64:ff9b:1::" + a.String() + "]",
		fmt.Sprintf("[2002:%x:%x::1]", n>>16, n&0xffff),
		fmt.Sprintf("[2001:0:4136:e378:8000:63bf:%x:%x]", ^n>>16, ^n&0xffff),
	}
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// TestClosedNetworks has its own list, by the registries' names, not the table's.
func TestClosedNetworks(t *testing.T) {
	t.Parallel()
	networks := []struct{ name, prefix string }{
		{"this network", "0.0.0.0/8"},
		{"private 10", "10.0.0.0/8"},
		{"carrier-grade NAT", "100.64.0.0/10"},
		{"loopback", "127.0.0.0/8"},
		{"link-local", "169.254.0.0/16"},
		{"private 172", "172.16.0.0/12"},
		{"protocol assignments", "192.0.0.0/24"},
		{"documentation 1", "192.0.2.0/24"},
		{"6to4 relays", "192.88.99.0/24"},
		{"private 192", "192.168.0.0/16"},
		{"benchmarking", "198.18.0.0/15"},
		{"documentation 2", "198.51.100.0/24"},
		{"documentation 3", "203.0.113.0/24"},
		{"multicast", "224.0.0.0/4"},
		{"reserved", "240.0.0.0/4"},
		{"broadcast", "255.255.255.255/32"},
		{"unspecified 6", "::/128"},
		{"loopback 6", "::1/128"},
		{"IPv4-compatible", "::/96"},
		{"IPv4-translated", "::ffff:0:0:0/96"},
		{"NAT64", "64:ff9b::/96"},
		{"local NAT64", "64:ff9b:1::/48"},
		{"discard", "100::/64"},
		{"dummy", "100:0:0:1::/64"},
		{"Teredo", "2001::/32"},
		{"benchmarking 6", "2001:2::/48"},
		{"ORCHID", "2001:10::/28"},
		{"ORCHIDv2", "2001:20::/28"},
		{"protocol assignments 6", "2001::/23"},
		{"documentation 6", "2001:db8::/32"},
		{"documentation 6 new", "3fff::/20"},
		{"6to4", "2002::/16"},
		{"SRv6", "5f00::/16"},
		{"unique local", "fc00::/7"},
		{"link-local 6", "fe80::/10"},
		{"site-local", "fec0::/10"},
		{"multicast 6", "ff00::/8"},
		{"not handed out", "4000::/3"},
	}
	p := policy(t, nil)
	for _, n := range networks {
		t.Run(n.name, func(t *testing.T) {
			t.Parallel()
			prefix := netip.MustParsePrefix(n.prefix)
			for _, a := range []netip.Addr{prefix.Addr(), lastAddr(prefix)} {
				if p.Allows(a) {
					t.Errorf("Allows(%v) = true, want false", a)
				}
				hosts := []string{"[" + a.String() + "]", "[" + a.StringExpanded() + "]"}
				if a.Is4() {
					hosts = notations4(a)
					if mapped := netip.AddrFrom16(a.As16()); p.Allows(mapped) {
						t.Errorf("Allows(%v) = true, want false", mapped)
					}
				} else if zoned := a.WithZone("eth0"); p.Allows(zoned) {
					t.Errorf("Allows(%v) = true, want false", zoned)
				}
				for _, host := range hosts {
					for _, form := range []string{"http://%s/", "https://%s:8443/a?b=c", "HTTP://%s"} {
						if raw := fmt.Sprintf(form, host); p.CheckURL(raw) == nil {
							t.Errorf("CheckURL(%q) = nil, want an error", raw)
						}
					}
				}
			}
			opened := policy(t, nil, n.prefix)
			if a := prefix.Addr(); a.Is4() && !opened.Allows(a) {
				t.Errorf("Allows(%v) = false although %v is opened", a, prefix)
			}
		})
	}
}

func TestPublicAddressesAreAllowed(t *testing.T) {
	t.Parallel()
	p := policy(t, nil)
	for _, s := range []string{
		"1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
		"169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.0.3.0", "192.88.98.255",
		"192.88.100.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "198.51.99.255",
		"203.0.112.255", "203.0.114.0", "223.255.255.255",
		"2000::1", "2001:200::1", "2001:db7:ffff::1", "2001:db9::1", "2003::1", "2600:1901::1", "2a00:1450:4001::1", "3ffe:ffff::1",
	} {
		a := netip.MustParseAddr(s)
		host := s
		if a.Is6() {
			host = "[" + s + "]"
		}
		if !p.Allows(a) {
			t.Errorf("Allows(%v) = false, want true", a)
		}
		if err := p.CheckURL("https://" + host + ":444/x"); err != nil {
			t.Errorf("CheckURL with host %s = %v, want nil", host, err)
		}
	}
	if err := p.CheckURL("https://[::ffff:8.8.8.8]/"); err != nil {
		t.Errorf("CheckURL with a mapped public address = %v, want nil", err)
	}
}

func TestMetadataServerIsNeverOpened(t *testing.T) {
	t.Parallel()
	p := policy(t, nil, "0.0.0.0/0", "::/0")
	hosts := append(notations4(netip.MustParseAddr("169.254.169.254")),
		"[fd20:ce::254]", "[FD20:00CE:0:0:0:0:0:0254]", "[fd20:ce::254%25eth0]",
		"metadata.google.internal", "metadata.google.internal.", "Metadata.Google.INTERNAL", "METADATA.GOOGLE.INTERNAL.:80")
	for _, hostList := range [][]string{nil, {"metadata.google.internal", "169.254.169.254", "fd20:ce::254", ".google.internal"}} {
		p.hosts = policy(t, hostList).hosts
		for _, host := range hosts {
			if err := p.CheckURL("http://" + host + "/computeMetadata/v1/"); err == nil {
				t.Errorf("CheckURL with host %s and allowed hosts %q = nil, want an error", host, hostList)
			}
		}
	}
	for _, s := range []string{
		"169.254.169.254", "::ffff:169.254.169.254", "fd20:ce::254", "fd20:ce::254%eth0", "::169.254.169.254",
		"64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:5601:5601", "::ffff:0:a9fe:a9fe",
	} {
		if p.Allows(netip.MustParseAddr(s)) {
			t.Errorf("Allows(%s) = true, want false", s)
		}
	}
	for _, s := range []string{"169.254.169.253", "10.0.0.1", "127.0.0.1", "::1", "::", "fd20:ce::253", "fe80::1"} {
		if !p.Allows(netip.MustParseAddr(s)) {
			t.Errorf("Allows(%s) = false although everything is opened", s)
		}
	}
}

func TestOpenedNetworks(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		networks []string
		allowed  []string
		refused  []string
	}{
		{"one network", []string{"10.1.0.0/16"}, []string{"10.1.2.3", "::ffff:10.1.2.3"}, []string{"10.2.0.0", "127.0.0.1", "::ffff:10.2.0.0"}},
		{"written as mapped", []string{"::ffff:10.1.0.0/112"}, []string{"10.1.2.3"}, []string{"10.2.0.0"}},
		{"all of IPv4 is not IPv6", []string{"0.0.0.0/0"}, []string{"127.0.0.1"}, []string{"::1", "fd00::1"}},
		{"all of IPv6 is not IPv4", []string{"::/0"}, []string{"::1", "fd00::1"}, []string{"127.0.0.1", "64:ff9b::127.0.0.1"}},
		{"NAT64 to public addresses only", []string{"64:ff9b::/96"}, []string{"64:ff9b::8.8.8.8"}, []string{"64:ff9b::10.0.0.1", "10.0.0.1"}},
		{"NAT64 to an opened network", []string{"64:ff9b::/96", "10.0.0.0/8"}, []string{"64:ff9b::10.0.0.1"}, []string{"64:ff9b::127.0.0.1"}},
		{"an opened network is not NAT64", []string{"10.0.0.0/8"}, []string{"10.0.0.1"}, []string{"64:ff9b::10.0.0.1", "2002:a00:1::1"}},
		{"6to4", []string{"2002::/16"}, []string{"2002:808:808::1"}, []string{"2002:a00:1::1"}},
		{"Teredo", []string{"2001::/32"}, []string{"2001:0:4136:e378:8000:63bf:f7f7:f7f7"}, []string{"2001:0:4136:e378:8000:63bf:f5ff:fffe"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := policy(t, nil, tt.networks...)
			for _, s := range tt.allowed {
				if !p.Allows(netip.MustParseAddr(s)) {
					t.Errorf("Allows(%s) = false, want true", s)
				}
			}
			for _, s := range tt.refused {
				if p.Allows(netip.MustParseAddr(s)) {
					t.Errorf("Allows(%s) = true, want false", s)
				}
			}
		})
	}
}

func TestCheckURL(t *testing.T) {
	t.Parallel()
	https, err := NewPolicy(nil, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	open := policy(t, nil)
	hosts := policy(t, []string{"Plays.Melodia.app.", ".Internal.melodia.app", "8.8.8.8", "2600::1"})
	tests := []struct {
		name   string
		policy *Policy
		url    string
		want   error
	}{
		{"https", https, "https://plays.melodia.app/x", nil},
		{"https, upper case", https, "HTTPS://plays.melodia.app/x", nil},
		{"http where https is required", https, "http://plays.melodia.app/x", errNotHTTPS},
		{"http", open, "http://plays.melodia.app/x", nil},
		{"underscore", open, "http://my_service:8080/", nil},
		{"punycode", open, "http://xn--mnchen-3ya.de/", nil},
		{"other scheme", open, "ftp://plays.melodia.app/x", ErrNotURL},
		{"no scheme", open, "//plays.melodia.app/x", ErrNotURL},
		{"opaque", open, "http:plays.melodia.app", ErrNotURL},
		{"empty", open, "", ErrNotURL},
		{"not a URL", open, "http://[::1", ErrNotURL},
		{"no host", open, "http:///x", errBadHost},
		{"only a port", open, "http://:80/", errBadHost},
		{"only a dot", open, "http://./", errBadHost},
		{"empty label", open, "http://a..b/", errBadHost},
		{"two trailing dots", open, "http://127.0.0.1../", errBadHost},
		{"wide digits", open, "http://１２７.0.0.1/", errBadHost},
		{"wide dot", open, "http://127。0.0.1/", errBadHost},
		{"percent-encoded wide digits", open, "http://%EF%BC%91%EF%BC%92%EF%BC%97.0.0.1/", errBadHost},
		{"separator in the host", open, "http://melodia.app;127.0.0.1/", errBadHost},
		{"too long a name", open, "http://" + strings.Repeat("a.", 127) + "a/", errBadHost},
		{"too long a label", open, "http://" + strings.Repeat("a", 64) + "/", errBadHost},
		{"decimal", open, "http://134744072/", errOddIPv4},
		{"decimal with port", open, "http://134744072:80/", errOddIPv4},
		{"short", open, "http://8.8/", errOddIPv4},
		{"hex prefix alone", open, "http://8.8.8.0x/", errOddIPv4},
		{"too many numbers", open, "http://8.8.8.8.8/", errOddIPv4},
		{"number too big", open, "http://8.8.8.256/", errOddIPv4},
		{"a name in front of a number", open, "http://melodia.127/", errOddIPv4},
		{"trailing dot after an address", open, "http://8.8.8.8./", errOddIPv4},
		{"localhost", open, "http://localhost:5432/", errNetwork},
		{"localhost with a dot", open, "http://LocalHost./", errNetwork},
		{"below localhost", open, "http://db.localhost/", errNetwork},
		{"localhost, loopback open", policy(t, nil, "127.0.0.0/8"), "http://localhost/", nil},
		{"localhost, IPv6 loopback open", policy(t, nil, "::1/128"), "http://a.localhost/", nil},
		{"not localhost", open, "http://localhost.melodia.app/", nil},
		{"allowed host", hosts, "http://plays.melodia.app/", nil},
		{"allowed host in other letters", hosts, "http://PLAYS.melodia.APP.:81/", nil},
		{"below an exact host", hosts, "http://x.plays.melodia.app/", errHost},
		{"longer than an exact host", hosts, "http://plays.melodia.app.evil.example/", errHost},
		{"below a suffix", hosts, "http://a.b.internal.melodia.app/", nil},
		{"the suffix itself", hosts, "http://internal.melodia.app/", errHost},
		{"ends like a suffix", hosts, "http://evilinternal.melodia.app/", errHost},
		{"allowed address", hosts, "http://8.8.8.8/", nil},
		{"allowed address, mapped", hosts, "http://[::ffff:8.8.8.8]/", nil},
		{"allowed IPv6 address", hosts, "http://[2600:0::1]/", nil},
		{"other address", hosts, "http://8.8.4.4/", errHost},
		{"user info does not make a host", hosts, "http://plays.melodia.app@evil.example/", errHost},
		{"an allowed host opens no network", policy(t, []string{"10.0.0.1"}), "http://10.0.0.1/", errNetwork},
		{"an allowed localhost opens no network", policy(t, []string{"localhost"}), "http://localhost/", errNetwork},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := tt.policy.CheckURL(tt.url); got != tt.want {
				t.Errorf("CheckURL(%q) = %v, want %v", tt.url, got, tt.want)
			}
		})
	}
}

// Stored by an earlier version, or by hand: nothing gets out of its line.
func TestHostsThatAreNone(t *testing.T) {
	t.Parallel()
	open := policy(t, nil, "0.0.0.0/0", "::/0")
	for _, raw := range []string{
		"http://h\r\nX: y/", "http://h y/", "http://h\ty/", "http://h\x00/", "http://h%0d%0ax/", "http://%68/", "http://h%2eh/", "http://h%2f/", "http://h\\.evil/",
		"http://h\\@evil/", "http://[::1%25a]/", "http://[::1%a]/", "http://[::1/", "http://::1/", "http://[[::1]]/", "http://[::1]x/", "http://h]/", "http://bücher.example/",
		"http://b%C3%BCcher.example/", "http://①.example/", "http://h。example/", "http://h:80:80/", "http://h:8a/", "http://h:-1/", "http://h: 80/", "http:// h/", "http://h\u00ad/",
		"http:/h/", "http:h", "//h/", "/h", "h", "\thttp://h/", "http\t://h/", "ht\ntp://h/", "http:\\\\h\\",
	} {
		if u, err := open.Parse(raw); err == nil {
			t.Errorf("%q is taken for a call to %q", raw, u.Host)
		}
	}
}

func BenchmarkCheckURL(b *testing.B) {
	var p Policy
	b.ReportAllocs()
	for b.Loop() {
		if err := p.CheckURL("https://plays.melodia.app/v1/plays?source=app"); err != nil {
			b.Fatal(err)
		}
	}
}

func TestNewPolicyNamesBadEntries(t *testing.T) {
	t.Parallel()
	for _, entry := range []string{
		"", ".", "..", " melodia.app", "melodia.app ", "*.melodia.app", "https://melodia.app", "melodia.app:443", "melodia.app/x",
		"a..b", "..melodia.app", "melodia.app..", "münchen.de", "[::1]", "fe80::1%eth0", "127.1", "2130706433", ".0.0.1", "0x7f.1", "10.0.0.0/8", "a,b",
		strings.Repeat("a", 64),
	} {
		_, err := NewPolicy([]string{"melodia.app", entry}, nil, false)
		if err == nil || !strings.Contains(err.Error(), strconv.Quote(entry)) {
			t.Errorf("NewPolicy with host %q: error %v, want one that names it", entry, err)
		}
	}
	if _, err := NewPolicy(nil, []netip.Prefix{{}}, false); err == nil {
		t.Error("NewPolicy with the zero prefix: no error")
	}
}

// atonAddr reads host as inet_aton(3) does: one to four numbers, each decimal,
// octal or hexadecimal, the last of which fills what is left.
func atonAddr(host string) (netip.Addr, bool) {
	parts := strings.Split(strings.TrimRight(host, "."), ".")
	if len(parts) > 4 {
		return netip.Addr{}, false
	}
	total := new(big.Int)
	for i, part := range parts {
		if part == "" || strings.ContainsAny(part, "_+-oObB") && !strings.HasPrefix(strings.ToLower(part), "0x") {
			return netip.Addr{}, false
		}
		n, ok := new(big.Int).SetString(part, 0)
		if !ok || n.Sign() < 0 {
			return netip.Addr{}, false
		}
		bits := uint(8)
		if i == len(parts)-1 {
			bits = uint(8 * (5 - len(parts)))
		}
		if n.BitLen() > int(bits) {
			return netip.Addr{}, false
		}
		total.Lsh(total, bits).Or(total, n)
	}
	var b [4]byte
	total.FillBytes(b[:])
	return netip.AddrFrom4(b), true
}

// surelyInternal is by the standard library's rules, which know fewer networks than ours.
func surelyInternal(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified()
}

func FuzzCheckURL(f *testing.F) {
	for _, host := range notations4(netip.MustParseAddr("127.0.0.1")) {
		f.Add("http://" + host + "/")
	}
	for _, s := range []string{
		"https://plays.melodia.app/x?y=z", "http://metadata.google.internal./", "http://[fe80::1%25eth0]:80/", "http://localhost",
		"http://user:pw@10.0.0.1/", "http://0177.1", "http://%31%32%37.1/", "http://１２７.1", "http:////127.0.0.1", `http:\\127.0.0.1`, "http://127.1:80?x", "\x00", "http://[::]:1",
	} {
		f.Add(s)
	}
	closedPolicy := policy(f, nil)
	openPolicy := policy(f, nil, "0.0.0.0/0", "::/0")
	f.Fuzz(func(t *testing.T, raw string) {
		for _, p := range []*Policy{closedPolicy, openPolicy} {
			if p.CheckURL(raw) != nil {
				continue
			}
			u, err := p.Parse(raw)
			if err != nil || !sameHost(raw, u) {
				t.Fatalf("CheckURL(%q) = nil, but its host is read as %+v (%v)", raw, u, err)
			}
			host := u.Hostname()
			addr, ok := atonAddr(host)
			if ip := net.ParseIP(host); ip != nil {
				addr, ok = netip.AddrFromSlice(ip)
			}
			if ok && p == closedPolicy && surelyInternal(addr) {
				t.Errorf("CheckURL(%q) = nil, but its host is %v", raw, addr)
			}
			if ok && addr.Unmap() == netip.MustParseAddr("169.254.169.254") {
				t.Errorf("CheckURL(%q) = nil, but its host is the metadata server", raw)
			}
			if strings.EqualFold(strings.TrimRight(host, "."), "metadata.google.internal") {
				t.Errorf("CheckURL(%q) = nil, but its host is the metadata server", raw)
			}
		}
	})
}

// sameHost reports whether u leads to the host that stands in raw, for a reader
// that knows nothing but RFC 3986 §3.2: the authority ends at the first / ? or #.
func sameHost(raw string, u *url.URL) bool {
	_, authority, _ := strings.Cut(raw, "://")
	if i := strings.IndexAny(authority, "/?#"); i >= 0 {
		authority = authority[:i]
	}
	authority = authority[strings.LastIndexByte(authority, '@')+1:]
	rest, found := strings.CutPrefix(authority, u.Host)
	return found && (rest == "" || strings.Trim(rest, ":0") == map[string]string{"http": "8", "https": "443"}[u.Scheme])
}

package target

import (
	"errors"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// Hosts is a list of hosts: exact names and IP addresses, and suffixes such as
// ".melodia.app", which stand for every name below melodia.app but not for
// melodia.app itself. Case and one trailing dot do not count. An entry stands for
// all ports of its host. The zero list is empty. A list that no longer grows may be
// shared by any number of goroutines.
type Hosts struct {
	exact    map[string]bool
	suffixes []string
}

// errBadEntry says what an entry must be. It does not hold the entry, which may
// be a secret that was put in the wrong place.
var errBadEntry = errors.New("not a name (plays.melodia.app), a suffix (.melodia.app) or an IP address")

// Add adds an entry. The error's text completes "the host is …" and does not hold
// the entry.
func (l *Hosts) Add(entry string) error {
	host, isSuffix, err := ParseHost(entry)
	switch {
	case err != nil:
		return err
	case isSuffix:
		l.suffixes = append(l.suffixes, host)
		return nil
	}
	if l.exact == nil {
		l.exact = make(map[string]bool)
	}
	l.exact[host] = true
	return nil
}

// ParseHost returns an entry in the form in which hosts are compared. A suffix keeps the
// dot at its start. The errors are those of [Hosts.Add].
func ParseHost(entry string) (host string, isSuffix bool, err error) {
	if addr, err := netip.ParseAddr(entry); err == nil && addr.Zone() == "" {
		return addr.Unmap().String(), false, nil
	}
	host = canonicalName(entry)
	name, isSuffix := strings.CutPrefix(host, ".")
	if !isName(name) || endsInNumber(name) {
		return "", false, errBadEntry
	}
	return host, isSuffix, nil
}

// Empty reports whether the list has no entry.
func (l *Hosts) Empty() bool { return l.exact == nil && l.suffixes == nil }

func (l *Hosts) hasAddr(addr netip.Addr) bool { return l.exact[plain(addr).String()] }

// hasName takes a name as canonicalName returns it.
func (l *Hosts) hasName(name string) bool {
	return l.exact[name] || slices.ContainsFunc(l.suffixes, func(suffix string) bool { return strings.HasSuffix(name, suffix) })
}

// Contains reports whether u's host is in the list. No list contains a host that
// programs could read in two ways.
func (l *Hosts) Contains(u *url.URL) bool {
	host, isName := HostOf(u)
	return l.exact[host] || isName && l.hasName(host)
}

// HostOf returns u's host in the form of [ParseHost], and whether it is a name. The
// host is empty where programs could read it in two ways.
func HostOf(u *url.URL) (host string, named bool) {
	host = u.Hostname()
	if addr, err := netip.ParseAddr(host); err == nil {
		return plain(addr).String(), false
	}
	host = canonicalName(host)
	if !isName(host) || endsInNumber(host) {
		return "", false
	}
	return host, true
}

// Confidential reports whether only u's host can read what is sent to u: over
// https the certificate proves the host, whatever the DNS says; to a loopback
// address nothing leaves the machine. A name such as localhost proves nothing.
func Confidential(u *url.URL) bool {
	addr, err := netip.ParseAddr(u.Hostname())
	return u.Scheme == "https" || u.Scheme == "http" && err == nil && plain(addr).IsLoopback()
}

// canonicalName is the form in which host names are compared.
func canonicalName(host string) string { return strings.ToLower(strings.TrimSuffix(host, ".")) }

// isName reports whether s, in lower case, could be a host's name in the DNS.
func isName(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, isNoNameRune) {
			return false
		}
	}
	return true
}

// isNoNameRune reports whether r may not stand in a label of a host's name. The
// underscore may: names in container networks have it.
func isNoNameRune(r rune) bool {
	return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
}

// endsInNumber reports whether name, in lower case, is read as an IPv4 address
// by the WHATWG URL standard's "ends in a number checker".
func endsInNumber(name string) bool {
	last := name[strings.LastIndexByte(name, '.')+1:]
	if hex, ok := strings.CutPrefix(last, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return last != "" && strings.Trim(last, "0123456789") == ""
}

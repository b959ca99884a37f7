package deliver

import (
	"errors"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// hostList names hosts: exact names and IP addresses, and suffixes such as
// ".melodia.app", which stand for every name below melodia.app but not for
// melodia.app itself. Case and one trailing dot do not count. A host is meant
// with all its ports. The zero list is empty.
type hostList struct {
	exact    map[string]bool
	suffixes []string
}

// errBadEntry says what an entry must be. It does not hold the entry: that may
// be a secret in the wrong place.
var errBadEntry = errors.New("not a name (plays.melodia.app), a suffix (.melodia.app) or an IP address")

func (l *hostList) add(entry string) error {
	host, isSuffix, err := parseHost(entry)
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

// parseHost returns an entry as it is compared. A suffix keeps the dot at its start.
func parseHost(entry string) (host string, isSuffix bool, err error) {
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

func (l *hostList) empty() bool { return l.exact == nil && l.suffixes == nil }

func (l *hostList) hasAddr(addr netip.Addr) bool { return l.exact[plain(addr).String()] }

// hasName takes a name as canonicalName returns it.
func (l *hostList) hasName(name string) bool {
	return l.exact[name] || slices.ContainsFunc(l.suffixes, func(suffix string) bool { return strings.HasSuffix(name, suffix) })
}

// has reports whether u's host is in the list. What could be read in two ways
// is in none.
func (l *hostList) has(u *url.URL) bool {
	host, isName := hostOf(u)
	return l.exact[host] || isName && l.hasName(host)
}

// hostOf returns u's host as entries are compared with it, and whether it is a
// name. It is empty where it could be read in two ways.
func hostOf(u *url.URL) (host string, named bool) {
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

// confidential reports whether what is sent to u is read by its host alone:
// over https, where the certificate proves the host whatever the DNS says, or
// when it does not leave the machine. A name such as localhost proves nothing.
func confidential(u *url.URL) bool {
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
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return true
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

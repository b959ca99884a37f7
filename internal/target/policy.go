// Package target decides which hosts and addresses may be called. [Policy] checks
// a task's URL when the task is submitted and again when it is called, and each
// address when it is dialled. [Hosts] is a list of hosts from the settings, which
// package credentials uses too: both must read the host of a URL the same way.
package target

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strings"

	"github.com/melodia/orchestrator/internal/task"
)

// Policy says which targets may be called. It never changes, so that many
// goroutines may share it. The zero Policy allows every public address.
type Policy struct {
	hosts        Hosts
	networks     []netip.Prefix
	requireHTTPS bool
}

// ErrNotURL is the error for a text that is not the URL of a call. Its text
// completes "url …".
var ErrNotURL = errors.New("must be a valid absolute URL that begins with http:// or https://")

// The other errors of [Policy.CheckURL]. Their texts complete "url …".
var (
	errNotHTTPS = errors.New("must begin with https://: the target policy requires it")
	errBadHost  = errors.New("must name its host by an IP address or by a name of letters, digits, hyphens and dots")
	errOddIPv4  = errors.New("must write an IPv4 address as four decimal numbers without leading zeros")
	errMetadata = errors.New("must not point to the metadata server")
	errHost     = errors.New("must name a host that the service may call (TARGET_ALLOW_HOSTS lists them)")
	errNetwork  = errors.New("must not point to a loopback, private or other special address (TARGET_ALLOW_NETWORKS lists exceptions)")
)

// NewPolicy makes a policy.
//
// Where allowHosts is not empty, only its hosts may be called; [Hosts] says what an
// entry may be. The error for any other entry names it.
//
// allowNetworks opens networks that are closed otherwise, whatever the host is
// called. An IPv6 address that carries an IPv4 address (NAT64, 6to4, Teredo)
// may be dialled only where both may.
func NewPolicy(allowHosts []string, allowNetworks []netip.Prefix, requireHTTPS bool) (*Policy, error) {
	p := &Policy{requireHTTPS: requireHTTPS}
	for _, entry := range allowHosts {
		if err := p.hosts.Add(entry); err != nil {
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

// CheckURL returns an error unless the text of rawURL shows a target that may be
// called. It does not look host names up: [Policy.Allows] decides about their
// addresses when they are dialled. The error's text completes "url …" and never
// holds what was sent. CheckURL does no I/O.
func (p *Policy) CheckURL(rawURL string) error {
	_, err := p.Parse(rawURL)
	return err
}

// Parse reads rawURL with [task.ParseURL] and checks it as CheckURL does. Its errors
// are those of CheckURL.
func (p *Policy) Parse(rawURL string) (*url.URL, error) {
	u, err := task.ParseURL(rawURL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Opaque != "" {
		return nil, ErrNotURL // not the parser's error, which quotes the URL
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
	case !p.hosts.Empty() && !p.hosts.hasAddr(addr):
		return errHost
	case !p.Allows(addr):
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
	case !p.hosts.Empty() && !p.hosts.hasName(name):
		return errHost
	case (name == "localhost" || strings.HasSuffix(name, ".localhost")) && !p.Allows(loopback4) && !p.Allows(loopback6):
		return errNetwork // RFC 6761 §6.3
	}
	return nil
}

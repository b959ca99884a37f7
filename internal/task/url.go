package task

import (
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ParseURL reads the URL of a call, as [EncodeURL] returns it; RequestURI of the
// result is what stands in the request line. The default port of its scheme is
// left out of the result's Host, as RFC 9110 §4.2.3 advises. Errors are those of
// [url.Parse] and quote raw.
//
// Whatever decides about a call by its host must ask ParseURL, and the call must
// go to the host that it returns: two parsers could see two hosts.
func ParseURL(raw string) (*url.URL, error) {
	u, err := url.Parse(EncodeURL(raw))
	if err != nil {
		return nil, err
	}
	if port := u.Port(); port != "" {
		switch number := strings.TrimLeft(port, "0"); {
		case u.Scheme == "http" && number == "80", u.Scheme == "https" && number == "443":
			u.Host = strings.TrimSuffix(u.Host, ":"+port)
		}
	}
	return u, nil
}

// EncodeURL returns a URL, or a reference to one, with a path, a query and a
// fragment that hold only what RFC 3986 allows there (§3.3 to §3.5): every other
// byte is percent-encoded, and so is a % that no two hexadecimal digits follow.
// All else stays as it is: escapes, dot segments, repeated slashes, upper and
// lower case. What stands before the path is not touched.
func EncodeURL(raw string) string {
	begin := endOfAuthority(raw)
	encoded := 0
	for i := begin; i < len(raw); i++ {
		if !allowedAt(raw, i) {
			encoded++
		}
	}
	if encoded == 0 {
		return raw
	}
	const hex = "0123456789ABCDEF"
	b := make([]byte, 0, len(raw)+2*encoded)
	b = append(b, raw[:begin]...)
	for i := begin; i < len(raw); i++ {
		c := raw[i]
		if allowedAt(raw, i) {
			b = append(b, c)
		} else {
			b = append(b, '%', hex[c>>4], hex[c&15])
		}
	}
	return string(b)
}

// endOfAuthority returns where the path of a URL or reference begins (RFC 3986 §3).
func endOfAuthority(raw string) int {
	begin := 0
	if i := strings.IndexAny(raw, ":/?#"); i >= 0 && raw[i] == ':' {
		begin = i + 1
	}
	rest, found := strings.CutPrefix(raw[begin:], "//")
	if !found {
		return begin
	}
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		rest = rest[i:]
	} else {
		rest = ""
	}
	return len(raw) - len(rest)
}

// allowedAt reports whether byte i of a URL may stand as it is behind the
// authority: as a delimiter, a pchar, or the % of an escape.
func allowedAt(raw string, i int) bool {
	c := raw[i]
	if c == '%' {
		return i+2 < len(raw) && isHex(raw[i+1]) && isHex(raw[i+2])
	}
	return isAlphanumeric(rune(c)) || strings.IndexByte("/?#-._~!$&'()*+,;=:@", c) >= 0
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// checkURL returns what is wrong with a target's URL, or "".
func checkURL(raw string) string {
	if raw == "" {
		return "must not be empty"
	}
	if len(raw) > MaxURLBytes {
		return "must be at most 2048 bytes long"
	}
	if !utf8.ValidString(raw) || strings.ContainsFunc(raw, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return "must not contain spaces or control characters; percent-encode them"
	}
	u, err := ParseURL(raw)
	if err != nil {
		return "must be an absolute URL with a valid host and port, like https://plays.melodia.app:8443/plays"
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return "must begin with http:// or https://"
	case u.User != nil:
		return "must not hold a user name or password; use an Authorization header"
	case strings.Contains(raw, "#"):
		return "must not have a fragment (#…)"
	case u.Hostname() == "":
		return "must name a host"
	}
	host := u.Hostname()
	if strings.HasPrefix(u.Host, "[") { // an IPv6 address, or url.Parse would have refused it
		if strings.Contains(host, "%") {
			return "must not have an IPv6 zone in its host"
		}
	} else if strings.ContainsFunc(host, func(r rune) bool { return !isAlphanumeric(r) && !strings.ContainsRune("-._", r) }) {
		return "must name its host in ASCII letters, digits, hyphens and dots; write international names in punycode (xn--…)"
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.Atoi(p); err != nil || n < 1 || n > 65535 {
			return "must have a port between 1 and 65535"
		}
	} else if strings.HasSuffix(u.Host, ":") {
		return "must have a port after the colon"
	}
	return ""
}

// DefaultAudience is the audience where a request names none: scheme, host and
// port of the call's URL, without the default port, as Cloud Run wants it. It is
// empty for what is no URL.
func DefaultAudience(rawURL string) string {
	u, err := ParseURL(rawURL)
	if err != nil || u.Host == "" {
		return ""
	}
	return u.Scheme + "://" + strings.ToLower(u.Host)
}

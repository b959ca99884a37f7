package deliver

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/melodia/orchestrator/internal/task"
)

// credentials are what is added to a call at the moment when it is made, and
// is kept nowhere. The zero value adds nothing.
type credentials struct {
	// headers are the task's, with the secrets that they refer to.
	headers map[string]string
	// token is nil where the task asks for none.
	token *idToken
	// secrets must not be kept when the target sends them back.
	secrets []string
}

// callError says why no request was sent, in words that may be kept and shown.
type callError struct {
	text string
	// refused: the settings do not admit it, so that another try is in vain.
	refused bool
}

func (e *callError) Error() string { return e.text }

// credentials gets what c asks for, until deadline at the longest. What was
// admitted at submission is asked again, of the URL that is really called: the
// settings may have changed.
func (d *Deliverer) credentials(ctx context.Context, deadline time.Time, u *url.URL, c task.Call) (got credentials, err error) {
	got.headers, got.secrets, err = d.secrets.fill(u, c.Task.Headers)
	got.secrets = appendLiterals(got.secrets, c.Task.Headers)
	if err != nil || c.Task.OIDCAudience == "" {
		return got, err
	}
	if err := d.identity.check(u); err != nil {
		return got, &callError{text: "the task's auth " + err.Error(), refused: true}
	}
	maxAge := anyAge
	if c.Attempt > 1 {
		maxAge = freshFor
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	got.token, err = d.identity.token(ctx, c.Task.OIDCAudience, c.At, maxAge)
	if err == nil {
		got.secrets = append(got.secrets, got.token.value)
	}
	return got, err
}

// leastLiteral is the length from which on the value of a secret header is
// looked for in answers. Shorter ones are in every text: X-Max-Tokens: 5.
const leastLiteral = 8

// appendLiterals appends the values of secret headers to secrets, and what
// follows the scheme in those that have one.
func appendLiterals(secrets []string, headers map[string]string) []string {
	for name, value := range headers {
		if len(value) < leastLiteral || !task.IsSecretHeader(name) {
			continue
		}
		secrets = append(secrets, value)
		if _, credential, _ := strings.Cut(value, " "); len(credential) >= leastLiteral {
			secrets = append(secrets, credential)
		}
	}
	return secrets
}

const redacted = "[redacted]"

// redact hides secrets in what a target sent. It is for targets that repeat
// what they were sent, as it was or quoted for JSON or a URL: one that is out to
// give a secret away can do so in other ways. Where cut says that text breaks
// off, what may be the start of a secret is left out at its end.
func redact(text string, secrets []string, cut bool) string {
	if !cut && !slices.ContainsFunc(secrets, func(s string) bool { return len(s) <= len(text) }) {
		return text // too short for any: no spelling is shorter than its secret
	}
	var spellings []string
	for _, s := range secrets {
		var quoted bytes.Buffer
		encoder := json.NewEncoder(&quoted)
		_ = encoder.Encode(s) // a string always can be
		encoder.SetEscapeHTML(false)
		_ = encoder.Encode(s)
		for _, escaped := range []string{url.QueryEscape(s), url.PathEscape(s)} {
			spellings = append(spellings, escaped, percentEscape.ReplaceAllStringFunc(escaped, strings.ToLower)) // as .NET does
		}
		spellings = append(spellings, s)
		for line := range strings.Lines(quoted.String()) {
			line = line[1 : len(line)-len("\"\n")]
			spellings = append(spellings, line, strings.ReplaceAll(line, "/", `\/`)) // as PHP does
		}
	}
	// The longest first: one may be a part of another.
	slices.SortFunc(spellings, func(a, b string) int {
		return cmp.Or(cmp.Compare(len(b), len(a)), strings.Compare(a, b))
	})
	spellings = slices.Compact(spellings)
	if !cut && !slices.ContainsFunc(spellings, func(s string) bool { return strings.Contains(text, s) }) {
		return text // nearly always
	}
	pairs := make([]string, 0, 2*len(spellings))
	for _, s := range spellings {
		pairs = append(pairs, s, redacted)
	}
	text = strings.NewReplacer(pairs...).Replace(text) // at once: a secret may be a part of "redacted"
	if cut {
		end := len(text)
		for _, s := range spellings {
			for n := min(len(s), len(text)); n > len(text)-end; n-- {
				if strings.HasSuffix(text, s[:n]) {
					end = len(text) - n
				}
			}
		}
		text = text[:end]
	}
	// It may have grown.
	for end := min(len(text), excerptBytes); ; end-- {
		if end == len(text) || utf8.RuneStart(text[end]) {
			return text[:end]
		}
	}
}

var percentEscape = regexp.MustCompile(`%[0-9A-F]{2}`)

// redactLocation hides secrets in the one header of an answer that is quoted.
func redactLocation(h http.Header, secrets []string) {
	for i, location := range h["Location"] {
		h["Location"][i] = redact(location, secrets, false)
	}
}

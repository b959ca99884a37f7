// Package credentials adds to a call what proves who makes it: an ID token of the
// service's account ([Identity]), a token of the platform ([Issuer]), secrets that the headers of the task refer to
// ([Secrets]), signatures ([Signer]). They are added when the call is made and are
// stored nowhere; [Added.Read] and [Added.RedactHeader] keep them out of what is
// stored of an answer.
//
// Tokens and secrets go to the hosts that the settings name for them, over https,
// and to no others. A host is told by the name in the URL, which its certificate
// must bear: neither redirects, which are not followed, nor DNS answers lead them
// elsewhere.
//
// A token of the platform is made for each call, at its moment, so that a 401 to it
// counts like any answer. Where a target answers 401 to an ID token, the token may have been withdrawn. A
// second request within the attempt would not be one attempt, so the next attempt
// gets a new token. Attempts after the first have one that was just fetched, so
// that another 401 counts like any answer (while the metadata server cannot be
// reached they make do with an older one).
package credentials

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Set is what the service can add to calls. The zero value adds nothing. Any number
// of goroutines may use it.
type Set struct {
	// Identity fetches ID tokens; nil allows none.
	Identity *Identity
	// Issuer makes tokens of the platform; nil makes none.
	Issuer *Issuer
	// Secrets are what headers may refer to; nil is none.
	Secrets *Secrets
	// Signer signs calls; nil signs none.
	Signer *Signer
}

// Wanted is what one call asks for.
type Wanted struct {
	// Headers are the task's. Their values may refer to secrets.
	Headers map[string]string
	// Audience is whom the ID token is for; "" asks for no token.
	Audience string
	// JWT is what a token of the platform says; nil asks for none. There is no ID token then.
	JWT *task.JWT
	// Token is sent beside what For returns, and hidden in answers; "" is none.
	Token string
	// At is the moment of the attempt, by the database's clock.
	At time.Time
	// Retry says that it is not the task's first attempt.
	Retry bool
	// Deadline ends the wait for a token.
	Deadline time.Time
}

// Added is what one call carries. The zero value is nothing.
type Added struct {
	// Headers are the task's, with the secrets that they refer to.
	Headers map[string]string

	token  *idToken // nil: none
	jwt    string   // a token of the platform; "": none
	signs  bool     // the headers of signatures are the service's
	keys   signingKeys
	hidden *hidden // nil: nothing to hide
}

// Error says why a call cannot carry what it asks for, in words that may be stored
// and shown. It wraps what the system said, where that matters.
type Error struct {
	text    string
	refused bool
	cause   error
}

func (e *Error) Error() string { return e.text }

// Refused reports whether the settings do not allow what the call asks for, so that
// another attempt would fail too.
func (e *Error) Refused() bool { return e.refused }

func (e *Error) Unwrap() error { return e.cause }

// For returns what a call to u carries. The rules of [Identity.CheckURL] and
// [Secrets.Check] are asked again, of the URL that is really called: the settings may
// have changed since the task was submitted. For blocks while a token is fetched,
// until w.Deadline or the end of ctx at most. Its errors are [*Error], or the
// context's.
func (s *Set) For(ctx context.Context, u *url.URL, w Wanted) (added Added, err error) {
	var h hidden
	added.Headers, h.values, err = s.Secrets.fill(u, w.Headers)
	if w.Token != "" {
		h.values = append(h.values, w.Token)
	}
	h.literals = literals(w.Headers)
	if h.values != nil || h.literals != nil {
		added.hidden = &h
	}
	added.signs, added.keys = s.Signer != nil, s.Signer.keysFor(u)
	if err == nil && w.JWT != nil {
		if err := s.Issuer.check(u, w.JWT.Role); err != nil {
			return added, &Error{text: "the task's auth " + err.Error(), refused: true}
		}
		if added.jwt, err = s.Issuer.token(w.JWT, w.At); err != nil {
			return added, &Error{text: "no token could be signed", cause: err}
		}
		h.values = append(h.values, added.jwt)
		added.hidden = &h
		return added, nil
	}
	if err != nil || w.Audience == "" {
		return added, err
	}
	if err := s.Identity.check(u); err != nil {
		return added, &Error{text: "the task's auth " + err.Error(), refused: true}
	}
	maxAge := anyAge
	if w.Retry {
		maxAge = freshFor
	}
	ctx, cancel := context.WithDeadline(ctx, w.Deadline)
	defer cancel()
	added.token, err = s.Identity.token(ctx, w.Audience, w.At, maxAge)
	if err == nil {
		h.values = append(h.values, added.token.value)
		added.hidden = &h
	}
	return added, err
}

// TokenRefused takes note that the target answered 401 to added. It reports whether
// the next attempt, which has a new ID token, may do better; false where added has no
// token, or one that was just fetched at that moment.
func (s *Set) TokenRefused(added Added, at time.Time) bool {
	return added.token != nil && s.Identity.refused(added.token, at)
}

// Token returns what goes with the call as Authorization: Bearer; "" is none.
func (a Added) Token() string {
	if a.token == nil {
		return a.jwt
	}
	return a.token.value
}

// Signature returns the values of the headers Webhook-Timestamp and Webhook-Signature
// for a request with this id and body at a moment. Where signed is false the request
// has neither.
func (a Added) Signature(id string, at time.Time, body []byte) (timestamp, signature string, signed bool) {
	if a.keys == nil {
		return "", "", false
	}
	timestamp = strconv.FormatInt(at.Unix(), 10)
	return timestamp, a.keys.sign(id, timestamp, body), true
}

// Replaces reports whether the service sends the header itself, so that the task's
// own header of that name must not be sent.
func (a Added) Replaces(name string) bool {
	return a.signs && isWebhook(name) || a.Token() != "" && strings.EqualFold(name, "Authorization")
}

// isWebhook reports whether a header is Webhook-…, or Webhook_…, which a target may
// take for it. Stored tasks may have such headers from before the domain refused
// them.
func isWebhook(name string) bool {
	const mark = len("Webhook")
	return len(name) > mark && (name[mark] == '-' || name[mark] == '_') && strings.EqualFold(name[:mark], "Webhook")
}

// RedactHeader replaces the secrets of the call in the values of the header name,
// which is in canonical form.
func (a Added) RedactHeader(header http.Header, name string) {
	h := a.hidden
	if h == nil {
		return
	}
	for i, value := range header[name] {
		if h.fits(len(value)) {
			header[name][i] = redact(value, len(value), spellings(h.values), spellings(h.literals))
		}
	}
}

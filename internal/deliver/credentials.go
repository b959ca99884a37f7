package deliver

import (
	"context"
	"net/url"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// credentials are what is added to a call at the moment when it is made, and
// is kept nowhere. The zero value adds nothing.
type credentials struct {
	// headers are the task's, with the secrets that they refer to.
	headers map[string]string
	// token is nil where the task asks for none.
	token *idToken
	// secrets must not be kept when the target sends them back; nil: there are none.
	secrets *hidden
}

// callError says why no request was sent, in words that may be kept and shown.
type callError struct {
	text string
	// refused: the settings do not admit it, so that another try is in vain.
	refused bool
	// cause is what the system said, where that matters; it is never shown.
	cause error
}

func (e *callError) Error() string { return e.text }

func (e *callError) Unwrap() error { return e.cause }

// credentials gets what c asks for, until deadline at the longest. What was
// admitted at submission is asked again, of the URL that is really called: the
// settings may have changed.
func (d *Deliverer) credentials(ctx context.Context, deadline time.Time, u *url.URL, c task.Call) (got credentials, err error) {
	var secrets hidden
	got.headers, secrets.values, err = d.secrets.fill(u, c.Task.Headers)
	secrets.literals = literals(c.Task.Headers)
	if secrets.values != nil || secrets.literals != nil {
		got.secrets = &secrets
	}
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
		secrets.values = append(secrets.values, got.token.value)
		got.secrets = &secrets
	}
	return got, err
}

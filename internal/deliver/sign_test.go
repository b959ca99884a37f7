package deliver

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	webhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/melodia/orchestrator/internal/credentials"
	"github.com/melodia/orchestrator/internal/task"
)

// signingSecret is a secret of n bytes.
func signingSecret(first byte, n int) string {
	return "whsec_" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{first}, n))
}

func newSigner(t testing.TB, entries ...string) *credentials.Signer {
	t.Helper()
	s, err := credentials.NewSigner(entries)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSignatures(t *testing.T) {
	t.Parallel()
	current, last, other := signingSecret(1, 24), signingSecret(2, 64), signingSecret(3, 32)
	type request struct {
		header http.Header
		body   []byte
	}
	got := make(chan request, 1)
	s := newServer(t, func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- request{r.Header, body}
	})
	for _, tt := range []struct {
		name    string
		method  string
		body    []byte
		secrets []string
		signers []string // whose signature is there
	}{
		{"JSON", "POST", []byte(`{"a": 1.0}`), []string{current}, []string{current}},
		{"bytes", "PUT", []byte("\x00\xff.\r\n"), []string{current}, []string{current}},
		{"empty body", "POST", []byte{}, []string{current}, []string{current}},
		{"no body", "GET", nil, []string{current}, []string{current}},
		{"rotation", "POST", []byte("x"), []string{current, last}, []string{current, last}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDeliverer(t)
			d.credentials.Signer = newSigner(t, tt.secrets...)
			c := newCall(tt.method, s.URL, tt.body)
			c.At = time.Now()
			if o := d.Deliver(t.Context(), c); o.Kind != task.OutcomeSucceeded {
				t.Fatalf("outcome = %+v, want success", o)
			}
			r := <-got
			if id := r.header.Get("Webhook-Id"); id != c.Task.ID.String() {
				t.Errorf("webhook-id = %q, want the task's id", id)
			}
			if n := len(strings.Fields(r.header.Get("Webhook-Signature"))); n != len(tt.signers) {
				t.Errorf("%d signatures, want %d", n, len(tt.signers))
			}
			for _, secret := range tt.signers {
				verifier, err := webhooks.NewWebhook(secret)
				if err != nil {
					t.Fatal(err)
				}
				if err := verifier.Verify(r.body, r.header); err != nil {
					t.Errorf("Verify: %v", err)
				}
				if err := verifier.Verify(append(r.body, ' '), r.header); err == nil {
					t.Error("Verify of another body: no error")
				}
			}
			verifier, err := webhooks.NewWebhook(other)
			if err != nil {
				t.Fatal(err)
			}
			if err := verifier.Verify(r.body, r.header); err == nil {
				t.Error("Verify with another secret: no error")
			}
		})
	}
}

// Calls to two hosts are signed with their own secrets, and one to a third host,
// for which there is none, is not signed.
func TestEachTargetHasItsOwnSignature(t *testing.T) {
	t.Parallel()
	type request struct {
		header http.Header
		body   []byte
	}
	got := make(chan request, 1)
	listener, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: listener, Config: &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- request{r.Header, body}
	})}}
	s.Start()
	t.Cleanup(s.Close)
	plays, others := signingSecret(1, 24), signingSecret(2, 24)
	d := newDeliverer(t)
	d.credentials.Signer = newSigner(t, "127.0.0.1="+plays, "127.0.0.2="+others)
	for host, secret := range map[string]string{"127.0.0.1": plays, "127.0.0.2": others, "127.0.0.3": ""} {
		c := newCall("POST", fmt.Sprintf("http://%s:%d", host, listener.Addr().(*net.TCPAddr).Port), []byte(`{"a":1}`))
		c.Task.Headers = map[string]string{"Webhook-Id": "forged", "Webhook-Signature": "forged"}
		c.At = time.Now()
		if o := d.Deliver(t.Context(), c); o.Kind != task.OutcomeSucceeded {
			t.Fatalf("outcome = %+v, want success", o)
		}
		r := <-got
		for name, other := range map[string]string{"the secret of 127.0.0.1": plays, "the secret of 127.0.0.2": others} {
			verifier, err := webhooks.NewWebhook(other)
			if err != nil {
				t.Fatal(err)
			}
			if verified := verifier.Verify(r.body, r.header) == nil; verified != (other == secret) {
				t.Errorf("the call to %s verifies with %s: %t", host, name, verified)
			}
		}
		for name := range r.header {
			if strings.HasPrefix(name, "Webhook-") && secret == "" {
				t.Errorf("the call to %s has %s", host, name)
			}
		}
	}
}

// A task that was stored before its headers were reserved cannot pass off its own.
func TestSignatureIsNotTheTasks(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		for name, values := range r.Header {
			if strings.HasPrefix(strings.ToLower(name), "webhook") {
				io.WriteString(w, strings.Join(values, "|"))
			}
		}
	})
	d := newDeliverer(t)
	d.credentials.Signer = newSigner(t, signingSecret(1, 24))
	c := newCall("POST", s.URL, nil)
	c.Task.Headers = map[string]string{"webhook-id": "forged", "Webhook-timestamp": "forged", "WEBHOOK-signature": "forged", "webhook_id": "forged", "Webhook_Signature": "forged"}
	if o := d.Deliver(t.Context(), c); o.Kind != task.OutcomeSucceeded || strings.Contains(o.ResponseExcerpt, "forged") || strings.Contains(o.ResponseExcerpt, "|") {
		t.Errorf("outcome = %+v, want the signer's headers alone", o)
	}
}

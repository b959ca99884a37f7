package deliver

import (
	"bytes"
	"encoding/base64"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	webhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/melodia/orchestrator/internal/task"
)

// signingSecret is a secret of n bytes.
func signingSecret(first byte, n int) string {
	return "whsec_" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{first}, n))
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
			signer, err := NewSigner(tt.secrets)
			if err != nil {
				t.Fatal(err)
			}
			d := New(Options{Policy: policy(t, nil, "127.0.0.0/8"), Signer: signer})
			t.Cleanup(d.Close)
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

// A task that was stored before its headers were reserved cannot pass off its own.
func TestSignatureIsNotTheTasks(t *testing.T) {
	t.Parallel()
	signer, err := NewSigner([]string{signingSecret(1, 24)})
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		for _, name := range []string{"Webhook-Id", "Webhook-Timestamp", "Webhook-Signature"} {
			io.WriteString(w, strings.Join(r.Header[name], "|"))
		}
	})
	d := New(Options{Policy: policy(t, nil, "127.0.0.0/8"), Signer: signer})
	t.Cleanup(d.Close)
	c := newCall("POST", s.URL, nil)
	c.Task.Headers = map[string]string{"webhook-id": "forged", "Webhook-timestamp": "forged", "WEBHOOK-signature": "forged"}
	if o := d.Deliver(t.Context(), c); o.Kind != task.OutcomeSucceeded || strings.Contains(o.ResponseExcerpt, "forged") || strings.Contains(o.ResponseExcerpt, "|") {
		t.Errorf("outcome = %+v, want the signer's headers alone", o)
	}
}

func TestNewSignerRefuses(t *testing.T) {
	t.Parallel()
	good := signingSecret(1, 24)
	for name, secret := range map[string]string{
		"empty":             "",
		"no prefix":         strings.TrimPrefix(good, "whsec_"),
		"another prefix":    strings.Replace(good, "whsec_", "WHSEC_", 1),
		"too short":         signingSecret(1, 23),
		"too long":          signingSecret(1, 65),
		"not base64":        "whsec_s3cret!!s3cret!!s3cret!!s3cret!!",
		"base64 of URLs":    "whsec_" + base64.URLEncoding.EncodeToString(bytes.Repeat([]byte{0xff}, 24)),
		"line break":        good[:12] + "\n" + good[12:],
		"space":             " " + good,
		"padding left out":  strings.TrimRight(signingSecret(1, 25), "="),
		"bits left over":    "whsec_" + strings.Repeat("A", 34) + "B=",
		"asymmetric secret": "whsk_" + strings.TrimPrefix(good, "whsec_"),
	} {
		_, err := NewSigner([]string{good, secret})
		if want := "secret 2: must be whsec_ and the base64 of 24 to 64 bytes"; err == nil || err.Error() != want {
			t.Errorf("%s: error %v, want %q", name, err, want)
		}
	}
	if s, err := NewSigner(nil); s != nil || err != nil {
		t.Errorf("NewSigner of none = %v, %v, want nil, nil", s, err)
	}
}

func BenchmarkSign(b *testing.B) {
	s, err := NewSigner([]string{signingSecret(1, 32)})
	if err != nil {
		b.Fatal(err)
	}
	body := make([]byte, 500)
	b.ReportAllocs()
	for b.Loop() {
		s.sign("01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b", "1800000000", body)
	}
}

//go:build faults

package e2e

import (
	"crypto/rand"
	"encoding/base64"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	webhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

// python returns an interpreter that can import the modules: the one in the path, or
// Debian's with the packages.
func python(t *testing.T, modules, packages string) string {
	t.Helper()
	for _, name := range []string{"python3", "/usr/bin/python3"} {
		if exec.Command(name, "-c", "import "+modules).Run() == nil {
			return name
		}
	}
	t.Fatalf("no python3 can import %s (Debian: %s)", modules, packages)
	return ""
}

// The README's examples in Python do what the README says.
func TestDocumentedPython(t *testing.T) {
	t.Parallel()
	interpreter := python(t, "fastapi, httpx, uvicorn", "python3-fastapi python3-httpx uvicorn")
	blocks := fenced(t, "README.md", "python")
	if len(blocks) != 3 {
		t.Fatalf("the README has %d examples in Python, want 3", len(blocks))
	}
	submit, receive, double := blocks[0], blocks[1], blocks[2]

	dir := t.TempDir()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	signing := "whsec_" + base64.StdEncoding.EncodeToString(secret)
	if err := os.WriteFile(filepath.Join(dir, "receiver.py"), []byte(receive), 0o600); err != nil {
		t.Fatal(err)
	}
	receiver := exec.Command(interpreter, "-c", `
import socket, uvicorn
listener = socket.create_server(("127.0.0.1", 0))
print('{"msg": "serving", "address": "127.0.0.1:%d"}' % listener.getsockname()[1], flush=True)
uvicorn.run("receiver:app", fd=listener.fileno(), log_level="warning")`)
	receiver.Dir = dir
	receiver.Env = append(os.Environ(), "SIGNING_SECRET="+signing)
	target := startCommand(t, receiver)

	p, _, key := developing(t, "AUTH=api_key", "SIGNING_SECRETS="+signing)
	run := func(script string) string {
		t.Helper()
		command := exec.Command(interpreter, "-c", script)
		command.Env = append(os.Environ(), "ORCHESTRATOR_KEY="+key)
		out, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("%v:\n%s\n%s", err, script, out)
		}
		return string(out)
	}
	if out := run(addresses(p, target.url).Replace(submit)); !strings.HasPrefix(out, "succeeded ") || !strings.Contains(out, `{"repeat":false}`) {
		t.Errorf("the first task printed %s", out)
	}

	// A repeat is told by the task's id; a call without a signature is refused.
	webhook, err := webhooks.NewWebhook(signing)
	if err != nil {
		t.Fatal(err)
	}
	now, body := time.Now(), `{"song_id":1,"user_id":2}`
	signature, err := webhook.Sign("task", now, []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	signed := http.Header{
		"Orchestrator-Task-Id": {"task"}, "Webhook-Id": {"task"},
		"Webhook-Timestamp": {strconv.FormatInt(now.Unix(), 10)}, "Webhook-Signature": {signature},
	}
	for _, want := range []string{`{"repeat":false}`, `{"repeat":true}`} {
		if a := target.send(http.MethodPost, "/plays", body, signed); a.status != http.StatusOK || a.raw != want {
			t.Errorf("a signed call: %d %s, want 200 %s", a.status, a.raw, want)
		}
	}
	signed.Del("Webhook-Signature")
	if a := target.send(http.MethodPost, "/plays", body, signed); a.status != http.StatusUnauthorized {
		t.Errorf("a call without a signature: %d %s, want 401", a.status, a.raw)
	}

	run(double + `
submitted = []
client = orchestrator_double(submitted)
answer = client.post("/enqueue", json={"url": "http://plays/plays"})
assert answer.status_code == 202 and answer.headers["Location"] == "/tasks/" + answer.json()["id"]
assert client.post("/schedule", json={"url": "http://plays/later"}).status_code == 202
assert client.get("/tasks/" + answer.json()["id"]).status_code == client.post("/enqeue", json={}).status_code == 404
assert submitted == [{"url": "http://plays/plays"}, {"url": "http://plays/later"}]
`)
}

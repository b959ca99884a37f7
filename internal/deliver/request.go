package deliver

import (
	"net/url"
	"strings"

	"github.com/melodia/orchestrator/internal/credentials"
	"github.com/melodia/orchestrator/internal/deliver/http1"
	"github.com/melodia/orchestrator/internal/task"
)

// appendHead appends the head of the request for c. Its fields are legal: the
// domain's rules checked the task's when it was submitted, and package credentials
// checks what it adds.
func (d *Deliverer) appendHead(b []byte, u *url.URL, c task.Call, added credentials.Added) []byte {
	t := c.Task
	b = http1.AppendStart(b, t.Method, u)
	hasAgent, hasType := false, t.Body == nil || t.ContentType == ""
	for name, value := range added.Headers {
		if added.Replaces(name) {
			continue
		}
		hasAgent = hasAgent || strings.EqualFold(name, "User-Agent")
		hasType = hasType || strings.EqualFold(name, "Content-Type")
		b = http1.AppendField(b, name, value)
	}
	if !hasAgent {
		b = http1.AppendField(b, "User-Agent", d.userAgent)
	}
	if !hasType {
		b = http1.AppendField(b, "Content-Type", t.ContentType)
	}
	id := t.ID.String()
	b = http1.AppendField(b, "Orchestrator-Task-Id", id)
	b = http1.AppendNumber(b, "Orchestrator-Attempt", c.Attempt)
	b = http1.AppendNumber(b, "Orchestrator-Max-Attempts", t.Retry.MaxAttempts)
	b = http1.AppendNumber(b, "Orchestrator-Hops", t.Hops+1)
	if !t.RunAt.IsZero() {
		b = append(b, "Orchestrator-Run-At: "...)
		b = append(task.AppendTime(b, t.RunAt), "\r\n"...)
	}
	if c.Token != "" {
		b = http1.AppendField(b, "Orchestrator-Completion-Url", d.publicURL+"/tasks/"+id+"/complete")
		b = http1.AppendField(b, "Orchestrator-Completion-Token", string(c.Token))
	}
	if c.ViaWorkerEndpoint {
		b = http1.AppendField(b, "Orchestrator-Via", "worker-endpoint")
	}
	if token := added.Token(); token != "" {
		b = http1.AppendField(b, "Authorization", "Bearer "+token)
	}
	if timestamp, signature, signed := added.Signature(id, c.At, t.Body); signed {
		b = http1.AppendField(b, "Webhook-Id", id)
		b = http1.AppendField(b, "Webhook-Timestamp", timestamp)
		b = http1.AppendField(b, "Webhook-Signature", signature)
	}
	return http1.AppendEnd(b, t.Method, len(t.Body))
}

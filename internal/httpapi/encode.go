package httpapi

import (
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/melodia/orchestrator/internal/task"
)

// The answer to a submission is a task, and written by reflection it took as long
// as all that is read and checked. So where an answer is one task, its members are
// written one by one. A test compares that with what reflection makes of it.

// maxBuffer is how large a buffer may be that is kept for the next answer.
const maxBuffer = 64 << 10

var buffers = sync.Pool{New: func() any { return new([]byte) }}

func writeTask(w io.Writer, t *Task) error {
	buffer := buffers.Get().(*[]byte)
	*buffer = appendTask((*buffer)[:0], t)
	_, err := w.Write(*buffer)
	if cap(*buffer) <= maxBuffer {
		buffers.Put(buffer)
	}
	return err
}

func appendTask(b []byte, t *Task) []byte {
	b = appendText(append(b, `{"id":`...), t.ID)
	b = appendText(append(b, `,"state":`...), string(t.State))
	b = appendText(append(b, `,"url":`...), t.URL)
	b = appendText(append(b, `,"method":`...), t.Method)
	b = appendMap(append(b, `,"headers":`...), t.Headers)
	b = append(b, `,"auth":`...)
	if t.Auth == nil {
		b = append(b, "null"...)
	} else {
		b = appendText(append(b, `{"type":`...), t.Auth.Type)
		b = appendText(append(b, `,"audience":`...), t.Auth.Audience)
		b = append(b, '}')
	}
	b = appendMap(append(b, `,"labels":`...), t.Labels)
	b = appendTimestamp(append(b, `,"run_at":`...), t.RunAt)
	b = appendTimestamp(append(b, `,"created_at":`...), t.CreatedAt)
	b = appendTimestamp(append(b, `,"expires_at":`...), t.ExpiresAt)
	b = appendFloat(append(b, `,"timeout_seconds":`...), t.TimeoutSeconds)
	b = appendInt(append(b, `,"retry":{"max_attempts":`...), t.Retry.MaxAttempts)
	b = appendFloat(append(b, `,"max_retry_duration_seconds":`...), t.Retry.MaxRetryDurationSeconds)
	b = appendFloat(append(b, `,"min_backoff_seconds":`...), t.Retry.MinBackoffSeconds)
	b = appendFloat(append(b, `,"max_backoff_seconds":`...), t.Retry.MaxBackoffSeconds)
	b = appendInt(append(b, `,"max_doublings":`...), t.Retry.MaxDoublings)
	b = strconv.AppendBool(append(b, `,"retry_client_errors":`...), t.Retry.RetryClientErrors)
	b = appendInt(append(b, `},"attempt_count":`...), t.AttemptCount)
	b = appendTimestamp(append(b, `,"finished_at":`...), t.FinishedAt)
	b = appendOptional(append(b, `,"reason":`...), (*string)(t.Reason), appendText)
	b = appendTimestamp(append(b, `,"cancel_requested_at":`...), t.CancelRequestedAt)
	b = appendOptional(append(b, `,"on_success":`...), t.OnSuccess, appendCallback)
	b = appendOptional(append(b, `,"on_failure":`...), t.OnFailure, appendCallback)
	b = appendOptional(append(b, `,"created_by":`...), t.CreatedBy, appendText)
	b = appendInt(append(b, `,"payload_bytes":`...), t.PayloadBytes)
	b = appendOptional(append(b, `,"content_type":`...), t.ContentType, appendText)
	b = appendOptional(append(b, `,"parent_id":`...), t.ParentID, appendText)
	b = appendOptional(append(b, `,"root_id":`...), t.RootID, appendText)
	b = appendOptional(append(b, `,"queue":`...), t.Queue, appendText)
	b = appendOptional(append(b, `,"flow_key":`...), t.FlowKey, appendText)
	b = appendOptional(append(b, `,"priority":`...), (*string)(t.Priority), appendText)
	b = append(b, `,"attempts":[`...)
	for i, a := range t.Attempts {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendAttempt(b, &a)
	}
	b = append(b, ']')
	if t.Payload != nil { // byte for byte: reflection would drop its white space
		b = append(append(b, `,"payload":`...), t.Payload...)
	}
	if t.Body != nil {
		b = appendText(append(b, `,"body":`...), *t.Body)
	}
	if t.BodyBase64 != nil {
		b = appendText(append(b, `,"body_base64":`...), *t.BodyBase64)
	}
	return append(b, '}')
}

func appendAttempt(b []byte, a *Attempt) []byte {
	b = appendInt(append(b, `{"round":`...), a.Round)
	b = appendInt(append(b, `,"number":`...), a.Number)
	b = appendTimestamp(append(b, `,"started_at":`...), a.StartedAt)
	b = appendFloat(append(b, `,"duration_seconds":`...), a.DurationSeconds)
	b = appendText(append(b, `,"outcome":`...), string(a.Outcome))
	b = appendOptional(append(b, `,"status_code":`...), a.StatusCode, appendInt)
	b = appendOptional(append(b, `,"error":`...), a.Error, appendText)
	b = appendOptional(append(b, `,"response_excerpt":`...), a.ResponseExcerpt, appendText)
	b = appendOptional(append(b, `,"retry_after_seconds":`...), a.RetryAfterSeconds, appendFloat)
	return append(b, '}')
}

func appendCallback(b []byte, c Callback) []byte {
	b = appendText(append(b, `{"url":`...), c.URL)
	b = appendMap(append(b, `,"headers":`...), c.Headers)
	return append(b, '}')
}

func appendOptional[T any](b []byte, v *T, with func([]byte, T) []byte) []byte {
	if v == nil {
		return append(b, "null"...)
	}
	return with(b, *v)
}

func appendMap(b []byte, m map[string]string) []byte {
	if len(m) == 0 {
		return append(b, "{}"...)
	}
	separator := byte('{')
	for name, value := range m {
		b = appendText(append(b, separator), name)
		b = appendText(append(b, ':'), value)
		separator = ','
	}
	return append(b, '}')
}

// appendText has U+FFFD for what is not UTF-8.
func appendText(b []byte, s string) []byte {
	b, _ = jsontext.AppendQuote(b, s)
	return b
}

func appendInt(b []byte, n int) []byte { return strconv.AppendInt(b, int64(n), 10) }

// appendFloat writes what most durations are, whole seconds, the fast way.
func appendFloat(b []byte, f float64) []byte {
	if n := int64(f); float64(n) == f {
		return strconv.AppendInt(b, n, 10)
	}
	return strconv.AppendFloat(b, f, 'f', -1, 64)
}

func appendTimestamp(b []byte, t Timestamp) []byte {
	if time.Time(t).IsZero() {
		return append(b, "null"...)
	}
	return append(task.AppendTime(append(b, '"'), time.Time(t)), '"')
}

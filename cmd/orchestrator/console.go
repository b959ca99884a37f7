package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// console is a slog.Handler for people at a terminal: one short line for each event.
type console struct {
	w     io.Writer
	color bool
	level slog.Level
	attrs []slog.Attr
}

// isTerminal reports whether w is a character device, which is what a terminal is.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// wantsColor reports whether lines may be coloured (https://no-color.org).
func wantsColor(getenv func(string) string) bool {
	return getenv("NO_COLOR") == "" && getenv("TERM") != "dumb"
}

// ANSI colours (ECMA-48, SGR).
const (
	dim    = "2"
	red    = "31"
	green  = "32"
	yellow = "33"
	cyan   = "36"
)

// events are the messages about one task, with their colour and sign. The successes
// among them are Debug.
var events = map[string]struct{ color, sign string }{
	"task succeeded":             {green, "✓"},
	"attempt failed, will retry": {yellow, "↻"},
	"task snoozed":               {yellow, "↻"},
	"task failed":                {red, "✗"},
	"task cancelled":             {dim, "–"},
	"attempt interrupted":        {dim, "–"},
	echoMessage:                  {cyan, "←"},
}

// Enabled is part of slog.Handler.
func (c *console) Enabled(context.Context, slog.Level) bool { return true }

// WithAttrs is part of slog.Handler.
func (c *console) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *c
	with.attrs = append(slices.Clip(c.attrs), attrs...)
	return &with
}

// WithGroup is part of slog.Handler. Nothing here is logged in groups.
func (c *console) WithGroup(string) slog.Handler { return c }

// Handle is part of slog.Handler.
func (c *console) Handle(_ context.Context, r slog.Record) error {
	event, isEvent := events[r.Message]
	if !isEvent && r.Level < c.level {
		return nil
	}
	values := map[string]slog.Value{}
	var order []string
	add := func(a slog.Attr) bool {
		values[a.Key] = a.Value.Resolve()
		order = append(order, a.Key)
		return true
	}
	for _, a := range c.attrs {
		add(a)
	}
	r.Attrs(add)
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s ", c.paint(dim, r.Time.Format("15:04:05")))
	if isEvent {
		c.event(&b, event.color, event.sign, values)
	} else {
		color := map[slog.Level]string{slog.LevelWarn: yellow, slog.LevelError: red}[r.Level]
		b.WriteString(c.paint(color, r.Message))
		for _, key := range order {
			fmt.Fprintf(&b, " %s=%s", c.paint(dim, key), visible(values[key].String()))
		}
	}
	b.WriteByte('\n')
	_, err := c.w.Write(b.Bytes())
	return err
}

// event writes what happened to one task.
func (c *console) event(b *bytes.Buffer, color, sign string, values map[string]slog.Value) {
	text := func(key string) string {
		if v, ok := values[key]; ok {
			return visible(v.String())
		}
		return ""
	}
	id := text("task_id")
	parts := []string{c.paint(color, sign), id[max(0, len(id)-6):], text("method"), text("url"), c.paint(color, text("status_code"))}
	if attempt := text("attempt"); attempt != "" {
		parts = append(parts, "attempt "+strings.TrimSuffix(attempt+"/"+text("max_attempts"), "/"))
	}
	if v, ok := values["wait_seconds"]; ok {
		parts = append(parts, fmt.Sprintf("next try in %.1f s", v.Float64()))
	} else if v, ok := values["duration_seconds"]; ok {
		parts = append(parts, c.paint(dim, time.Duration(v.Float64()*float64(time.Second)).Round(time.Millisecond).String()))
	}
	if headers, ok := values["headers"].Any().(map[string]string); ok {
		for _, name := range slices.Sorted(maps.Keys(headers)) {
			if !isUsual(name) {
				parts = append(parts, c.paint(dim, name+":")+" "+visible(headers[name]))
			}
		}
	}
	parts = append(parts, text("body"))
	if values["status_code"].Any() == nil { // else the status says it
		parts = append(parts, text("error"))
	}
	parts = append(parts, text("reason"))
	parts = slices.DeleteFunc(parts, func(s string) bool { return s == "" })
	b.WriteString(strings.Join(parts, " "))
}

// isUsual reports whether every call has a header of this name.
func isUsual(name string) bool {
	return strings.HasPrefix(name, "Orchestrator-") || slices.Contains([]string{"Accept-Encoding", "Content-Length", "Content-Type", "User-Agent"}, name)
}

func (c *console) paint(color, text string) string {
	if !c.color || color == "" || text == "" {
		return text
	}
	return "\x1b[" + color + "m" + text + "\x1b[0m"
}

// visible replaces control characters with spaces. A terminal would obey those in a
// target's answer.
func visible(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

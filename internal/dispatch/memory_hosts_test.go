package dispatch

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// hostRows are the hosts that a store in memory has, with the moments until which things hold.
type hostRows struct {
	mu       sync.Mutex
	versions int64
	byName   map[string]*hostRow
	saves    int
}

type hostRow struct {
	task.Host

	congested, held, open time.Time
}

func (r *hostRow) at(now time.Time) task.Host {
	h := r.Host
	h.CongestedFor, h.HeldFor, h.OpenFor = max(r.congested.Sub(now), 0), max(r.held.Sub(now), 0), max(r.open.Sub(now), 0)
	return h
}

// Hosts is not among the calls that the store counts: it comes with each poll.
func (m *memory) Hosts(ctx context.Context) (hosts []task.Host, err error) {
	err = m.quietly(ctx, "Hosts", func() {
		m.hosts.mu.Lock()
		defer m.hosts.mu.Unlock()
		for _, r := range m.hosts.byName {
			h := r.at(time.Now())
			if status, _ := h.Status(); status != task.HostHealthy {
				hosts = append(hosts, h)
			}
		}
		slices.SortFunc(hosts, func(a, b task.Host) int { return strings.Compare(a.Name, b.Name) })
	})
	return hosts, err
}

func (m *memory) SaveHost(ctx context.Context, h task.Host) (stored task.Host, saved bool, err error) {
	err = m.quietly(ctx, "SaveHost", func() {
		m.hosts.mu.Lock()
		defer m.hosts.mu.Unlock()
		m.hosts.saves++
		now := time.Now()
		r := m.hosts.byName[h.Name]
		switch {
		case r == nil && h.Version != 0:
			stored = task.Host{Name: h.Name}
			return
		case r != nil && r.Version != h.Version:
			stored = r.at(now)
			return
		}
		saved = true
		if status, _ := h.Status(); status == task.HostHealthy {
			delete(m.hosts.byName, h.Name)
			stored = task.Host{Name: h.Name}
			return
		}
		m.hosts.versions++
		until := func(left time.Duration) (moment time.Time) {
			if left > 0 {
				moment = now.Add(left)
			}
			return moment
		}
		h.Version = m.hosts.versions
		if h.Since.IsZero() {
			h.Since = m.now()
		}
		r = &hostRow{h, until(h.CongestedFor), until(h.HeldFor), until(h.OpenFor)}
		if m.hosts.byName == nil {
			m.hosts.byName = make(map[string]*hostRow)
		}
		m.hosts.byName[h.Name] = r
		stored = r.at(now)
	})
	return stored, saved, err
}

// close is what an operator does to a host.
func (m *memory) close(name string) {
	m.hosts.mu.Lock()
	defer m.hosts.mu.Unlock()
	delete(m.hosts.byName, name)
}

// host returns what is stored of a host; its zero value where that is healthy.
func (m *memory) host(name string) task.Host {
	m.hosts.mu.Lock()
	defer m.hosts.mu.Unlock()
	if r := m.hosts.byName[name]; r != nil {
		return r.at(time.Now())
	}
	return task.Host{}
}

// quietly is do of a call that the store does not count.
func (m *memory) quietly(ctx context.Context, op string, f func()) error {
	m.mu.Lock()
	fault := m.fault
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if fault == nil {
		f()
		return nil
	}
	return fault(ctx, op, f)
}

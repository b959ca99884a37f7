//go:build faults

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// Instances are killed under load while others cancel, hasten, change and
// redrive whatever tasks there are, one by one and many at once.
func TestManagingWhileInstancesAreKilled(t *testing.T) {
	const lease, poll = time.Second, 100 * time.Millisecond
	const tasks, kills = 4000, 8
	database := pgtest.URL(t)
	j := newJournal(t)
	j.answer = func(w http.ResponseWriter, r *http.Request, nth int) {
		afterAMoment(w, r, nth)
		switch rand.IntN(10) {
		case 0:
			w.WriteHeader(http.StatusNotFound)
		case 1, 2:
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}
	j.audit(database)
	instances := startFleet(t, 3, "DATABASE_URL="+database, "LEASE_DURATION="+lease.String(), "POLL_INTERVAL="+poll.String(), "LOG_LEVEL=info")
	s := &managers{journal: j, url: instances.url, answers: map[string]int{}}
	over, end := context.WithCancel(t.Context())
	defer end()
	var submitting, managing sync.WaitGroup
	submitting.Go(func() {
		j.load(t.Context(), tasks/2, 16, 0, instances.url, `"retry":{"max_attempts":5,"min_backoff_seconds":0.05,"max_backoff_seconds":0.2},`+j.callbacks())
		j.load(t.Context(), tasks/2, 16, 0, instances.url, `"delay_seconds":0.5,"retry":{"max_attempts":5,"min_backoff_seconds":0.05,"max_backoff_seconds":0.2}`)
	})
	for range 16 {
		managing.Go(func() {
			for over.Err() == nil {
				s.manage(over)
			}
		})
	}
	for kill := range kills {
		eventually(t, func() bool { return j.submitted() > tasks*(kill+1)/(kills+2) }, func() string { return "submissions do not get on" })
		instances.replace(rand.IntN(3), syscall.SIGKILL)
	}
	submitting.Wait()
	end()
	managing.Wait()
	f := j.check(database)
	t.Logf("%d cancelled in the end, %d redriven; answers: %v", f.cancelled, f.redriven, s.answers)
	for _, want := range []string{"cancel 200", "cancel 202", "run 200", "change 200", "redrive 200", "cancel many 200", "redrive many 200"} {
		if s.answers[want] == 0 {
			t.Errorf("there was no answer %q", want)
		}
	}
}

// managers manage tasks that were submitted.
type managers struct {
	journal *journal
	url     func() string

	mu      sync.Mutex
	answers map[string]int // by act and status
}

func (s *managers) manage(ctx context.Context) {
	s.journal.mu.Lock()
	id := ""
	if n := len(s.journal.submissions); n > 0 {
		id = s.journal.submissions[max(0, n-1-rand.IntN(200))].id
	}
	s.journal.mu.Unlock()
	if id == "" {
		return
	}
	switch rand.IntN(20) {
	case 0:
		s.do(ctx, "cancel many", http.MethodPost, "/tasks/cancel", `{"filter":{"state":["pending"],"run_after":"2020-01-01T00:00:00Z","min_attempts":2},"dry_run":false}`)
	case 1:
		s.do(ctx, "redrive many", http.MethodPost, "/tasks/redrive", `{"filter":{"state":["cancelled"]},"dry_run":false,"spread_seconds":0.5}`)
	case 2, 3, 4, 5, 6:
		s.do(ctx, "cancel", http.MethodPost, "/tasks/"+id+"/cancel", "")
	case 7, 8, 9:
		s.do(ctx, "run", http.MethodPost, "/tasks/"+id+"/run", "")
	case 10, 11, 12:
		s.do(ctx, "change", http.MethodPatch, "/tasks/"+id, `{"delay_seconds":0.2,"labels":{"changed":"yes"}}`)
	default:
		s.do(ctx, "redrive", http.MethodPost, "/tasks/"+id+"/redrive", "")
	}
}

func (s *managers) do(ctx context.Context, act, method, path, body string) {
	request, err := http.NewRequestWithContext(ctx, method, s.url()+path, bytes.NewBufferString(body))
	if err != nil {
		s.journal.t.Error(err)
		return
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := s.journal.client.Do(request)
	if err != nil {
		return // the instance was killed
	}
	defer func() { _ = response.Body.Close() }()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return
	}
	switch response.StatusCode {
	case http.StatusOK, http.StatusAccepted, http.StatusNotFound, http.StatusConflict, http.StatusTooManyRequests, http.StatusServiceUnavailable:
	default:
		s.journal.t.Errorf("%s is answered %d: %s", act, response.StatusCode, answer)
	}
	if !json.Valid(answer) {
		s.journal.t.Errorf("%s is answered %d with what is no JSON: %s", act, response.StatusCode, answer)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answers[act+" "+strconv.Itoa(response.StatusCode)]++
}

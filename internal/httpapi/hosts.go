package httpapi

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/task"
)

// Host is a host that is not healthy: tasks for it wait.
type Host struct {
	Host    string          `json:"host" example:"https://plays.melodia.app" doc:"Scheme, name and port; the scheme's own port is left out."`
	Status  task.HostStatus `json:"status" enum:"held,broken,recovering,congested" example:"broken" doc:"held: it asked with Retry-After not to be called. broken: its calls failed, and none starts. recovering: few calls at a time start, and more with each that succeeds. congested: it is slow, and holds its share of the slots (HOST_SHARE)."`
	Why     string          `json:"why" example:"most calls failed, the last one with: connection refused" doc:"What led to it, for people."`
	Since   Timestamp       `json:"since" example:"2026-11-24T12:00:00.000000Z" doc:"Since when it is not healthy."`
	Until   Timestamp       `json:"until" nullable:"true" example:"2026-11-24T12:00:30.000000Z" doc:"Until when no call starts. Null: some do."`
	Allowed *int            `json:"allowed" example:"1" doc:"How many calls there may be at a time, of all instances together, once calls start again. Null: any number, as far as the share allows it."`
	Opened  int             `json:"opened" example:"1" doc:"How many times the breaker opened without a recovery in between."`
}

// HostList is the hosts that are not healthy.
type HostList struct {
	Hosts      []Host  `json:"hosts" nullable:"false" doc:"In the order of their names. Hosts that are on no page are healthy."`
	NextCursor *string `json:"next_cursor" example:"https://plays.melodia.app" doc:"Send it as cursor for the hosts behind these. Null when there are none."`
}

func hostView(h task.Host, now time.Time) Host {
	status, wait := h.Status()
	v := Host{Host: h.Name, Status: status, Why: h.Why, Since: Timestamp(h.Since), Allowed: present(h.Allowed), Opened: h.Opened}
	if wait > 0 {
		v.Until = Timestamp(now.Add(wait))
	}
	return v
}

func (a *API) listHostsOperation() huma.Operation {
	return huma.Operation{
		OperationID: "list-hosts", Method: http.MethodGet, Path: "/hosts", Tags: []string{"hosts"}, Security: needs(scopeManage),
		Summary: "List hosts that are not healthy",
		Description: "Hosts whose tasks wait, so that they do not delay the tasks of others: why, and until when. All instances obey the same state. " +
			"Waiting for a host costs a task no attempt.",
		Parameters: a.parameters(listInput{}), Responses: a.responses(http.StatusOK, HostList{}), Errors: readErrors,
	}
}

func (a *API) listHosts(w http.ResponseWriter, r *http.Request) error {
	var in listInput
	if err := a.readList(r, &in, &in); err != nil {
		return err
	}
	now, err := a.Store.Now(r.Context())
	if err != nil {
		return err
	}
	hosts, err := a.Store.SomeHosts(r.Context(), in.Cursor, in.Limit+1)
	if err != nil {
		return err
	}
	var list HostList
	if len(hosts) > in.Limit {
		hosts = hosts[:in.Limit]
		list.NextCursor = &hosts[in.Limit-1].Name
	}
	list.Hosts = make([]Host, len(hosts))
	for i, h := range hosts {
		list.Hosts[i] = hostView(h, now)
	}
	return a.answer(w, r, http.StatusOK, list)
}

type hostPath struct {
	Host string `path:"host" maxLength:"2048" example:"plays.melodia.app" doc:"The name of the host, with its port unless that is the scheme's own: 127.0.0.1:8082. Or the host as GET /hosts shows it, which the path holds percent-encoded (https%3A%2F%2Fplays.melodia.app)."`
}

func (a *API) closeHostOperation() huma.Operation {
	return huma.Operation{
		OperationID: "close-host", Method: http.MethodPost, Path: "/hosts/{host}/close", Tags: []string{"hosts"}, Security: needs(scopeManage),
		Summary: "Close the breaker of a host",
		Description: "Makes a host count as healthy: its breaker is closed, and no Retry-After holds it back any more. Each instance knows within its POLL_INTERVAL, and calls it then. " +
			"If it is not well, its calls open the breaker again. 404: the host is healthy, or no task has named it.",
		Parameters: a.parameters(hostPath{}), Responses: noContent("The host counts as healthy."), Errors: append([]int{http.StatusNotFound}, readErrors...),
	}
}

func (a *API) closeHost(w http.ResponseWriter, r *http.Request) error {
	var in hostPath
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	names := []string{in.Host}
	if !strings.Contains(in.Host, "://") {
		names = []string{"https://" + in.Host, "http://" + in.Host}
	}
	closed := false
	for _, name := range names {
		err := a.Store.CloseHost(r.Context(), task.HostOf(name))
		if err != nil && !errors.Is(err, task.ErrNotFound) {
			return err
		}
		closed = closed || err == nil
	}
	if !closed {
		return newProblem(http.StatusNotFound, "Nothing holds back the tasks of this host: it is healthy, or no task has named it. GET /hosts lists the others.")
	}
	a.Log.InfoContext(r.Context(), "host closed by hand", "host", in.Host, "caller", httpserver.Principal(r.Context()))
	a.Dispatcher.Wake()
	w.WriteHeader(http.StatusNoContent)
	return nil
}

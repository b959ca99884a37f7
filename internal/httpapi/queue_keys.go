package httpapi

import (
	"errors"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/task"
)

func (a *API) listQueueKeysOperation() huma.Operation {
	o := a.queueOperation(http.MethodGet, "/queues/{name}/keys", "list-queue-keys", "List flow keys with limits of their own",
		"The flow keys of a queue that have limits of their own. All others have those of per_key.")
	o.Parameters, o.Responses, o.Errors = a.parameters(queueKeyListInput{}), a.responses(http.StatusOK, QueueKeyList{}), append([]int{http.StatusNotFound}, readErrors...)
	return o
}

func (a *API) listQueueKeys(w http.ResponseWriter, r *http.Request) error {
	var in queueKeyListInput
	if err := a.readList(r, &in, &in.listInput); err != nil {
		return err
	}
	if _, err := a.Store.Queue(r.Context(), in.Name); err != nil {
		return err
	}
	keys, err := a.Store.QueueKeys(r.Context(), in.Name, in.Cursor, in.Limit+1)
	if err != nil {
		return err
	}
	var found QueueKeyList
	if len(keys) > in.Limit {
		keys = keys[:in.Limit]
		found.NextCursor = &keys[in.Limit-1].Key
	}
	found.Keys = make([]QueueKey, len(keys))
	for i, k := range keys {
		found.Keys[i] = queueKeyView(k)
	}
	return a.answer(w, r, http.StatusOK, found)
}

func (a *API) getQueueKeyOperation() huma.Operation {
	o := a.queueOperation(http.MethodGet, "/queues/{name}/keys/{key}", "get-queue-key", "See the limits of a flow key",
		"The limits of a flow key that has its own. 404: it has those that per_key of its queue says.")
	o.Parameters, o.Responses, o.Errors = a.parameters(QueueKeyPath{}), a.queueKeyAnswer(), append([]int{http.StatusNotFound}, readErrors...)
	return o
}

func (a *API) queueKeyAnswer() map[string]*huma.Response {
	return a.responses(http.StatusOK, QueueKey{}, settingsTag)
}

func (a *API) answerQueueKey(w http.ResponseWriter, r *http.Request, k task.QueueKey) error {
	w.Header()["Etag"] = []string{versionTag(k.Version)}
	return a.answer(w, r, http.StatusOK, queueKeyView(k))
}

func (a *API) getQueueKey(w http.ResponseWriter, r *http.Request) error {
	var in QueueKeyPath
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	k, err := a.Store.QueueKey(r.Context(), in.Name, in.Key)
	if err != nil {
		return err
	}
	return a.answerQueueKey(w, r, k)
}

func (a *API) putQueueKeyOperation() huma.Operation {
	o := a.queueOperation(http.MethodPut, "/queues/{name}/keys/{key}", "put-queue-key", "Give a flow key limits of its own",
		"Writes the limits of one flow key. They hold in place of all that per_key of its queue says: a limit that is left out is none. "+
			"The queue's own limits hold for the key too. 404: the queue does not exist. 412: others wrote the limits since the version that If-Match names.")
	o.RequestBody = jsonBody(a.body(KeyLimitsRequest{}), map[string]*huma.Example{
		"more": example("A large tenant", `{"max_concurrent":20}`),
		"slow": example("One that is to be slowed down", `{"max_concurrent":1,"max_per_second":0.5}`),
	})
	o.Parameters, o.Responses, o.Errors = a.parameters(queueKeyWriteInput{}), a.queueKeyAnswer(), settingsErrors
	return o
}

func (a *API) putQueueKey(w http.ResponseWriter, r *http.Request) error {
	var in queueKeyWriteInput
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	if !task.IsFlowKey(in.Key) {
		return noPathName("key")
	}
	request := new(KeyLimitsRequest)
	if err := a.readBody(r, request); err != nil {
		return err
	}
	var limits task.KeyLimits
	request.patch(&limits)
	if err := limits.Check(); err != nil {
		return err
	}
	k, err := written(func() (task.QueueKey, error) {
		k, err := a.queueKeyIn(r, &in)
		if err != nil {
			return k, err
		}
		k.KeyLimits = limits
		return a.Store.PutQueueKey(r.Context(), k)
	})
	if err != nil {
		return err
	}
	a.logQueue(r.Context(), "limits of a flow key written", k.Queue, "flow_key", k.Key)
	a.Dispatcher.Wake()
	return a.answerQueueKey(w, r, k)
}

// queueKeyIn returns the key that a request names, in a version that If-Match allows. One
// without limits of its own has the version 0.
func (a *API) queueKeyIn(r *http.Request, in *queueKeyWriteInput) (task.QueueKey, error) {
	k, err := a.Store.QueueKey(r.Context(), in.Name, in.Key)
	switch {
	case errors.Is(err, task.ErrQueueKeyNotFound) && in.IfMatch == "":
		return task.QueueKey{Queue: in.Name, Key: in.Key}, nil
	case errors.Is(err, task.ErrQueueKeyNotFound):
		return k, errQueueVersion()
	case err != nil:
		return k, err
	case !ifMatch(in.IfMatch, versionTag(k.Version)):
		return k, errQueueVersion()
	}
	return k, nil
}

func (a *API) deleteQueueKeyOperation() huma.Operation {
	o := a.queueOperation(http.MethodDelete, "/queues/{name}/keys/{key}", "delete-queue-key", "Take a flow key's own limits away",
		"From then on the key has the limits that per_key of its queue says. Its tasks stay. 404: it has none of its own.")
	o.Parameters, o.Errors = a.parameters(queueKeyWriteInput{}), append([]int{http.StatusNotFound, http.StatusConflict, http.StatusPreconditionFailed}, readErrors...)
	o.Responses = noContent("The key has the limits of all keys.")
	return o
}

func (a *API) deleteQueueKey(w http.ResponseWriter, r *http.Request) error {
	var in queueKeyWriteInput
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	_, err := written(func() (struct{}, error) {
		k, err := a.queueKeyIn(r, &in)
		if err == nil {
			err = a.Store.DeleteQueueKey(r.Context(), in.Name, in.Key, k.Version)
		}
		return struct{}{}, err
	})
	if err != nil {
		return err
	}
	a.logQueue(r.Context(), "limits of a flow key deleted", in.Name, "flow_key", in.Key)
	a.Dispatcher.Wake()
	w.WriteHeader(http.StatusNoContent)
	return nil
}

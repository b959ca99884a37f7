package httpapi

import (
	"encoding/json"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/task"
)

// Ended is the body of a callback. It is here to be documented: the store
// writes it, in the statement that ends the task.
type Ended struct {
	ID                  string            `json:"id" format:"uuid" example:"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b" doc:"The task that ended. Orchestrator-Task-Id is the callback's own."`
	State               task.State        `json:"state" enum:"succeeded,failed" example:"failed" doc:"How it ended."`
	Reason              *task.Reason      `json:"reason" enum:"attempts_exhausted,retry_duration_exhausted,client_error,expired,target_refused" example:"attempts_exhausted" doc:"Why it failed. Null unless it did."`
	AttemptCount        int               `json:"attempt_count" example:"10" doc:"Ended attempts that count."`
	LastStatusCode      *int              `json:"last_status_code" example:"503" doc:"The target's last answer. Null when none came."`
	LastError           *string           `json:"last_error" example:"the target answered 503 Service Unavailable" doc:"What went wrong last. Null when nothing did. After a success: what did not change it, such as a body that broke off."`
	LastResponseExcerpt *string           `json:"last_response_excerpt" example:"try again later" doc:"The first 4 KiB of the last response's body. Null when it was empty."`
	Result              json.RawMessage   `json:"result" example:"{\"song_id\":42}" doc:"With what the target completed the task. Null: nothing."`
	Labels              map[string]string `json:"labels" example:"{\"kind\":\"play\"}" doc:"The task's labels."`
	FinishedAt          Timestamp         `json:"finished_at" example:"2026-12-25T00:00:01.000000Z" doc:"When it ended."`
}

// documentCallbacks describes the calls that a task request of the operation asks
// for by its callbacks. Their operation ids begin with its own, since generators
// name types after them: one id twice does not compile.
func (a *API) documentCallbacks(operationID string) map[string]map[string]*huma.PathItem {
	call := func(field, id, summary string) map[string]*huma.PathItem {
		return map[string]*huma.PathItem{"{$request.body#/" + field + "/url}": {Post: &huma.Operation{
			OperationID: operationID + "-" + id, Security: openToAll,
			Summary: summary,
			Description: "It is a task of its own, stored together with the end that it tells, and with all that tasks have: " +
				"it is called at least once, retried by the service's defaults, and found by the label callback_of, the id of the task that ended. It has no callbacks itself.",
			RequestBody: &huma.RequestBody{Required: true, Content: map[string]*huma.MediaType{"application/json": {Schema: a.schemaOf(Ended{})}}},
			Responses: map[string]*huma.Response{
				"2XX":     {Description: "The result was taken."},
				"4XX":     {Description: "The result was refused: it is sent again after 408, 425 and 429 alone."},
				"default": {Description: "As with every task, the answer says whether it is tried again."},
			},
		}}}
	}
	return map[string]map[string]*huma.PathItem{
		"on_success": call("on_success", "succeeded", "The task has succeeded"),
		"on_failure": call("on_failure", "failed", "The task has failed"),
	}
}

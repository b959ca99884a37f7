//go:build faults

package e2e

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// generators make Go clients from the OpenAPI document. Each program enqueues a
// call to the second argument at the service at the first, waits for its end, and
// finds it again, with the types that were generated.
var generators = map[string]struct {
	generate []string // after `go run`
	program  string
}{
	"oapi-codegen": {
		[]string{"github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2", "-generate", "types,client", "-package", "client", "-o", "client/client.go", "openapi.yaml"},
		`package main

import (
	"context"
	"fmt"
	"os"

	"example.com/generated/client"
)

func main() {
	c, err := client.NewClientWithResponses(os.Args[1])
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	accepted, err := c.EnqueueTaskWithResponse(ctx, nil, client.TaskRequest{Url: os.Args[2], Payload: map[string]int{"song_id": 42}})
	if err != nil || accepted.JSON202 == nil {
		panic(fmt.Sprint(err, string(accepted.Body)))
	}
	wait := 30.0
	task, err := c.GetTaskWithResponse(ctx, accepted.JSON202.Id, &client.GetTaskParams{WaitSeconds: &wait})
	if err != nil || task.JSON200 == nil {
		panic(fmt.Sprint(err, string(task.Body)))
	}
	found, err := c.FindTasksWithResponse(ctx, &client.FindTasksParams{})
	if err != nil || found.JSON200 == nil {
		panic(fmt.Sprint(err, string(found.Body)))
	}
	fmt.Println(task.JSON200.State, len(task.JSON200.Attempts), len(found.JSON200.Tasks))
}
`,
	},
	"ogen": {
		[]string{"github.com/ogen-go/ogen/cmd/ogen@v1.25.0", "--target", "client", "--package", "client", "openapi.yaml"},
		`package main

import (
	"context"
	"fmt"
	"os"

	"example.com/generated/client"
)

type key struct{}

func (key) APIKey(context.Context, client.OperationName) (client.APIKey, error) {
	return client.APIKey{APIKey: "none"}, nil
}

func (key) Bearer(context.Context, client.OperationName) (client.Bearer, error) {
	return client.Bearer{Token: "none"}, nil
}

func (key) CompletionToken(context.Context, client.OperationName) (client.CompletionToken, error) {
	return client.CompletionToken{APIKey: "none"}, nil
}

func main() {
	c, err := client.NewClient(os.Args[1], key{})
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	accepted, err := c.EnqueueTask(ctx, &client.TaskRequest{URL: os.Args[2], Payload: []byte("{\"song_id\":42}")}, client.EnqueueTaskParams{})
	if err != nil {
		panic(err)
	}
	stored, ok := accepted.(*client.EnqueueTaskAcceptedHeaders)
	if !ok {
		panic(fmt.Sprintf("%#v", accepted))
	}
	answer, err := c.GetTask(ctx, client.GetTaskParams{ID: stored.Response.ID, WaitSeconds: client.NewOptFloat64(30)})
	if err != nil {
		panic(err)
	}
	task, ok := answer.(*client.GetTaskOKHeaders)
	if !ok {
		panic(fmt.Sprintf("%#v", answer))
	}
	list, err := c.FindTasks(ctx, client.FindTasksParams{})
	if err != nil {
		panic(err)
	}
	found, ok := list.(*client.TaskList)
	if !ok {
		panic(fmt.Sprintf("%#v", list))
	}
	fmt.Println(task.Response.State, len(task.Response.Attempts), len(found.Tasks))
}
`,
	},
}

// Code that Go's generators make of the document compiles and talks to the service.
func TestGeneratedClients(t *testing.T) {
	for name, generator := range generators {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			document, err := exec.Command(binary, "openapi").Output()
			if err != nil {
				t.Fatal(err)
			}
			for file, text := range map[string]string{"openapi.yaml": string(document), "go.mod": "module example.com/generated\n\ngo 1.26\n", "main.go": generator.program} {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Mkdir(filepath.Join(dir, "client"), 0o700); err != nil {
				t.Fatal(err)
			}
			run := func(arguments ...string) string {
				t.Helper()
				cmd := exec.CommandContext(t.Context(), "go", arguments...)
				cmd.Dir = dir
				cmd.Env = append(os.Environ(), "GOFLAGS=")
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("go %s: %v\n%s", strings.Join(arguments, " "), err, out)
				}
				return string(out)
			}
			run(append([]string{"run"}, generator.generate...)...)
			run("mod", "tidy")
			run("build", "-o", "program", ".")

			target := newTarget(t, func(http.ResponseWriter, *http.Request, int) {})
			p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t))
			out, err := exec.CommandContext(t.Context(), filepath.Join(dir, "program"), p.url, target.url+"/plays").CombinedOutput()
			if got, want := strings.TrimSpace(string(out)), "succeeded 1 1"; err != nil || got != want {
				t.Errorf("the program printed %q (%v), want %q", got, err, want)
			}
			if calls := target.got("/plays"); len(calls) != 1 || calls[0].body != `{"song_id":42}` {
				t.Errorf("the target got %v, want one call with the payload", calls)
			}
		})
	}
}

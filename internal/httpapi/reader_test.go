package httpapi

import (
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"github.com/danielgtaylor/huma/v2"
)

// The memory that a body takes must be in proportion to its text: a tree of
// small values takes sixty times as much.
func TestLargeBodiesAreNotMadeIntoTrees(t *testing.T) {
	large := "[" + strings.Repeat(`{"":0},`, 1<<17) + "0]"
	shape := newService(t).shapes[reflect.TypeFor[TaskRequest]()]
	var many strings.Builder
	for i := range 1 << 16 {
		fmt.Fprintf(&many, `,"%d":{}`, i)
	}
	for name, body := range map[string]string{
		"payload":           `{"url":"` + target + `","payload":` + large + `}`,
		"headers":           `{"url":"` + target + `","headers":{"x":` + large + `}}`,
		"many members":      `{"url":"` + target + `","on_success":{` + many.String()[1:] + `}}`,
		"an unknown member": `{"url":"` + target + `","paylod":` + large + `}`,
	} {
		allocations := testing.AllocsPerRun(1, func() {
			if _, err := readJSON([]byte(body), shape, new(TaskRequest), Loc{"body"}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		most := 1000.
		if name == "many members" { // the decoder keeps their names, to tell one that is there twice
			most = 1 << 17
		}
		if allocations > most {
			t.Errorf("%s: %.0f allocations for %d bytes", name, allocations, len(body))
		}
	}
}

func TestOversizedMembersAreRefused(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 64<<10)
	for name, tt := range map[string]struct{ member, want string }{
		"headers":              {`"headers":{"x":"` + long + `"}`, `["body","headers"] too_long`},
		"headers of lists":     {`"headers":{"x":["` + long + `"]}`, `["body","headers","x"] string_type`},
		"labels":               {`"labels":{"x":"` + long + `"}`, `["body","labels","x"] invalid`},
		"retry":                {`"retry":{"` + long + `":1}`, `["body","retry","` + long + `"] extra_forbidden`},
		"a list for retry":     {`"retry":["` + long + `"]`, `["body","retry"] object_type`},
		"an unknown one":       {`"paylod":["` + long + `"]`, `["body","paylod"] extra_forbidden`},
		"auth":                 {`"auth":{"type":"oidc","audience":"` + long + `"}`, `["body","auth","audience"] string_too_long`},
		"a callback":           {`"on_success":{"url":"` + target + `","headers":{"x":"` + long + `"}}`, `["body","on_success","headers"] too_long`},
		"a callback, misspelt": {`"on_failure":{"url":"` + target + `","header":{"x":"` + long + `"}}`, `["body","on_failure","header"] extra_forbidden`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			for _, path := range []string{"/enqueue", "/worker-endpoint"} {
				s.refused(s.post(path, `{"url":"`+target+`",`+tt.member+`}`), http.StatusUnprocessableEntity, tt.want)
			}
		})
	}
}

// What the document states about a request and the reader does not enforce, or cannot
// tell, is found when the operation is registered.
func TestShapesAreEnforced(t *testing.T) {
	t.Parallel()
	registry := huma.NewMapRegistry("#/", huma.DefaultSchemaNamer)
	for name, tt := range map[string]struct {
		of    any
		panic string
	}{
		"a request": {TaskRequest{}, ""},
		"a number without a maximum": {struct {
			A float64 `json:"a" minimum:"0"`
		}{}, "no bounds"},
		"a number without a minimum": {struct {
			A *int `json:"a" maximum:"9"`
		}{}, "no bounds"},
		"a multiple": {struct {
			A int `json:"a" minimum:"0" maximum:"9" multipleOf:"3"`
		}{}, "not enforced"},
		"a length of two": {struct {
			A string `json:"a" minLength:"2"`
		}{}, "not enforced"},
		"an unknown format": {struct {
			A string `json:"a" format:"email"`
		}{}, "not enforced"},
		"a pattern without a description": {struct {
			A string `json:"a" pattern:"^a$"`
		}{}, "not enforced"},
		"unique items": {struct {
			A []string `json:"a" uniqueItems:"true" nullable:"false"`
		}{}, "not enforced"},
		"null that cannot be told": {struct {
			A *string `json:"a,omitempty" nullable:"true"`
		}{}, "pointer to a pointer"},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if p := fmt.Sprint(recover()); !strings.Contains(p, tt.panic) || (tt.panic == "") != (p == "<nil>") {
					t.Errorf("got the panic %q, want %q", p, tt.panic)
				}
			}()
			shapeOf(registry, reflect.TypeOf(tt.of), huma.SchemaFromType(registry, reflect.TypeOf(tt.of)))
		})
	}
}

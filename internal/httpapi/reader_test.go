package httpapi

import (
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"
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

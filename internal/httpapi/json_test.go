package httpapi

import (
	"net/http"
	"strings"
	"testing"
)

// The memory that a body takes must be in proportion to its text: a tree of
// small values takes sixty times as much.
func TestLargeBodiesAreNotMadeIntoTrees(t *testing.T) {
	large := "[" + strings.Repeat(`{"":0},`, 1<<17) + "0]"
	for name, body := range map[string]string{
		"payload":           `{"url":"` + target + `","payload":` + large + `}`,
		"headers":           `{"url":"` + target + `","headers":{"x":` + large + `}}`,
		"an unknown member": `{"url":"` + target + `","paylod":` + large + `}`,
	} {
		allocations := testing.AllocsPerRun(1, func() {
			var tree any
			if err := decode([]byte(body), &tree); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		if allocations > 1000 && name != "payload" || allocations > 1<<18 {
			t.Errorf("%s: %.0f allocations for %d bytes", name, allocations, len(body))
		}
	}
}

func TestOversizedMembersAreRefused(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", maxTree)
	for name, body := range map[string]string{
		"headers":          `{"url":"` + target + `","headers":{"x":"` + long + `"}}`,
		"headers of lists": `{"url":"` + target + `","headers":{"x":["` + long + `"]}}`,
		"labels":           `{"url":"` + target + `","labels":{"x":"` + long + `"}}`,
		"retry":            `{"url":"` + target + `","retry":{"` + long + `":1}}`,
		"a list for retry": `{"url":"` + target + `","retry":["` + long + `"]}`,
		"an unknown one":   `{"url":"` + target + `","paylod":["` + long + `"]}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			for _, path := range []string{"/enqueue", "/worker-endpoint"} {
				if a := s.post(path, body); a.status != http.StatusUnprocessableEntity {
					t.Errorf("%s: got %d %.200s, want 422", path, a.status, a.text)
				}
			}
		})
	}
}

package intake

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// fingerprintOf is what tells tasks from others that a principal may submit under the same
// key: equal for equal tasks, whatever their ids and their origin. It is stored, so it must
// stay the same from one version to the next: what is zero does not count, which a field that
// a later version adds is in every older task.
func fingerprintOf(tasks []*task.Task) []byte {
	h := sha256.New()
	for _, t := range tasks {
		addValue(h, "task", "")
		addFields(h, "spec", reflect.ValueOf(t.Spec))
		addFields(h, "run_at", reflect.ValueOf(t.RunAt))
		addFields(h, "delay", reflect.ValueOf(t.Delay))
	}
	return h.Sum(nil)
}

// addFields adds v, and all that is in it, under the path that leads there. It takes what a
// [task.Spec] is made of.
func addFields(h hash.Hash, path string, v reflect.Value) {
	if v.IsZero() {
		return
	}
	switch value := v.Interface().(type) {
	case time.Time:
		addValue(h, path, value.UTC().Format(time.RFC3339Nano))
	case []byte:
		addValue(h, path, string(value))
	case map[string]string:
		for _, name := range slices.Sorted(maps.Keys(value)) {
			addValue(h, path+"["+name+"]", value[name])
		}
	default:
		switch v.Kind() {
		case reflect.Pointer:
			addValue(h, path, "")
			addFields(h, path, v.Elem())
		case reflect.Struct:
			for i := range v.NumField() {
				addFields(h, path+"."+v.Type().Field(i).Name, v.Field(i))
			}
		default:
			addValue(h, path, fmt.Sprint(value))
		}
	}
}

// addValue adds a value so that no two lists of them are written alike.
func addValue(h hash.Hash, path, value string) {
	fmt.Fprintf(h, "%d %d ", len(path), len(value)) // a hash returns no errors
	_, _ = io.WriteString(h, path)
	_, _ = io.WriteString(h, value)
}

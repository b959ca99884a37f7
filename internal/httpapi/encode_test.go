package httpapi

import (
	"bytes"
	jsonv1 "encoding/json"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/go-cmp/cmp"
)

// What is written member by member is what reflection would write, of every field.
func TestTaskIsWrittenWhole(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		var written, reflected bytes.Buffer
		one := new(Task)
		fill(random, reflect.ValueOf(one).Elem())
		if err := encodeTo(&written, one); err != nil {
			t.Fatal(err)
		}
		type task Task // which encode does not know
		if err := encodeTo(&reflected, (*task)(one)); err != nil {
			t.Fatal(err)
		}
		got, want := jsontext.Value(written.Bytes()), jsontext.Value(reflected.Bytes())
		if !got.IsValid() {
			t.Fatalf("not valid JSON: %s", got)
		}
		if diff := cmp.Diff(unmarshal(t, want), unmarshal(t, got)); diff != "" {
			t.Fatalf("written by reflection and member by member (-reflection +members):\n%s", diff)
		}
	}
}

func unmarshal(t *testing.T, v jsontext.Value) (tree any) {
	t.Helper()
	if err := json.Unmarshal(v, &tree); err != nil {
		t.Fatalf("%v: %s", err, v)
	}
	return tree
}

// fill sets a value and all in it; of what may be absent, half is.
func fill(random *rand.Rand, v reflect.Value) {
	texts := []string{"", "plain", "with \"quotes\" and \\", "line\nand tab\t\x00\x1f\x7f", "ümläut 🎵 \u2028 </script>", "not \xff UTF-8"}
	floats := []float64{0, 0.1, 1e-9, 30, 315360000, 1e21, 1.0 / 3}
	switch v.Kind() {
	case reflect.String:
		v.SetString(texts[random.IntN(len(texts))])
	case reflect.Int:
		v.SetInt(random.Int64N(1000) - 10)
	case reflect.Float64:
		v.SetFloat(floats[random.IntN(len(floats))])
	case reflect.Bool:
		v.SetBool(random.IntN(2) == 0)
	case reflect.Pointer:
		if random.IntN(2) == 0 {
			v.Set(reflect.New(v.Type().Elem()))
			fill(random, v.Elem())
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for _, name := range texts[:random.IntN(len(texts))] { // none but valid UTF-8: two might become the same
			value := reflect.New(v.Type().Elem()).Elem()
			fill(random, value)
			v.SetMapIndex(reflect.ValueOf(name), value)
		}
	case reflect.Slice:
		if raw, ok := v.Addr().Interface().(*jsonv1.RawMessage); ok {
			*raw = [][]byte{nil, []byte("0"), []byte(`{ "a": [1e3, ""] }`)}[random.IntN(3)]
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), random.IntN(3), 3))
		for i := range v.Len() {
			fill(random, v.Index(i))
		}
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[Timestamp]() {
			if random.IntN(2) == 0 {
				v.Set(reflect.ValueOf(Timestamp(time.UnixMicro(random.Int64N(1 << 52)))))
			}
			return
		}
		for i := range v.NumField() {
			fill(random, v.Field(i))
		}
	default:
		panic("no value for a " + v.Type().String())
	}
}

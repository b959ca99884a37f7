package httpapi

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"
)

// shape is what the document says of a JSON value, made once for each type of a
// request: of which kind the value is, and which rules it must keep.
type shape struct {
	kind     kind
	nullable bool // null is a value of its own
	rules

	fields   map[string]*field // of a record
	required []*field          // those that must be there
	open     bool              // a record may have members that are not fields
	each     *shape            // of the items of a list
}

// field is a member of a record.
type field struct {
	name     any // as a step of a Loc
	index    []int
	bit      uint64 // among those of the record
	required bool
	*shape
}

// maxMembers is far more than any request has. To name every wrong one of tens
// of thousands would take seconds.
const maxMembers = 64

type kind int

const (
	anything kind = iota // json.RawMessage
	text
	number
	integer
	boolean
	list
	record // a struct
	table  // a map
)

// shapeOf returns the shape of t, which schema describes.
func shapeOf(registry huma.Registry, t reflect.Type, schema *huma.Schema) *shape {
	s := &shape{nullable: schema.Nullable}
	for schema.Ref != "" {
		schema = registry.SchemaFromRef(schema.Ref)
		s.nullable = s.nullable || schema.Nullable
	}
	s.rules = rulesOf(schema)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t == reflect.TypeFor[json.RawMessage]():
	case schema.Type == huma.TypeString:
		s.kind = text
	case schema.Type == huma.TypeNumber:
		s.kind = number
	case schema.Type == huma.TypeInteger:
		s.kind = integer
	case schema.Type == huma.TypeBoolean:
		s.kind = boolean
	case schema.Type == huma.TypeArray:
		s.kind, s.each = list, shapeOf(registry, t.Elem(), schema.Items)
	case t == reflect.TypeFor[map[string]string](), t == reflect.TypeFor[map[string]*string]():
		s.kind = table
	default:
		s.kind, s.open = record, schema.AdditionalProperties == true
		s.readFields(registry, t, schema)
	}
	if (s.kind == number || s.kind == integer) && (s.minimum == nil || s.maximum == nil) {
		panic(fmt.Sprintf("a number of type %s has no bounds: what is beyond them may not fit the type", t))
	}
	return s
}

// enforceable panics where a schema states what rules do not enforce: the document would
// promise it.
func enforceable(schema *huma.Schema) {
	switch {
	case schema.ExclusiveMinimum != nil, schema.ExclusiveMaximum != nil, schema.MultipleOf != nil, schema.UniqueItems, schema.MinProperties != nil,
		schema.ContentEncoding != "", len(schema.DependentRequired) > 0, schema.Pattern != "" && schema.PatternDescription == "":
	case schema.MinLength != nil && *schema.MinLength != 1, schema.MinItems != nil && *schema.MinItems != 1: // the error texts are for one: "must not be empty", "at least 1 item"
	case schema.Type == huma.TypeString && schema.Format != "" && schema.Format != "date-time" && schema.Pattern == "":
	default:
		return
	}
	panic(fmt.Sprintf("a schema states what is not enforced: %+v", schema))
}

func (s *shape) readFields(registry huma.Registry, t reflect.Type, schema *huma.Schema) {
	s.fields = make(map[string]*field, len(schema.Properties))
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		property := schema.Properties[name]
		if property == nil {
			continue
		}
		one := &field{
			name: name, index: f.Index, bit: 1 << len(s.fields),
			required: slices.Contains(schema.Required, name), shape: shapeOf(registry, f.Type, property),
		}
		if one.nullable && (f.Type.Kind() != reflect.Pointer || f.Type.Elem().Kind() != reflect.Pointer) {
			panic(fmt.Sprintf("%s.%s cannot tell null from a field that is left out: it must be a pointer to a pointer", t, f.Name))
		}
		s.fields[name] = one
		if one.required {
			s.required = append(s.required, one)
		}
	}
	if len(s.fields) != len(schema.Properties) || len(s.fields) > maxMembers {
		panic(fmt.Sprintf("the fields of %s are not those of its schema, or are more than %d", t, maxMembers))
	}
}

// rules are what a schema demands of a value of the right kind.
type rules struct {
	minimum, maximum     *float64
	minLength, maxLength *int // of a text, in characters
	minItems, maxItems   *int
	maxMembers           *int
	pattern              *regexp.Regexp
	patternWords         string
	enum                 []string
	isMoment             bool
}

func rulesOf(schema *huma.Schema) rules {
	enforceable(schema)
	r := rules{
		minimum: schema.Minimum, maximum: schema.Maximum, minLength: schema.MinLength, maxLength: schema.MaxLength,
		minItems: schema.MinItems, maxItems: schema.MaxItems, maxMembers: schema.MaxProperties,
		patternWords: schema.PatternDescription, isMoment: schema.Format == "date-time",
	}
	if schema.Pattern != "" {
		r.pattern = regexp.MustCompile(schema.Pattern)
	}
	for _, word := range schema.Enum {
		if word != nil {
			r.enum = append(r.enum, word.(string))
		}
	}
	return r
}

const wantTime = "must be a time like 2026-12-24T21:00:00Z (RFC 3339 with an offset)"

// checkText reports each rule that a text breaks: a message for people, and a kind for
// programs.
func (r *rules) checkText(text string, mistake func(message, kind string)) {
	if r.minLength != nil && text == "" { // it is 1: see enforceable
		mistake("must not be empty", "string_too_short")
	}
	if r.maxLength != nil && len(text) > *r.maxLength && utf8.RuneCountInString(text) > *r.maxLength {
		mistake("must be at most "+strconv.Itoa(*r.maxLength)+" characters long", "string_too_long")
	}
	if r.pattern != nil && !r.pattern.MatchString(text) {
		mistake("must be "+r.patternWords, "string_pattern_mismatch")
	}
	if r.isMoment {
		if _, err := time.Parse(time.RFC3339, text); err != nil {
			mistake(wantTime, "datetime_parsing")
		}
	}
	if r.enum != nil && !slices.Contains(r.enum, text) {
		mistake("must be one of "+strings.Join(r.enum, ", "), "enum")
	}
}

// checkNumber is checkText of a number.
func (r *rules) checkNumber(n float64, whole bool, mistake func(message, kind string)) {
	if whole && n != math.Trunc(n) {
		mistake("must be a whole number", "int_type")
	}
	if n < *r.minimum {
		mistake("must be at least "+plain(*r.minimum), "greater_than_equal")
	}
	if n > *r.maximum {
		mistake("must be at most "+plain(*r.maximum), "less_than_equal")
	}
}

// plain is a limit as people write it.
func plain(limit float64) string { return strconv.FormatFloat(limit, 'f', -1, 64) }

package httpapi

import (
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// document is the OpenAPI document as tools see it.
type document struct {
	root  map[string]any
	paths []documentPath
}

type documentPath struct {
	pattern    *regexp.Regexp
	operations map[string]any // by method, in lower case
}

func parseDocument(t testing.TB, a *API) *document {
	t.Helper()
	b, err := a.document.MarshalJSON()
	if err != nil {
		t.Fatalf("encode the document: %v", err)
	}
	d := new(document)
	if err := json.Unmarshal(b, &d.root); err != nil {
		t.Fatalf("decode the document: %v", err)
	}
	parameter := regexp.MustCompile(`\\\{[^}]*\\\}`)
	for template, item := range member(d.root, "paths") {
		pattern := "^" + parameter.ReplaceAllString(regexp.QuoteMeta(template), "[^/]+") + "$"
		d.paths = append(d.paths, documentPath{regexp.MustCompile(pattern), member(item)})
	}
	// A path that is spelt out comes before one with a parameter in its place.
	slices.SortFunc(d.paths, func(a, b documentPath) int {
		return strings.Count(a.pattern.String(), "[^/]+") - strings.Count(b.pattern.String(), "[^/]+")
	})
	return d
}

// member returns what is at the end of the path, or nil.
func member(v any, path ...string) map[string]any {
	for _, name := range path {
		object, _ := v.(map[string]any)
		v = object[name]
	}
	object, _ := v.(map[string]any)
	return object
}

// operation returns the operation that serves a request, or nil.
func (d *document) operation(method, path string) map[string]any {
	if method == http.MethodHead {
		method = http.MethodGet
	}
	for _, p := range d.paths {
		if p.pattern.MatchString(path) {
			return member(p.operations, strings.ToLower(method))
		}
	}
	return nil
}

// check says how an answer differs from what the document declares. Answers
// outside of the operations must be problems, where they are errors.
func (d *document) check(method, path string, a *answer) []string {
	mediaType, _, _ := mime.ParseMediaType(a.header.Get("Content-Type"))
	if a.status >= 400 && !(path == "/health" && a.status == http.StatusServiceUnavailable) {
		if mediaType != "application/problem+json" {
			return []string{"the content type of an error is " + strconv.Quote(mediaType)}
		}
	}
	schema := map[string]any{"$ref": "#/components/schemas/Problem"}
	if operation := d.operation(method, path); operation != nil {
		response := member(operation, "responses", strconv.Itoa(a.status))
		if response == nil {
			return []string{"the status is not declared"}
		}
		for name := range member(response, "headers") {
			if a.header.Get(name) == "" {
				return []string{"the header " + name + " is declared and not there"}
			}
		}
		content := member(response, "content", mediaType)
		if response["content"] == nil && a.text == "" {
			return nil
		}
		if content == nil {
			return []string{"the content type " + strconv.Quote(mediaType) + " is not declared"}
		}
		schema = member(content, "schema")
	} else if a.status < 400 {
		return nil
	}
	if method == http.MethodHead {
		return nil
	}
	mistakes := d.validate(schema, a.json, "")
	if a.status >= 400 && mediaType == "application/problem+json" {
		for _, name := range []string{"type", "title", "detail", "instance"} {
			if s, _ := a.at(name).(string); s == "" {
				mistakes = append(mistakes, name+" is empty")
			}
		}
		if a.at("status") != float64(a.status) {
			mistakes = append(mistakes, fmt.Sprintf("its member status is %v", a.at("status")))
		}
		if (a.status == http.StatusUnprocessableEntity) != (a.at("errors") != nil) {
			mistakes = append(mistakes, "errors belong to 422, and to it alone")
		}
	}
	return mistakes
}

// resolve follows a reference.
func (d *document) resolve(schema map[string]any) map[string]any {
	for {
		ref, ok := schema["$ref"].(string)
		if !ok {
			return schema
		}
		schema = member(d.root, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
	}
}

// validate says how v breaks schema: the keywords of JSON Schema 2020-12 that
// the document uses.
func (d *document) validate(schema map[string]any, v any, at string) (mistakes []string) {
	add := func(format string, args ...any) {
		mistakes = append(mistakes, at+": "+fmt.Sprintf(format, args...))
	}
	schema = d.resolve(schema)
	if list, ok := schema["oneOf"].([]any); ok {
		matches := 0
		for _, sub := range list {
			if len(d.validate(sub.(map[string]any), v, at)) == 0 {
				matches++
			}
		}
		if matches != 1 {
			add("matches %d of oneOf", matches)
		}
	}
	if types := allOf(schema["type"]); len(types) > 0 && !slices.ContainsFunc(types, func(t any) bool { return isOfType(t.(string), v) }) {
		add("is not of type %v", types)
		return mistakes
	}
	if enum, ok := schema["enum"].([]any); ok && !slices.Contains(enum, v) {
		add("is %v, not in enum", v)
	}
	switch v := v.(type) {
	case map[string]any:
		mistakes = append(mistakes, d.validateObject(schema, v, at)...)
	case []any:
		if items := member(schema, "items"); items != nil {
			for i, item := range v {
				mistakes = append(mistakes, d.validate(items, item, at+"/"+strconv.Itoa(i))...)
			}
		}
	case string:
		n := float64(utf8.RuneCountInString(v))
		if least, ok := schema["minLength"].(float64); ok && n < least {
			add("is shorter than %v", least)
		}
		if most, ok := schema["maxLength"].(float64); ok && n > most {
			add("is longer than %v", most)
		}
		if pattern, ok := schema["pattern"].(string); ok && !regexp.MustCompile(pattern).MatchString(v) {
			add("does not match %s", pattern)
		}
		if schema["format"] == "date-time" {
			if err := new(time.Time).UnmarshalText([]byte(v)); err != nil {
				add("is no date-time: %v", err)
			}
		}
	case float64:
		if least, ok := schema["minimum"].(float64); ok && v < least {
			add("is below %v", least)
		}
		if most, ok := schema["maximum"].(float64); ok && v > most {
			add("is above %v", most)
		}
	}
	return mistakes
}

func (d *document) validateObject(schema, v map[string]any, at string) (mistakes []string) {
	for _, name := range allOf(schema["required"]) {
		if _, ok := v[name.(string)]; !ok {
			mistakes = append(mistakes, fmt.Sprintf("%s: %v is missing", at, name))
		}
	}
	if most, ok := schema["maxProperties"].(float64); ok && float64(len(v)) > most {
		mistakes = append(mistakes, fmt.Sprintf("%s: has more than %v members", at, most))
	}
	for name, value := range v {
		switch property := member(schema, "properties", name); {
		case property != nil:
			mistakes = append(mistakes, d.validate(property, value, at+"/"+name)...)
		case schema["additionalProperties"] == false:
			mistakes = append(mistakes, fmt.Sprintf("%s: has an undeclared member %q", at, name))
		case member(schema, "additionalProperties") != nil:
			mistakes = append(mistakes, d.validate(member(schema, "additionalProperties"), value, at+"/"+name)...)
		}
	}
	return mistakes
}

// allOf is a list's items, or the one item that stands for a list.
func allOf(v any) []any {
	switch v := v.(type) {
	case nil:
		return nil
	case []any:
		return v
	default:
		return []any{v}
	}
}

func isOfType(name string, v any) bool {
	switch v := v.(type) {
	case nil:
		return name == "null"
	case bool:
		return name == "boolean"
	case float64:
		return name == "number" || name == "integer" && v == float64(int64(v))
	case string:
		return name == "string"
	case []any:
		return name == "array"
	default:
		return name == "object"
	}
}

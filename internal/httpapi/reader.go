package httpapi

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// readJSON reads a text of the given shape into v, a pointer to a value of the
// shape's type. It goes through the text once, and returns every mistake that it
// finds, each with its way from that of the text on: in the order of the text, but what is
// missing at the end of its object, and one more than [maxFieldProblems] at most.
// Where there is one, v is not to be used.
//
// An error says why the text is not JSON by what RFC 7493 (I-JSON) demands: no
// member twice, no invalid UTF-8, no lone surrogates, nothing behind the value. It
// is a sentence for the caller, says where the mistake is, and quotes nothing that
// was sent but member names. What the RFC only advises, to keep numbers within a
// float64, is not demanded of a payload: its numbers are not read.
func readJSON(data []byte, s *shape, v any, from Loc) ([]FieldProblem, error) {
	r := &reader{shape: s, into: reflect.ValueOf(v).Elem(), root: len(from)}
	r.way = append(r.steps[:0], from...)
	err := json.Unmarshal(data, r)
	if errors.Is(err, errTooManyMembers) {
		return nil, errTooManyMembers
	}
	var syntax *jsontext.SyntacticError
	switch {
	case err == nil:
		return r.mistakes, nil
	case errors.As(err, &syntax):
		what := "is not valid JSON"
		switch {
		case errors.Is(err, jsontext.ErrDuplicateName):
			what = "has a member twice" + pointed(syntax.JSONPointer)
		case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
			what = "ends in the middle of its JSON"
		case strings.Contains(syntax.Err.Error(), "UTF-8"), strings.Contains(syntax.Err.Error(), "surrogate"):
			what = "is not valid UTF-8, or has half of a surrogate pair"
		case strings.Contains(syntax.Err.Error(), "max depth"):
			what = "is nested too deeply"
		}
		return nil, fmt.Errorf("The body %s, at byte %d.", what, syntax.ByteOffset) //nolint:staticcheck // a sentence for the caller
	default:
		return nil, err // an error of the reader itself
	}
}

var errTooManyMembers = errors.New("The body has more members than any request has fields.") //nolint:staticcheck // a sentence for the caller

// memberNames are the names of an object's members, as far as the text can be read.
func memberNames(data []byte) map[string]bool {
	names := make(map[string]bool)
	d := jsontext.NewDecoder(bytes.NewReader(data))
	if open, err := d.ReadToken(); err != nil || open.Kind() != '{' {
		return nil
	}
	for len(names) <= maxMembers && d.PeekKind() == '"' {
		name, err := d.ReadToken()
		if err != nil {
			break
		}
		names[name.String()] = true
		if err := d.SkipValue(); err != nil {
			break
		}
	}
	return names
}

// reader fills into, which must be a struct, member by member.
type reader struct {
	*jsontext.Decoder
	shape    *shape
	into     reflect.Value
	way      Loc    // to what is being read
	steps    [8]any // room for the way
	root     int    // how long the way is to the whole text
	mistakes []FieldProblem
}

// UnmarshalJSONFrom is json.UnmarshalerFrom.
func (r *reader) UnmarshalJSONFrom(d *jsontext.Decoder) error {
	r.Decoder = d
	return r.value(r.into, r.shape)
}

// mistake notes that what is being read breaks a rule.
func (r *reader) mistake(message, kind string) {
	if len(r.mistakes) <= maxFieldProblems {
		r.mistakes = append(r.mistakes, FieldProblem{Loc: append(Loc(nil), r.way...), Msg: message, Type: kind})
	}
}

// enter and leave follow the way to what is being read.
func (r *reader) enter(step any) { r.way = append(r.way, step) }

func (r *reader) leave() { r.way = r.way[:len(r.way)-1] }

// skip passes over a value of the wrong kind.
func (r *reader) skip(message, kind string) error {
	r.mistake(message, kind)
	return r.SkipValue()
}

// value reads what comes next into v.
func (r *reader) value(v reflect.Value, s *shape) error {
	next := r.PeekKind()
	for v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		v = v.Elem()
	}
	switch s.kind {
	case anything:
		value, err := r.ReadValue()
		v.SetBytes(bytes.Clone(value))
		return err
	case text:
		if next != '"' {
			return r.skip("must be a string", "string_type")
		}
		text, err := r.text()
		s.checkText(text, r.mistake)
		v.SetString(text)
		return err
	case number, integer:
		if next != '0' {
			if s.kind == integer {
				return r.skip("must be a whole number", "int_type")
			}
			return r.skip("must be a number", "float_type")
		}
		return r.number(v, s)
	case boolean:
		if next != 't' && next != 'f' {
			return r.skip("must be true or false", "bool_type")
		}
		token, err := r.ReadToken()
		v.SetBool(token.Kind() == 't')
		return err
	case list:
		if next != '[' {
			return r.skip("must be a list", "list_type")
		}
		return r.list(v, s)
	case record:
		if next != '{' {
			return r.skip("must be an object", "object_type")
		}
		return r.record(v, s)
	case table:
		if next != '{' {
			return r.skip("must be an object", "object_type")
		}
		return r.table(v, s)
	}
	panic("unknown kind of a shape")
}

// text reads a string. As of a value without escapes, most often, only its bytes
// are copied.
func (r *reader) text() (string, error) {
	quoted, err := r.ReadValue()
	if err != nil {
		return "", err
	}
	if bytes.IndexByte(quoted, '\\') < 0 {
		return string(quoted[1 : len(quoted)-1]), nil
	}
	unquoted, err := jsontext.AppendUnquote(nil, quoted)
	return string(unquoted), err
}

// number reads 5.0 and 5e0 as 5 too: JSON has one kind of number. One that does not
// fit a float64 is infinite, which no field allows.
func (r *reader) number(v reflect.Value, s *shape) error {
	digits, err := r.ReadValue()
	if err != nil {
		return err
	}
	n, _ := strconv.ParseFloat(string(digits), 64)
	s.checkNumber(n, s.kind == integer, r.mistake)
	switch {
	case s.kind == number:
		v.SetFloat(n)
	case math.Abs(n) <= 1<<53:
		v.SetInt(int64(n))
	}
	return nil
}

func (r *reader) list(v reflect.Value, s *shape) error {
	if _, err := r.ReadToken(); err != nil {
		return err
	}
	before, items := len(r.mistakes), 0
	for r.PeekKind() != ']' {
		if items++; s.maxItems != nil && items > *s.maxItems {
			if err := r.SkipValue(); err != nil {
				return err
			}
			continue
		}
		v.Grow(1)
		v.SetLen(items)
		r.enter(items - 1)
		if err := r.value(v.Index(items-1), s.each); err != nil {
			return err
		}
		r.leave()
	}
	if s.maxItems != nil && items > *s.maxItems {
		r.mistakes = r.mistakes[:before] // what is wrong with the items matters no more
		r.mistake("must have at most "+strconv.Itoa(*s.maxItems)+" items", "too_long")
	}
	if s.minItems != nil && items < *s.minItems {
		r.mistake("must have at least "+strconv.Itoa(*s.minItems)+" item", "too_short")
	}
	_, err := r.ReadToken()
	return err
}

func (r *reader) record(v reflect.Value, s *shape) error {
	if _, err := r.ReadToken(); err != nil {
		return err
	}
	before, members, seen := len(r.mistakes), 0, uint64(0)
	for r.PeekKind() == '"' {
		quoted, err := r.ReadValue()
		if err != nil {
			return err
		}
		if members++; members > maxMembers {
			if len(r.way) == r.root {
				return errTooManyMembers
			}
			if err := r.SkipValue(); err != nil {
				return err
			}
			continue
		}
		var name string
		f := s.fields[string(quoted[1:len(quoted)-1])]
		if f == nil { // it is unknown, or spelt with escapes
			unquoted, _ := jsontext.AppendUnquote(nil, quoted)
			name = string(unquoted)
			f = s.fields[name]
		}
		if err := r.member(v, s, f, name); err != nil {
			return err
		}
		if f != nil {
			seen |= f.bit
		}
	}
	if members > maxMembers {
		r.mistakes = r.mistakes[:before]
		r.mistake(errTooManyMembers.Error(), "invalid")
	} else {
		for _, f := range s.required {
			if seen&f.bit == 0 {
				r.enter(f.name)
				r.mistake("is required", "missing")
				r.leave()
			}
		}
	}
	_, err := r.ReadToken()
	return err
}

// member reads a member of v into its field; nil: it has none.
func (r *reader) member(v reflect.Value, s *shape, f *field, name string) error {
	switch {
	case f == nil && s.open:
		return r.SkipValue()
	case f == nil:
		r.enter(name)
		err := r.skip("is not a field of this request; look for a spelling mistake, or in /docs for the request that takes it", "extra_forbidden")
		r.leave()
		return err
	case r.PeekKind() == 'n' && f.kind != anything && !f.required: // as if it were left out
		if f.nullable {
			null := v.FieldByIndex(f.index)
			null.Set(reflect.New(null.Type().Elem()))
		}
		return r.SkipValue()
	}
	r.enter(f.name)
	err := r.value(v.FieldByIndex(f.index), f.shape)
	r.leave()
	return err
}

// table reads an object whose members are texts, or null where the shape says so.
// Of more members than there may be, the first ones are kept.
func (r *reader) table(v reflect.Value, s *shape) error {
	if _, err := r.ReadToken(); err != nil {
		return err
	}
	v.Set(reflect.MakeMap(v.Type()))
	texts, _ := v.Addr().Interface().(*map[string]string)
	nullable, _ := v.Addr().Interface().(*map[string]*string)
	members := 0
	for r.PeekKind() == '"' {
		name, err := r.text()
		if err != nil {
			return err
		}
		members++
		keep := s.maxMembers == nil || members <= *s.maxMembers
		switch next := r.PeekKind(); {
		case next == '"' && keep:
			text, err := r.text()
			if err != nil {
				return err
			}
			if texts != nil {
				(*texts)[name] = text
			} else {
				value := text
				(*nullable)[name] = &value
			}
		case next == 'n' && keep && nullable != nil:
			(*nullable)[name] = nil
			fallthrough
		case next == '"', next == 'n' && nullable != nil:
			if err := r.SkipValue(); err != nil {
				return err
			}
		default:
			r.enter(name)
			if err := r.skip("must be a string", "string_type"); err != nil {
				return err
			}
			r.leave()
		}
	}
	if s.maxMembers != nil && members > *s.maxMembers {
		r.mistake("must have at most "+strconv.Itoa(*s.maxMembers)+" properties", "too_long")
	}
	_, err := r.ReadToken()
	return err
}

// pointed writes " at /way/to/the/value", cut where a caller made it very long.
func pointed(p jsontext.Pointer) string {
	if p == "" {
		return ""
	}
	const most = 100
	s := strconv.QuoteToASCII(string(p))
	s = s[1 : len(s)-1]
	if len(s) > most {
		s = s[:most] + "…"
	}
	return " at " + s
}

//go:build ignore

// Count prints the figures of docs/design.md about the code itself: go run docs/count.go
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

type listed struct {
	Dir, ImportPath, Export            string
	GoFiles, TestGoFiles, XTestGoFiles []string
	Standard                           bool
}

func main() {
	out, err := exec.Command("go", "list", "-export", "-deps", "-json", "./...").Output()
	if err != nil {
		log.Fatal("go list: ", err)
	}
	var ours []listed
	exports := map[string]string{}
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var p listed
		if err := d.Decode(&p); err != nil {
			log.Fatal(err)
		}
		exports[p.ImportPath] = p.Export
		if root, err := os.Getwd(); err == nil && strings.HasPrefix(p.Dir, root) {
			ours = append(ours, p)
		}
	}
	var longest []string
	lines, testLines := 0, 0
	fmt.Println("arrows between the files of a package (A uses what B declares), and how many go back up in the best order found:")
	for _, p := range ours {
		for _, f := range p.GoFiles {
			lines += count(filepath.Join(p.Dir, f))
		}
		for _, f := range slices.Concat(p.TestGoFiles, p.XTestGoFiles) {
			testLines += count(filepath.Join(p.Dir, f))
		}
		fset := token.NewFileSet()
		var files []*ast.File
		for _, f := range p.GoFiles {
			parsed, err := parser.ParseFile(fset, filepath.Join(p.Dir, f), nil, parser.SkipObjectResolution)
			if err != nil {
				log.Fatal(err)
			}
			files = append(files, parsed)
			for _, d := range parsed.Decls {
				if f, ok := d.(*ast.FuncDecl); ok {
					n := fset.Position(f.End()).Line - fset.Position(f.Pos()).Line + 1
					longest = append(longest, fmt.Sprintf("%4d lines  %s.%s", n, filepath.Base(p.ImportPath), f.Name.Name))
				}
			}
		}
		info := types.Info{Uses: map[*ast.Ident]types.Object{}}
		open := func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) }
		conf := types.Config{Importer: importer.ForCompiler(fset, "gc", open), Error: func(error) {}}
		own, _ := conf.Check(p.ImportPath, fset, files, &info) // what does not resolve is no arrow
		arrows := map[[2]string]bool{}
		for ident, object := range info.Uses {
			from, to := fset.Position(ident.Pos()).Filename, fset.Position(object.Pos()).Filename
			if object.Pkg() == own && from != to && to != "" {
				arrows[[2]string{filepath.Base(from), filepath.Base(to)}] = true
			}
		}
		if len(p.GoFiles) > 4 {
			fmt.Printf("  %-12s %3d files, %3d arrows, %2d back up\n", filepath.Base(p.ImportPath), len(p.GoFiles), len(arrows), backUp(p.GoFiles, arrows))
		}
	}
	slices.SortFunc(longest, func(a, b string) int { return cmp.Compare(b, a) })
	fmt.Printf("longest functions:\n  %s\n", strings.Join(longest[:3], "\n  "))
	fmt.Printf("lines of Go: %d, of tests: %d (without build tags)\n", lines, testLines)
}

func count(path string) int {
	b, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	return bytes.Count(b, []byte("\n"))
}

// backUp is how many arrows lead from a lower file to a higher one, in the order of the
// files that moving single ones does not better.
func backUp(order []string, arrows map[[2]string]bool) int {
	cost := func(order []string) (n int) {
		for arrow := range arrows {
			if slices.Index(order, arrow[0]) > slices.Index(order, arrow[1]) {
				n++
			}
		}
		return n
	}
	best := cost(order)
	for better := true; better; {
		better = false
		for _, file := range slices.Clone(order) {
			without := slices.DeleteFunc(slices.Clone(order), func(f string) bool { return f == file })
			for at := range len(order) {
				if next := slices.Insert(slices.Clone(without), at, file); cost(next) < best {
					best, order, better = cost(next), next, true
				}
			}
		}
	}
	return best
}

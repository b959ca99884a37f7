//go:build unix

package devdb

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The tests in this file write programs and run them, and so cannot run in
// parallel: a fork at the wrong moment would keep a program open for writing,
// and then it cannot be run (ETXTBSY).

func TestFind(t *testing.T) {
	root := newDir(t)
	bin := func(name string) string { return filepath.Join(root, name, "bin") }
	for name, version := range map[string]string{
		"lib/9.6": "9.6.24", "lib/13": "13.9", "lib/14": "14.18 (Debian 14.18-1)", "lib/16": "16.9", "lib/17": "17beta1",
		"old/9.6": "9.6.24", "old/13": "13.9",
		"broken": "many", "lonely": "17.5",
	} {
		writeProgram(t, filepath.Join(bin(name), "postgres"), "echo 'postgres (PostgreSQL) "+version+"'")
		if name != "lonely" {
			writeProgram(t, filepath.Join(bin(name), "initdb"), "")
		}
	}
	writeProgram(t, filepath.Join(bin("config"), "pg_config"), `[ "$*" = --bindir ] && echo `+bin("lib/16"))
	if err := errors.Join(
		os.MkdirAll(bin("links"), 0o755),
		os.Symlink(filepath.Join(bin("lib/14"), "postgres"), filepath.Join(bin("links"), "postgres")),
	); err != nil {
		t.Fatal(err)
	}

	tests := []struct {
		name  string
		path  []string
		globs []string
		want  installation
	}{
		{name: "on the path", path: []string{root, bin("lib/14")}, want: installation{bin("lib/14"), 14}},
		{name: "through a link", path: []string{bin("links")}, want: installation{bin("lib/14"), 14}},
		{name: "first on the path", path: []string{bin("lib/14"), bin("lib/16")}, want: installation{bin("lib/14"), 14}},
		{name: "too old on the path", path: []string{bin("lib/13"), bin("lib/16")}, want: installation{bin("lib/16"), 16}},
		{name: "by pg_config", path: []string{bin("config")}, want: installation{bin("lib/16"), 16}},
		{name: "path before pg_config", path: []string{bin("config"), bin("lib/14")}, want: installation{bin("lib/14"), 14}},
		{name: "pg_config before known places", path: []string{bin("config")}, globs: []string{bin("lib/14")}, want: installation{bin("lib/16"), 16}},
		{name: "highest of a known place", globs: []string{bin("none"), bin("lib/*")}, want: installation{bin("lib/17"), 17}},
		{name: "without initdb", path: []string{bin("lonely"), bin("lib/16")}, want: installation{bin("lib/16"), 16}},
		{name: "unreadable version", path: []string{bin("broken"), bin("lib/16")}, want: installation{bin("lib/16"), 16}},
		{name: "nothing but too old", path: []string{bin("old/13")}, globs: []string{bin("old/*")}},
		{name: "relative path", path: []string{"lib/14/bin"}},
	}
	t.Chdir(root)
	t.Setenv("TMPDIR", t.TempDir()) // embedded-postgres leaves a file there
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := machine{path: tt.path, globs: tt.globs, repository: "http://127.0.0.1:1"}
			got, err := m.find(t.Context(), newDir(t), slog.New(slog.DiscardHandler))
			if got != tt.want {
				t.Errorf("find() = %v, %v; want %v", got, err, tt.want)
			}
			if found := tt.want != (installation{}); found != (err == nil) {
				t.Errorf("find() error = %v, want one: %t", err, !found)
			}
		})
	}
}

func TestNoPostgres(t *testing.T) {
	dir := newDir(t)
	t.Setenv("TMPDIR", t.TempDir())
	_, err := start(t.Context(), Options{Dir: dir}, machine{repository: "http://127.0.0.1:1"})
	if err == nil {
		t.Fatal("Start() succeeded without a PostgreSQL")
	}
	for _, want := range []string{"PostgreSQL 14 or later", "apt-get install postgresql", "brew install postgresql@17", "connection refused"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("Start() = %v, want %q in it", err, want)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("Start() = %q, want one line", err)
	}
	assertEmpty(t, dir)
}

// archive is a tar.xz file with bin/postgres and bin/initdb: scripts, of which
// the first prints "postgres (PostgreSQL) 17.5".
const archive = "/Td6WFoAAAFpIt42AgAhARwAAAAQz1jM4Cf/AJxdADEaShsJm84iHsbLRwPoGC75j1TR0bLwgHrZQah4q5kOJF3240eHti0OnTfi" +
	"16BUcOHw6D4S+oR/ArRtCyrI+d9JGetC60VL5CbaWyXtXsQ5DJo5yT8XZUw8w51h82brsFvMYYNfkE8SlD1wtrKs2fM/6hUZxNsF" +
	"S72g3f46gViCyTx8cbH6OQOrDnko+7Tvg/3S1/H+4Q4qZsdVAACkC8zNAAG0AYBQAACFNIv+PjANiwIAAAAAAVla"

func TestFetch(t *testing.T) {
	txz, err := base64.StdEncoding.DecodeString(archive)
	if err != nil {
		t.Fatal(err)
	}
	good := pack(t, "postgres-linux.txz", txz)
	cut := pack(t, "postgres-linux.txz", txz[:150])
	tests := []struct {
		name string
		jar  []byte // nil: 404
		sum  [sha256.Size]byte
		want string // in the error
	}{
		{name: "good", jar: good, sum: sha256.Sum256(good)},
		{name: "wrong sum", jar: good, want: "checksums do not match"},
		{name: "not there", want: "no version found"},
		{name: "cut short", jar: cut, sum: sha256.Sum256(cut), want: "unable to extract"},
		{name: "not an archive", jar: []byte("<html>"), sum: sha256.Sum256([]byte("<html>")), want: "not a valid zip file"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := newDir(t)
			t.Setenv("TMPDIR", t.TempDir())
			repository := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch {
				case !strings.HasPrefix(r.URL.Path, "/maven/io/zonky/test/postgres/"), tt.jar == nil:
					http.NotFound(w, r)
				case strings.HasSuffix(r.URL.Path, ".jar"):
					_, _ = w.Write(tt.jar)
				case strings.HasSuffix(r.URL.Path, ".jar.sha256"):
					fmt.Fprintf(w, "%x", tt.sum)
				}
			}))
			defer repository.Close()
			m := machine{repository: repository.URL + "/maven"}
			got, err := m.find(t.Context(), dir, slog.New(slog.DiscardHandler))
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
					t.Errorf("find() = %v, %q; want one line with %q", got, err, tt.want)
				}
				assertEmpty(t, dir)
				return
			}
			want := installation{bin: filepath.Join(dir, "postgresql-"+string(fetchedVersion), "bin"), major: 17}
			if err != nil || got != want {
				t.Fatalf("find() = %v, %v; want %v", got, err, want)
			}
			repository.Close()
			if got, err := m.find(t.Context(), dir, slog.New(slog.DiscardHandler)); err != nil || got != want {
				t.Errorf("the second find(), without the repository = %v, %v; want %v", got, err, want)
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
				t.Errorf("left in the folder: %v, %v; want nothing but what was fetched", entries, err)
			}
		})
	}
}

func TestFetchEndsWithItsContext(t *testing.T) {
	dir := newDir(t)
	t.Setenv("TMPDIR", t.TempDir())
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	repository := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		cancel(enough)
		<-r.Context().Done() // hangs until the request is given up
	}))
	defer repository.Close()
	_, err := start(ctx, Options{Dir: dir}, machine{repository: repository.URL})
	if !errors.Is(err, enough) {
		t.Errorf("Start() = %v, want %v", err, enough)
	}
	assertEmpty(t, dir)
}

func writeProgram(t *testing.T, path, script string) {
	t.Helper()
	if err := errors.Join(
		os.MkdirAll(filepath.Dir(path), 0o755),
		os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755),
	); err != nil {
		t.Fatal(err)
	}
}

// pack returns a zip file with one file in it.
func pack(t *testing.T, name string, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	w, err := z.Create(name)
	if err == nil {
		_, err = w.Write(content)
	}
	if err := errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func assertEmpty(t *testing.T, dir string) {
	t.Helper()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("%s has %v, %v; want it empty", dir, entries, err)
	}
}

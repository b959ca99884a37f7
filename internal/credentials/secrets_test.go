package credentials

import (
	"errors"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/target"
	"github.com/melodia/orchestrator/internal/task"
)

// newSecrets has files of these names and contents, all for https://plays.melodia.app.
func newSecrets(t testing.TB, files map[string]string) *Secrets {
	t.Helper()
	dir := t.TempDir()
	var entries []string
	for name, content := range files {
		write(t, filepath.Join(dir, name), content)
		entries = append(entries, name+"=plays.melodia.app")
	}
	s, err := NewSecrets(dir, entries)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func parse(t testing.TB, rawURL string) *url.URL {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestSecretsAreFilledIn(t *testing.T) {
	t.Parallel()
	s := newSecrets(t, map[string]string{
		"billing": "b1ll\n", "windows": "w1n\r\n", "plain": "p", "tabs": "a\tb", "script": "clé", "like-a-reference": "${secret:billing}", "lines": "a\n\n",
		"empty": "", "newline": "\n", "control": "a\x01b", "latin": "cl\xe9", "space": " x", "big": strings.Repeat("x", maxSecretBytes+1),
		"most": strings.Repeat("x", maxSecretBytes),
	})
	s.hosts["absent"], s.hosts["folder"], s.hosts["device"] = s.hosts["billing"], s.hosts["billing"], s.hosts["billing"]
	if err := os.Mkdir(filepath.Join(s.dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/zero", filepath.Join(s.dir, "device")); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, value, want string
		err               string
	}{
		{"alone", "${secret:billing}", "b1ll", ""},
		{"in a text", "Bearer ${secret:billing}, x", "Bearer b1ll, x", ""},
		{"two", "${secret:billing}:${secret:plain}", "b1ll:p", ""},
		{"one twice", "${secret:plain}${secret:plain}", "pp", ""},
		{"line of Windows", "${secret:windows}", "w1n", ""},
		{"tabs", "${secret:tabs}", "a\tb", ""},
		{"any script", "${secret:script}", "clé", ""},
		{"what looks like a reference", "${secret:like-a-reference}", "${secret:billing}", ""},
		{"8 KiB", "${secret:most}", strings.Repeat("x", maxSecretBytes), ""},
		{"space within", "Bearer ${secret:space}", "Bearer  x", ""},
		{"no reference", "$secret:billing", "$secret:billing", ""},
		{"two lines", "${secret:lines}", "", "the header X is not legal with its secret: no control characters, no space at either end"},
		{"control character", "${secret:control}", "", "the header X is not legal with its secret: no control characters, no space at either end"},
		{"not UTF-8", "${secret:latin}", "", "the header X is not legal with its secret: no control characters, no space at either end"},
		{"space at the end", "${secret:space}", "", "the header X is not legal with its secret: no control characters, no space at either end"},
		{"empty", "${secret:empty}", "", "the secret empty is empty"},
		{"a new line", "${secret:newline}", "", "the secret newline is empty"},
		{"too big", "${secret:big}", "", "the secret big is larger than 8 KiB"},
		{"too much", strings.Repeat("${secret:most}", 5), "", "the headers are larger than 32 KiB with their secrets"},
		{"not there", "${secret:absent}", "", "the secret absent is not there"},
		{"a folder", "${secret:folder}", "", "the secret folder cannot be read"},
		{"a device", "${secret:device}", "", "the secret device cannot be read"},
		{"not for any host", "${secret:unlisted}", "", "the task's header X refers to a secret that does not exist, or that SECRET_HOSTS does not allow for the url's host"},
		{"a path", "${secret:../billing}", "", "the task's header X refers to a secret that does not exist, or that SECRET_HOSTS does not allow for the url's host"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			headers := map[string]string{"X": tt.value, "Y": "y"}
			before := maps.Clone(headers)
			filled, secrets, err := s.fill(parse(t, "https://plays.melodia.app/"), headers)
			if diff := cmp.Diff(before, headers); diff != "" {
				t.Errorf("the task's headers were changed (-before +after):\n%s", diff)
			}
			if tt.err != "" {
				refused := strings.HasPrefix(tt.err, "the task's header")
				if e, ok := errors.AsType[*Error](err); !ok || e.text != tt.err || e.refused != refused {
					t.Errorf("error %#v, want %q, refused %t", err, tt.err, refused)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(map[string]string{"X": tt.want, "Y": "y"}, filled); diff != "" {
				t.Errorf("headers (-want +got):\n%s", diff)
			}
			if n := strings.Count(tt.value, "${secret:"); len(secrets) != n {
				t.Errorf("%d secrets, want %d", len(secrets), n)
			}
		})
	}
}

// What has no reference costs nothing.
func TestHeadersWithoutSecretsAreNotCopied(t *testing.T) {
	headers := map[string]string{"X-Tenant": "melodia", "Authorization": "Bearer $x {secret:y}"}
	u, s := parse(t, "https://plays.melodia.app/"), new(Secrets)
	if n := testing.AllocsPerRun(100, func() {
		if _, secrets, err := s.fill(u, headers); secrets != nil || err != nil {
			t.Errorf("fill = %v, %v, want nothing", secrets, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func TestSecretsAreReadAgain(t *testing.T) {
	t.Parallel()
	s := newSecrets(t, map[string]string{"billing": "first"})
	path := filepath.Join(s.dir, "billing")
	past := time.Now().Add(-time.Hour)
	want := func(value string) {
		t.Helper()
		for range 2 { // the second time from memory
			if got, err := s.value("billing"); got != value || err != nil {
				t.Errorf("value = %q, %v, want %q", got, err, value)
			}
		}
	}
	want("first")
	write(t, path, "longer now")
	want("longer now")
	write(t, path, "shorter 1!")
	if err := os.Chtimes(path, past, past); err != nil { // the same size, another time
		t.Fatal(err)
	}
	want("shorter 1!")
	// Another file with the same size and time, as Kubernetes swaps them.
	version := func(name, content string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(s.dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(s.dir, name, "billing")
		write(t, file, content)
		if err := os.Chtimes(file, past, past); err != nil {
			t.Fatal(err)
		}
		link := filepath.Join(s.dir, "..next")
		if err := os.Symlink(name, link); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(link, filepath.Join(s.dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", "version 1!")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("..data/billing", path); err != nil {
		t.Fatal(err)
	}
	want("version 1!")
	version("..2", "version 2!")
	want("version 2!")
	// A change that does not show is noticed a little later.
	if err := os.WriteFile(path, []byte("version 3!"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, past, past); err != nil {
		t.Fatal(err)
	}
	want("version 2!")
	s.mu.Lock()
	old := s.read["billing"]
	old.at = old.at.Add(-rereadAfter)
	s.read["billing"] = old
	s.mu.Unlock()
	want("version 3!")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if got, err := s.value("billing"); err == nil {
		t.Errorf("value of a file that is gone = %q, want an error", got)
	}
}

func TestCheckSecrets(t *testing.T) {
	t.Parallel()
	s := newSecrets(t, map[string]string{"billing": "b1ll"})
	s.hosts["absent"] = s.hosts["billing"]
	for _, tt := range []struct {
		name, url string
		want      error
	}{
		{"billing", "https://plays.melodia.app/", nil},
		{"billing", "https://plays.melodia.app.evil.example/", errSecretHost},
		{"billing", "https://[", target.ErrNotURL},
		{"billing", "http://plays.melodia.app/", errSecretHTTP},
		{"billing", "http://evil.example/", errSecretHTTP},
		{"other", "http://plays.melodia.app/", errSecretHTTP},
		{"absent", "https://plays.melodia.app/", errSecretHost},
		{"other", "https://plays.melodia.app/", errSecretHost},
		{"", "https://plays.melodia.app/", errSecretHost},
	} {
		if got := s.Check(tt.name, tt.url); got != tt.want {
			t.Errorf("Check(%q, %q) = %v, want %v", tt.name, tt.url, got, tt.want)
		}
	}
}

// What kept a secret from being read says nothing about the secret.
func TestCheckSecretsInAShortage(t *testing.T) {
	t.Parallel()
	s := newSecrets(t, map[string]string{"billing": "b1ll"})
	for errno, want := range map[syscall.Errno]error{
		syscall.EMFILE: task.ShortageDescriptors, syscall.ENFILE: task.ShortageDescriptors, syscall.ENOMEM: task.ShortageMemory, syscall.EACCES: errSecretHost,
	} {
		s.readFile = func(path string) (string, error) {
			return "", &Error{text: "cannot be read", cause: &os.PathError{Op: "open", Path: path, Err: errno}}
		}
		if err := s.Check("billing", "https://plays.melodia.app/"); err != want {
			t.Errorf("%v: got %v, want %v", errno, err, want)
		}
		// Who may not use it learns nothing of that.
		if err := s.Check("billing", "https://example.com/"); err != errSecretHost {
			t.Errorf("%v, for another host: got %v", errno, err)
		}
	}
}

func TestNewSecretsRefuses(t *testing.T) {
	t.Parallel()
	for _, entry := range []string{
		"", "s3cret", "=s3cret.example", "a/s3cret=plays.melodia.app", "..=plays.melodia.app", "a b=plays.melodia.app",
		strings.Repeat("n", task.MaxSecretName+1) + "=plays.melodia.app", "billing=", "billing=https://s3cret", "billing=a=s3cret",
	} {
		_, err := NewSecrets("", []string{"billing=plays.melodia.app", "billing=.run.app", entry})
		if err == nil || !strings.HasPrefix(err.Error(), "entry 3: ") || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("entry %q: error %v, want one that numbers it and does not hold it", entry, err)
		}
	}
}

package credentials

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/melodia/orchestrator/internal/target"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	// maxSecretBytes bounds one secret. All headers of a submission have the same bound.
	maxSecretBytes = task.MaxHeaderBytes
	// maxFilledBytes bounds the headers with their secrets: few servers take more.
	maxFilledBytes = 32 << 10
	// rereadAfter is when a file is read again although nothing shows that it
	// changed: some file systems do not show it.
	rereadAfter = time.Minute
)

// Secrets are files whose contents the headers of calls may refer to, each for
// certain hosts. The nil Secrets have none. Any number of goroutines may use them.
type Secrets struct {
	dir   string
	hosts map[string]*target.Hosts // by the secret's name

	mu   sync.Mutex
	read map[string]secretFile // by name

	readFile func(path string) (string, error) // a test puts its own in
}

// secretFile is what was read at a moment, and the file's attributes just before.
type secretFile struct {
	info  fs.FileInfo
	at    time.Time
	value string
}

// Errors of [Secrets.Check]. Their texts complete "headers.X …".
var (
	// errSecretHost does not tell whether the secret exists: a principal that may
	// not use it must not learn that.
	errSecretHost = errors.New("refers to a secret that does not exist, or that SECRET_HOSTS does not allow for the url's host")
	errSecretHTTP = errors.New("refers to a secret, which needs a url that begins with https://")
)

// NewSecrets takes the folder of the files and, for each secret, the hosts that
// may be sent it: entries such as "billing=.melodia.app", several per secret
// where it has several hosts (see [target.Hosts] for their form). Errors number the
// entries and do not hold them.
func NewSecrets(dir string, entries []string) (*Secrets, error) {
	s := &Secrets{dir: dir, hosts: make(map[string]*target.Hosts), read: make(map[string]secretFile), readFile: readSecret}
	for i, entry := range entries {
		name, host, found := strings.Cut(entry, "=")
		if !found || !task.IsSecretName(name) {
			return nil, fmt.Errorf("entry %d: must be the name of a secret, an equals sign and a host, like billing=.melodia.app", i+1)
		}
		if s.hosts[name] == nil {
			s.hosts[name] = new(target.Hosts)
		}
		if err := s.hosts[name].Add(host); err != nil {
			return nil, fmt.Errorf("entry %d: its host is %w", i+1, err)
		}
	}
	return s, nil
}

// Check returns an error unless the named secret exists and may be sent to
// rawURL. The error is a [task.Shortage] where the instance lacks what it takes to find
// out; else its text completes "headers.X …" and holds nothing that was sent.
func (s *Secrets) Check(name, rawURL string) error {
	u, err := task.ParseURL(rawURL)
	if err != nil {
		return target.ErrNotURL
	}
	if err := s.check(name, u); err != nil {
		return err
	}
	_, err = s.value(name)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return task.ShortageDescriptors
	case errors.Is(err, syscall.ENOMEM):
		return task.ShortageMemory
	default:
		return errSecretHost
	}
}

// check reads no file. It checks the URL first, which tells nothing about the secret.
func (s *Secrets) check(name string, u *url.URL) error {
	if !target.Confidential(u) {
		return errSecretHTTP
	}
	if s == nil || s.hosts[name] == nil || !s.hosts[name].Contains(u) {
		return errSecretHost
	}
	return nil
}

// fill returns headers with each reference replaced by its secret, and the secrets.
// Where there is no reference it returns headers itself.
func (s *Secrets) fill(u *url.URL, headers map[string]string) (filled map[string]string, secrets []string, err error) {
	filled = headers
	size := 0
	var own bool // filled is a copy
	for name, value := range headers {
		before, secret, rest, found := task.CutSecret(value)
		if !found {
			continue
		}
		var b strings.Builder
		for ; found; before, secret, rest, found = task.CutSecret(rest) {
			if err := s.check(secret, u); err != nil {
				return nil, nil, &Error{text: "the task's header " + name + " " + err.Error(), refused: true}
			}
			v, err := s.value(secret)
			if err != nil {
				return nil, nil, &Error{text: "the secret " + secret + " " + err.Error(), cause: err}
			}
			b.WriteString(before)
			b.WriteString(v)
			secrets = append(secrets, v)
			if size += len(v); size > maxFilledBytes {
				return nil, nil, &Error{text: "the headers are larger than 32 KiB with their secrets"}
			}
		}
		b.WriteString(before)
		if !task.IsFieldValue(b.String()) {
			return nil, nil, &Error{text: "the header " + name + " is not legal with its secret: no control characters, no space at either end"}
		}
		if !own {
			filled, own = maps.Clone(headers), true
		}
		filled[name] = b.String()
	}
	return filled, secrets, nil
}

// value returns what is in a secret's file, without the end of its last line.
// The error's text completes "the secret name …".
func (s *Secrets) value(name string) (string, error) {
	path := filepath.Join(s.dir, name)
	info, err := os.Stat(path) // behind links, which Kubernetes swaps
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", errors.New("is not there")
	case err != nil || !info.Mode().IsRegular():
		return "", &Error{text: "cannot be read", cause: err}
	}
	s.mu.Lock()
	known := s.read[name]
	s.mu.Unlock()
	if known.is(info) && time.Since(known.at) < rereadAfter {
		return known.value, nil
	}
	value, err := s.readFile(path)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	s.read[name] = secretFile{info: info, at: time.Now(), value: value}
	s.mu.Unlock()
	return value, nil
}

// is reports whether the file seems to be as it was when it was read.
func (f secretFile) is(info fs.FileInfo) bool {
	return f.info != nil && os.SameFile(f.info, info) && f.info.Size() == info.Size() && f.info.ModTime().Equal(info.ModTime())
}

func readSecret(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", &Error{text: "cannot be read", cause: err}
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxSecretBytes+1))
	value := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	switch {
	case err != nil:
		return "", &Error{text: "cannot be read", cause: err}
	case len(b) > maxSecretBytes:
		return "", errors.New("is larger than 8 KiB")
	case value == "":
		return "", errors.New("is empty")
	}
	return value, nil
}

package e2e

import (
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// The addresses that the documents' commands call.
const (
	documentedService = "http://127.0.0.1:8080"
	documentedTarget  = "http://127.0.0.1:8081"
)

// fenced returns the blocks of code of a document that are marked with a language,
// without the indentation that a list gives them.
func fenced(t *testing.T, document, language string) (blocks []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(repository, document))
	if err != nil {
		t.Fatal(err)
	}
	for _, match := range regexp.MustCompile("(?ms)^( *)```"+language+"\n(.*?)^ *```$").FindAllStringSubmatch(string(text), -1) {
		blocks = append(blocks, strings.TrimPrefix(strings.ReplaceAll("\n"+match[2], "\n"+match[1], "\n"), "\n"))
	}
	return blocks
}

// developing starts dev, and returns it with the address of its echo target and the key
// that it made, if it made one.
func developing(t *testing.T, settings ...string) (p *process, target, key string) {
	t.Helper()
	p = start(t, "dev", append([]string{"DATABASE_URL=" + pgtest.URL(t), "TARGET_ALLOW_NETWORKS="}, settings...)...)
	eventually(t, func() bool { return p.count("End with Ctrl-C") > 0 }, func() string { return "dev does not say that it is ready" })
	printed := strings.Join(p.lines(), "\n")
	echo := regexp.MustCompile(`echo target +(http://\S+)`).FindStringSubmatch(printed)
	if echo == nil {
		t.Fatalf("dev does not say where its echo target is:\n%s", printed)
	}
	if made := regexp.MustCompile(`ORCHESTRATOR_KEY=(ork_\S+)`).FindStringSubmatch(printed); made != nil {
		key = made[1]
	}
	return p, echo[1], key
}

// rest waits until no task of p is running or due, as a reader does between two commands.
func (p *process) rest(key string) {
	p.t.Helper()
	header := http.Header{"Authorization": {"Bearer " + key}}
	var last answer
	eventually(p.t, func() bool {
		now := url.QueryEscape(time.Now().Format(time.RFC3339Nano))
		last = p.send(http.MethodGet, "/tasks?state=running,pending&run_before="+now, "", header)
		return last.status == http.StatusOK && strings.Contains(last.raw, `"tasks":[]`)
	}, func() string { return "tasks do not come to rest: " + last.raw })
}

// Every command in the documents that calls the service is accepted by it.
func TestDocumentedCommands(t *testing.T) {
	t.Parallel()
	for document, auth := range map[string]string{"README.md": "api_key", "docs/guide.md": "none", "docs/operations.md": "none"} {
		t.Run(document, func(t *testing.T) {
			t.Parallel()
			p, target, key := developing(t, "AUTH="+auth)
			home := t.TempDir()
			// A status of 400 and above ends curl with an error, and the block with it.
			if err := os.WriteFile(filepath.Join(home, ".curlrc"), []byte("fail-with-body\nsilent\nshow-error\nmax-time = 60\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			ran := 0
			// Of several blocks that belong together, a later one uses what an earlier one has set.
			var script strings.Builder
			for _, block := range fenced(t, document, "sh") {
				if !strings.Contains(block, documentedService) {
					continue
				}
				p.rest(key)
				// What an earlier block printed is of no interest: it was shown when it ran.
				earlier := assignments.FindAllString(script.String(), -1)
				script.WriteString(block)
				command := exec.Command("bash", "-e", "-u", "-o", "pipefail", "-c", addresses(p, target).Replace(strings.Join(earlier, "\n")+"\n"+block))
				command.Env = append(os.Environ(), "CURL_HOME="+home, "ORCHESTRATOR_KEY="+key)
				if out, err := command.CombinedOutput(); err != nil {
					t.Errorf("%v:\n%s\n%s", err, block, out)
				}
				ran++
			}
			if ran == 0 {
				t.Error("no command calls the service")
			}
		})
	}
}

// assignments are the lines of a block that keep something for a later one.
var assignments = regexp.MustCompile(`(?m)^\w+=\$\(curl .*$`)

// addresses puts the real addresses of a process and its target into a command.
func addresses(p *process, target string) *strings.Replacer {
	return strings.NewReplacer(documentedService, p.url, documentedTarget, target)
}

// Links between the documents lead to a file that is there and to a heading in it.
func TestDocumentsLinks(t *testing.T) {
	t.Parallel()
	documents, err := filepath.Glob(filepath.Join(repository, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	documents = append(documents, filepath.Join(repository, "README.md"), filepath.Join(repository, ".github", "SECURITY.md"))
	read := func(path string) string {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		return regexp.MustCompile("(?ms)^ *```.*?^ *```$").ReplaceAllString(string(text), "")
	}
	links := 0
	for _, document := range documents {
		for _, link := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(read(document), -1) {
			path, fragment, _ := strings.Cut(link[1], "#")
			if strings.Contains(path, "://") || strings.HasPrefix(path, "../../../security/") { // a page of GitHub's
				continue
			}
			links++
			to := document
			if path != "" {
				to = filepath.Join(filepath.Dir(document), path)
			}
			text := read(to)
			if fragment == "" {
				continue
			}
			found := false
			for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
				// As GitHub makes them.
				anchor := strings.ReplaceAll(regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(heading[1]), ""), " ", "-")
				found = found || anchor == fragment
			}
			if !found {
				t.Errorf("%s: %s leads to no heading", document, link[1])
			}
		}
	}
	if links == 0 {
		t.Error("there are no links")
	}
}

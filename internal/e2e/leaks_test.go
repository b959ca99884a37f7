package e2e

import (
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/devdb"
)

// planted are secrets, by where they were put.
type planted map[string]string

// in returns where the secrets in a text were put, with what is around them.
func (s planted) in(text string) (found []string) {
	for _, where := range slices.Sorted(maps.Keys(s)) {
		if at := strings.Index(text, s[where]); at >= 0 {
			found = append(found, where+": …"+text[max(0, at-200):min(len(text), at+100)]+"…")
		}
	}
	return found
}

// shown is what an answer shows of a task to whoever has the scope for it.
var shown = regexp.MustCompile(`"(url|response_excerpt)":"(\\.|[^"\\])*"`)

// Whatever is secret in what the service is set up with, sent, and answered:
// it is in no line of its log, however much that tells, in no answer, and not in
// the log of the database with all statements, also where things go wrong.
func TestNothingLeaks(t *testing.T) {
	t.Parallel()
	dir := openDir(t)
	server, err := devdb.Start(t.Context(), devdb.Options{Dir: dir, Temporary: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	database := server.URL("postgres")
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := u.User.Password()
	issuer := newIssuer(t)
	key, entry := newAPIKey(t, "plays", "submit", "read", "manage", "internal")
	weak, weakEntry := newAPIKey(t, "weak", "read")
	secrets := planted{
		"database's password": password, "API key": key, "API key without scopes": weak, "entry of a key": entry[strings.LastIndex(entry, ":")+1:],
		"token":         issuer.Token(issuer.Claims("plays@x.example", "x")),
		"expired token": issuer.Token(map[string]any{"iss": issuer.URL, "aud": "x", "exp": 1}),
	}
	for i, where := range []string{
		"request's query string", "request's path", "request's cookie", "request's header", "request's method", "wrong key", "unknown account",
		"task's query string", "task's header", "task's secret header", "payload", "body", "label", "malformed body", "wrong field", "wrong value", "large body",
		"target's cookie", "target's answer", "redirect's query string", "secret in a file", "secret that signs",
	} {
		secrets[where] = fmt.Sprintf("pl4nted%02d", i)
	}
	secrets["platform's secret"] = platformSecret
	secrets["tokens of the platform"] = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9." // as each of them begins
	secrets["unknown account"] += "@x.example"
	secrets["token for targets"] = "s1gn4tur3" // newMetadata's
	signing := base64.StdEncoding.EncodeToString([]byte(strings.Repeat(secrets["secret that signs"], 4)))
	secrets["secret that signs"] = signing
	// Where a target repeats what it was sent, and in a url, others are shown.
	hidden := maps.Clone(secrets)
	maps.DeleteFunc(hidden, func(where, _ string) bool {
		return where == "target's answer" || strings.HasSuffix(where, "query string")
	})
	secretsDir := t.TempDir()
	if err := os.WriteFile(filepath.Join(secretsDir, "billing"), []byte(secrets["secret in a file"]), 0o600); err != nil {
		t.Fatal(err)
	}

	release := make(chan struct{})
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		w.Header().Set("Set-Cookie", "session="+secrets["target's cookie"])
		switch {
		case strings.HasPrefix(r.URL.Path, "/302"):
			w.Header().Set("Location", "https://elsewhere.example/next?token="+secrets["redirect's query string"])
			w.WriteHeader(http.StatusFound)
		case strings.HasPrefix(r.URL.Path, "/cut"):
			panic(http.ErrAbortHandler)
		case strings.HasPrefix(r.URL.Path, "/slow"):
			select {
			case <-release:
			case <-r.Context().Done():
			}
		case strings.HasPrefix(r.URL.Path, "/503"):
			w.WriteHeader(http.StatusServiceUnavailable)
		case strings.HasPrefix(r.URL.Path, "/echo"):
			_ = r.Header.Write(w)
		}
		_, _ = io.WriteString(w, secrets["target's answer"])
	})
	t.Cleanup(func() { close(release) }) // before the target closes

	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	order := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			t.Fatal(err)
		}
	}
	// Every statement, as docs/security.md says.
	order(`ALTER SYSTEM SET log_min_duration_statement = 0`)
	order(`ALTER SYSTEM SET log_parameter_max_length = 0`)
	order(`SELECT pg_reload_conf()`)

	p := start(t, "serve", "DATABASE_URL="+database, "AUTH=api_key,oidc,jwt", "API_KEYS="+entry+","+weakEntry,
		"AUTH_SECRET="+platformSecret, "AUTH_ROLES=admin:submit+read+manage+internal", "JWT_TARGET_HOSTS=127.0.0.1",
		"GCE_METADATA_HOST="+newMetadata(t), "OIDC_TARGET_HOSTS=127.0.0.1", "SIGNING_SECRETS=whsec_"+signing,
		"SECRETS_DIR="+secretsDir, "SECRET_HOSTS=billing=127.0.0.1",
		"OIDC_ISSUER="+issuer.URL, "OIDC_AUDIENCE=x", "OIDC_ALLOW=plays@x.example:submit+read+manage+internal", "LOG_LEVEL=debug")
	authorized := func(credential string) http.Header {
		return http.Header{
			"Authorization": {"Bearer " + credential}, "Cookie": {"session=" + secrets["request's cookie"]}, "X-Request-Secret": {secrets["request's header"]},
			"Traceparent": {secrets["request's header"]},
		}
	}
	seen := map[int]bool{}
	look := func(method, path, body string, header http.Header) answer {
		t.Helper()
		send := func(path string, header http.Header) answer {
			t.Helper()
			a := p.send(method, path, body, header)
			seen[a.status] = true
			for _, leak := range append(secrets.in(shown.ReplaceAllString(a.raw, "")+fmt.Sprint(a.header)), hidden.in(a.raw)...) {
				t.Errorf("%s %s is answered %d with the %s", method, path, a.status, leak)
			}
			return a
		}
		// What is refused leaks no more than what is taken.
		if path == "/enqueue" {
			wrong := header.Clone()
			wrong["Orchestrator-Task-Id"] = []string{secrets["request's header"]}
			send(path, wrong)
		}
		if !strings.Contains(path, "?") {
			send(path+"?access_token="+secrets["request's query string"], header)
		}
		return send(path, header)
	}
	get := func(path string) answer { t.Helper(); return look(http.MethodGet, path, "", authorized(key)) }
	post := func(path, body string) answer { t.Helper(); return look(http.MethodPost, path, body, authorized(key)) }
	spec := func(path, more string) string {
		return `{"url":"` + target.url + path + `?signature=` + secrets["task's query string"] + `","headers":{"Authorization":"Bearer ` + secrets["task's secret header"] +
			`","X-Access-Token":"` + secrets["task's secret header"] + `","X-Billing":"a ${secret:billing}"},"payload":{"card":"` + secrets["payload"] + `"}` + more + `}`
	}

	// Every way that a call can go, stored and in the request.
	const once = `,"timeout_seconds":0.2,"retry":{"max_attempts":2,"min_backoff_seconds":0.01}`
	var tasks []string
	for _, path := range []string{"/200", "/503", "/302", "/cut", "/slow", "/echo"} {
		tasks = append(tasks, post("/enqueue", spec(path, once)).task.ID)
		post("/worker-endpoint", spec(path, `,"timeout_seconds":0.2`))
	}
	for _, host := range []string{"127.0.0.1:1", "nowhere.invalid", "localhost:1"} {
		tasks = append(tasks, post("/enqueue", `{"url":"http://`+host+`/?signature=`+secrets["task's query string"]+`","body":"`+secrets["body"]+`"`+once+`}`).task.ID)
		post("/worker-endpoint", `{"url":"https://`+host+`/?signature=`+secrets["task's query string"]+`","body":"`+secrets["body"]+`","timeout_seconds":0.2}`)
	}
	tasks = append(tasks, post("/schedule", spec("/200", `,"delay_seconds":0`)).task.ID,
		post("/enqueue", `{"url":"`+target.url+`/echo","auth":{"type":"oidc"},"retry":{"min_backoff_seconds":0.01}}`).task.ID,
		post("/enqueue", `{"url":"`+target.url+`/echo","auth":{"type":"jwt"}}`).task.ID)
	post("/worker-endpoint", `{"url":"`+target.url+`/echo","auth":{"type":"jwt"}}`)
	callback := `{"url":"` + target.url + `/503?signature=` + secrets["task's query string"] + `","headers":{"Authorization":"Bearer ` + secrets["task's secret header"] + `"}}`
	tasks = append(tasks, post("/enqueue", spec("/200", `,"on_success":`+callback)).task.ID, post("/enqueue", spec("/302", `,"on_failure":`+callback)).task.ID)
	for _, id := range tasks {
		if id == "" {
			t.Fatal("a task was not taken")
		}
		eventually(t, func() bool { return ended(look(http.MethodGet, "/tasks/"+id, "", authorized(key)).task) }, func() string { return "a task does not end" })
	}
	look(http.MethodGet, "/tasks/"+tasks[0], "", authorized(secrets["token"]))
	look(http.MethodGet, "/tasks/"+tasks[0], "", authorized(platformToken(t, platformClaims("user-1", "admin"))))
	look(http.MethodGet, "/tasks/"+tasks[0], "", authorized(platformToken(t, platformClaims(secrets["wrong value"]+" ", "admin"))))
	post("/worker-endpoint", `{"task_id":"`+tasks[0]+`"}`)

	// Everything that is there to find and manage them.
	findAndSteer := func() {
		t.Helper()
		for _, id := range tasks {
			get("/tasks/" + id + "/explain")
		}
		wrong, late := secrets["request's query string"], tasks[len(tasks)-1]
		for _, path := range []string{
			"/tasks?limit=200", "/tasks", "/tasks/counts", "/tasks?url=" + url.QueryEscape(target.url+"/503?signature="+secrets["task's query string"]),
			"/tasks?created_by=" + wrong, "/tasks?created_by=%00" + wrong, "/tasks?host=" + wrong, "/tasks?host=/" + wrong, "/tasks?label.a=" + wrong, "/tasks?label.a=%00" + wrong,
			"/tasks?cursor=" + wrong, "/tasks?state=" + wrong, "/tasks?reason=" + wrong, "/tasks?created_after=" + wrong, "/tasks?min_attempts=" + wrong, "/tasks?limit=" + wrong,
			"/tasks?%zz=" + wrong, "/tasks?url=a&url=" + wrong, "/tasks/" + late + "?wait_seconds=" + wrong,
		} {
			get(path)
		}
		change := func(body string, ifMatch ...string) {
			t.Helper()
			header := authorized(key)
			header["If-Match"] = ifMatch
			look(http.MethodPatch, "/tasks/"+late, body, header)
		}
		wrong = secrets["wrong value"]
		for _, body := range []string{
			`{"headers":{"Authorization":"Bearer ` + secrets["task's secret header"] + `"},"payload":"` + secrets["payload"] + `"}`, `{"body":"` + secrets["body"] + `"}`,
			`{"url":"http://` + wrong + `"}`, `{"headers":{"Host":"` + wrong + `"}}`, `{"headers":{"X-A":"${secret:` + wrong + `}"}}`, `{"headers":{"X-A":"` + wrong + `\u0000"}}`,
			`{"run_at":"` + wrong + `"}`, `{"run_at":"2030-01-01T00:00:00","time_zone":"` + wrong + `"}`, `{"timeout_seconds":"` + wrong + `"}`, `{"expires_at":"` + wrong + `"}`,
			`{"retry":{"max_attempts":"` + wrong + `"}}`, `{"labels":{"a":"\u0000` + wrong + `"}}`, `{"payload":1,"body":"` + wrong + `"}`, `{"` + secrets["malformed body"],
		} {
			change(body)
		}
		change(`{}`, `"`+secrets["request's header"]+`"`)
		for _, act := range []string{"/run", "/cancel", "/cancel", "/redrive", "/redrive", "/nothing"} {
			post("/tasks/"+late+act, "")
		}
		for _, path := range []string{"/tasks/cancel", "/tasks/redrive"} {
			for _, body := range []string{
				`{"filter":{"url":"` + target.url + `/503?signature=` + secrets["task's query string"] + `"},"dry_run":false}`, `{"filter":{"created_by":"` + wrong + `"}}`,
				`{"filter":{"host":"` + wrong + `/"}}`, `{"filter":{"state":["` + wrong + `"]}}`, `{"filter":{"labels":{"a":["` + wrong + `"]}}}`, `{"filter":{"created_after":"` + wrong + `"}}`,
				`{"filter":{"min_attempts":1},"dry_run":"` + wrong + `"}`, `{"filter":"` + wrong + `"}`, `{"` + secrets["malformed body"],
			} {
				post(path, body)
			}
		}
	}
	tasks = append(tasks, post("/schedule", spec("/200", `,"delay_seconds":3600`)).task.ID)
	findAndSteer()

	// Every way that a request can be wrong.
	for _, path := range []string{"/enqueue", "/schedule", "/tasks/batch", "/worker-endpoint"} {
		for _, body := range []string{
			``, `{"` + secrets["malformed body"], `"` + secrets["malformed body"] + `"`, `[1,"` + secrets["malformed body"] + `"]`, "{\"url\":\"" + secrets["malformed body"] + "\xff\"}",
			`{"url":"http://` + secrets["wrong value"] + `:x/"}`, `{"url":"http://10.0.0.1/` + secrets["wrong value"] + `"}`, `{"url":"http://u:` + secrets["wrong value"] + `@x.example/"}`,
			spec("/200", `,"method":"`+secrets["wrong value"]+`"`), spec("/200", `,"timeout_seconds":"`+secrets["wrong value"]+`"`), spec("/200", `,"run_at":"`+secrets["wrong value"]+`"`),
			spec("/200", `,"retry":{"max_attempts":"`+secrets["wrong value"]+`"}`), spec("/200", `,"body":"`+secrets["body"]+`"`), spec("/200", `,"expires_at":"`+secrets["wrong value"]+`"`),
			spec("/200", `,"run_at":"2030-01-01T00:00:00","time_zone":"`+secrets["wrong value"]+`"`), spec("/200", `,"labels":{"a":["`+secrets["label"]+`"]}`),
			spec("/200", `,"on_success":{"url":"`+secrets["wrong value"]+`"}`), spec("/200", `,"on_failure":{"url":"http://10.0.0.1/`+secrets["wrong value"]+`","headers":{"Host":"`+secrets["wrong value"]+`"}}`),
			`{"url":"` + target.url + `","headers":{"Host":"` + secrets["task's header"] + `","X-A":"` + secrets["task's header"] + `\u0000"}}`,
			`{"task_id":"` + secrets["wrong value"] + `"}`, `{"task_id":"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b","x":"` + secrets["wrong value"] + `"}`,
			`{"body":"` + secrets["large body"] + strings.Repeat("x", 1<<20) + `"}`,
		} {
			if path == "/tasks/batch" {
				post(path, `{"tasks":[`+spec("/200", "")+`,`+body+`]}`)
			}
			post(path, body)
			look(http.MethodPost, path, body, http.Header{"Content-Type": {"text/" + secrets["request's header"]}, "Authorization": {"Bearer " + key}})
		}
		for _, credential := range []string{weak, secrets["wrong key"], "ork_" + secrets["wrong key"], secrets["expired token"], secrets["token"] + "x", issuer.Token(issuer.Claims(secrets["unknown account"], "x"))} {
			look(http.MethodPost, path, spec("/200", ""), authorized(credential))
		}
		look(http.MethodPut, path, spec("/200", ""), authorized(key))
	}
	for _, path := range []string{"/tasks/" + secrets["request's path"], "/" + secrets["request's path"], "/docs/" + secrets["request's path"], "/tasks/%00" + secrets["request's path"]} {
		look(http.MethodGet, path, "", authorized(key))
		look(http.MethodDelete, path, "", authorized(key))
		look(strings.ToUpper(secrets["request's method"]), path, "", authorized(key))
	}
	look(http.MethodPost, "/enqueue", spec("/200", ""), http.Header{"Sec-Fetch-Site": {"cross-site"}, "Origin": {"https://" + secrets["request's header"]}})
	for _, path := range []string{"/health", "/health/live", "/openapi.json", "/openapi.yaml", "/docs/index.html"} {
		look(http.MethodGet, path, "", authorized(key))
	}
	for _, line := range []string{"GET /%s HTTP/9.9\r\n\r\n", "%s\r\n\r\n", "GET / HTTP/1.1\r\nHost: %s %s\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n"} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, strings.ReplaceAll(line, "%s", secrets["request's header"]))
		raw, _ := io.ReadAll(conn)
		_ = conn.Close()
		for _, leak := range secrets.in(string(raw)) {
			t.Errorf("a malformed request is answered with the %s", leak)
		}
	}

	// The database fails in the middle of a statement, and dies.
	order(`CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the trigger refuses'; END $$;
		CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION refuse()`)
	post("/enqueue", spec("/200", ""))
	post("/schedule", spec("/200", `,"delay_seconds":60`))
	findAndSteer()
	post("/tasks/batch", `{"tasks":[`+spec("/200", "")+`]}`)
	order(`DROP TRIGGER refuse ON tasks; BEGIN; LOCK TABLE tasks`)
	var waiting sync.WaitGroup
	waiting.Go(func() { post("/schedule", spec("/200", `,"delay_seconds":60`)) })
	eventually(t, func() bool {
		order(`SELECT pg_stat_clear_snapshot()`) // a transaction has seen it once and for all
		var terminated bool
		err := conn.QueryRow(t.Context(), `SELECT coalesce(bool_or(pg_terminate_backend(pid)), false) FROM pg_stat_activity
			WHERE wait_event_type = 'Lock' AND query LIKE '%INSERT INTO tasks%'`).Scan(&terminated)
		return err == nil && terminated
	}, func() string { return "no statement waits for the lock" })
	order(`ROLLBACK`)
	waiting.Wait()
	order(`ALTER TABLE tasks RENAME TO hidden`)
	post("/enqueue", spec("/200", ""))
	get("/tasks/" + tasks[0])
	findAndSteer()
	order(`ALTER TABLE hidden RENAME TO tasks`)

	for _, status := range []int{200, 202, 400, 401, 403, 404, 405, 409, 412, 413, 415, 422, 500, 502, 504} {
		if !seen[status] {
			t.Errorf("no request was answered %d, so that nothing is known about it", status)
		}
	}
	p.stop(syscall.SIGTERM)
	log := strings.Join(p.lines(), "\n")
	for _, want := range []string{"task failed", "attempt failed, will retry", "request failed", "the trigger refuses", "task changed", "tasks redriven"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log does not say %q, so that nothing is known about it", want)
		}
	}
	for _, leak := range secrets.in(log) {
		t.Errorf("the log has the %s", leak)
	}
	files, err := filepath.Glob(filepath.Join(dir, "pg*", "log"))
	if err != nil || len(files) != 1 {
		t.Fatalf("PostgreSQL has the logs %q (%v), want one", files, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"the trigger refuses", "terminating connection", "INSERT INTO tasks", "-- name: find", "duration: "} {
		if !strings.Contains(string(b), want) {
			t.Errorf("PostgreSQL's log does not say %q, so that nothing is known about it:\n%s", want, b)
		}
	}
	for _, leak := range secrets.in(string(b)) {
		t.Errorf("PostgreSQL's log has the %s", leak)
	}
}

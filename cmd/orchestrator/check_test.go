package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

func TestCheck(t *testing.T) {
	t.Setenv("AUTH", "none")
	t.Setenv("PORT", "0")
	t.Setenv("TARGET_ALOW_HOSTS", "hunter2")
	migrated, empty := pgtest.URL(t), pgtest.EmptyURL(t)
	for name, tt := range map[string]struct {
		env  map[string]string
		code int
		want string // regular expression for all of stdout
	}{
		"fine":            {map[string]string{"DATABASE_URL": migrated}, 0, `^warn .*TARGET_ALLOW_HOSTS\?\nok +settings .*\nok +database +PostgreSQL .*\n(warn +database +synchronous_commit.*\n)?ok +rights .*\nok +schema +version \d+ .*nothing to migrate\n$`},
		"empty":           {map[string]string{"DATABASE_URL": empty}, 0, `ok +schema +version 0 .*the next start does\n$`},
		"not migrated":    {map[string]string{"DATABASE_URL": empty, "MIGRATE_ON_START": "false"}, 1, `FAIL +schema .*orchestrator migrate"\n$`},
		"no database":     {map[string]string{"DATABASE_URL": "postgres://u:hunter2@127.0.0.1:1/x"}, 1, `ok +settings .*\nFAIL +database .*connection refused[^\n]*\n$`},
		"wrong settings":  {map[string]string{"DATABASE_URL": migrated, "PORT": "x", "AUTH": ""}, 1, `FAIL +settings +PORT must be a whole number[^\n]*\n$`},
		"no database URL": {map[string]string{"DATABASE_URL": "", "AUTH": "", "TARGET_ALLOW_HOSTS": "http://x"}, 1, `FAIL +settings +DATABASE_URL is not set[^\n]*\nFAIL +settings +TARGET_ALLOW_HOSTS: [^\n]*\nFAIL +settings +AUTH is not set[^\n]*\n$`},
		"no caller":       {map[string]string{"DATABASE_URL": migrated, "AUTH": ""}, 1, `FAIL +settings +AUTH is not set.*\nok +database`},
	} {
		t.Run(name, func(t *testing.T) {
			for key, value := range tt.env {
				t.Setenv(key, value)
			}
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), []string{"check"}, &stdout, &stderr); code != tt.code || !regexp.MustCompile(tt.want).MatchString(stdout.String()) {
				t.Errorf("check: %d\n%s%s\nwant %d and %s", code, stdout.String(), stderr.String(), tt.code, tt.want)
			}
			if strings.Contains(stdout.String()+stderr.String(), "hunter2") {
				t.Errorf("a secret is shown: %s%s", stdout.String(), stderr.String())
			}
		})
	}
}

package config_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/config"
)

func TestMisspelt(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		environ []string
		want    map[string]string
	}{
		"a letter missing":        {[]string{"TARGET_ALOW_HOSTS=hunter2"}, map[string]string{"TARGET_ALOW_HOSTS": "TARGET_ALLOW_HOSTS"}},
		"two letters swapped":     {[]string{"RETENITON=1h"}, map[string]string{"RETENITON": "RETENTION"}},
		"words in another order":  {[]string{"ALLOW_TARGET_HOSTS=x"}, map[string]string{"ALLOW_TARGET_HOSTS": "TARGET_ALLOW_HOSTS"}},
		"no underscores":          {[]string{"DATABASEURL=x"}, map[string]string{"DATABASEURL": "DATABASE_URL"}},
		"lower case":              {[]string{"log_level=x"}, map[string]string{"log_level": "LOG_LEVEL"}},
		"one letter too many":     {[]string{"RATE_LIMITS=1"}, map[string]string{"RATE_LIMITS": "RATE_LIMIT"}},
		"the setting is set too":  {[]string{"RATE_LIMITS=1", "RATE_LIMIT=1"}, map[string]string{}},
		"settings":                {[]string{"PORT=1", "AUTH=none", "LOG_LEVEL=info", "K_SERVICE=x"}, map[string]string{}},
		"parts of DATABASE_URL":   {[]string{"DATABASE_HOST=x", "DATABASE_PORT=x", "DATABASE_NAME=x", "DATABASE_USER=x", "DATABASE_PASSWORD=x"}, map[string]string{}},
		"one of them misspelt":    {[]string{"DATABASE_HOST=x", "DATABASE_PASWORD=hunter2"}, map[string]string{"DATABASE_PASWORD": "DATABASE_PASSWORD"}},
		"an entry without a name": {[]string{"=C:=C:\\", "", "x"}, map[string]string{}},
		"what is not ours": {[]string{
			"PATH=x", "PWD=x", "HOME=x", "LANG=x", "TERM=x", "SHLVL=1", "LOG_DIR=x", "LOG_FILE=x", "PGHOST=x", "PGPORT=x", "PGUSER=x", "PGPASSWORD=x",
			"API_KEY=x", "API_URL=x", "DATABASE_URI=x", "DB_URL=x", "REDIS_URL=x",
			"DEBUG=1", "HOST=x", "HOSTNAME=x", "PORTS=x", "SUPPORT=x", "AUTHOR=x", "K_REVISION=x", "K_CONFIGURATION=x", "LOG_COLOR=x", "GOGC=1", "GOMEMLIMIT=1",
			"KUBERNETES_PORT=x", "ORCHESTRATOR_PORT=x", "ORCHESTRATOR_KEY=x", "XDG_CACHE_HOME=x", "NO_COLOR=1", "TEST_DATABASE_URL=x", "OTEL_LOG_LEVEL=x", "SECRET_KEY=x", "OIDC_CLIENT_ID=x",
		}, map[string]string{}},
	} {
		if diff := cmp.Diff(tt.want, config.Misspelt(tt.environ)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/role"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
)

// plainSession is somebody's without our settings.
func plainSession(t *testing.T, s *server, sql string) {
	t.Helper()
	config, err := blankConfig()
	if err != nil {
		t.Fatal(err)
	}
	config.User, config.Database = "postgres", "postgres"
	config.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.socket())
	}
	connection, err := pgconn.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer disconnect(connection)
	if _, err := connection.Exec(t.Context(), sql).ReadAll(); err != nil {
		t.Fatal(err)
	}
}

// heard keeps messages, and tells of each.
type heard struct {
	mutex sync.Mutex
	lines []string
	on    func(line string)
}

func (h *heard) Bytes(string, int64, int64) {}

func (h *heard) Message(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	h.mutex.Lock()
	h.lines = append(h.lines, line)
	h.mutex.Unlock()
	if h.on != nil {
		h.on(line)
	}
}

func TestReadyWaitsForTheSocketAndForTheEndOfRecovery(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	if err := os.WriteFile(s.folder+"/data/standby.signal", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Observe(t.Context(), wanted()); !errors.Is(err, ErrNotReady) {
		t.Errorf("observing what is not there: got %v", err)
	}
	// A standby that lets nobody in, until it is promoted; then it would let
	// in readers only until recovery has ended.
	progress := &heard{on: func(line string) {
		switch {
		case strings.Contains(line, "nothing answers"):
			s.run(t, "hot_standby=off")
		case strings.Contains(line, "not accepting connections"):
			promote := exec.Command(s.programs+"/pg_ctl", "promote", "-W", "-D", s.folder+"/data")
			asNobody(promote)
			if said, err := promote.CombinedOutput(); err != nil {
				t.Errorf("promote: %v: %s", err, said)
			}
		}
	}}
	if err := s.Ready(t.Context(), 30*time.Second, progress); err != nil {
		t.Fatalf("%v\n%s", err, s.log(t))
	}
	said := strings.Join(progress.lines, "\n")
	for _, want := range []string{"waiting for postgres: nothing answers on its socket yet", "not accepting connections (Hot standby mode is disabled.)"} {
		if !strings.Contains(said, want) {
			t.Errorf("%q was not said:\n%s", want, said)
		}
	}
}

func TestReadyIsBoundedAndSaysWhatItWaitedFor(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	if err := os.WriteFile(s.folder+"/data/standby.signal", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.run(t) // a hot standby answers, and never writes
	progress := &heard{}
	err := s.Ready(t.Context(), 4*time.Second, progress)
	var late *retry.TimeoutError
	if !errors.As(err, &late) || !strings.Contains(err.Error(), "in recovery") {
		t.Fatalf("got %v, heard %q", err, progress.lines)
	}
}

func TestAPeerThatIsNotInTheMapIsRefusedAtOnceWithAHint(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.write(t, "pg_ident.conf", "site somebody postgres\n")
	_ = s.Reload(t.Context()) // may see it already
	err := s.Ready(t.Context(), 20*time.Second, quietProgress{})
	if err == nil || errors.Is(err, ErrNotReady) || !strings.Contains(err.Error(), "Peer authentication failed") || !strings.Contains(plan.HintOf(err), "peer map") {
		t.Fatalf("got %v, hint %q", err, plan.HintOf(err))
	}
}

func TestConfigurationFilesThatChangedAreAChangeAndLoaded(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := role.Desired{}
	_, changes := s.diff(t, want)
	expect(t, "untouched", changes)
	s.write(t, "pg_ident.conf", "site root postgres\nsite backup backup\n")
	have, changes := s.diff(t, want)
	expect(t, "with another map", changes, "update postgres configuration pg_ident.conf (the server has not loaded the file as it is)")
	s.apply(t, want, have, changes)
	_, changes = s.diff(t, want)
	expect(t, "after the reload", changes)

	s.write(t, "pg_hba.conf", "local all all peer map=site\nhost all all nonsense scram-sha-256 and more\n")
	have, changes = s.diff(t, want)
	expect(t, "with a broken file", changes, "update postgres configuration pg_hba.conf (the server has not loaded the file as it is)")
	err := s.Apply(t.Context(), want, have, changes, quietProgress{})
	if err == nil || !strings.Contains(err.Error(), "pg_hba.conf line 2: ") {
		t.Errorf("got %v", err)
	}
}

func TestLoginSaysWhyNot(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := wanted()
	s.converge(t, want)
	s.sql(t, "stats", "REVOKE CONNECT ON DATABASE stats FROM PUBLIC; ALTER ROLE stats CONNECTION LIMIT 0")
	for _, test := range []struct {
		name, database, user, password string
		verdict                        error
	}{
		{"the right password", "shop", "shop", shopPassword, nil},
		{"another password", "shop", "shop", "wrong-" + shopPassword, ErrWrongPassword},
		{"a database that the role may not connect to", "stats", "shop", shopPassword, ErrNoAccess},
		{"a database that does not exist", "nowhere", "shop", shopPassword, ErrNoAccess},
		{"a role that does not exist looks like a wrong password", "shop", "nobody", shopPassword, ErrWrongPassword},
	} {
		err := s.Login(t.Context(), s.address(), test.database, test.user, secret.New(test.password))
		if !errors.Is(err, test.verdict) {
			t.Errorf("%s: got %v, want %v", test.name, err, test.verdict)
		}
		if err != nil && strings.Contains(err.Error(), shopPassword) {
			t.Errorf("%s: the error shows the password: %v", test.name, err)
		}
	}
	err := s.Login(t.Context(), s.address(), "shop", "stats", secret.New(statsPassword))
	if err == nil || errors.Is(err, ErrWrongPassword) || errors.Is(err, ErrNoAccess) || !strings.Contains(err.Error(), "too many connections") {
		t.Errorf("a role without connections left: got %v", err)
	}
}

func TestVariablesOfTheEnvironmentDoNotMatter(t *testing.T) {
	s := start(t)
	passfile := filepath.Join(t.TempDir(), "passfile")
	if err := os.WriteFile(passfile, []byte("*:*:*:*:from-a-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"PGHOST": "127.0.0.9", "PGPORT": "none", "PGDATABASE": "nowhere", "PGUSER": "nobody", "PGPASSWORD": "from-the-environment",
		"PGPASSFILE": passfile, "PGSERVICE": "nothing", "PGSERVICEFILE": "/nowhere", "PGSSLMODE": "wrong", "PGSSLCERTMODE": "wrong",
		"PGSSLROOTCERT": "/nowhere", "PGSSLNEGOTIATION": "wrong", "PGTARGETSESSIONATTRS": "wrong", "PGCONNECT_TIMEOUT": "wrong",
		"PGOPTIONS": "-c log_statement=all", "PGTZ": "nowhere", "PGAPPNAME": "wrong", "PGMINPROTOCOLVERSION": "9", "PGMAXPROTOCOLVERSION": "wrong",
		"PGCHANNELBINDING": "wrong", "PGREQUIREAUTH": "wrong",
	} {
		t.Setenv(name, value)
	}
	want := wanted()
	s.converge(t, want)
	if err := s.Login(t.Context(), s.address(), "shop", "shop", secret.New(shopPassword)); err != nil {
		t.Error(err)
	}
	if err := s.Login(t.Context(), s.address(), "shop", "shop", secret.Value{}); !errors.Is(err, ErrWrongPassword) {
		t.Errorf("without a password: got %v", err)
	}
}

func TestACancelledCallEndsAtOnce(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := wanted()
	have, changes := s.diff(t, want)
	blocker, err := s.connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer disconnect(blocker)
	if _, err := blocker.Exec(t.Context(), "BEGIN; LOCK TABLE pg_authid").ReadAll(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := s.Apply(ctx, want, have, changes, quietProgress{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
}

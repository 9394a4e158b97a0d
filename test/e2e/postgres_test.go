package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/nomad-site/site/internal/plan"
)

// ledger writes the numbers from 1 on into a table, each in a transaction of its
// own, and goes on wherever it was cut off. It does so as the application does,
// by TCP with its password.
type ledger struct {
	s *testSite
	// told is the last number that the server said was committed.
	told   atomic.Int64
	cancel context.CancelFunc
	writer sync.WaitGroup
}

// ledgerPause is between attempts to connect.
const ledgerPause = 50 * time.Millisecond

func (s *testSite) startLedger() *ledger {
	s.t.Helper()
	config, err := pgconn.ParseConfig("host=127.0.0.1 user=hello_a database=hello sslmode=disable connect_timeout=5")
	if err != nil {
		s.t.Fatal(err)
	}
	config.Password = s.must("secrets", "get", ownPassword, "--reveal").stdout
	tunnel := s.dialHost(s.labKey().signer)
	config.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		return tunnel.DialContext(ctx, network, address)
	}
	l := &ledger{s: s}
	var ctx context.Context
	ctx, l.cancel = context.WithCancel(s.t.Context())
	l.told.Store(int64(s.ledgerRows()))
	l.writer.Go(func() { l.write(ctx, config) })
	s.t.Cleanup(l.stop)
	return l
}

// ledgerRows makes the table and counts its rows; none may be missing in between.
func (s *testSite) ledgerRows() int {
	s.t.Helper()
	out := s.psql("hello", `SET client_min_messages = warning; CREATE TABLE IF NOT EXISTS ledger (n bigint PRIMARY KEY, page text);
		ALTER TABLE ledger OWNER TO hello; SELECT count(*) || ' ' || coalesce(max(n), 0) FROM ledger`)
	var rows, last int
	if _, err := fmt.Sscan(out[strings.LastIndex(out, "\n")+1:], &rows, &last); err != nil {
		s.t.Fatalf("the ledger says %q: %v", out, err)
	}
	if rows != last {
		s.t.Errorf("the ledger has %d rows, and the last is %d", rows, last)
	}
	return last
}

func (l *ledger) write(ctx context.Context, config *pgconn.Config) {
	var connection *pgconn.PgConn
	drop := func() {
		if connection != nil {
			closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			_ = connection.Close(closing)
			cancel()
		}
		connection = nil
	}
	defer drop()
	for ctx.Err() == nil {
		var err error
		if connection == nil {
			connection, err = pgconn.ConnectConfig(ctx, config)
		}
		if err == nil {
			// It may be there: committed, and the answer was cut off.
			insert := fmt.Sprintf("INSERT INTO ledger VALUES (%d, repeat('%032d', 32)) ON CONFLICT DO NOTHING", l.told.Load()+1, l.told.Load())
			_, err = connection.Exec(ctx, insert).ReadAll()
		}
		if err == nil {
			l.told.Add(1)
			continue
		}
		drop()
		select {
		case <-ctx.Done():
		case <-time.After(ledgerPause):
		}
	}
}

func (l *ledger) stop() {
	l.cancel()
	l.writer.Wait()
}

// grows waits until so many more numbers are committed.
func (l *ledger) grows(by int64, within time.Duration) {
	l.s.t.Helper()
	target := l.told.Load() + by
	l.s.until(fmt.Sprintf("%d numbers to be written", by), within, func() error {
		if told := l.told.Load(); told < target {
			return fmt.Errorf("%d of %d are", by-(target-told), by)
		}
		return nil
	})
}

// isWhole ends the writing and insists that all is there that was said to be.
func (l *ledger) isWhole() {
	l.s.t.Helper()
	l.stop()
	told := int(l.told.Load())
	if rows := l.s.ledgerRows(); rows < told || rows > told+1 {
		l.s.t.Errorf("%d numbers were committed, %d are there", told, rows)
	}
	l.s.t.Logf("%d numbers were committed, and are there", told)
}

// serverProcess is the first process of the database's container.
func (s *testSite) serverProcess() string {
	s.t.Helper()
	return strings.TrimSpace(s.host.exec("podman", "inspect", "--format", "{{.State.Pid}}", s.containerOf("postgresql")))
}

func TestPostgresLosesNothingAndKeepsItsPlace(t *testing.T) {
	s := newSite(t, platform)
	place := s.allocations("postgresql")
	if len(place) != 1 {
		t.Fatalf("Postgres has the allocations %v, not one", place)
	}
	kept := func(s *testSite) {
		s.t.Helper()
		if now := s.allocations("postgresql"); !slices.Equal(now, place) {
			s.t.Errorf("Postgres has the allocations %v, before it was %v", now, place)
		}
	}
	for title, leave := range map[string]string{
		"it is killed while it writes":                                      "true",
		"it is killed and its lock file is left empty as after a power cut": ": > /var/lib/postgresql/data/postmaster.pid",
		"it is killed and its lock file names another process":              "sed -i 1s/.*/4711/ /var/lib/postgresql/data/postmaster.pid",
	} {
		t.Run(title, func(t *testing.T) {
			s := s.in(t)
			numbers := s.startLedger()
			numbers.grows(50, time.Minute)
			s.host.shell(fmt.Sprintf(`kill -9 %[1]s; while kill -0 %[1]s 2>/dev/null; do :; done
				test -s /var/lib/postgresql/data/postmaster.pid; %[2]s`, s.serverProcess(), leave))
			begun := time.Now()
			numbers.grows(50, 2*time.Minute)
			t.Logf("it took writes again after %s", time.Since(begun).Round(100*time.Millisecond))
			numbers.isWhole()
			kept(s)
		})
	}
	t.Run("its recovery takes minutes", func(t *testing.T) {
		s := s.in(t)
		s.slowRecovery(func() { kept(s) })
	})
	t.Run("its task is started again", func(t *testing.T) {
		s := s.in(t)
		numbers := s.startLedger()
		numbers.grows(50, time.Minute)
		before := s.containerOf("postgresql") + s.serverProcess()
		token, err := s.managementToken()
		if err != nil {
			t.Fatal(err)
		}
		s.host.exec("env", "NOMAD_TOKEN="+token, "/opt/site/bin/nomad", "alloc", "restart", place[0])
		numbers.grows(50, 2*time.Minute)
		numbers.isWhole()
		kept(s)
		if after := s.containerOf("postgresql") + s.serverProcess(); after == before {
			t.Error("it was not started again: this proves nothing")
		}
	})
	s.waitHealthy("hello")
	s.countsRows()
	s.planIs()
}

// catchRecovery kills the server and stops the process that recovers its data,
// as soon as that is there.
const catchRecovery = `kill -9 %s
	while [ $SECONDS -lt 50 ]; do
		for each in /proc/[0-9]*/cmdline; do
			IFS= read -r -d '' title < "$each" || true
			if [[ $title == "postgres: startup"* ]]; then
				id=${each#/proc/}; kill -STOP "${id%%/cmdline}"; echo "${id%%/cmdline}"; exit 0
			fi
		done 2>/dev/null
	done
	exit 1`

func (s *testSite) slowRecovery(kept func()) {
	hold := 30 * time.Second
	if os.Getenv(fullVariable) == "1" {
		hold = 2 * time.Minute
	}
	numbers := s.startLedger()
	// So much is to be done again that there is time to catch it.
	s.psql("hello", "CHECKPOINT")
	s.psql("hello", "CREATE TABLE ballast AS SELECT n, repeat(md5(n::text), 8) AS page FROM generate_series(1, 200000) AS n")
	numbers.grows(50, time.Minute)
	startup := strings.TrimSpace(s.host.shell(fmt.Sprintf(catchRecovery, s.serverProcess())))
	begun, container := time.Now(), s.containerOf("postgresql")+s.serverProcess()
	var deploying sync.WaitGroup
	defer deploying.Wait()
	released := false
	release := func() {
		if !released {
			released = true
			s.host.exec("kill", "-CONT", startup)
		}
	}
	defer release() // nobody else may have to wait for it
	said := make(chan string, 100)
	finished := make(chan result, 1)
	deploying.Go(func() {
		finished <- s.runWatched(func(_ *os.Process, event plan.Event) {
			if event.Type == plan.StepProgress && strings.Contains(event.Message, "waiting for postgres") {
				said <- event.Message
			}
		}, "deploy")
	})
	told := numbers.told.Load()
	if _, err := s.tryPsql("postgres", "SELECT 1"); err == nil {
		s.t.Error("the server takes connections: its recovery was not caught")
	}
	s.until("the deploy to say what it waits for", hold, func() error {
		select {
		case message := <-said:
			if !strings.Contains(message, "starting up") && !strings.Contains(message, "recovery") {
				return fmt.Errorf("it says %q", message)
			}
			s.t.Logf("the deploy says: %s", message)
			return nil
		default:
			return errors.New("it says nothing")
		}
	})
	ticker := time.NewTicker(2 * time.Second)
	defer ticker.Stop()
	for time.Since(begun) < hold {
		<-ticker.C
		kept()
		if now := s.containerOf("postgresql") + s.serverProcess(); now != container {
			s.t.Fatalf("the server was started again while it recovered: %s, now %s", container, now)
		}
	}
	if now := numbers.told.Load(); now != told {
		s.t.Errorf("%d numbers were written during the recovery: it was not held", now-told)
	}
	select {
	case got := <-finished:
		s.t.Errorf("the deploy ended before the recovery did: %v", got)
		finished <- got
	default:
	}
	release()
	numbers.grows(50, time.Minute)
	if got := <-finished; got.code != 0 {
		s.t.Errorf("the deploy that waited: %v", got)
	}
	numbers.isWhole()
	kept()
	if rows := s.psql("hello", "SELECT count(*) FROM ballast"); rows != "200000" {
		s.t.Errorf("%s rows of 200000 are left", rows)
	}
	s.waitHealthy("postgresql")
}

package postgres

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/testneeds"
)

// nobody runs the servers: Postgres refuses root.
const nobody = 65534

// template is the folder of a cluster that initdb made once, and that each
// server starts with a copy of.
var template = struct {
	once   sync.Once
	folder string
	err    error
}{}

func TestMain(m *testing.M) {
	code := m.Run()
	if template.folder != "" {
		_ = os.RemoveAll(template.folder)
	}
	os.Exit(code)
}

// server is a Postgres of its own, with the peer map of production.
type server struct {
	programs, folder string
	port             int
	process          *exec.Cmd
	*Client
}

type quietProgress struct{}

func (quietProgress) Message(string, ...any)     {}
func (quietProgress) Bytes(string, int64, int64) {}

// newServer makes a cluster and does not start it.
func newServer(t testing.TB) *server {
	t.Helper()
	testneeds.Root(t)
	programs := filepath.Dir(testneeds.Program(t, installed()))
	template.once.Do(func() { template.folder, template.err = initCluster(programs) })
	if template.err != nil {
		t.Fatal(template.err)
	}
	folder := openFolder(t)
	if said, err := exec.CommandContext(t.Context(), "cp", "-a", template.folder+"/data", folder).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	s := &server{programs: programs, folder: folder, port: freePort(t)}
	s.write(t, "pg_hba.conf", "local all all peer map=site\nhost all all 127.0.0.1/32 scram-sha-256\n")
	s.write(t, "pg_ident.conf", "site root postgres\n")
	// The host's files are older than the server.
	for _, name := range []string{"pg_hba.conf", "pg_ident.conf"} {
		earlier := time.Now().Add(-time.Minute)
		if err := os.Chtimes(filepath.Join(s.folder, name), earlier, earlier); err != nil {
			t.Fatal(err)
		}
	}
	s.Client = New(Options{Socket: s.socket()})
	return s
}

// start starts it and waits for it.
func start(t testing.TB, settings ...string) *server {
	t.Helper()
	s := newServer(t)
	s.run(t, settings...)
	if err := s.Ready(t.Context(), 20*time.Second, quietProgress{}); err != nil {
		t.Fatalf("%v\n%s", err, s.log(t))
	}
	return s
}

func (s *server) run(t testing.TB, settings ...string) {
	t.Helper()
	log, err := os.OpenFile(s.folder+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	arguments := []string{
		"-D", s.folder + "/data", "-k", s.folder, "-p", fmt.Sprint(s.port),
		"-c", "hba_file=" + s.folder + "/pg_hba.conf", "-c", "ident_file=" + s.folder + "/pg_ident.conf",
		"-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "shared_buffers=16MB",
	}
	for _, setting := range settings {
		arguments = append(arguments, "-c", setting)
	}
	s.process = exec.Command(s.programs+"/postgres", arguments...)
	s.process.Stdout, s.process.Stderr = log, log
	asNobody(s.process)
	if err := s.process.Start(); err != nil {
		t.Fatal(err)
	}
	process := s.process
	t.Cleanup(func() {
		_ = process.Process.Signal(syscall.SIGQUIT) // at once
		_ = process.Wait()
	})
}

func (s *server) socket() string  { return fmt.Sprintf("%s/.s.PGSQL.%d", s.folder, s.port) }
func (s *server) address() string { return fmt.Sprintf("127.0.0.1:%d", s.port) }

func (s *server) log(t testing.TB) string {
	t.Helper()
	content, err := os.ReadFile(s.folder + "/log")
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func (s *server) write(t testing.TB, name, content string) {
	t.Helper()
	path := filepath.Join(s.folder, name)
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// sql runs statements by hand, and gives the rows of the last, a line each.
func (s *server) sql(t testing.TB, database, statements string) string {
	t.Helper()
	connection, err := s.connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer disconnect(connection)
	results, err := connection.Exec(t.Context(), statements).ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", statements, err)
	}
	var lines []string
	for _, row := range results[len(results)-1].Rows {
		var cells []string
		for _, cell := range row {
			cells = append(cells, string(cell))
		}
		lines = append(lines, strings.Join(cells, " | "))
	}
	return strings.Join(lines, "\n")
}

// installed is Debian's newest, which is not in the search path.
func installed() string {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if len(found) == 0 {
		return "postgres"
	}
	return found[len(found)-1]
}

func initCluster(programs string) (string, error) {
	folder, err := os.MkdirTemp("/tmp", "site-pg-")
	if err != nil {
		return "", err
	}
	if err := os.Chown(folder, nobody, nobody); err != nil {
		return folder, err
	}
	command := exec.Command(programs+"/initdb", "-D", folder+"/data", "-U", "postgres", "-N", "--no-locale", "-E", "UTF8", "-A", "peer")
	asNobody(command)
	if said, err := command.CombinedOutput(); err != nil {
		return folder, fmt.Errorf("initdb: %w: %s", err, said)
	}
	return folder, nil
}

func asNobody(command *exec.Cmd) {
	command.Dir = "/"
	command.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC"}
	command.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, Pdeathsig: syscall.SIGQUIT,
	}
}

// openFolder is one that others may enter, with a path short enough for sockets.
func openFolder(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "site-pg-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	if err := os.Chown(folder, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	return folder
}

func freePort(t testing.TB) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	return listener.Addr().(*net.TCPAddr).Port
}

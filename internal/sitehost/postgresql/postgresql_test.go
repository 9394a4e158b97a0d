package postgresql

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/testneeds"
)

const (
	programs = "/usr/lib/postgresql/15/bin"
	nobody   = 65534
	// asServer makes the test's executable what site-host is in the container:
	// it becomes the server.
	asServer = "SITE_TEST_BECOME_POSTGRES"
)

func TestMain(m *testing.M) {
	if os.Getenv(asServer) == "" {
		os.Exit(m.Run())
	}
	becomeServer()
	os.Exit(1)
}

func becomeServer() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	cluster := Cluster{
		Data: os.Args[1], Programs: os.Args[2], Sockets: os.Args[3], StoppedFile: os.Args[4],
		Superuser: "postgres", Output: os.Stdout, Errors: os.Stderr,
	}
	err := cluster.Run(ctx, os.Args[5:])
	fmt.Fprintf(os.Stderr, "error: %v\nhint: %s\n", err, plan.HintOf(err))
}

// machine is a folder of a user without rights, with the executable in it.
type machine struct {
	t        *testing.T
	folder   string
	cluster  Cluster
	programs string
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	testneeds.Root(t)
	testneeds.Program(t, programs+"/postgres")
	folder, err := os.MkdirTemp("", "postgresql-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, folder: folder, programs: programs, cluster: Cluster{
		Data: filepath.Join(folder, "var", "data"), Sockets: filepath.Join(folder, "run"), Superuser: "postgres", Errors: io.Discard,
	}}
	m.must(os.Chmod(folder, 0o755))
	m.must(os.WriteFile(m.path("site-host"), content, 0o755))
	m.must(os.WriteFile(m.path("hba"), []byte("local all all trust\n"), 0o644))
	for _, each := range []string{"var", "run"} {
		m.must(os.Mkdir(m.path(each), 0o755))
		m.must(os.Chown(m.path(each), nobody, nobody))
	}
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.folder, name) }

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// own makes a file of the user's.
func (m *machine) own(path, content string) {
	m.t.Helper()
	m.must(os.WriteFile(path, []byte(content), 0o600))
	m.must(os.Chown(path, nobody, nobody))
}

// running is the first process of a container.
type running struct {
	*exec.Cmd
	m     *machine
	said  *lockedBuffer
	ended chan error
}

type lockedBuffer struct {
	mutex  sync.Mutex
	buffer bytes.Buffer
}

func (l *lockedBuffer) Write(data []byte) (int, error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.buffer.Write(data)
}

func (l *lockedBuffer) String() string {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.buffer.String()
}

// start runs it; within is a program before it, such as one that makes namespaces.
func (m *machine) start(within ...string) *running {
	m.t.Helper()
	arguments := append(slices.Clone(within), m.path("site-host"), m.cluster.Data, m.programs, m.cluster.Sockets, m.path("stopped"),
		"-c", "listen_addresses=", "-c", "unix_socket_directories="+m.cluster.Sockets, "-c", "hba_file="+m.path("hba"))
	r := &running{Cmd: exec.Command(arguments[0], arguments[1:]...), m: m, said: &lockedBuffer{}, ended: make(chan error, 1)}
	r.Env = append(os.Environ(), asServer+"=1")
	r.Dir = "/"
	r.Stdout, r.Stderr = r.said, r.said
	r.WaitDelay = 10 * time.Second
	r.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if len(within) == 0 {
		r.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	m.must(r.Start())
	go func() { r.ended <- r.Wait() }()
	m.t.Cleanup(func() { _ = syscall.Kill(-r.Process.Pid, syscall.SIGKILL) })
	return r
}

func (r *running) query(statement string) (string, error) {
	command := exec.Command(programs+"/psql", "-h", r.m.cluster.Sockets, "-U", "postgres", "-XAtc", statement)
	output, err := command.CombinedOutput()
	return strings.TrimSpace(string(output)), err
}

// ready waits until it answers.
func (r *running) ready() *running {
	r.m.t.Helper()
	err := retry.Until(r.m.t.Context(), "the server", time.Minute, func(context.Context) error {
		select {
		case err := <-r.ended:
			r.ended <- err
			return retry.Permanent(fmt.Errorf("it ended: %w", err))
		default:
		}
		if output, err := r.query("select 1"); err != nil {
			return errors.New(output)
		}
		return nil
	})
	if err != nil {
		r.m.t.Fatalf("%v: %s", err, r.said)
	}
	return r
}

// end sends a signal and waits.
func (r *running) end(signal syscall.Signal) error {
	r.m.t.Helper()
	if signal != 0 {
		r.m.must(r.Process.Signal(signal))
	}
	select {
	case err := <-r.ended:
		r.ended <- err
		return err
	case <-time.After(time.Minute):
		r.m.t.Fatalf("it does not end: %s", r.said)
		return nil
	}
}

func (r *running) mustSay(parts ...string) {
	r.m.t.Helper()
	for _, part := range parts {
		if !strings.Contains(r.said.String(), part) {
			r.m.t.Errorf("%q is not in what it said: %s", part, r.said)
		}
	}
}

func TestAClusterIsMadeOnceAndKept(t *testing.T) {
	m := newMachine(t)
	first := m.start().ready()
	for setting, want := range map[string]string{
		"server_encoding": "UTF8", "data_checksums": "on", "lc_collate": "C.UTF-8", "data_directory": m.cluster.Data,
	} {
		if got, err := first.query("show " + setting); err != nil || got != want {
			t.Errorf("%s is %q, %v", setting, got, err)
		}
	}
	if output, err := first.query("create table kept as select 42 as answer"); err != nil {
		t.Fatal(output)
	}
	// The signal reaches the server itself: a fast shutdown, with a client connected.
	client := exec.Command(programs+"/psql", "-h", m.cluster.Sockets, "-U", "postgres", "-Xc", "select pg_sleep(600)")
	m.must(client.Start())
	defer func() { _ = client.Wait() }()
	if err := first.end(syscall.SIGINT); err != nil {
		t.Errorf("stopped with %v: %s", err, first.said)
	}
	first.mustSay("received fast shutdown request", "database system is shut down")

	second := m.start().ready()
	if got, err := second.query("select answer from kept"); err != nil || got != "42" {
		t.Errorf("%q, %v", got, err)
	}
	if strings.Contains(second.said.String(), "creating") {
		t.Errorf("it was made again: %s", second.said)
	}
	hba, err := os.ReadFile(filepath.Join(m.cluster.Data, "pg_hba.conf"))
	if err != nil || !strings.Contains(string(hba), "scram-sha-256") || strings.Contains(string(hba), "trust\n") {
		t.Errorf("the cluster's own pg_hba.conf: %v %s", err, hba)
	}
}

func TestAnInterruptedAttemptIsBegunAgain(t *testing.T) {
	m := newMachine(t)
	attempt := m.cluster.Data + ".new"
	killed := m.start()
	m.must(retry.Until(t.Context(), "half a cluster", time.Minute, func(context.Context) error {
		_, err := os.Stat(filepath.Join(attempt, "base"))
		return err
	}))
	m.must(syscall.Kill(-killed.Process.Pid, syscall.SIGKILL))
	_ = killed.end(0)
	if _, err := os.Stat(m.cluster.Data); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("half a cluster is in place: %v", err)
	}
	m.start().ready()
	if _, err := os.Stat(attempt); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the attempt is still there: %v", err)
	}
}

func TestASignalEndsTheMakingOfACluster(t *testing.T) {
	m := newMachine(t)
	r := m.start()
	m.must(retry.Until(t.Context(), "half a cluster", time.Minute, func(context.Context) error {
		_, err := os.Stat(m.cluster.Data + ".new")
		return err
	}))
	if err := r.end(syscall.SIGINT); err == nil {
		t.Error("it went on")
	}
	if _, err := os.Stat(m.cluster.Data); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestAServerThatWasKilledStartsAgain(t *testing.T) {
	m := newMachine(t)
	first := m.start().ready()
	if output, err := first.query("create table kept as select 42 as answer"); err != nil {
		t.Fatal(output)
	}
	_ = first.end(syscall.SIGKILL)
	pidFile, socketFile := filepath.Join(m.cluster.Data, "postmaster.pid"), filepath.Join(m.cluster.Sockets, ".s.PGSQL.5432.lock")
	left, err := os.ReadFile(pidFile)
	m.must(err)
	_, rest, _ := strings.Cut(string(left), "\n")
	socketLeft, err := os.ReadFile(socketFile)
	m.must(err)
	_, socketRest, _ := strings.Cut(string(socketLeft), "\n")

	// Someone of the same user who is no server.
	other := exec.Command("sleep", "600")
	other.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	m.must(other.Start())
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()

	for _, test := range []struct{ name, pid, socket string }{
		{"with the files that it left", string(left), string(socketLeft)},
		{"with the id of another program", strconv.Itoa(other.Process.Pid) + "\n" + rest, strconv.Itoa(other.Process.Pid) + "\n" + socketRest},
		{"with the id of a program of root", "1\n" + rest, "1\n" + socketRest},
		{"with empty files, after a power cut", "", ""},
		{"with nonsense", "nonsense\n", "nonsense\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := *m
			m.t = t
			m.own(pidFile, test.pid)
			m.own(socketFile, test.socket)
			again := m.start().ready()
			if got, err := again.query("select answer from kept"); err != nil || got != "42" {
				t.Errorf("%q, %v", got, err)
			}
			_ = again.end(syscall.SIGINT)
		})
	}
	t.Run("as process 1 of a container, like the one before", func(t *testing.T) {
		m := *m
		m.t = t
		m.own(pidFile, "1\n"+rest)
		m.own(socketFile, "1\n"+socketRest)
		id := strconv.Itoa(nobody)
		again := m.start(testneeds.Program(t, "unshare"), "--pid", "--fork", "--mount-proc", "--kill-child", "--setgid", id, "--setuid", id).ready()
		if got, err := again.query("select answer from kept"); err != nil || got != "42" {
			t.Errorf("%q, %v", got, err)
		}
		written, err := os.ReadFile(pidFile)
		if err != nil || !strings.HasPrefix(string(written), "1\n") {
			t.Errorf("%q, %v", written, err)
		}
	})
}

func TestTwoContainersDoNotRunOnOneCluster(t *testing.T) {
	m := newMachine(t)
	id := strconv.Itoa(nobody)
	container := []string{testneeds.Program(t, "unshare"), "--pid", "--fork", "--mount-proc", "--ipc", "--kill-child", "--setgid", id, "--setuid", id}
	first := m.start(container...).ready()
	second := m.start(container...)
	m.must(retry.Until(t.Context(), "the second one to wait", time.Minute, func(context.Context) error {
		if !strings.Contains(second.said.String(), "another server still runs") {
			return errors.New(second.said.String())
		}
		return nil
	}))
	if output, err := first.query("create table kept as select 42 as answer"); err != nil {
		t.Fatal(output)
	}
	m.must(syscall.Kill(-first.Process.Pid, syscall.SIGKILL))
	_ = first.end(0)
	if got, err := second.ready().query("select answer from kept"); err != nil || got != "42" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestWhatIsNoClusterOfThisServerIsLeftAlone(t *testing.T) {
	m := newMachine(t)
	m.must(os.Mkdir(m.cluster.Data, 0o700))
	m.must(os.Chown(m.cluster.Data, nobody, nobody))
	m.own(filepath.Join(m.cluster.Data, "photo.jpg"), "a photo")
	r := m.start()
	if r.end(0) == nil {
		t.Error("it ran on a foreign folder")
	}
	r.mustSay("not empty", "photo.jpg", "hint: nothing was changed")
	if content, err := os.ReadFile(filepath.Join(m.cluster.Data, "photo.jpg")); err != nil || string(content) != "a photo" {
		t.Errorf("it became %q, %v", content, err)
	}

	m.own(filepath.Join(m.cluster.Data, "PG_VERSION"), "13\n")
	r = m.start()
	if r.end(0) == nil {
		t.Error("it ran on another version")
	}
	r.mustSay("PostgreSQL 13", "the server of 15", "hint: run an image with PostgreSQL 13")
}

func TestAnEmptyFolderIsReplaced(t *testing.T) {
	m := newMachine(t)
	m.must(os.Mkdir(m.cluster.Data, 0o700))
	m.must(os.Chown(m.cluster.Data, nobody, nobody))
	// While it is kept down, nothing is made.
	m.own(m.path("stopped"), "")
	r := m.start()
	m.must(retry.Until(t.Context(), "it to wait", time.Minute, func(context.Context) error {
		if !strings.Contains(r.said.String(), "kept down") {
			return errors.New(r.said.String())
		}
		return nil
	}))
	if entries, err := os.ReadDir(m.path("var")); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	m.must(os.Remove(m.path("stopped")))
	r.ready()
}

func TestALockFileOfARunningServerStays(t *testing.T) {
	m := newMachine(t)
	r := m.start().ready()
	m.cluster.Errors = io.Discard
	m.must(m.cluster.removeStale())
	if _, err := os.Stat(filepath.Join(m.cluster.Data, "postmaster.pid")); err != nil {
		t.Error(err)
	}
	if got, err := r.query("select 1"); err != nil {
		t.Error(got)
	}
}

package ssh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh/knownhosts"

	gossh "golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/testneeds"
)

// server is a real sshd with its own keys on a free loopback port.
type server struct {
	t       *testing.T
	dir     string
	port    int
	user    string
	process *exec.Cmd
	log     *lockedBuffer
	options []string
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

// newServer starts sshd with host keys of the given types (default ed25519)
// and a login key "id" of the operator.
func newServer(t *testing.T, hostKeys []string, options ...string) *server {
	t.Helper()
	testneeds.Program(t, "sshd")
	s := &server{t: t, dir: t.TempDir(), user: localUser(), options: options}
	if os.Geteuid() == 0 {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("HOME", filepath.Join(s.dir, "home"))
	if err := os.Mkdir(s.path("home"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSH_AUTH_SOCK", "")
	if len(hostKeys) == 0 {
		hostKeys = []string{"ed25519"}
	}
	for _, kind := range hostKeys {
		s.keygen("host_"+kind, kind)
		s.options = append(s.options, "HostKey "+s.path("host_"+kind))
	}
	s.keygen("id", "ed25519")
	s.authorize("id")
	s.port = freePort(t)
	s.start()
	return s
}

// in is the same server for a subtest.
func (s *server) in(t *testing.T) *server {
	same := *s
	same.t = t
	return &same
}

func freePort(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	return listener.Addr().(*net.TCPAddr).Port
}

func (s *server) path(name string) string { return filepath.Join(s.dir, name) }

func (s *server) keygen(name, kind string, more ...string) {
	s.t.Helper()
	args := append([]string{"-q", "-t", kind, "-N", "", "-f", s.path(name)}, more...)
	if output, err := exec.Command(testneeds.Program(s.t, "ssh-keygen"), args...).CombinedOutput(); err != nil {
		s.t.Fatalf("ssh-keygen: %v: %s", err, output)
	}
}

func (s *server) authorize(names ...string) {
	s.t.Helper()
	var content []byte
	for _, name := range names {
		content = append(content, s.read(name+".pub")...)
	}
	if err := os.WriteFile(s.path("authorized_keys"), content, 0o644); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) read(name string) string {
	s.t.Helper()
	content, err := os.ReadFile(s.path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(content)
}

func (s *server) write(name, content string) string {
	s.t.Helper()
	if err := os.MkdirAll(filepath.Dir(s.path(name)), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(s.path(name), []byte(content), 0o644); err != nil {
		s.t.Fatal(err)
	}
	return s.path(name)
}

func (s *server) start() {
	s.t.Helper()
	lines := append([]string{
		"ListenAddress 127.0.0.1", "Port " + strconv.Itoa(s.port), "PidFile none", "UsePAM no", "StrictModes no",
		"PasswordAuthentication no", "KbdInteractiveAuthentication no", "PermitRootLogin prohibit-password",
		"AuthorizedKeysFile " + s.path("authorized_keys"), "LogLevel VERBOSE",
		// A whole test suite comes from one address.
		"MaxStartups 100",
	}, s.options...)
	s.write("sshd_config", strings.Join(lines, "\n")+"\n")
	s.log = &lockedBuffer{}
	s.process = exec.Command(testneeds.Program(s.t, "sshd"), "-D", "-e", "-f", s.path("sshd_config"))
	s.process.Stderr = s.log
	// A session that a failed test left open holds stderr.
	s.process.WaitDelay = time.Second
	s.process.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	process := s.process
	s.t.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
		if s.t.Failed() {
			s.t.Logf("sshd said:\n%s", s.log)
		}
	})
	err := retry.Until(s.t.Context(), "sshd", 10*time.Second, func(context.Context) error {
		conn, err := net.Dial("tcp", s.address())
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
	if err != nil {
		s.t.Fatalf("%v: %s", err, s.log)
	}
}

func (s *server) address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

func (s *server) publicKey(name string) gossh.PublicKey {
	s.t.Helper()
	key, _, _, _, err := gossh.ParseAuthorizedKey([]byte(s.read(name + ".pub")))
	if err != nil {
		s.t.Fatal(err)
	}
	return key
}

// target pins the server's first host key and logs in with "id".
func (s *server) target() Target {
	name := "host_ed25519"
	for _, option := range s.options {
		if path, ok := strings.CutPrefix(option, "HostKey "); ok {
			name = filepath.Base(path)
			break
		}
	}
	return Target{
		Name: "alpha-1", Address: "127.0.0.1", Port: s.port, User: s.user,
		IdentityFile: s.path("id"), HostKeys: []string{s.read(name + ".pub")},
		ConfigFile: s.write("empty_config", ""),
	}
}

func (s *server) dial(target Target, options Options) *Conn {
	s.t.Helper()
	conn, err := Dial(s.t.Context(), target, options)
	if err != nil {
		s.t.Fatalf("dial: %v", err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (s *server) connect() *Conn {
	s.t.Helper()
	return s.dial(s.target(), Options{})
}

func (s *server) knownHosts(name, hostKey string) string {
	s.t.Helper()
	return s.write(name, knownhosts.Line([]string{knownhosts.Normalize(s.address())}, s.publicKey(hostKey))+"\n")
}

// proxy stands between us and the server; cut drops connections, mute keeps
// them open but silent.
type proxy struct {
	port  int
	mutex sync.Mutex
	conns []net.Conn
	muted bool
}

func (s *server) proxy() *proxy {
	s.t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	p := &proxy{port: listener.Addr().(*net.TCPAddr).Port}
	s.t.Cleanup(func() { _ = listener.Close(); p.cut() })
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", s.address())
			if err != nil {
				_ = near.Close()
				continue
			}
			p.mutex.Lock()
			p.conns = append(p.conns, near, far)
			p.mutex.Unlock()
			go p.copy(near, far)
			go p.copy(far, near)
		}
	}()
	return p
}

func (p *proxy) copy(to, from net.Conn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		p.mutex.Lock()
		muted := p.muted
		p.mutex.Unlock()
		if !muted && n > 0 {
			_, err = to.Write(buffer[:n])
		}
		if err != nil {
			_ = to.Close()
			return
		}
	}
}

func (p *proxy) cut() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for _, conn := range p.conns {
		_ = conn.Close()
	}
}

func (p *proxy) mute() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.muted = true
}

// startAgent runs a real ssh-agent that holds keys.
func (s *server) startAgent(keys ...string) string {
	s.t.Helper()
	socket := filepath.Join(s.t.TempDir(), "agent")
	agent := exec.Command(testneeds.Program(s.t, "ssh-agent"), "-D", "-a", socket)
	if err := agent.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = agent.Process.Kill(); _ = agent.Wait() })
	err := retry.Until(s.t.Context(), "ssh-agent", 10*time.Second, func(context.Context) error {
		_, err := os.Stat(socket)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, key := range keys {
		add := exec.Command(testneeds.Program(s.t, "ssh-add"), "-q", s.path(key))
		add.Env = append(os.Environ(), "SSH_AUTH_SOCK="+socket)
		if output, err := add.CombinedOutput(); err != nil {
			s.t.Fatalf("ssh-add: %v: %s", err, output)
		}
	}
	return socket
}

func within(t *testing.T, limit time.Duration, what string, action func() error) error {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- action() }()
	select {
	case err := <-ended:
		return err
	case <-time.After(limit):
		t.Fatalf("%s took longer than %s", what, limit)
		return nil
	}
}

func mustBe[E error](t *testing.T, err error) E {
	t.Helper()
	var typed E
	if !errors.As(err, &typed) {
		t.Fatalf("error is %T %v, want %T", err, err, typed)
	}
	return typed
}

func mustContain(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q lacks %q", text, part)
		}
	}
}

func count(n int) string { return fmt.Sprint(n) }

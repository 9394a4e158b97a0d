package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/plan"
)

const (
	stderrTail = 4 << 10
	// cancelGrace is how long a cancelled command may take to go.
	cancelGrace = 2 * time.Second
	// leaderMarker begins the line on stderr that tells the process group.
	leaderMarker = "site-process-group "
	// inputGrace is how long we wait for a reader that nobody reads from any more.
	inputGrace = 2 * time.Second
)

// Command is one program on the host. It gets no environment from us: sshd
// drops it and sudo too.
type Command struct {
	// Args are the program and its arguments, verbatim: we quote them.
	Args  []string
	Stdin io.Reader
	// AsLoginUser keeps a login user that is not root from becoming it by sudo.
	AsLoginUser bool
}

// Facts are what a bare host tells in one round trip.
type Facts struct {
	// Machine is `uname -m`, such as x86_64 or aarch64.
	Machine string
	UserID  int

	sudoMissing bool
	sudoRefusal string
	// sudoLimited: sudo runs site-host, and nothing else. Who only rotates
	// secrets needs no more.
	sudoLimited bool
}

// Root reports whether the login user is root.
func (f Facts) Root() bool { return f.UserID == 0 }

const factsScript = `LC_ALL=C; export LC_ALL
uname -m; id -u
if [ "$(id -u)" = 0 ]; then echo root
elif ! command -v sudo >/dev/null 2>&1; then echo missing
elif answer=$(sudo -n -- true 2>&1 </dev/null); then echo sudo
elif sudo -n -- /opt/site/bin/site-host version >/dev/null 2>&1 </dev/null; then echo limited
else echo refused "$answer"; fi`

// Facts asks the host once; later calls answer from memory.
func (c *Conn) Facts(ctx context.Context) (Facts, error) {
	c.factsMutex.Lock()
	defer c.factsMutex.Unlock()
	if c.facts != nil {
		return *c.facts, nil
	}
	output, err := c.Run(ctx, Command{Args: []string{"sh", "-c", factsScript}, AsLoginUser: true})
	if err != nil {
		return Facts{}, fmt.Errorf("look at %s: %w", c.host.name, err)
	}
	lines := strings.SplitN(string(output), "\n", 3)
	if len(lines) < 3 {
		return Facts{}, fmt.Errorf("look at %s: unexpected answer %q", c.host.name, output)
	}
	userID, err := strconv.Atoi(lines[1])
	if err != nil {
		return Facts{}, plan.WithHint(fmt.Errorf("look at %s: unexpected answer %q", c.host.name, output),
			"does a start-up file of the login shell print something?")
	}
	facts := Facts{Machine: lines[0], UserID: userID}
	verdict, detail, _ := strings.Cut(strings.TrimSpace(lines[2]), " ")
	facts.sudoMissing, facts.sudoLimited = verdict == "missing", verdict == "limited"
	if verdict == "refused" {
		facts.sudoRefusal = detail
		if detail == "" {
			facts.sudoRefusal = "no reason given"
		}
	}
	// Someone may install sudo or mend the refusal meanwhile.
	if facts.Root() || verdict == "sudo" || facts.sudoLimited {
		c.facts = &facts
	}
	return facts, nil
}

// SudoPrefix is what comes before a command to run it as root: nothing for root.
func (c *Conn) SudoPrefix(ctx context.Context) ([]string, error) {
	facts, err := c.Facts(ctx)
	if err != nil {
		return nil, err
	}
	if facts.Root() {
		return nil, nil
	}
	if facts.sudoMissing || facts.sudoRefusal != "" {
		return nil, &SudoError{Host: c.host.name, User: c.host.user, Missing: facts.sudoMissing, Output: facts.sudoRefusal}
	}
	return []string{"sudo", "-n", "--"}, nil
}

// Run runs a command as root and returns what it wrote to stdout. A code other
// than 0 is an *ExitError.
func (c *Conn) Run(ctx context.Context, command Command) ([]byte, error) {
	process, err := c.start(ctx, command)
	if err != nil {
		return nil, err
	}
	defer func() { _ = process.Close() }()
	fed := make(chan error, 1)
	go func() {
		var err error
		if command.Stdin != nil {
			_, err = io.Copy(process.stdin, command.Stdin)
		}
		_ = process.CloseWrite()
		fed <- err
	}()
	read := make(chan []byte, 1)
	go func() {
		output, _ := io.ReadAll(process.stdout)
		read <- output
	}()
	err = process.Wait()
	// The copier of stdin ends first, so that a caller may close its reader.
	var fedErr error
	select {
	case fedErr = <-fed:
	case <-time.After(inputGrace):
	}
	var exit *ExitError
	// A program may leave input unread (io.EOF); a reader of ours may not fail,
	// and where it did, the program only saw too little.
	if fedErr != nil && !errors.Is(fedErr, io.EOF) && (err == nil || errors.As(err, &exit)) {
		return nil, fmt.Errorf("feed %s on %s: %w", process.title, c.host.name, fedErr)
	}
	if err != nil {
		return nil, err
	}
	return <-read, nil
}

// Start starts a command as root whose stdin and stdout carry a protocol. When
// ctx ends, the command gets a signal and its session is closed.
func (c *Conn) Start(ctx context.Context, args []string) (*Process, error) {
	return c.start(ctx, Command{Args: args})
}

// Process is a running command; it reads from the command's stdout and writes
// to its stdin.
type Process struct {
	conn    *Conn
	ctx     context.Context
	title   string
	session *ssh.Session
	stdin   io.WriteCloser
	stdout  io.Reader
	stderr  *tail
	release func()
	ended   chan struct{}
	err     error
	once    sync.Once
	asRoot  bool
}

var _ io.ReadWriteCloser = (*Process)(nil)

func (c *Conn) start(ctx context.Context, command Command) (*Process, error) {
	if len(command.Args) == 0 {
		return nil, fmt.Errorf("run on %s: no command", c.host.name)
	}
	args := command.Args
	if !command.AsLoginUser {
		prefix, err := c.SudoPrefix(ctx)
		if err != nil {
			return nil, err
		}
		args = append(prefix, args...)
	}
	// Arguments stay out of messages, except the program: scripts are long.
	title := command.Args[0]
	failed := func(err error) error {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("run %s on %s: %w", title, c.host.name, err)
	}
	session, release, err := c.session(ctx)
	if err != nil {
		return nil, failed(err)
	}
	process := &Process{conn: c, ctx: ctx, title: title, session: session, stderr: &tail{}, release: release, ended: make(chan struct{}), asRoot: !command.AsLoginUser}
	abandon := func(err error) (*Process, error) {
		_ = session.Close()
		release()
		return nil, failed(err)
	}
	if process.stdin, err = session.StdinPipe(); err != nil {
		return abandon(err)
	}
	if process.stdout, err = session.StdoutPipe(); err != nil {
		return abandon(err)
	}
	session.Stderr = process.stderr
	stop := context.AfterFunc(ctx, func() { process.kill() })
	// sshd passes no signals on for root and kills nothing when a session is
	// closed: the login shell, leader of its group, tells us what to kill.
	if err := session.Start("echo " + leaderMarker + "$$ >&2; exec " + Quote(args)); err != nil {
		stop()
		return abandon(c.explain(err))
	}
	go func() {
		process.err = process.result(session.Wait())
		stop()
		_ = session.Close()
		release()
		close(process.ended)
	}()
	return process, nil
}

// session opens a session when one of our slots is free.
func (c *Conn) session(ctx context.Context) (*ssh.Session, func(), error) {
	select {
	case c.slots <- struct{}{}:
	case <-c.done:
		return nil, nil, c.Err()
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("wait for one of %d sessions: %w", maximumSessions, context.Cause(ctx))
	}
	var once sync.Once
	release := func() { once.Do(func() { <-c.slots }) }
	type result struct {
		session *ssh.Session
		err     error
	}
	opened := make(chan result, 1)
	go func() {
		session, err := c.client.NewSession()
		opened <- result{session, err}
	}()
	select {
	case got := <-opened:
		if got.err == nil {
			return got.session, release, nil
		}
		release()
		var refused *ssh.OpenChannelError
		if errors.As(got.err, &refused) {
			return nil, nil, plan.WithHint(got.err, "sshd refuses another session: are MaxSessions of sshd_config at least 10?")
		}
		return nil, nil, c.explain(got.err)
	case <-ctx.Done():
		go func() {
			if got := <-opened; got.err == nil {
				_ = got.session.Close()
			}
			release()
		}()
		return nil, nil, context.Cause(ctx)
	}
}

// result turns the end of a session into what callers decide on.
func (p *Process) result(err error) error {
	if err == nil {
		return nil
	}
	if p.ctx.Err() != nil {
		return fmt.Errorf("run %s on %s: %w", p.title, p.conn.host.name, context.Cause(p.ctx))
	}
	var exit *ssh.ExitError
	if errors.As(err, &exit) {
		return &ExitError{Host: p.conn.host.name, Command: p.title, Code: exit.ExitStatus(), Signal: exit.Signal(), Stderr: p.stderr.String()}
	}
	return fmt.Errorf("run %s on %s: %w", p.title, p.conn.host.name, p.conn.explain(err))
}

// kill ends the command's process group through a session of its own, which
// needs no slot of ours: sshd grants more than we have.
func (p *Process) kill() {
	p.once.Do(func() {
		killed := make(chan struct{})
		go func() {
			defer close(killed)
			leader := p.stderr.leader()
			if leader == "" {
				_ = p.session.Signal(ssh.SIGTERM)
				return
			}
			session, err := p.conn.client.NewSession()
			if err != nil {
				return
			}
			defer func() { _ = session.Close() }()
			args := []string{"sh", "-c", "kill -s TERM -- -" + leader}
			p.conn.factsMutex.Lock()
			known := p.conn.facts
			p.conn.factsMutex.Unlock()
			if p.asRoot && known != nil && !known.Root() {
				args = append([]string{"sudo", "-n", "--"}, args...)
			}
			_ = session.Run(Quote(args))
		}()
		select {
		case <-killed:
		case <-p.conn.done:
		case <-time.After(cancelGrace): // the connection may be dead
		}
		go func() { _ = p.session.Close() }() // a write to a dead peer may block
	})
}

// Read reads from the command's stdout. Where the connection broke, the end
// is an ErrConnectionLost and not io.EOF.
func (p *Process) Read(buffer []byte) (int, error) {
	n, err := p.stdout.Read(buffer)
	return n, p.explainEnd(err)
}

// Write writes to the command's stdin.
func (p *Process) Write(data []byte) (int, error) {
	n, err := p.stdin.Write(data)
	return n, p.explainEnd(err)
}

func (p *Process) explainEnd(err error) error {
	if err == nil {
		return nil
	}
	limit := time.NewTimer(settleLimit)
	defer limit.Stop()
	select {
	case <-p.conn.done:
		return p.conn.Err()
	case <-p.ended:
		// The end of the process may itself be the end of the connection.
		if p.err != nil && errors.Is(p.err, ErrConnectionLost) {
			return p.err
		}
	case <-limit.C:
	}
	return err
}

// CloseWrite ends the command's stdin.
func (p *Process) CloseWrite() error { return p.stdin.Close() }

// Stderr is the tail of what the command wrote there so far.
func (p *Process) Stderr() string { return p.stderr.String() }

// Wait waits for the command's end. A code other than 0 is an *ExitError.
func (p *Process) Wait() error {
	select {
	case <-p.ended:
		return p.err
	case <-p.ctx.Done():
	}
	// It was signalled; a dead connection must not hold us.
	select {
	case <-p.ended:
	case <-time.After(cancelGrace):
	}
	return fmt.Errorf("run %s on %s: %w", p.title, p.conn.host.name, context.Cause(p.ctx))
}

// Close ends the command, if it still runs, and its session.
func (p *Process) Close() error {
	select {
	case <-p.ended:
	default:
		p.kill()
	}
	return nil
}

// tail keeps the last bytes written to it, without the line of the marker.
type tail struct {
	mutex sync.Mutex
	kept  []byte
	group string
}

func (t *tail) Write(data []byte) (int, error) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.kept = append(t.kept, data...)
	if t.group == "" {
		// A start-up file of the shell may have written before it.
		before, rest, found := strings.Cut(string(t.kept), leaderMarker)
		if group, after, whole := strings.Cut(rest, "\n"); found && whole {
			t.group, t.kept = group, []byte(before+after)
		}
	}
	if over := len(t.kept) - stderrTail; over > 0 {
		t.kept = append(t.kept[:0], t.kept[over:]...)
	}
	return len(data), nil
}

// leader is the process group's id, empty where it is not known.
func (t *tail) leader() string {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if _, err := strconv.Atoi(t.group); err != nil {
		return ""
	}
	return t.group
}

func (t *tail) String() string {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	return string(t.kept)
}

// Quote writes args as words of a POSIX shell.
func Quote(args []string) string {
	words := make([]string, len(args))
	for i, arg := range args {
		words[i] = quoteWord(arg)
	}
	return strings.Join(words, " ")
}

func quoteWord(word string) string {
	const harmless = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:@%+,"
	if word != "" && strings.Trim(word, harmless) == "" {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

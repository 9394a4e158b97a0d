// Package ssh reaches hosts: one connection per host, with pinned host keys,
// commands, tunnels and the upload of a first binary.
package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

const (
	// sshd's MaxSessions is 10; two stay free for Ansible or a person.
	maximumSessions = 8
	// maximumHops ends a ProxyJump that leads back to itself.
	maximumHops = 8
	// loginLimit is sshd's LoginGraceTime: someone may have to touch a key.
	loginLimit = 2 * time.Minute
	// settleLimit bounds how long we wait to learn whether an unexpected end
	// was the connection's.
	settleLimit = 250 * time.Millisecond
)

// Options are how to connect, the same for all hosts of a run.
type Options struct {
	// AcceptNewHostKey trusts a host without any pinned key, and records its
	// key in RecordTo. It never accepts a changed key.
	AcceptNewHostKey bool
	RecordTo         string
	// ConnectTimeout bounds TCP and key exchange. Default: the ssh config's, else 15 s.
	ConnectTimeout time.Duration
	// Keepalive is how long a connection may be silent before we ask; after
	// three unanswered it is lost. Default 5 s.
	Keepalive time.Duration
	// Passphrase opens an encrypted key file, only when a host accepts that key.
	Passphrase func(file string) (secret.Value, error)
}

// Conn is the one connection to a host. It is safe for concurrent use.
type Conn struct {
	host       settings
	client     *ssh.Client
	wire       *wire
	via        *Conn
	identities *identities
	hostKey    ssh.PublicKey
	login      identity
	slots      chan struct{}
	done       chan struct{}

	mutex  sync.Mutex
	closed bool
	cause  error

	factsMutex sync.Mutex
	facts      *Facts
}

// Dial connects and logs in.
func Dial(ctx context.Context, target Target, options Options) (*Conn, error) {
	return dial(ctx, target, options, nil, 0)
}

func dial(ctx context.Context, target Target, options Options, via *Conn, depth int) (*Conn, error) {
	host, err := resolve(target, options)
	if err != nil {
		return nil, err
	}
	if depth > maximumHops {
		return nil, fmt.Errorf("connect to %s: more than %d jump hosts", host.name, maximumHops)
	}
	keys, err := newKeychain(target, host, options)
	if err != nil {
		return nil, err
	}
	// Only the first of several hops has a way of its own to be reached.
	if via == nil {
		for _, text := range host.proxyJump {
			jump, err := hop(text, target)
			if err != nil {
				return nil, err
			}
			next, err := dial(ctx, jump, options, via, depth+1)
			if err != nil {
				if via != nil {
					_ = via.Close()
				}
				return nil, fmt.Errorf("reach %s by jump host %s: %w", host.name, text, err)
			}
			via = next
		}
	}
	conn, err := handshake(ctx, host, keys, options, via)
	if err != nil && via != nil {
		_ = via.Close()
	}
	return conn, err
}

// open makes the transport connection.
func open(ctx context.Context, host settings, via *Conn) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, host.connectTimeout)
	defer cancel()
	if via != nil {
		return via.DialContext(ctx, "tcp", host.address())
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", host.address())
}

func handshake(ctx context.Context, host settings, keys *keychain, options Options, via *Conn) (*Conn, error) {
	transport, err := open(ctx, host, via)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("connect to %s: %w", host.name, context.Cause(ctx))
		}
		return nil, newConnectError(host.name, host.address(), err)
	}
	conn := &Conn{
		host: host, via: via, wire: newWire(transport), identities: &identities{},
		slots: make(chan struct{}, maximumSessions), done: make(chan struct{}),
	}
	limit := time.AfterFunc(host.connectTimeout, func() { conn.wire.expire() })
	defer limit.Stop()
	stop := context.AfterFunc(ctx, func() { _ = transport.Close() })
	defer stop()

	attempted := false
	var signErr error
	config := &ssh.ClientConfig{
		User: host.user,
		Auth: []ssh.AuthMethod{ssh.PublicKeysCallback(func() ([]ssh.Signer, error) {
			attempted = true
			conn.identities = findIdentities(host, options.Passphrase)
			var signers []ssh.Signer
			for _, one := range conn.identities.offered {
				signers = append(signers, &loginSigner{one.signer, func(failed error) { conn.login, signErr = one, failed }})
			}
			return signers, nil
		})},
		HostKeyAlgorithms: keys.algorithms(),
		HostKeyCallback: func(name string, remote net.Addr, key ssh.PublicKey) error {
			err := keys.check(name, remote, key)
			if err == nil && keys.accepted != nil {
				limit.Reset(loginLimit)
			}
			return err
		},
	}
	connection, channels, requests, err := ssh.NewClientConn(conn.wire, host.keyName(), config)
	if err != nil {
		conn.identities.close()
		return nil, conn.explainHandshake(ctx, err, keys, attempted, signErr)
	}
	conn.hostKey = keys.accepted
	conn.client = ssh.NewClient(connection, channels, requests)
	go conn.wait()
	interval := options.Keepalive
	if interval <= 0 {
		interval = 5 * time.Second
	}
	go conn.keepalive(interval)
	return conn, nil
}

func (c *Conn) explainHandshake(ctx context.Context, err error, keys *keychain, attempted bool, signErr error) error {
	var mismatch *ssh.AlgorithmNegotiationError
	var network net.Error
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("connect to %s: %w", c.host.name, context.Cause(ctx))
	case keys.verdict != nil:
		return keys.verdict
	case c.wire.expired.Load():
		return newConnectError(c.host.name, c.host.address(), fmt.Errorf("key exchange: %w", context.DeadlineExceeded))
	case errors.As(err, &mismatch) && keys.pinned() && mismatch.What == "host key":
		return c.presentedInstead(ctx, keys, err)
	case signErr != nil:
		return plan.WithHint(fmt.Errorf("log in to %s as %s with %s: %w", c.host.name, c.host.user, c.login, signErr),
			"is the passphrase right, and does the agent allow the key's use?")
	case attempted && !errors.Is(err, io.EOF) && !errors.As(err, &network):
		var tried []string
		for _, one := range c.identities.offered {
			tried = append(tried, one.String())
		}
		return &AuthError{Host: c.host.name, User: c.host.user, Tried: append(tried, c.identities.problems...), Err: err}
	}
	failure := newConnectError(c.host.name, c.host.address(), err)
	if failure.Reason == Failed {
		failure.Reason = NotSSH
	}
	return failure
}

// presentedInstead asks the host for whatever key it has, only to name it: a
// host without any key of a pinned type has changed its key.
func (c *Conn) presentedInstead(ctx context.Context, keys *keychain, failure error) error {
	transport, err := open(ctx, c.host, c.via)
	if err != nil {
		return failure
	}
	_ = transport.SetDeadline(time.Now().Add(c.host.connectTimeout))
	refused := errors.New("only looking")
	var presented ssh.PublicKey
	_, _, _, _ = ssh.NewClientConn(transport, c.host.keyName(), &ssh.ClientConfig{
		User:              c.host.user,
		HostKeyAlgorithms: defaultHostKeyAlgorithms(),
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			presented = key
			return refused
		},
	})
	if presented == nil {
		return failure
	}
	return keys.changed(presented)
}

// Name is how messages call the host.
func (c *Conn) Name() string { return c.host.name }

// Address is host:port as dialled.
func (c *Conn) Address() string { return c.host.address() }

// User is the login user.
func (c *Conn) User() string { return c.host.user }

// AuthenticatedKey is the operator's public key that the host accepted; nil
// where the host asked for none.
func (c *Conn) AuthenticatedKey() ssh.PublicKey {
	if c.login.signer == nil {
		return nil
	}
	return c.login.signer.PublicKey()
}

// Signers are the operator's keys, the one that logged in first: agent keys
// and identity files. For RSA, sign with ssh.AlgorithmSigner and an
// rsa-sha2 algorithm. They work until Close.
func (c *Conn) Signers() []ssh.Signer {
	var signers []ssh.Signer
	if c.login.signer != nil {
		signers = append(signers, c.login.signer)
	}
	for _, list := range [][]identity{c.identities.offered, c.identities.further} {
		for _, one := range list {
			if c.login.signer != one.signer {
				signers = append(signers, one.signer)
			}
		}
	}
	return signers
}

// Done is closed when the connection has ended, for whatever reason.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err is nil while the connection stands, an ErrConnectionLost when it broke,
// net.ErrClosed after Close.
func (c *Conn) Err() error {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	switch {
	case c.closed:
		return fmt.Errorf("host %s: %w", c.host.name, net.ErrClosed)
	case c.cause != nil:
		return &LostError{Host: c.host.name, Cause: c.cause}
	}
	return nil
}

// Close ends the connection and all that runs over it.
func (c *Conn) Close() error {
	c.mutex.Lock()
	if c.closed {
		c.mutex.Unlock()
		return nil
	}
	c.closed = true
	c.mutex.Unlock()
	_ = c.wire.Close()
	if c.via != nil {
		// A tunnel ends when its other side agrees: one through a dead jump host never does.
		select {
		case <-c.done:
		case <-time.After(settleLimit):
		}
		_ = c.via.Close()
	}
	<-c.done
	c.identities.close()
	return nil
}

func (c *Conn) wait() {
	err := c.client.Wait()
	c.lose(err)
	close(c.done)
}

// lose notes the first cause and cuts the transport.
func (c *Conn) lose(cause error) {
	c.mutex.Lock()
	if c.cause == nil && !c.closed {
		c.cause = cause
	}
	c.mutex.Unlock()
	_ = c.wire.Close()
}

// keepalive asks a silent peer for an answer; any byte from it counts as one,
// so that a long upload does not look like silence.
func (c *Conn) keepalive(interval time.Duration) {
	ticker := time.NewTicker(interval / 2)
	defer ticker.Stop()
	var asking atomic.Bool
	for {
		select {
		case <-c.done:
			return
		case <-ticker.C:
		}
		silent := c.wire.silence()
		if silent > 3*interval {
			c.lose(fmt.Errorf("no answer for %s", silent.Round(100*time.Millisecond)))
			return
		}
		if silent >= interval && asking.CompareAndSwap(false, true) {
			// A write may block on a dead peer; the loop must not. It ends with the transport.
			go func() {
				_, _, _ = c.client.SendRequest("keepalive@openssh.com", true, nil)
				asking.Store(false)
			}()
		}
	}
}

// explain replaces an error that a broken connection caused. An unexpected
// end is seen a moment before the connection's own.
func (c *Conn) explain(err error) error {
	if err == nil {
		return nil
	}
	limit := time.NewTimer(settleLimit)
	defer limit.Stop()
	select {
	case <-c.done:
		return c.Err()
	case <-limit.C:
		return err
	}
}

// wire notes when the peer was last heard.
type wire struct {
	net.Conn
	started time.Time
	heard   atomic.Int64
	expired atomic.Bool
}

func newWire(transport net.Conn) *wire { return &wire{Conn: transport, started: time.Now()} }

func (w *wire) Read(buffer []byte) (int, error) {
	n, err := w.Conn.Read(buffer)
	if n > 0 {
		w.heard.Store(int64(time.Since(w.started)))
	}
	return n, err
}

func (w *wire) silence() time.Duration {
	return time.Since(w.started) - time.Duration(w.heard.Load())
}

func (w *wire) expire() {
	w.expired.Store(true)
	_ = w.Close()
}

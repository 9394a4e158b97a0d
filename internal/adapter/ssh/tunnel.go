package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/plan"
)

// DialContext dials from the host: "tcp" or "unix". It fits where an
// http.Transport or a database client takes a dialer.
func (c *Conn) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	failed := func(err error) error {
		return fmt.Errorf("dial %s from %s: %w", address, c.host.name, err)
	}
	channel, err := c.client.DialContext(ctx, network, address)
	if err != nil {
		var refused *ssh.OpenChannelError
		switch {
		case ctx.Err() != nil:
			return nil, failed(context.Cause(ctx))
		case errors.As(err, &refused) && refused.Reason == ssh.Prohibited:
			return nil, plan.WithHint(failed(err), "allow AllowTcpForwarding and AllowStreamLocalForwarding in the host's sshd_config")
		case errors.As(err, &refused):
			return nil, plan.WithHint(failed(err), "nothing listens there on the host: is the service up?")
		}
		return nil, failed(c.explain(err))
	}
	return &tunnel{Conn: channel, host: c}, nil
}

// tunnel adds deadlines, which SSH channels lack and database clients need to
// cancel. One that passes ends the tunnel: clients drop such a connection anyway.
type tunnel struct {
	net.Conn
	host    *Conn
	expired atomic.Bool

	mutex sync.Mutex
	read  *time.Timer
	write *time.Timer
}

func (t *tunnel) Read(buffer []byte) (int, error) {
	n, err := t.Conn.Read(buffer)
	return n, t.explain(err)
}

func (t *tunnel) Write(data []byte) (int, error) {
	n, err := t.Conn.Write(data)
	return n, t.explain(err)
}

// CloseWrite ends our half.
func (t *tunnel) CloseWrite() error {
	if half, ok := t.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

func (t *tunnel) explain(err error) error {
	if err == nil {
		return nil
	}
	if t.expired.Load() {
		return os.ErrDeadlineExceeded
	}
	// Ends are common on tunnels: no waiting for the connection's verdict, but
	// for a moment.
	select {
	case <-t.host.done:
		return t.host.Err()
	case <-time.After(20 * time.Millisecond):
		return err
	}
}

func (t *tunnel) Close() error {
	t.mutex.Lock()
	stop(t.read)
	stop(t.write)
	t.mutex.Unlock()
	return t.Conn.Close()
}

func stop(timer *time.Timer) {
	if timer != nil {
		timer.Stop()
	}
}

func (t *tunnel) arm(timer **time.Timer, deadline time.Time) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	stop(*timer)
	*timer = nil
	if deadline.IsZero() {
		return
	}
	*timer = time.AfterFunc(time.Until(deadline), func() {
		t.expired.Store(true)
		_ = t.Conn.Close()
	})
}

func (t *tunnel) SetReadDeadline(deadline time.Time) error {
	t.arm(&t.read, deadline)
	return nil
}

func (t *tunnel) SetWriteDeadline(deadline time.Time) error {
	t.arm(&t.write, deadline)
	return nil
}

func (t *tunnel) SetDeadline(deadline time.Time) error {
	t.arm(&t.read, deadline)
	t.arm(&t.write, deadline)
	return nil
}

// Forward carries every connection to listener on to remote, as seen from the
// host, until ctx ends (nil) or something breaks. A remote that begins with
// "/" is a Unix socket. It closes the listener.
func (c *Conn) Forward(ctx context.Context, listener net.Listener, remote string) error {
	network := "tcp"
	if strings.HasPrefix(remote, "/") {
		network = "unix"
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		select {
		case <-groupCtx.Done():
		case <-c.done:
		}
		_ = listener.Close()
		if ctx.Err() == nil && groupCtx.Err() == nil {
			return c.Err()
		}
		return nil
	})
	group.Go(func() error {
		for {
			local, err := listener.Accept()
			if err != nil {
				if groupCtx.Err() != nil || c.Err() != nil {
					return c.Err()
				}
				return fmt.Errorf("forward %s to %s on %s: %w", listener.Addr(), remote, c.host.name, err)
			}
			group.Go(func() error {
				c.join(groupCtx, local, network, remote)
				return nil
			})
		}
	})
	err := group.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// join copies both ways. A remote that cannot be dialled only ends this one
// connection: the service behind may come back.
func (c *Conn) join(ctx context.Context, local net.Conn, network, remote string) {
	defer func() { _ = local.Close() }()
	far, err := c.DialContext(ctx, network, remote)
	if err != nil {
		return
	}
	defer func() { _ = far.Close() }()
	stop := context.AfterFunc(ctx, func() {
		_ = local.Close()
		_ = far.Close()
	})
	defer stop()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = io.Copy(far, local)
		closeWrite(far)
	}()
	_, _ = io.Copy(local, far)
	closeWrite(local)
	<-sent
}

func closeWrite(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}

// Package dial joins a pair of streams with a connection to a service of this
// host: how site reaches, through SSH, what only root may open.
package dial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nomad-site/site/internal/plan"
)

const (
	connectLimit = 10 * time.Second
	// lingerLimit is how long the client may go on to send after the service
	// has ended its half.
	lingerLimit = 5 * time.Second
)

// Address is a service of this host.
type Address struct{ network, address string }

// Unix is a socket by its absolute path.
func Unix(path string) (Address, error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path {
		return Address{}, fmt.Errorf("dial %q: want the absolute path of a socket", path)
	}
	return Address{"unix", path}, nil
}

// TCP is a loopback IP address and port. A name could resolve to anything.
func TCP(address string) (Address, error) {
	parsed, err := netip.ParseAddrPort(address)
	if err != nil || !parsed.Addr().Unmap().IsLoopback() || parsed.Addr().Zone() != "" {
		return Address{}, fmt.Errorf("dial %q: want a loopback address and port, such as 127.0.0.1:5432", address)
	}
	return Address{"tcp", parsed.String()}, nil
}

// ErrNothingListens says that the service is not up.
var ErrNothingListens = errors.New("nothing listens there")

// Join connects, then carries both directions until both have ended, or the
// connection has. Either half may end before the other. It may leave a read of
// input behind, which only the process's end ends.
func (a Address) Join(ctx context.Context, input io.Reader, output io.Writer) error {
	dialer := net.Dialer{Timeout: connectLimit}
	connection, err := dialer.DialContext(ctx, a.network, a.address)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return plan.WithHint(fmt.Errorf("%w: %w", ErrNothingListens, err), "is the service up? See `site status`")
	}
	if err != nil {
		return err
	}
	defer func() { _ = connection.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = connection.Close() })
	defer stop()

	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(connection, input)
		if half, ok := connection.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
		sent <- err
	}()
	_, err = io.Copy(output, connection)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("dial %s: %w", a.address, err)
	}
	// The client learns of this end now, though the other half may go on. With
	// sudo in between it learns of it by our end alone.
	if closer, ok := output.(io.Closer); ok {
		_ = closer.Close()
	}
	if hungUp(connection) {
		return nil
	}
	limit := time.NewTimer(lingerLimit)
	defer limit.Stop()
	select {
	case <-limit.C:
	case <-ctx.Done():
	case err := <-sent:
		// A service that closed before it read everything took what it wanted.
		if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			return fmt.Errorf("dial %s: %w", a.address, err)
		}
	}
	return nil
}

// hungUp reports whether the service has closed both halves, which the kernel
// tells of Unix sockets alone.
func hungUp(connection net.Conn) bool {
	socket, ok := connection.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = raw.Control(func(descriptor uintptr) {
		asked := []unix.PollFd{{Fd: int32(descriptor), Events: unix.POLLOUT}}
		if _, err := unix.Poll(asked, 0); err == nil {
			gone = asked[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
		}
	})
	return gone || err != nil
}

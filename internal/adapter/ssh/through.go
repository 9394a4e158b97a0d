package ssh

import (
	"context"
	"errors"
	"io"
	"net"
	"time"
)

// DialThrough runs a command as root whose stdin and stdout are a connection,
// such as `site-host dial`. It reaches what sshd does not forward to: sockets
// that only root may open. ctx bounds the start alone, as with any dialer; the
// connection lasts until Close, and takes one of the sessions until then.
//
// A command that ends with an error, such as for a socket that is not there,
// fails the first read with an *ExitError that has its stderr.
func (c *Conn) DialThrough(ctx context.Context, args []string) (net.Conn, error) {
	living, end := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { end(context.Cause(ctx)) })
	process, err := c.Start(living, args)
	if !stop() && err == nil { // ctx ended meanwhile, and with it the process
		err = context.Cause(ctx)
		_ = process.Close()
	}
	if err != nil {
		end(err)
		return nil, err
	}
	// Pipes have the deadlines that SSH channels lack: one for each direction,
	// since either may end alone.
	read, fromHost := net.Pipe()
	write, toHost := net.Pipe()
	t := &through{process: process, end: end, read: half{Conn: read, ended: make(chan struct{})}, write: half{Conn: write, ended: make(chan struct{})}}
	go func() {
		_, err := io.Copy(fromHost, readerOnly{process})
		t.read.finish(t.explain(err))
		_ = fromHost.Close()
	}()
	go func() {
		_, err := io.Copy(writerOnly{process}, toHost)
		if err != nil {
			err = t.explain(err)
		}
		_ = process.CloseWrite()
		t.write.finish(err)
		_ = toHost.Close()
	}()
	return t, nil
}

// io.Copy asks for more than these methods, and would go around Process.
type (
	readerOnly struct{ io.Reader }
	writerOnly struct{ io.Writer }
)

// half is our end of one direction.
type half struct {
	net.Conn
	ended chan struct{}
	err   error // why it ended; set before ended is closed
}

func (h *half) finish(err error) {
	h.err = err
	close(h.ended)
}

// explain says why the pipe's far end was closed.
func (h *half) explain(err error) error {
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrClosedPipe) {
		return err
	}
	select {
	case <-h.ended:
		if h.err != nil {
			return h.err
		}
	default:
	}
	return err
}

// through is a remote process as a connection.
type through struct {
	process     *Process
	end         context.CancelCauseFunc
	read, write half
}

// explain prefers what the command said over how its end looked to us.
func (t *through) explain(err error) error {
	if err != nil && errors.Is(err, ErrConnectionLost) {
		return err
	}
	if t.process.endsWithin(settleLimit) && t.process.err != nil {
		return t.process.err
	}
	return err // nil where only this half ended
}

func (t *through) Read(buffer []byte) (int, error) {
	n, err := t.read.Read(buffer)
	return n, t.read.explain(err)
}

func (t *through) Write(data []byte) (int, error) {
	n, err := t.write.Write(data)
	return n, t.write.explain(err)
}

// CloseWrite ends our half: the command's stdin.
func (t *through) CloseWrite() error { return t.write.Close() }

// Close ends the command: by the end of its stdin and, if that is not enough,
// by a signal.
func (t *through) Close() error {
	err := errors.Join(t.write.Close(), t.read.Close())
	if !t.process.endsWithin(settleLimit) {
		err = errors.Join(err, t.process.Close())
	}
	t.end(net.ErrClosed)
	return err
}

func (t *through) SetReadDeadline(deadline time.Time) error { return t.read.SetReadDeadline(deadline) }

func (t *through) SetWriteDeadline(deadline time.Time) error {
	return t.write.SetWriteDeadline(deadline)
}

func (t *through) SetDeadline(deadline time.Time) error {
	return errors.Join(t.SetReadDeadline(deadline), t.SetWriteDeadline(deadline))
}

func (t *through) LocalAddr() net.Addr { return throughAddress{"this machine"} }

// RemoteAddr names the host and the program; the arguments may be long.
func (t *through) RemoteAddr() net.Addr {
	return throughAddress{t.process.conn.host.name + ":" + t.process.title}
}

type throughAddress struct{ text string }

func (throughAddress) Network() string  { return "ssh" }
func (a throughAddress) String() string { return a.text }

// endsWithin reports whether the command has ended or does so soon.
func (p *Process) endsWithin(limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.ended:
		return true
	case <-timer.C:
		return false
	}
}

package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync/atomic"
)

// wire is what TLS goes over. It sees the end of the connection, which
// crypto/tls does not tell from TLS's own farewell (RFC 8446, 6.1).
type wire struct {
	*net.TCPConn
	ended atomic.Bool
}

// Read implements io.Reader.
func (w *wire) Read(buffer []byte) (int, error) {
	n, err := w.TCPConn.Read(buffer)
	if errors.Is(err, io.EOF) {
		w.ended.Store(true)
	}
	return n, err
}

// wasCut reports whether a connection ended without a farewell.
func wasCut(connection *tls.Conn) bool {
	over, ok := connection.NetConn().(*wire)
	return !ok || over.ended.Load()
}

// splice carries both directions until both have ended, each by itself. An error
// ends both at once, and is seen at both ends: what was cut must not look like
// what has ended. It closes both connections.
func splice(ctx context.Context, plain *net.TCPConn, far *tls.Conn) {
	stop := context.AfterFunc(ctx, func() { cut(plain, far) })
	defer stop()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		if _, err := io.Copy(far, plain); err != nil || far.CloseWrite() != nil {
			cut(plain, far)
		}
	}()
	if _, err := io.Copy(plain, far); err != nil || wasCut(far) || plain.CloseWrite() != nil {
		cut(plain, far)
	}
	<-sent
	_, _ = plain.Close(), far.Close()
}

// cut ends connections so that neither end takes it for the end of the stream:
// by a reset on the plain one, without TLS's own farewell on the other.
func cut(plain *net.TCPConn, far *tls.Conn) {
	_ = plain.SetLinger(0)
	_ = plain.Close()
	if far != nil {
		_ = far.NetConn().Close()
	}
}

package relay

import (
	"context"
	"crypto/tls"
	"io"
	"net"
)

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
	if _, err := io.Copy(plain, far); err != nil || plain.CloseWrite() != nil {
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

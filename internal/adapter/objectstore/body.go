package objectstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/nomad-site/site/internal/writesession"
)

var errStalled = errors.New("nothing came for " + stall.String())

// body is an object on its way. It ends when nothing comes for a while, since a
// transfer of any length has no other limit.
type body struct {
	what    string
	outer   context.Context //nolint:containedctx // to tell the caller's end from ours
	ctx     context.Context //nolint:containedctx // the request's, which must outlive the call
	cancel  context.CancelCauseFunc
	timer   *time.Timer
	content io.ReadCloser
}

func newBody(ctx context.Context, what string) *body {
	b := &body{what: what, outer: ctx}
	b.ctx, b.cancel = context.WithCancelCause(ctx)
	b.timer = time.AfterFunc(stall, func() { b.cancel(errStalled) })
	return b
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	b.timer.Reset(stall) // whoever reads slowly stalls nothing
	n, err := b.content.Read(p)
	b.timer.Stop()
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, io.EOF):
		return n, io.EOF
	case b.outer.Err() != nil:
		return n, fmt.Errorf("%s: %w", b.what, context.Cause(b.outer))
	case b.ctx.Err() != nil:
		err = context.Cause(b.ctx)
	}
	return n, &writesession.UnavailableError{What: b.what, Err: err}
}

// Close implements io.Closer.
func (b *body) Close() error {
	b.timer.Stop()
	b.cancel(context.Canceled)
	return b.content.Close()
}

// begin is when the answer is there.
func (b *body) begin(content io.ReadCloser) {
	b.timer.Stop()
	b.content = content
}

// fail ends a body that has not begun.
func (b *body) fail(err error) error {
	b.timer.Stop()
	if errors.Is(context.Cause(b.ctx), errStalled) {
		err = errStalled
	}
	b.cancel(context.Canceled)
	return err
}

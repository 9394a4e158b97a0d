package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/writesession"
)

const (
	// storePatience is how long a pack is tried again after its first failure, and
	// leastAttempts how often at least: keys that were just made are refused for a
	// while, and a slow attempt must not be the last.
	storePatience = 2 * time.Minute
	leastAttempts = 4
	// packWithin is more than the slowest uplink needs for a pack.
	packWithin = 2 * time.Hour
	// stalledAfter is how long an upload may stand still.
	stalledAfter = 2 * time.Minute
)

// bring has the store hold the pack: it asks for an address and puts the pack
// there, each time anew, for addresses run out with the keys that signed them.
func (l *pipeline) bring(ctx context.Context, filled *pack, digest blob.Digest) error {
	object := writesession.Object{
		Name: fmt.Sprintf("pack-%d", filled.number), SHA256: digest.Hex(), Size: int64(len(filled.content)),
	}
	shown := &shownProgress{count: l.count, plain: filled.plain, size: object.Size}
	var failing time.Time
	attempts := 0
	err := retry.Until(ctx, "the object store", packWithin, func(ctx context.Context) error {
		err := l.attempt(ctx, object, filled, digest, shown)
		if err == nil {
			return nil
		}
		if attempts++; failing.IsZero() {
			failing = time.Now()
		}
		var upload *UploadError
		if !errors.As(err, &upload) || (attempts >= leastAttempts && time.Since(failing) > l.client.storePatience) {
			return retry.Permanent(err)
		}
		return stopUnlessPassing(ctx, err)
	})
	if err != nil {
		return err
	}
	shown.finish()
	return nil
}

// attempt asks for one address and uses it.
func (l *pipeline) attempt(
	ctx context.Context, object writesession.Object, filled *pack, digest blob.Digest, shown *shownProgress,
) error {
	var session writesession.Session
	_, sent, err := l.client.do(ctx, call{
		what: "ask where to upload", method: http.MethodPost, path: l.path("/objects"),
		body: writesession.AddRequest{Objects: []writesession.Object{object}}, into: &session,
	})
	l.count.sent(sent)
	if err != nil {
		return err
	}
	for _, state := range session.Objects {
		switch {
		case state.SHA256 != object.SHA256 || state.Size != object.Size:
		case state.State == writesession.Present:
			return nil
		case state.State == writesession.ToPut && state.Put != nil:
			if err := l.client.put(ctx, *state.Put, filled.content, digest, l.count, shown); err != nil {
				return err
			}
			l.count.change(func(result *PushResult) { result.Packs++ })
			return nil
		}
	}
	return strange("ask where to upload", "the answer does not say")
}

// put is one upload.
func (c *Client) put(
	ctx context.Context, to writesession.Put, content []byte, digest blob.Digest, count *counter, shown *shownProgress,
) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	sending := newBody(content, shown, c.stalledAfter, cancel)
	// The transport may go on reading after its answer, and the pack is used again.
	defer sending.stop()
	request, err := putRequest(ctx, to, sending)
	if err != nil {
		return err
	}
	failed := func(status int, code string, err error) *UploadError {
		return &UploadError{Pack: digest, Host: request.URL.Host, Status: status, Code: code, Err: err}
	}
	response, err := c.options.Store.Do(request)
	count.put(sending.stop())
	if err != nil {
		return failed(0, "", withoutAddress(ctx, err))
	}
	defer response.Body.Close()
	if response.StatusCode >= 200 && response.StatusCode <= 299 {
		return nil
	}
	unread := time.AfterFunc(c.stalledAfter, func() { cancel(nil) })
	defer unread.Stop()
	const longest = 64 << 10
	answer, _ := io.ReadAll(io.LimitReader(response.Body, longest)) // only for the code in it
	return retryAfter(response.Header, failed(response.StatusCode, codeOf(answer), nil))
}

// putRequest has exactly the headers that were signed. Its errors do not show the address.
func putRequest(ctx context.Context, to writesession.Put, sending *body) (*http.Request, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, to.URL, sending)
	if err != nil || (request.URL.Scheme != "http" && request.URL.Scheme != "https") || request.URL.Host == "" {
		return nil, strange("upload a pack", "the address is none")
	}
	request.ContentLength = int64(len(sending.content))
	for key, value := range to.Headers {
		switch http.CanonicalHeaderKey(key) {
		case "Host":
			request.Host = value
		case "Content-Length":
			if value != strconv.Itoa(len(sending.content)) {
				return nil, strange("upload a pack", "the address is for %.20s bytes, not for %d", value, len(sending.content))
			}
		default:
			request.Header.Set(key, value)
		}
	}
	return request, nil
}

var errorCode = regexp.MustCompile(`<Code>([A-Za-z0-9]{1,64})</Code>`)

// codeOf is the one thing that is read of a store's error: the rest may repeat
// what was signed.
func codeOf(answer []byte) string {
	if found := errorCode.FindSubmatch(answer); found != nil {
		return string(found[1])
	}
	return ""
}

// body is content on its way. After stop nobody reads content any more, whatever
// the transport still does.
type body struct {
	mutex   sync.Mutex
	content []byte
	sent    int64
	shown   *shownProgress
	stalled *time.Timer
	within  time.Duration
	stopped bool
}

// newBody calls cancel once nothing was taken of it for a while.
func newBody(content []byte, shown *shownProgress, within time.Duration, cancel context.CancelCauseFunc) *body {
	stalled := time.AfterFunc(within, func() { cancel(fmt.Errorf("nothing was sent for %s", within)) })
	return &body{content: content, shown: shown, within: within, stalled: stalled}
}

// Read implements io.Reader.
func (b *body) Read(into []byte) (int, error) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if b.stopped {
		return 0, io.ErrClosedPipe
	}
	b.stalled.Reset(b.within)
	if b.sent == int64(len(b.content)) {
		return 0, io.EOF
	}
	n := copy(into, b.content[b.sent:])
	b.sent += int64(n)
	b.shown.reached(b.sent)
	return n, nil
}

// Close implements io.Closer.
func (b *body) Close() error { return nil }

// stop ends the reading and says how much was read.
func (b *body) stop() int64 {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.stopped = true
	b.stalled.Stop()
	return b.sent
}

// shownProgress turns the bytes of a pack into plain bytes, and never goes back
// when a pack is sent again.
type shownProgress struct {
	mutex       sync.Mutex
	count       *counter
	plain, size int64
	shown       int64
}

func (s *shownProgress) reached(sent int64) {
	s.show(int64(float64(s.plain) * float64(sent) / float64(s.size)))
}

func (s *shownProgress) finish() { s.show(s.plain) }

func (s *shownProgress) show(plain int64) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if more := min(plain, s.plain) - s.shown; more > 0 {
		s.shown += more
		s.count.advance(more)
	}
}

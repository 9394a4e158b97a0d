package objectstore

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

const probeTTL = 5 * time.Minute

// Probe proves that the keys may put, head, get and delete below prefix, and
// tells if the store refuses an upload of other bytes than were signed. It leaves
// nothing there.
func (b *Bucket) Probe(ctx context.Context, prefix string) (enforces bool, err error) {
	right := []byte("site probes this store " + rand.Text())
	wrong := bytes.Clone(right)
	wrong[0] ^= 1
	// Two keys: R2 takes one write of a key in a second.
	keys := []string{prefix + "probe-" + rand.Text() + "-wrong", prefix + "probe-" + rand.Text() + "-right"}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerWait)
		defer cancel()
		err = errors.Join(err, b.Delete(clean, keys...))
	}()
	if err = b.upload(ctx, keys[0], right, wrong); err != nil {
		refused, ok := errors.AsType[*answerError](err)
		if !ok || refused.status < 400 || refused.status >= 500 {
			return false, fmt.Errorf("probe the object store with a wrong byte: %w", err)
		}
		enforces = true
	}
	if err = b.upload(ctx, keys[1], right, right); err != nil {
		return false, fmt.Errorf("probe the object store: %w", err)
	}
	return enforces, b.probeReads(ctx, keys[1], right)
}

// probeReads reads back what was uploaded, removes it, and sees that it is gone.
func (b *Bucket) probeReads(ctx context.Context, key string, content []byte) error {
	info, err := b.Head(ctx, key)
	switch {
	case err != nil:
		return fmt.Errorf("probe the object store: %w", err)
	case info.Size != int64(len(content)):
		return fmt.Errorf("probe the object store: %d bytes were stored, and it says %d", len(content), info.Size)
	case !b.holds(ctx, key, content):
		return errors.New("probe the object store: what was stored cannot be read back")
	}
	if err := b.Delete(ctx, key); err != nil {
		return fmt.Errorf("probe the object store: %w", err)
	}
	if _, err := b.Head(ctx, key); !errors.Is(err, writesession.ErrNotFound) {
		return fmt.Errorf("probe the object store: what was deleted is still there (%w)", err)
	}
	return nil
}

// upload puts content at a URL that was presigned for announced.
func (b *Bucket) upload(ctx context.Context, key string, announced, content []byte) error {
	return b.call(ctx, "upload to "+key, answerWait, func(ctx context.Context, _ func(*s3.Options)) error {
		return b.uploadOnce(ctx, key, announced, content)
	})
}

func (b *Bucket) uploadOnce(ctx context.Context, key string, announced, content []byte) error {
	put, err := b.PresignPut(ctx, key, blob.DigestOf(announced), int64(len(announced)), probeTTL)
	if err != nil {
		return err
	}
	what := "upload to " + key
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, put.URL, bytes.NewReader(content))
	if err != nil {
		return errors.New(what + ": no request can be made")
	}
	for name, value := range put.Headers {
		request.Header.Set(name, value)
	}
	response, err := b.http.Do(request)
	if err != nil {
		return &writesession.UnavailableError{What: what, Err: withoutURL(err)}
	}
	defer func() { _ = response.Body.Close() }()
	return uploaded(what, response)
}

// uploaded is what the store says to an upload.
func uploaded(what string, response *http.Response) error {
	if response.StatusCode >= 200 && response.StatusCode < 300 {
		return nil
	}
	said, _ := io.ReadAll(io.LimitReader(response.Body, 64<<10))
	var answered struct{ Code string }
	if xml.Unmarshal(said, &answered) != nil || answered.Code == "" {
		answered.Code = http.StatusText(response.StatusCode)
	}
	return answer(what, response.StatusCode, answered.Code, response.Header, nil)
}

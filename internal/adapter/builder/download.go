package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/site"
)

const (
	downloadAttempts = 3
	downloadDeadline = 30 * time.Minute
)

// download gets a url source into the cache under its declared digest.
func (b *builder) download(ctx context.Context) (Built, error) {
	artifact := b.Artifact
	address, err := url.Parse(artifact.URL)
	if err != nil || (address.Scheme != "http" && address.Scheme != "https") || address.Host == "" {
		return Built{}, fmt.Errorf("url %q is not an http or https address", artifact.URL)
	}
	shown := address.Redacted()
	if b.sha256 == "" {
		return Built{}, plan.WithHint(fmt.Errorf("url %s has no sha256", shown), "set sha256 to the digest of the file: only then is it known to be the same every time")
	}
	source := "url " + shown
	blob, found := b.store.find(b.sha256, MediaTypeFile)
	if !found {
		attempts := 0
		err := retry.Until(ctx, "the download of "+shown, downloadDeadline, func(ctx context.Context) error {
			attempts++
			var err error
			blob, err = b.fetch(ctx, shown)
			if err != nil && attempts == downloadAttempts {
				return retry.Permanent(err)
			}
			return err
		})
		if err != nil {
			return Built{}, fmt.Errorf("download %s: %w", shown, err)
		}
	}
	built := Built{Digest: blob.Digest, Blobs: []LocalBlob{blob}}
	switch {
	case artifact.Kind == site.Image && artifact.Executable != "":
		built, err = b.executableIn(ctx, place{path: blob.Path, name: shown})
	case artifact.Kind == site.Image:
		built, err = b.imageIn(ctx, place{path: blob.Path, name: shown}, anyArchive)
	}
	built.Source = source
	return built, err
}

func (b *builder) fetch(ctx context.Context, shown string) (LocalBlob, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, b.Artifact.URL, nil)
	if err != nil {
		return LocalBlob{}, retry.Permanent(err)
	}
	client := b.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	response, err := client.Do(request)
	if err != nil {
		// The client's own error repeats the address, with what it may carry.
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		return LocalBlob{}, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		err := fmt.Errorf("the server answers %s", response.Status)
		if response.StatusCode < 500 && response.StatusCode != http.StatusTooManyRequests {
			return LocalBlob{}, retry.Permanent(err)
		}
		return LocalBlob{}, err
	}
	limit := b.MaxDownload
	if limit == 0 {
		limit = defaultMaxDownload
	}
	return b.store.add(MediaTypeFile, func(w *pending) error {
		n, err := copyContext(ctx, w, io.LimitReader(response.Body, limit+1))
		switch {
		case err != nil:
			return err
		case n > limit:
			return retry.Permanent(fmt.Errorf("it is larger than the limit of %d bytes", limit))
		case w.digest() != b.sha256:
			return retry.Permanent(b.checkSource(shown, w.digest()))
		}
		return nil
	})
}

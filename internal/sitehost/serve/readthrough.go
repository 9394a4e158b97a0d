package serve

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/sitehost/pull"
)

// retryAfter is when who asked for something that cannot be pulled now may ask again.
const retryAfter = "10"

// Puller brings what the store lacks from the site's object store.
type Puller interface {
	// Site is whose artifacts it brings.
	Site() string
	// Name finds a name, in the store or in the object store.
	Name(ctx context.Context, artifact string, digest blob.Digest) (blob.Name, error)
	// Pending reports whether a name that Name found and that is not published yet
	// lists the blob.
	Pending(artifact string, digest blob.Digest) bool
	// Artifact has all of a name in the store; Prefetch begins that.
	Artifact(ctx context.Context, artifact string, digest blob.Digest) error
	Prefetch(artifact string, digest blob.Digest)
	Blob(ctx context.Context, digest blob.Digest) error
}

// missError says that something is not on the host and could not be pulled.
type missError struct{ err error }

func (e *missError) Error() string { return "not on this host, and " + e.err.Error() }
func (e *missError) Unwrap() error { return e.err }

// pullerFor gives the puller for a site; nil where none brings its artifacts.
func (h *handler) pullerFor(site string) (Puller, error) {
	if h.puller == nil {
		return nil, nil
	}
	puller, err := h.puller()
	if err != nil {
		return nil, &missError{err}
	}
	if puller == nil || puller.Site() != site {
		return nil, nil
	}
	return puller, nil
}

// missed keeps what is nowhere apart from what could not be asked for.
func missed(err error) error {
	if err == nil || pull.Code(err) == pull.CodeNotFound {
		return err
	}
	return &missError{err}
}

// pullFile has a file of a name on the host that was missing.
func (h *handler) pullFile(ctx context.Context, writer http.ResponseWriter, site, artifact, hex string) error {
	puller, err := h.pullerFor(site)
	if err != nil || puller == nil {
		return orMissing(err)
	}
	name, err := puller.Name(ctx, artifact, digestOf(hex))
	if err != nil {
		return missed(err)
	}
	if name.Kind != blob.KindFile {
		return os.ErrNotExist
	}
	err = puller.Artifact(ctx, artifact, digestOf(hex))
	extend(writer)
	return missed(err)
}

// pullImagePart has a blob of an image on the host that was missing. It comes
// before the others of its image, which follow unasked.
func (h *handler) pullImagePart(ctx context.Context, writer http.ResponseWriter, site, artifact, hex string, manifest, listed bool) error {
	puller, err := h.pullerFor(site)
	if err != nil || puller == nil {
		return orMissing(err)
	}
	digest := digestOf(hex)
	if !listed && !puller.Pending(artifact, digest) {
		if !manifest { // only a name says what an artifact's blobs are
			return os.ErrNotExist
		}
		name, err := puller.Name(ctx, artifact, digest)
		if err != nil {
			return missed(err)
		}
		if name.Kind != blob.KindImage {
			return os.ErrNotExist
		}
		if err := puller.Blob(ctx, digest); err != nil {
			return missed(err)
		}
		puller.Prefetch(artifact, digest)
		return nil
	}
	err = puller.Blob(ctx, digest)
	extend(writer)
	return missed(err)
}

func orMissing(err error) error {
	if err == nil {
		return os.ErrNotExist
	}
	return err
}

// extend gives the answer its whole time: what was pulled first does not count.
func extend(writer http.ResponseWriter) {
	// A recorder of a test has no deadline to set.
	_ = http.NewResponseController(writer).SetWriteDeadline(time.Now().Add(sendTimeout))
}

func digestOf(hex string) blob.Digest { return blob.Digest("sha256:" + hex) }

// explain gives the text for who asked.
func explain(status int, err error) string {
	var miss *missError
	if !errors.As(err, &miss) {
		return strings.ToLower(http.StatusText(status))
	}
	return fmt.Sprintf("%s: %v", strings.ToLower(http.StatusText(status)), miss)
}

// Package pull brings what a host's store lacks from the site's object store.
// Nothing that comes is believed: each chunk is proven before it is kept, and
// each blob before it is visible.
package pull

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
)

const (
	defaultParallel = 8
	// blobsAtOnce are pulled side by side: most of an image are small.
	blobsAtOnce = 4
	maxName     = 1 << 20
	// longestName is that of an artifact; see blob.Name.
	longestName = 100
	// mostPending bounds the names that are known and not published yet.
	mostPending = 1024
	// maxRounds bounds how often chunks are asked for again that were damaged or
	// removed on the host meanwhile.
	maxRounds = 4
)

// KeySource gives the keys that may read the object store. With refresh, those
// in use were refused.
type KeySource interface {
	Keys(ctx context.Context, refresh bool) (id string, key secret.Value, generation int, err error)
}

// Options say from where to where.
type Options struct {
	Config host.ObjectStore
	Store  *blob.Store
	Keys   KeySource
	// HTTP is a client for the object store; nil: one of the package's own.
	HTTP *http.Client
	Log  *slog.Logger
	// Parallel is how many requests run at once. Default 8.
	Parallel int
	// MakeRoom is asked for free bytes before they are needed; may be nil.
	MakeRoom func(ctx context.Context, need int64) error
}

// Want is an artifact that is to be in the store.
type Want struct {
	Artifact string      `json:"artifact"`
	Digest   blob.Digest `json:"digest"`
}

// Puller pulls into one store.
type Puller struct {
	options Options
	bucket  *bucket
	layout  writesession.Layout
	metrics *metrics

	// life ends with Close: a pull goes on when who asked for it goes away.
	life    context.Context
	end     context.CancelFunc
	running sync.WaitGroup
	flights singleflight.Group

	// reading lets one record at a time into memory.
	reading sync.Mutex

	mutex    sync.Mutex
	closed   bool
	pending  map[Want]blob.Name
	records  map[blob.Digest]writesession.Record
	watchers map[*watcher]bool
}

// New checks the options; it asks nothing yet.
func New(options Options) (*Puller, error) {
	if options.Parallel <= 0 {
		options.Parallel = defaultParallel
	}
	if options.Log == nil {
		options.Log = slog.New(slog.DiscardHandler)
	}
	bucket, err := newBucket(options)
	if err != nil {
		return nil, err
	}
	life, end := context.WithCancel(context.Background())
	return &Puller{
		options: options, bucket: bucket, layout: writesession.Layout{Site: options.Config.Site}, metrics: newMetrics(bucket),
		life: life, end: end, pending: map[Want]blob.Name{}, records: map[blob.Digest]writesession.Record{}, watchers: map[*watcher]bool{},
	}, nil
}

// Close ends what still runs. The store stays open.
func (p *Puller) Close() {
	p.mutex.Lock()
	p.closed = true
	p.mutex.Unlock()
	p.end()
	p.running.Wait()
}

// Site is whose artifacts are pulled.
func (p *Puller) Site() string { return p.options.Config.Site }

// begin keeps Close waiting until done is called; false: it is too late.
func (p *Puller) begin() (done func(), ok bool) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.closed {
		return nil, false
	}
	p.running.Add(1)
	return p.running.Done, true
}

var errClosed = errors.New("the pull was ended")

// share lets all who ask for the same wait for one. Who goes away does not end
// it for the others.
func (p *Puller) share(ctx context.Context, key string, do func(context.Context) error) error {
	result := p.flights.DoChan(key, func() (any, error) {
		done, ok := p.begin()
		if !ok {
			return nil, errClosed
		}
		defer done()
		return nil, do(p.life)
	})
	select {
	case got := <-result:
		return got.Err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Name finds a published name: in the store, or else in the object store.
func (p *Puller) Name(ctx context.Context, artifact string, digest blob.Digest) (blob.Name, error) {
	what := fmt.Sprintf("%s/%s@%s", p.Site(), artifact, digest)
	if len(artifact) > longestName {
		return blob.Name{}, &NotFoundError{What: what}
	}
	name, err := p.options.Store.Name(p.Site(), artifact, digest)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return name, err
	}
	want := Want{Artifact: artifact, Digest: digest}
	p.mutex.Lock()
	name, known := p.pending[want]
	p.mutex.Unlock()
	if known {
		return name, nil
	}
	content, err := p.bucket.get(ctx, what, p.layout.Name(artifact, digest), maxName)
	if err != nil {
		p.metrics.failed(ctx, err)
		return blob.Name{}, err
	}
	if name, err = p.parseName(want, content); err != nil {
		err = &CorruptError{What: what, Err: err}
		p.metrics.failed(ctx, err)
		return blob.Name{}, err
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if len(p.pending) >= mostPending {
		clear(p.pending)
	}
	p.pending[want] = name
	return name, nil
}

func (p *Puller) parseName(want Want, content []byte) (blob.Name, error) {
	var stored writesession.Artifact
	if err := json.Unmarshal(content, &stored); err != nil {
		return blob.Name{}, fmt.Errorf("decode its name: %w", err)
	}
	if stored.Artifact != want.Artifact || stored.Digest != want.Digest {
		return blob.Name{}, fmt.Errorf("it names %.200q at %.100q", stored.Artifact, string(stored.Digest))
	}
	name := stored.Name
	name.Site, name.Artifact = p.Site(), want.Artifact
	// What is never evicted comes by SSH alone.
	name.Platform = false
	return name, name.Validate()
}

// Pending reports whether a name that is not published yet lists the blob.
func (p *Puller) Pending(artifact string, digest blob.Digest) bool {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for want, name := range p.pending {
		if want.Artifact != artifact || name.Kind != blob.KindImage {
			continue
		}
		for _, listed := range name.Blobs {
			if listed == digest {
				return true
			}
		}
	}
	return false
}

// Artifact has all blobs of a name in the store, and publishes it there.
func (p *Puller) Artifact(ctx context.Context, artifact string, digest blob.Digest) error {
	return p.share(ctx, "name "+artifact+"@"+string(digest), func(ctx context.Context) error {
		err := p.artifact(ctx, artifact, digest)
		if errors.Is(err, fs.ErrNotExist) && Code(err) == CodeInternal {
			// A blob was removed between its pull and the name.
			err = p.artifact(ctx, artifact, digest)
		}
		return err
	})
}

func (p *Puller) artifact(ctx context.Context, artifact string, digest blob.Digest) error {
	name, err := p.Name(ctx, artifact, digest)
	if err != nil {
		return err
	}
	group, inner := errgroup.WithContext(ctx)
	group.SetLimit(blobsAtOnce)
	for _, each := range name.Blobs {
		group.Go(func() error { return p.Blob(inner, each) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if err := p.options.Store.PutName(name); err != nil {
		return err
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	delete(p.pending, Want{Artifact: artifact, Digest: digest})
	return nil
}

// Prefetch is Artifact in the background.
func (p *Puller) Prefetch(artifact string, digest blob.Digest) {
	done, ok := p.begin()
	if !ok {
		return
	}
	go func() {
		defer done()
		if err := p.Artifact(p.life, artifact, digest); err != nil && p.life.Err() == nil {
			p.options.Log.Warn("cannot pull an artifact", "artifact", artifact, "digest", digest, "error", err)
		}
	}()
}

// Blob has a blob in the store.
func (p *Puller) Blob(ctx context.Context, digest blob.Digest) error {
	present, err := p.options.Store.Has(digest)
	if err != nil || present {
		return err
	}
	return p.share(ctx, string(digest), func(ctx context.Context) error {
		err := p.pullBlob(ctx, digest)
		if err != nil {
			p.metrics.failed(ctx, err)
			return err
		}
		p.metrics.pulled.Inc()
		return nil
	})
}

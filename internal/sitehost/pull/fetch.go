package pull

import (
	"context"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// watcher counts the chunks that someone waits for, whoever pulls them.
type watcher struct {
	mutex       sync.Mutex
	awaited     map[blob.Digest]int64
	done, total int64
	progress    func(done, total int64)
}

func (w *watcher) arrived(digest blob.Digest) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	size, awaited := w.awaited[digest]
	if !awaited {
		return
	}
	delete(w.awaited, digest)
	w.done += size
	w.progress(w.done, w.total)
}

func (p *Puller) arrived(chunk piece) {
	p.metrics.plain.Add(float64(chunk.size))
	p.mutex.Lock()
	watchers := make([]*watcher, 0, len(p.watchers))
	for each := range p.watchers {
		watchers = append(watchers, each)
	}
	p.mutex.Unlock()
	for _, each := range watchers {
		each.arrived(chunk.digest)
	}
}

// Fetch has artifacts in the store, and publishes their names there. progress is
// told the plain bytes that came, of those that are to come; it may be nil.
func (p *Puller) Fetch(ctx context.Context, wants []Want, progress func(done, total int64)) error {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	watch := &watcher{awaited: map[blob.Digest]int64{}, progress: progress}
	p.mutex.Lock()
	p.watchers[watch] = true
	p.mutex.Unlock()
	defer func() {
		p.mutex.Lock()
		defer p.mutex.Unlock()
		delete(p.watchers, watch)
		clear(p.records)
	}()
	if err := p.prepare(ctx, wants, watch); err != nil {
		return err
	}
	progress(0, watch.total)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(blobsAtOnce)
	for _, want := range wants {
		group.Go(func() error { return p.Artifact(ctx, want.Artifact, want.Digest) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	// What another process had brought meanwhile did not pass here.
	watch.mutex.Lock()
	defer watch.mutex.Unlock()
	if watch.done < watch.total {
		progress(watch.total, watch.total)
	}
	return nil
}

// prepare reads the names and records of all that lacks, and makes room for all
// of it at once.
func (p *Puller) prepare(ctx context.Context, wants []Want, watch *watcher) error {
	lacking, err := p.lacking(ctx, wants)
	if err != nil || len(lacking) == 0 {
		return err
	}
	var mutex sync.Mutex
	var need int64
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(blobsAtOnce)
	for _, digest := range lacking {
		group.Go(func() error {
			record, err := p.record(ctx, digest)
			if err != nil {
				p.metrics.failed(ctx, err)
				return err
			}
			missing, err := p.missing(record)
			if err != nil {
				return err
			}
			mutex.Lock()
			defer mutex.Unlock()
			need += record.Manifest.Size + compressedSize(record, missing)
			watch.await(record, missing)
			p.mutex.Lock()
			defer p.mutex.Unlock()
			p.records[digest] = record
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if p.options.MakeRoom == nil {
		return nil
	}
	return p.options.MakeRoom(ctx, need)
}

func (w *watcher) await(record writesession.Record, missing []blob.Digest) {
	sizes := make(map[blob.Digest]int64, len(record.Manifest.Chunks))
	for _, chunk := range record.Manifest.Chunks {
		sizes[chunk.Digest] = chunk.Size
	}
	w.mutex.Lock()
	defer w.mutex.Unlock()
	for _, digest := range missing {
		if _, already := w.awaited[digest]; !already {
			w.awaited[digest] = sizes[digest]
			w.total += sizes[digest]
		}
	}
}

// lacking gives the blobs of the wanted artifacts that are not in the store.
func (p *Puller) lacking(ctx context.Context, wants []Want) ([]blob.Digest, error) {
	seen := map[blob.Digest]bool{}
	var lacking []blob.Digest
	for _, want := range wants {
		name, err := p.Name(ctx, want.Artifact, want.Digest)
		if err != nil {
			return nil, err
		}
		for _, digest := range name.Blobs {
			if seen[digest] {
				continue
			}
			seen[digest] = true
			present, err := p.options.Store.Has(digest)
			if err != nil {
				return nil, err
			}
			if !present {
				lacking = append(lacking, digest)
			}
		}
	}
	return lacking, nil
}

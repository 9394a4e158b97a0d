package server

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// raw is a digest in 32 bytes: an index holds many.
type raw [32]byte

// rawOf is only for digests that were checked.
func rawOf(digest blob.Digest) raw {
	var out raw
	_, _ = hex.Decode(out[:], []byte(digest.Hex()))
	return out
}

func (r raw) digest() blob.Digest { return blob.Digest("sha256:" + hex.EncodeToString(r[:])) }

// digestOfKey reads the digest that ends a key; false for what is not ours.
func digestOfKey(prefix, key string) (blob.Digest, bool) {
	if len(key) < len(prefix) || key[:len(prefix)] != prefix {
		return "", false
	}
	digest, err := blob.ParseDigest("sha256:" + key[len(prefix):])
	return digest, err == nil
}

// chunkEntry is one chunk in one pack: about 100 bytes with its place in the map.
type chunkEntry struct {
	digest               raw
	size, offset, length uint32
	pack                 uint32
}

type packEntry struct {
	digest   raw
	size     int64
	modified time.Time
	// there is false for one that records name and the bucket lacks.
	there bool
	// since is the change of the index that brought it.
	since uint64
}

type recordEntry struct {
	etag     string
	modified time.Time
	// unreadable records are as good as none, and written anew.
	unreadable bool
	packs      []uint32
	chunks     []uint32
	since      uint64
}

// index knows what the bucket has. It is only a memory of it: refresh brings what
// another process wrote or removed.
type index struct {
	layout writesession.Layout
	bucket writesession.Bucket
	// refreshing has one place.
	refreshing chan struct{}

	mutex   sync.RWMutex
	changes uint64
	packs   []packEntry
	packID  map[raw]uint32
	chunks  []chunkEntry
	byChunk map[raw]uint32
	records map[raw]*recordEntry
}

func newIndex(layout writesession.Layout, bucket writesession.Bucket) *index {
	return &index{
		layout: layout, bucket: bucket, refreshing: make(chan struct{}, 1),
		packID: map[raw]uint32{}, byChunk: map[raw]uint32{}, records: map[raw]*recordEntry{},
	}
}

// place is where a chunk lies.
type place struct {
	pack                 blob.Digest
	offset, length, size int64
}

func (x *index) pack(digest blob.Digest) (size int64, there bool) {
	x.mutex.RLock()
	defer x.mutex.RUnlock()
	id, known := x.packID[rawOf(digest)]
	if !known || !x.packs[id].there {
		return 0, false
	}
	return x.packs[id].size, true
}

func (x *index) chunk(digest blob.Digest) (place, bool) {
	x.mutex.RLock()
	defer x.mutex.RUnlock()
	id, known := x.byChunk[rawOf(digest)]
	if !known {
		return place{}, false
	}
	entry := x.chunks[id]
	if !x.packs[entry.pack].there {
		return place{}, false
	}
	return place{
		pack: x.packs[entry.pack].digest.digest(), offset: int64(entry.offset), length: int64(entry.length), size: int64(entry.size),
	}, true
}

// record says whether a blob has a record, and whether all that it needs is there.
func (x *index) record(digest blob.Digest) (known, intact bool) {
	x.mutex.RLock()
	defer x.mutex.RUnlock()
	entry := x.records[rawOf(digest)]
	if entry == nil {
		return false, false
	}
	if entry.unreadable {
		return true, false
	}
	for _, id := range entry.packs {
		if !x.packs[id].there {
			return true, false
		}
	}
	return true, true
}

func (x *index) totals() (packs int, bytes int64) {
	x.mutex.RLock()
	defer x.mutex.RUnlock()
	for _, pack := range x.packs {
		if pack.there {
			packs, bytes = packs+1, bytes+pack.size
		}
	}
	return packs, bytes
}

// addPack and addRecord note what was just written.
func (x *index) addPack(digest blob.Digest, size int64, modified time.Time) {
	x.mutex.Lock()
	defer x.mutex.Unlock()
	x.changes++
	id := x.internPack(rawOf(digest))
	x.packs[id].size, x.packs[id].modified, x.packs[id].there, x.packs[id].since = size, modified, true, x.changes
}

func (x *index) addRecord(record writesession.Record, etag string, modified time.Time) {
	x.mutex.Lock()
	defer x.mutex.Unlock()
	x.changes++
	x.insert(record, etag, modified)
}

func (x *index) internPack(digest raw) uint32 {
	if id, known := x.packID[digest]; known {
		return id
	}
	id := uint32(len(x.packs))
	x.packs = append(x.packs, packEntry{digest: digest})
	x.packID[digest] = id
	return id
}

// insert takes a valid record. The caller holds the mutex.
func (x *index) insert(record writesession.Record, etag string, modified time.Time) {
	entry := &recordEntry{etag: etag, modified: modified, since: x.changes, chunks: make([]uint32, 0, len(record.Places))}
	for _, pack := range record.Packs {
		entry.packs = append(entry.packs, x.internPack(rawOf(pack)))
	}
	for i, at := range record.Places {
		chunk := record.Manifest.Chunks[i]
		entry.chunks = append(entry.chunks, x.internChunk(chunkEntry{
			digest: rawOf(chunk.Digest), size: uint32(chunk.Size),
			offset: uint32(at.Offset), length: uint32(at.Length), pack: entry.packs[at.Pack],
		}))
	}
	x.records[rawOf(record.Manifest.Digest)] = entry
}

func (x *index) internChunk(chunk chunkEntry) uint32 {
	old, known := x.byChunk[chunk.digest]
	if known && x.chunks[old] == chunk {
		return old
	}
	id := uint32(len(x.chunks))
	x.chunks = append(x.chunks, chunk)
	if !known || (!x.packs[x.chunks[old].pack].there && x.packs[chunk.pack].there) {
		x.byChunk[chunk.digest] = id
	}
	return id
}

// rebuild forgets what no record names any more. The caller holds the mutex.
func (x *index) rebuild() {
	packs, chunks := x.packs, x.chunks
	x.packs, x.packID, x.chunks, x.byChunk = nil, map[raw]uint32{}, nil, map[raw]uint32{}
	moved := func(id uint32) uint32 {
		to := x.internPack(packs[id].digest)
		x.packs[to] = packs[id]
		return to
	}
	for id := range packs {
		if packs[id].there {
			moved(uint32(id))
		}
	}
	for _, record := range x.records {
		for i, id := range record.packs {
			record.packs[i] = moved(id)
		}
		for i, id := range record.chunks {
			chunk := chunks[id]
			chunk.pack = moved(chunk.pack)
			record.chunks[i] = x.internChunk(chunk)
		}
	}
}

// refresh brings the index up to date: two listings, and one read for each record
// that is new.
func (x *index) refresh(ctx context.Context) error {
	select {
	case x.refreshing <- struct{}{}:
		defer func() { <-x.refreshing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	x.mutex.RLock()
	began := x.changes
	x.mutex.RUnlock()
	packs, err := listDigests(ctx, x.bucket, x.layout.Packs())
	if err != nil {
		return err
	}
	records, err := listDigests(ctx, x.bucket, x.layout.Blobs())
	if err != nil {
		return err
	}
	dropped := x.takeListings(packs, records, began)
	if err := x.readRecords(ctx, x.unread(records)); err != nil {
		return err
	}
	if dropped {
		x.mutex.Lock()
		defer x.mutex.Unlock()
		x.rebuild()
	}
	return nil
}

func listDigests(ctx context.Context, bucket writesession.Bucket, prefix string) (map[raw]writesession.Info, error) {
	found := map[raw]writesession.Info{}
	for info, err := range bucket.List(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		if digest, ok := digestOfKey(prefix, info.Key); ok {
			found[rawOf(digest)] = info
		}
	}
	return found, nil
}

// takeListings marks packs and drops records that are gone; what came after the
// listing began is left as it is.
func (x *index) takeListings(packs, records map[raw]writesession.Info, began uint64) (dropped bool) {
	x.mutex.Lock()
	defer x.mutex.Unlock()
	for digest, info := range packs {
		pack := &x.packs[x.internPack(digest)]
		dropped = dropped || !pack.there // one that came back may be a better place
		pack.size, pack.modified, pack.there = info.Size, info.Modified, true
	}
	for id := range x.packs {
		pack := &x.packs[id]
		if _, listed := packs[pack.digest]; !listed && pack.there && pack.since <= began {
			pack.there, dropped = false, true
		}
	}
	maps.DeleteFunc(x.records, func(digest raw, record *recordEntry) bool {
		_, listed := records[digest]
		gone := !listed && record.since <= began
		dropped = dropped || gone
		return gone
	})
	return dropped
}

// unread are the records that are new, or not what was read.
func (x *index) unread(listed map[raw]writesession.Info) []raw {
	x.mutex.RLock()
	defer x.mutex.RUnlock()
	var out []raw
	for digest, info := range listed {
		known := x.records[digest]
		// Without an etag this process wrote it, and knows what is in it.
		if known == nil || (known.etag != "" && known.etag != info.ETag) {
			out = append(out, digest)
		}
	}
	return out
}

func (x *index) readRecords(ctx context.Context, digests []raw) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallelPacks)
	for _, digest := range digests {
		group.Go(func() error { return x.readRecord(ctx, digest) })
	}
	return group.Wait()
}

func (x *index) readRecord(ctx context.Context, digest raw) error {
	stored, info, err := getAll(ctx, x.bucket, x.layout.Blob(digest.digest()), writesession.MaxRecordBytes)
	if errors.Is(err, writesession.ErrNotFound) {
		return nil // removed since it was listed
	}
	var long *tooLongError
	if err != nil && !errors.As(err, &long) {
		return err
	}
	var record writesession.Record
	if err == nil {
		record, err = writesession.ParseRecord(stored)
	}
	if err == nil && record.Manifest.Digest != digest.digest() {
		err = fmt.Errorf("it is of %s", record.Manifest.Digest)
	}
	x.mutex.Lock()
	defer x.mutex.Unlock()
	x.changes++
	if err != nil {
		x.records[digest] = &recordEntry{etag: info.ETag, modified: info.Modified, unreadable: true, since: x.changes}
		return nil
	}
	x.insert(record, info.ETag, info.Modified)
	return nil
}

// tooLongError is an object that cannot be what its key says.
type tooLongError struct{ key string }

func (e *tooLongError) Error() string { return e.key + " is longer than it can be" }

// getAll reads a small object.
func getAll(ctx context.Context, bucket writesession.Bucket, key string, limit int64) ([]byte, writesession.Info, error) {
	reader, info, err := bucket.Get(ctx, key, 0, 0)
	if err != nil {
		return nil, writesession.Info{}, err
	}
	defer reader.Close()
	if info.Size > limit {
		return nil, info, &tooLongError{key}
	}
	content, err := io.ReadAll(io.LimitReader(reader, limit+1))
	if err != nil {
		return nil, info, broken("read "+key, err)
	}
	if int64(len(content)) > limit {
		return nil, info, &tooLongError{key}
	}
	return content, info, nil
}

// broken is a stream that ended early: trying again may help.
func broken(what string, err error) error {
	var unavailable *writesession.UnavailableError
	if errors.As(err, &unavailable) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return &writesession.UnavailableError{What: what, Err: err}
}

// Package storetest is an object store in memory, for tests: a
// writesession.Bucket whose presigned uploads are real HTTP requests, and whose
// faults are at a test's command.
package storetest

import (
	"bytes"
	"context"
	"crypto/md5" //nolint:gosec // an etag, as S3 has it
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"iter"
	"maps"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// What Fail and Counts call the operations. Upload is a PUT at a presigned URL.
const (
	Get     = "get"
	Head    = "head"
	Put     = "put"
	Copy    = "copy"
	Delete  = "delete"
	List    = "list"
	Presign = "presign"
	Upload  = "upload"
)

// Options say which kind of store it is.
type Options struct {
	// Enforces refuses an upload of other bytes than were signed. Without it any
	// bytes of any size are taken.
	Enforces bool
	// OneWritePerSecond refuses a second write of a key within a second, as R2
	// does: with status 429, or an UnavailableError that says when.
	OneWritePerSecond bool
	// Now is the store's clock; nil is the real one.
	Now func() time.Time
}

// Store is the store. All its methods may be called at once.
type Store struct {
	options Options
	server  *httptest.Server

	mutex   sync.Mutex
	objects map[string]object
	grants  map[string]grant
	writes  map[string]int
	written map[string]time.Time
	hot     map[string]bool
	counts  map[string]int
	before  func(operation, key string) error
	after   func(operation, key string) error
}

// object is immutable once it is in the map.
type object struct {
	content  []byte
	etag     string
	modified time.Time
}

// grant is one presigned URL.
type grant struct {
	key     string
	headers map[string]string
	digest  blob.Digest
	size    int64
	expires time.Time
}

var _ writesession.Bucket = (*Store)(nil)

// New starts an empty store, which ends with the test.
func New(t testing.TB, options Options) *Store {
	t.Helper()
	if options.Now == nil {
		options.Now = time.Now
	}
	s := &Store{
		options: options,
		objects: map[string]object{}, grants: map[string]grant{},
		writes: map[string]int{}, written: map[string]time.Time{}, hot: map[string]bool{}, counts: map[string]int{},
	}
	s.server = httptest.NewServer(s.handler())
	t.Cleanup(s.server.Close)
	return s
}

// Get implements writesession.Bucket.
func (s *Store) Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, writesession.Info, error) {
	found, err := s.find(ctx, Get, key)
	if err != nil {
		return nil, writesession.Info{}, err
	}
	size := int64(len(found.content))
	if offset < 0 || length < 0 || offset > size || (offset == size && size > 0) {
		return nil, writesession.Info{}, fmt.Errorf("get %s: the range %d+%d is not within %d bytes", key, offset, length, size)
	}
	end := size
	if length > 0 {
		end = min(size, offset+length)
	}
	return io.NopCloser(bytes.NewReader(found.content[offset:end])), found.info(key), nil
}

// Head implements writesession.Bucket.
func (s *Store) Head(ctx context.Context, key string) (writesession.Info, error) {
	found, err := s.find(ctx, Head, key)
	if err != nil {
		return writesession.Info{}, err
	}
	return found.info(key), nil
}

// Put implements writesession.Bucket.
func (s *Store) Put(ctx context.Context, key string, content []byte, create bool) error {
	if err := s.begin(ctx, Put, key); err != nil {
		return err
	}
	if err := s.write(key, content, create); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	return s.end(Put, key)
}

// Copy implements writesession.Bucket.
func (s *Store) Copy(ctx context.Context, from, to, etag string) error {
	if err := s.begin(ctx, Copy, to); err != nil {
		return err
	}
	found, exists := s.object(from)
	switch {
	case !exists:
		return fmt.Errorf("copy %s: %w", from, writesession.ErrNotFound)
	case found.etag != etag:
		return fmt.Errorf("copy %s: %w", from, writesession.ErrChanged)
	}
	if err := s.write(to, found.content, false); err != nil {
		return fmt.Errorf("copy to %s: %w", to, err)
	}
	return s.end(Copy, to)
}

// Delete implements writesession.Bucket. Each key may fail on its own.
func (s *Store) Delete(ctx context.Context, keys ...string) error {
	for _, key := range keys {
		if err := s.begin(ctx, Delete, key); err != nil {
			return err
		}
		s.mutex.Lock()
		delete(s.objects, key)
		s.mutex.Unlock()
		if err := s.end(Delete, key); err != nil {
			return err
		}
	}
	return nil
}

// List implements writesession.Bucket: what is there when it begins.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[writesession.Info, error] {
	return func(yield func(writesession.Info, error) bool) {
		if err := s.begin(ctx, List, prefix); err != nil {
			yield(writesession.Info{}, err)
			return
		}
		s.mutex.Lock()
		all := maps.Clone(s.objects)
		s.mutex.Unlock()
		for _, key := range slices.Sorted(maps.Keys(all)) {
			if strings.HasPrefix(key, prefix) && !yield(all[key].info(key), nil) {
				return
			}
		}
		if err := s.end(List, prefix); err != nil {
			yield(writesession.Info{}, err)
		}
	}
}

// PresignPut implements writesession.Bucket.
func (s *Store) PresignPut(ctx context.Context, key string, digest blob.Digest, size int64, ttl time.Duration) (writesession.Put, error) {
	if err := s.begin(ctx, Presign, key); err != nil {
		return writesession.Put{}, err
	}
	token := rand.Text()
	headers := map[string]string{"X-Amz-Content-Sha256": digest.Hex(), "X-Amz-Checksum-Sha256": checksum(digest)}
	expires := s.options.Now().Add(ttl)
	s.mutex.Lock()
	s.grants[token] = grant{key: key, headers: headers, digest: digest, size: size, expires: expires}
	s.mutex.Unlock()
	return writesession.Put{URL: s.server.URL + "/" + key + "?X-Amz-Signature=" + token, Headers: maps.Clone(headers), Expires: expires}, nil
}

// find is a read of one object.
func (s *Store) find(ctx context.Context, operation, key string) (object, error) {
	if err := s.begin(ctx, operation, key); err != nil {
		return object{}, err
	}
	found, exists := s.object(key)
	if !exists {
		return object{}, fmt.Errorf("%s %s: %w", operation, key, writesession.ErrNotFound)
	}
	return found, s.end(operation, key)
}

func (s *Store) object(key string) (object, bool) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	found, exists := s.objects[key]
	return found, exists
}

// write is the one place where an object comes to be.
func (s *Store) write(key string, content []byte, create bool) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	now := s.options.Now()
	if _, exists := s.objects[key]; exists && create {
		return writesession.ErrExists
	}
	if last, written := s.written[key]; written && now.Sub(last) < time.Second {
		s.hot[key] = true
		if s.options.OneWritePerSecond {
			return &writesession.UnavailableError{What: "write " + key, RetryAfter: last.Add(time.Second).Sub(now), Err: errTooOften}
		}
	}
	s.objects[key] = newObject(content, now)
	s.writes[key]++
	s.written[key] = now
	return nil
}

func newObject(content []byte, now time.Time) object {
	sum := md5.Sum(content) //nolint:gosec // an etag, as S3 has it
	return object{content: bytes.Clone(content), etag: `"` + hex.EncodeToString(sum[:]) + `"`, modified: now}
}

// begin is before anything happens.
func (s *Store) begin(ctx context.Context, operation, key string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mutex.Lock()
	s.counts[operation]++
	hook := s.before
	s.mutex.Unlock()
	return call(hook, operation, key)
}

// end is when it has happened and the answer is on its way.
func (s *Store) end(operation, key string) error {
	s.mutex.Lock()
	hook := s.after
	s.mutex.Unlock()
	return call(hook, operation, key)
}

func call(hook func(operation, key string) error, operation, key string) error {
	if hook == nil {
		return nil
	}
	return hook(operation, key)
}

func (o object) info(key string) writesession.Info {
	return writesession.Info{Key: key, Size: int64(len(o.content)), ETag: o.etag, Modified: o.modified}
}

package pull

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/sitehost/pull/pulltest"
	"github.com/nomad-site/site/internal/writesession"
)

// fixedKeys are keys that a test changes.
type fixedKeys struct {
	mutex      sync.Mutex
	id, key    string
	generation int
	refreshes  int
	// next is taken at a refresh.
	next func(k *fixedKeys)
}

func (k *fixedKeys) Keys(_ context.Context, refresh bool) (string, secret.Value, int, error) {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if refresh {
		k.refreshes++
		if k.next != nil {
			k.next(k)
		}
	}
	if k.id == "" {
		return "", secret.Value{}, 0, &NoKeysError{Err: errors.New("OpenBao is sealed")}
	}
	return k.id, secret.New(k.key), k.generation, nil
}

type fixture struct {
	bucket *pulltest.Bucket
	keys   *fixedKeys
	store  *blob.Store
	puller *Puller
}

func newFixture(t *testing.T, change ...func(*Options)) *fixture {
	t.Helper()
	f := &fixture{bucket: pulltest.NewBucket(t), keys: &fixedKeys{id: "id-1", key: "key-1", generation: 1}}
	var err error
	f.store, err = blob.OpenStore(filepath.Join(t.TempDir(), "store"))
	must(t, err)
	options := Options{Config: f.bucket.Config(), Store: f.store, Keys: f.keys}
	for _, each := range change {
		each(&options)
	}
	f.puller, err = New(options)
	must(t, err)
	f.puller.bucket.patience = 2 * time.Second
	t.Cleanup(func() {
		f.puller.Close()
		_ = f.store.Close()
	})
	return f
}

func wants(names ...blob.Name) []Want {
	var out []Want
	for _, name := range names {
		out = append(out, Want{Artifact: name.Artifact, Digest: name.Digest})
	}
	return out
}

// holds insists that the store has a name with exactly these bytes.
func (f *fixture) holds(t *testing.T, name blob.Name, contents ...[]byte) {
	t.Helper()
	got, err := f.store.Name(pulltest.Site, name.Artifact, name.Digest)
	must(t, err)
	if !slices.Equal(got.Blobs, name.Blobs) || got.Size != name.Size || got.Kind != name.Kind {
		t.Errorf("published as %+v", got)
	}
	for i, digest := range name.Blobs {
		file, err := f.store.Open(digest)
		must(t, err)
		defer file.Close()
		content, err := os.ReadFile(file.Name())
		must(t, err)
		if !bytes.Equal(content, contents[i]) {
			t.Errorf("blob %d has %d bytes, want %d", i, len(content), len(contents[i]))
		}
	}
}

// holdsNothing insists that nothing of a failed pull is visible.
func (f *fixture) holdsNothing(t *testing.T) {
	t.Helper()
	blobs, err := f.store.Blobs()
	must(t, err)
	names, err := f.store.Names()
	must(t, err)
	if len(blobs) > 0 || len(names) > 0 {
		t.Errorf("visible: %v, %v", blobs, names)
	}
}

func TestWhatTheHostLacksIsPulledAndPublished(t *testing.T) {
	f := newFixture(t)
	manifest, layer := []byte(`{"schemaVersion":2}`), pulltest.Random(1, 3<<20)
	image := f.bucket.Publish(t, "hello", blob.KindImage, manifest, layer)
	tool := f.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(2, 1000))
	var lastDone, lastTotal int64
	must(t, f.puller.Fetch(t.Context(), wants(image, tool), func(done, total int64) {
		if done < lastDone || done > total {
			t.Errorf("progress %d of %d after %d", done, total, lastDone)
		}
		lastDone, lastTotal = done, total
	}))
	f.holds(t, image, manifest, layer)
	f.holds(t, tool, pulltest.Random(2, 1000))
	if want := image.Size + tool.Size; lastDone != want || lastTotal != want {
		t.Errorf("progress ended at %d of %d, want %d", lastDone, lastTotal, want)
	}
	if waiting, err := os.ReadDir(filepath.Join(f.store.Dir(), "incoming")); err != nil || len(waiting) > 0 {
		t.Errorf("left in incoming: %d, %v", len(waiting), err)
	}
	before := f.bucket.Requests("")
	must(t, f.puller.Fetch(t.Context(), wants(image, tool), nil))
	if after := f.bucket.Requests(""); after != before {
		t.Errorf("%d requests for what is there", after-before)
	}
}

func TestASmallChangeCostsAFewChunks(t *testing.T) {
	f := newFixture(t)
	content := pulltest.Random(1, 8<<20)
	must(t, f.puller.Fetch(t.Context(), wants(f.bucket.Publish(t, "tool", blob.KindFile, content)), nil))
	changed := bytes.Clone(content)
	copy(changed[4<<20:], "a changed line")
	next := f.bucket.Publish(t, "tool", blob.KindFile, changed)
	packs, received := f.bucket.Requests("packs"), f.bucket.Sent()
	var total int64
	must(t, f.puller.Fetch(t.Context(), wants(next), func(_, of int64) { total = of }))
	f.holds(t, next, changed)
	if requests := f.bucket.Requests("packs") - packs; requests > 2 {
		t.Errorf("%d requests for packs", requests)
	}
	if bytes := f.bucket.Sent() - received; bytes > 1<<20 || total > 1<<20 {
		t.Errorf("%d bytes came, progress of %d", bytes, total)
	}
}

func TestThoseWhoAskAtOnceWaitForOnePull(t *testing.T) {
	f := newFixture(t)
	content := pulltest.Random(1, 4<<20)
	name := f.bucket.Publish(t, "tool", blob.KindFile, content)
	gone, leave := context.WithCancel(t.Context())
	leave() // one that goes away does not end it for the others
	var group sync.WaitGroup
	for i := range 16 {
		group.Go(func() {
			ctx := t.Context()
			if i == 0 {
				ctx = gone
			}
			err := f.puller.Artifact(ctx, name.Artifact, name.Digest)
			if (i == 0) != errors.Is(err, context.Canceled) || (i > 0 && err != nil) {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	group.Wait()
	f.holds(t, name, content)
	for key, n := range f.bucket.Gets() {
		if n > 1 && !strings.Contains(key, "/packs/") {
			t.Errorf("%s was read %d times", key, n)
		}
	}
	if f.bucket.Sent() > 4<<20+1<<17 {
		t.Errorf("%d bytes came", f.bucket.Sent())
	}
}

func TestAPullGoesOnWhereTheConnectionBroke(t *testing.T) {
	f := newFixture(t, func(o *Options) { o.Parallel = 1 })
	content := pulltest.Random(1, 4<<20)
	name := f.bucket.Publish(t, "tool", blob.KindFile, content)
	broken := map[string]bool{}
	f.bucket.Cut = func(key string) int {
		if broken[key] || !strings.Contains(key, "/packs/") {
			return 0
		}
		broken[key] = true
		return 400 << 10
	}
	must(t, f.puller.Fetch(t.Context(), wants(name), nil))
	f.holds(t, name, content)
	// What was proven before the breaks did not come again.
	if len(broken) < 4 || f.bucket.Sent() > 4<<20+1<<17-len(broken)*(100<<10) {
		t.Errorf("%d bytes came after %d breaks", f.bucket.Sent(), len(broken))
	}
}

func TestAStoreThatIsAwayForAWhileIsWaitedFor(t *testing.T) {
	f := newFixture(t)
	f.puller.bucket.patience = time.Minute
	content := pulltest.Random(1, 1<<20)
	name := f.bucket.Publish(t, "tool", blob.KindFile, content)
	var asked atomic.Int64
	f.bucket.Fault = func(writer http.ResponseWriter, _ string) bool {
		statuses := []int{http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusInternalServerError}
		turn := asked.Add(1) - 1
		if turn >= int64(len(statuses)) {
			return false
		}
		pulltest.Error(writer, statuses[turn], "SlowDown")
		return true
	}
	must(t, f.puller.Fetch(t.Context(), wants(name), nil))
	f.holds(t, name, content)
}

func TestRefusedKeysAreReadAgain(t *testing.T) {
	for name, next := range map[string][2]string{"another pair": {"id-2", "key-2"}, "another key of the same id": {"id-1", "key-2"}} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			content := pulltest.Random(1, 2<<20)
			first, second := f.bucket.Publish(t, "tool", blob.KindFile, content[:1000]), f.bucket.Publish(t, "tool", blob.KindFile, content)
			must(t, f.puller.Fetch(t.Context(), wants(first), nil))
			f.bucket.Keys = map[string]string{next[0]: next[1]}
			f.keys.next = func(k *fixedKeys) { k.id, k.key, k.generation = next[0], next[1], 2 }
			must(t, f.puller.Fetch(t.Context(), wants(second), nil))
			f.holds(t, second, content)
			if f.keys.refreshes == 0 {
				t.Error("the keys were not asked for again")
			}
		})
	}
}

func TestWhyAPullFailsIsSaid(t *testing.T) {
	for _, test := range []struct {
		name  string
		spoil func(t *testing.T, f *fixture, name *blob.Name)
		code  string
		says  string
	}{
		{"a name that was never published", func(_ *testing.T, _ *fixture, name *blob.Name) {
			name.Digest = blob.DigestOf([]byte("other"))
		}, CodeNotFound, "does not have it"},
		{"a blob without a record", func(_ *testing.T, f *fixture, name *blob.Name) {
			delete(f.bucket.Objects, f.puller.layout.Blob(name.Digest))
		}, CodeNotFound, "does not have it"},
		{"a pack that is gone", func(_ *testing.T, f *fixture, _ *blob.Name) {
			f.eachPack(func(key string, _ []byte) { delete(f.bucket.Objects, key) })
		}, CodeCorrupt, "the pack is gone"},
		{"a wrong byte in a pack", func(_ *testing.T, f *fixture, _ *blob.Name) {
			f.eachPack(func(_ string, pack []byte) { pack[len(pack)/2] ^= 1 })
		}, CodeCorrupt, "holds something else"},
		{"a pack that is cut short", func(_ *testing.T, f *fixture, _ *blob.Name) {
			f.eachPack(func(key string, pack []byte) { f.bucket.Objects[key] = pack[:len(pack)/2] })
		}, CodeCorrupt, "shorter than its record says"},
		{"the record of another blob", func(t *testing.T, f *fixture, name *blob.Name) {
			other := f.bucket.Publish(t, "other", blob.KindFile, pulltest.Random(9, 1000))
			f.bucket.Put(f.puller.layout.Blob(name.Digest), f.bucket.Objects[f.puller.layout.Blob(other.Digest)])
		}, CodeCorrupt, "its record is of"},
		{"a record that unpacks to gigabytes", func(_ *testing.T, f *fixture, name *blob.Name) {
			// A frame header: 8 GiB, one segment.
			f.bucket.Put(f.puller.layout.Blob(name.Digest), []byte("\x28\xb5\x2f\xfd\xe0\x00\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00"))
		}, CodeCorrupt, "longer than"},
		{"chunks that make another blob", func(t *testing.T, f *fixture, name *blob.Name) {
			record := f.bucket.Store(t, pulltest.Random(7, 1000))
			record.Manifest.Digest = name.Digest
			encoded, err := record.Encode()
			must(t, err)
			f.bucket.Put(f.puller.layout.Blob(name.Digest), encoded)
		}, CodeCorrupt, "assembled blob"},
		{"a name of something else", func(t *testing.T, f *fixture, name *blob.Name) {
			other := f.bucket.Publish(t, "other", blob.KindFile, pulltest.Random(9, 1000))
			f.bucket.Put(f.puller.layout.Name(name.Artifact, name.Digest), f.bucket.Objects[f.puller.layout.Name("other", other.Digest)])
		}, CodeCorrupt, "it names"},
		{"a name that is no name", func(_ *testing.T, f *fixture, name *blob.Name) {
			f.bucket.Put(f.puller.layout.Name(name.Artifact, name.Digest), []byte("<html>"))
		}, CodeCorrupt, "decode its name"},
		{"keys that are refused", func(_ *testing.T, f *fixture, _ *blob.Name) {
			f.bucket.Keys = nil
		}, CodeDenied, "refuses the host's keys (generation 1): InvalidAccessKeyId"},
		{"a wrong key", func(_ *testing.T, f *fixture, _ *blob.Name) {
			f.keys.key = "another"
		}, CodeDenied, "SignatureDoesNotMatch"},
		{"no keys", func(_ *testing.T, f *fixture, _ *blob.Name) { f.keys.id = "" }, CodeNoKeys, "OpenBao is sealed"},
		{"a bucket that is gone", func(_ *testing.T, f *fixture, _ *blob.Name) {
			f.puller.bucket.base = f.puller.bucket.base.JoinPath("..", "elsewhere")
		}, CodeUnreachable, "NoSuchBucket"},
		{"a store that is away", func(_ *testing.T, f *fixture, _ *blob.Name) { f.bucket.Close() }, CodeUnreachable, "connection refused"},
		{"a store that cannot now", func(_ *testing.T, f *fixture, _ *blob.Name) {
			f.bucket.Fault = func(writer http.ResponseWriter, _ string) bool {
				pulltest.Error(writer, http.StatusServiceUnavailable, "SlowDown")
				return true
			}
		}, CodeUnreachable, "status 503, SlowDown"},
		{"a store that sends elsewhere", func(_ *testing.T, f *fixture, _ *blob.Name) {
			f.bucket.Fault = func(writer http.ResponseWriter, _ string) bool {
				writer.Header().Set("Location", "http://127.0.0.1:1/")
				writer.WriteHeader(http.StatusTemporaryRedirect)
				return true
			}
		}, CodeUnreachable, "status 307"},
		{"a full disk", func(_ *testing.T, f *fixture, _ *blob.Name) {
			f.puller.options.MakeRoom = func(context.Context, int64) error { return &blob.NoSpaceError{Path: f.store.Dir()} }
		}, CodeNoSpace, "no space left"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.puller.bucket.patience = 300 * time.Millisecond
			name := f.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(1, 1<<20))
			test.spoil(t, f, &name)
			err := f.puller.Fetch(t.Context(), wants(name), nil)
			if Code(err) != test.code || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s: %v", Code(err), err)
			}
			if plan.HintOf(err) == "" {
				t.Errorf("no hint: %v", err)
			}
			if strings.Contains(err.Error(), "key-1") || strings.Contains(err.Error(), "Signature=") {
				t.Errorf("it tells a secret: %v", err)
			}
			if (test.code == CodeNotFound) != errors.Is(err, fs.ErrNotExist) {
				t.Errorf("is it fs.ErrNotExist? %v", err)
			}
			f.holdsNothing(t)
		})
	}
}

func (f *fixture) eachPack(do func(key string, pack []byte)) {
	for key, pack := range f.bucket.Objects {
		if strings.Contains(key, "/packs/") {
			do(key, pack)
		}
	}
}

func TestAfterAFailureTheNextPullWorks(t *testing.T) {
	f := newFixture(t)
	content := pulltest.Random(1, 4<<20)
	name := f.bucket.Publish(t, "tool", blob.KindFile, content)
	flip := func(key string, pack []byte) {
		pack = bytes.Clone(pack) // a request may be under way still
		pack[100] ^= 1
		f.bucket.Put(key, pack)
	}
	f.eachPack(flip)
	if err := f.puller.Fetch(t.Context(), wants(name), nil); Code(err) != CodeCorrupt {
		t.Fatal(err)
	}
	f.holdsNothing(t)
	f.eachPack(flip)
	must(t, f.puller.Fetch(t.Context(), wants(name), nil))
	f.holds(t, name, content)
}

func TestAPlatformNameFromTheStoreIsNotKeptForEver(t *testing.T) {
	f := newFixture(t)
	name := f.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(1, 1000))
	key := f.puller.layout.Name("tool", name.Digest)
	f.bucket.Put(key, bytes.Replace(f.bucket.Objects[key], []byte(`"platform":false`), []byte(`"platform":true`), 1))
	must(t, f.puller.Fetch(t.Context(), wants(name), nil))
	if got, err := f.store.Name(pulltest.Site, "tool", name.Digest); err != nil || got.Platform {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRoomIsMadeBeforeAnythingComes(t *testing.T) {
	var asked int64
	var f *fixture
	f = newFixture(t, func(o *Options) {
		o.MakeRoom = func(_ context.Context, need int64) error {
			if asked == 0 && f.bucket.Requests("packs") > 0 {
				t.Error("chunks came first")
			}
			asked = max(asked, need)
			return nil
		}
	})
	name := f.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(1, 2<<20))
	must(t, f.puller.Fetch(t.Context(), wants(name), nil))
	if asked < 4<<20 || asked > 5<<20 { // the blob, and its chunks beside it
		t.Errorf("asked for %d bytes", asked)
	}
}

func TestWhatIsClosedPullsNothingMore(t *testing.T) {
	f := newFixture(t)
	name := f.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(1, 1000))
	f.puller.Close()
	f.puller.Prefetch("tool", name.Digest)
	if err := f.puller.Artifact(t.Context(), "tool", name.Digest); err == nil {
		t.Error("it was pulled")
	}
}

func TestRangesOfOnePackAreJoined(t *testing.T) {
	chunk := func(i int) blob.ChunkRef {
		return blob.ChunkRef{Digest: blob.DigestOf([]byte{byte(i)}), Size: 100 << 10}
	}
	const length = 60 << 10
	record := func(offsets ...int64) writesession.Record {
		r := writesession.Record{Packs: []blob.Digest{blob.DigestOf(nil)}}
		for i, offset := range offsets {
			r.Manifest.Chunks = append(r.Manifest.Chunks, chunk(i))
			r.Places = append(r.Places, writesession.Place{Offset: offset, Length: length})
		}
		return r
	}
	for _, test := range []struct {
		name    string
		offsets []int64
		missing []int
		want    []int // pieces of each span
	}{
		{"one behind the other", []int64{0, length, 2 * length}, []int{0, 1, 2}, []int{3}},
		{"in another order", []int64{2 * length, 0, length}, []int{0, 1, 2}, []int{3}},
		{"with a small gap", []int64{0, length, 2 * length}, []int{0, 2}, []int{2}},
		{"with a wide gap", []int64{0, length, 4 * length}, []int{0, 2}, []int{1, 1}},
		{"that overlap", []int64{0, length - 1}, []int{0, 1}, []int{1, 1}},
		{"nothing missing", []int64{0}, nil, nil},
		{"as long as a request may be", offsets(40, length), numbers(40), []int{17, 17, 6}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var missing []blob.Digest
			for _, i := range test.missing {
				missing = append(missing, chunk(i).Digest)
			}
			spans, err := spansOf(record(test.offsets...), missing, 8)
			must(t, err)
			var got []int
			for _, span := range spans {
				got = append(got, len(span.pieces))
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func offsets(n int, length int64) []int64 {
	var out []int64
	for i := range n {
		out = append(out, int64(i)*length)
	}
	return out
}

func numbers(n int) []int {
	var out []int
	for i := range n {
		out = append(out, i)
	}
	return out
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

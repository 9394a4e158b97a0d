package collect

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
)

type fixture struct {
	store *blob.Store
	list  string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	folder := filepath.Join(t.TempDir(), "store")
	store, err := blob.OpenStore(folder)
	must(t, err)
	t.Cleanup(func() { _ = store.Close() })
	return &fixture{store: store, list: ListPath(folder)}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) blob(t *testing.T, content string) blob.Digest {
	t.Helper()
	manifest, err := blob.Chunk(strings.NewReader(content))
	must(t, err)
	packer, err := blob.NewPacker(1)
	must(t, err)
	defer packer.Close()
	packed, err := packer.Pack(manifest.Chunks[0].Digest, []byte(content), nil)
	must(t, err)
	must(t, f.store.PutChunk(manifest.Chunks[0].Digest, packed))
	must(t, f.store.Assemble(manifest))
	return manifest.Digest
}

// name publishes an artifact that is as old as age.
func (f *fixture) name(t *testing.T, artifact string, age time.Duration, platform bool, contents ...string) blob.Name {
	t.Helper()
	name := blob.Name{Site: "lab", Artifact: artifact, Kind: blob.KindImage, Platform: platform}
	for _, content := range contents {
		name.Blobs = append(name.Blobs, f.blob(t, content))
		name.Size += int64(len(content))
	}
	name.Digest = name.Blobs[0]
	must(t, f.store.PutName(name))
	f.age(t, filepath.Join("names", "lab", artifact, name.Digest.Hex()+".json"), age)
	return name
}

func (f *fixture) age(t *testing.T, file string, age time.Duration) {
	t.Helper()
	at := time.Now().Add(-age)
	must(t, os.Chtimes(filepath.Join(f.store.Dir(), file), at, at))
}

func (f *fixture) keep(t *testing.T, names ...blob.Name) {
	t.Helper()
	var quoted []string
	for _, name := range names {
		quoted = append(quoted, `"`+name.String()+`"`)
	}
	_, err := WriteList(f.list, strings.NewReader(`{"names":[`+strings.Join(quoted, ",")+`]}`))
	must(t, err)
}

func (f *fixture) state(t *testing.T) (names []string, blobs int) {
	t.Helper()
	all, err := f.store.Names()
	must(t, err)
	for _, name := range all {
		names = append(names, name.Artifact+":"+name.Digest.Hex()[:8])
	}
	stored, err := f.store.Blobs()
	must(t, err)
	return names, len(stored)
}

func TestOnlyWhatNothingKeepsGoes(t *testing.T) {
	f := newFixture(t)
	kept := f.name(t, "shop", 48*time.Hour, false, "shop 2", "a layer of both")
	f.name(t, "shop", 72*time.Hour, false, "shop 1", "a layer of both", "a layer of the first alone")
	f.name(t, "openbao", 96*time.Hour, true, "openbao")
	f.name(t, "shop", 30*time.Minute, false, "shop 3")
	f.keep(t, kept)
	for _, dry := range []bool{true, false} {
		before, blobsBefore := f.state(t)
		result, err := Run(t.Context(), Options{Store: f.store, List: f.list, DryRun: dry})
		must(t, err)
		var fates []string
		for _, one := range result.Artifacts {
			fates = append(fates, one.Artifact+": "+one.Reason)
		}
		want := []string{"openbao: platform", "shop: no kept release has it", "shop: kept by the site", "shop: younger than an hour"}
		if !slices.Equal(fates, want) {
			t.Errorf("got %q", fates)
		}
		if size := int64(len("shop 1") + len("a layer of the first alone")); result.BytesFreed != size || result.Blobs != 2 {
			t.Errorf("freed %d bytes of %d blobs", result.BytesFreed, result.Blobs)
		}
		names, blobs := f.state(t)
		if dry && (!slices.Equal(names, before) || blobs != blobsBefore) {
			t.Error("a dry run removed something")
		}
		if !dry && (len(names) != 3 || blobs != 4) {
			t.Errorf("left: %v, %d blobs", names, blobs)
		}
	}
	for _, digest := range kept.Blobs {
		must(t, f.store.Verify(digest))
	}
}

func TestWithoutAListNothingGoes(t *testing.T) {
	f := newFixture(t)
	f.name(t, "shop", 72*time.Hour, false, "shop 1")
	result, err := Run(t.Context(), Options{Store: f.store, List: f.list})
	must(t, err)
	if names, blobs := f.state(t); result.Refused == "" || len(names) != 1 || blobs != 1 || result.Artifacts[0].Removed {
		t.Errorf("%+v", result)
	}
	must(t, os.WriteFile(f.list, []byte(`{"names":`), 0o600))
	if _, err := Run(t.Context(), Options{Store: f.store, List: f.list}); err == nil {
		t.Error("half a list was taken")
	}
	if names, _ := f.state(t); len(names) != 1 {
		t.Error("something went by half a list")
	}
}

func TestTheOldestGoFirstAndNoMoreThanMust(t *testing.T) {
	f := newFixture(t)
	f.name(t, "b", 50*time.Hour, false, strings.Repeat("b", 1000))
	f.name(t, "a", 40*time.Hour, false, strings.Repeat("a", 1000))
	f.name(t, "c", 30*time.Hour, false, strings.Repeat("c", 1000))
	f.keep(t)
	result, err := Run(t.Context(), Options{Store: f.store, List: f.list, MaxBytes: 2000})
	must(t, err)
	if names, _ := f.state(t); len(names) != 2 || !strings.HasPrefix(names[0], "a:") || !strings.HasPrefix(names[1], "c:") {
		t.Errorf("left: %v, %+v", names, result)
	}
	if result.Artifacts[1].Reason != "not kept, but there is room enough" {
		t.Errorf("%+v", result.Artifacts[1])
	}
}

func TestWhatAnUnfinishedTransferLeftGoesAfterADay(t *testing.T) {
	f := newFixture(t)
	old, young := f.blob(t, "old"), f.blob(t, "young")
	f.age(t, "blobs/sha256/"+old.Hex(), 25*time.Hour)
	f.keep(t)
	_, err := Run(t.Context(), Options{Store: f.store, List: f.list})
	must(t, err)
	if has, err := f.store.Has(old); err != nil || has {
		t.Errorf("the old one is there: %v", err)
	}
	if has, err := f.store.Has(young); err != nil || !has {
		t.Errorf("the young one is gone: %v", err)
	}
}

func TestRoomThatCannotBeMadeIsAFullDisk(t *testing.T) {
	f := newFixture(t)
	must(t, Room(f.store)(t.Context(), 1))
	f.name(t, "shop", 72*time.Hour, false, "shop 1")
	f.keep(t)
	err := Room(f.store)(t.Context(), 1<<60)
	var full *blob.NoSpaceError
	if !errors.As(err, &full) || full.Hint() == "" {
		t.Errorf("got %v", err)
	}
	if names, _ := f.state(t); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
}

func TestAListIsUnderstoodBeforeItReplacesAnother(t *testing.T) {
	digest := string(blob.DigestOf(nil))
	path := filepath.Join(t.TempDir(), "keep.json")
	const good = `{"names":[]}`
	_, err := WriteList(path, strings.NewReader(good))
	must(t, err)
	for name, input := range map[string]string{
		"nothing":             "",
		"no names":            "{}",
		"an unknown field":    `{"names":[],"more":1}`,
		"something behind":    `{"names":[]} {}`,
		"a name without site": `{"names":["shop@` + digest + `"]}`,
		"a tag":               `{"names":["lab/shop:latest"]}`,
		"a longer path":       `{"names":["lab/shop/x@` + digest + `"]}`,
		"cut off":             `{"names":["lab/shop@` + digest,
		"too long":            `{"names":["` + strings.Repeat("x", maxList) + `"]}`,
	} {
		if _, err := WriteList(path, strings.NewReader(input)); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if content, err := os.ReadFile(path); err != nil || !bytes.Equal(content, []byte(good)) {
		t.Errorf("it is %q, %v", content, err)
	}
}

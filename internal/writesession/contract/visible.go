package contract

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// read is what a host does: it asks the bucket, and not the service.
func (h *harness) read(key string, offset, length int64) ([]byte, error) {
	reader, _, err := h.store.Bucket.Get(h.t.Context(), key, offset, length)
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	return io.ReadAll(reader)
}

// pull puts a blob together from its record, as a host does.
func (h *harness) pull(digest blob.Digest) ([]byte, error) {
	stored, err := h.read(h.layout().Blob(digest), 0, 0)
	if err != nil {
		return nil, err
	}
	record, err := writesession.ParseRecord(stored)
	if err != nil {
		return nil, err
	}
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer decoder.Close()
	var plain []byte
	for i, place := range record.Places {
		packed, err := h.read(h.layout().Pack(record.Packs[place.Pack]), place.Offset, place.Length)
		if err != nil {
			return nil, err
		}
		chunk, err := decoder.DecodeAll(packed, nil)
		if err != nil {
			return nil, err
		}
		if err := record.Manifest.Chunks[i].Digest.Check(chunk); err != nil {
			return nil, err
		}
		plain = append(plain, chunk...)
	}
	return plain, digest.Check(plain)
}

// wantVisible insists that a host gets all of it.
func (h *harness) wantVisible(one content) {
	h.t.Helper()
	h.consistent()
	stored, err := h.read(h.layout().Name(one.name.Artifact, one.name.Digest), 0, 0)
	if err != nil {
		h.t.Errorf("its name: %v", err)
		return
	}
	var name writesession.Artifact
	if err := json.Unmarshal(stored, &name); err != nil || name.Artifact != one.name.Artifact ||
		!slices.Equal(name.Blobs, one.name.Blobs) || name.Created.IsZero() {
		h.t.Errorf("its name is %+v, %v", name, err)
	}
	plain, err := h.pull(one.manifest.Digest)
	if err != nil || !bytes.Equal(plain, one.plain) {
		h.t.Errorf("its blob: %d bytes, %v", len(plain), err)
	}
}

// nothingVisible: neither name nor blob can be had, and the service says so too.
func (h *harness) nothingVisible(one content) {
	h.t.Helper()
	h.consistent()
	for _, key := range []string{h.layout().Name(one.name.Artifact, one.name.Digest), h.layout().Blob(one.manifest.Digest)} {
		if _, err := h.store.Bucket.Head(h.t.Context(), key); !errors.Is(err, writesession.ErrNotFound) {
			h.t.Errorf("%s is there: %v", key, err)
		}
	}
	h.wantMissing(one, true)
}

func (h *harness) wantMissing(one content, want bool) {
	h.t.Helper()
	missing := decodeAs[writesession.MissingResponse](h, h.call(http.MethodPost, "missing", one.missing()))
	if name, blobs := len(missing.Names) > 0, len(missing.Blobs) > 0; name != want || blobs != want {
		h.t.Errorf("missing: %+v", missing)
	}
	if !want && len(missing.Chunks) > 0 {
		h.t.Errorf("missing chunks: %q", missing.Chunks)
	}
}

// consistent insists on what is true at any time: whatever is visible is whole.
func (h *harness) consistent() {
	h.t.Helper()
	for _, key := range h.keys(h.layout().Names()) {
		stored, err := h.read(key, 0, 0)
		h.must(err)
		var name writesession.Artifact
		h.must(json.Unmarshal(stored, &name))
		for _, digest := range name.Blobs {
			if _, err := h.pull(digest); err != nil {
				h.t.Errorf("%s is visible, and its blob %s is not whole: %v", key, digest, err)
			}
		}
	}
	for _, key := range h.keys(h.layout().Blobs()) {
		digest := blob.Digest("sha256:" + key[len(h.layout().Blobs()):])
		if _, err := h.pull(digest); err != nil {
			h.t.Errorf("%s is visible, and not whole: %v", key, err)
		}
	}
}

func collecting(h *harness) {
	old, kept := h.content("shop", 21, 300_000), h.content("shop", 22, 300_000)
	shared := h.change("shop", kept)
	h.push("collect-old", old)
	h.push("collect-kept", kept)
	h.push("collect-shared", shared)
	keep := writesession.CollectRequest{Keep: []writesession.Kept{{Artifact: "shop", Digest: kept.manifest.Digest, Reason: "release 1 of 5"}}}
	collect := func(request writesession.CollectRequest) writesession.Collected {
		h.t.Helper()
		return decodeAs[writesession.Collected](h, h.call(http.MethodPost, "collect", request))
	}
	// Whoever keeps nothing has lost its list.
	h.refused(http.StatusBadRequest, writesession.ProblemBadRequest, h.call(http.MethodPost, "collect", writesession.CollectRequest{}))
	if got := collect(keep); removed(got) != 0 || got.PacksRemoved != 0 || len(got.Artifacts) != 3 {
		h.t.Errorf("what is young: %+v", got)
	}
	h.clock.move(2 * time.Hour)
	open := h.begin("collect-open", h.content("other", 23, 100_000))
	if got := collect(keep); got.Refused == "" || removed(got) != 0 || got.BytesFreed != 0 {
		h.t.Errorf("while a session is open: %+v", got)
	}
	h.call(http.MethodDelete, sessionPath(open.ID, ""), nil)
	keep.DryRun = true
	before := h.keys(h.store.Site + "/")
	dry := collect(keep)
	if removed(dry) != 2 || dry.PacksRemoved != len(old.packs)+len(shared.packs) || dry.BytesFreed <= 0 {
		h.t.Errorf("dry: %+v", dry)
	}
	for _, artifact := range dry.Artifacts {
		if artifact.Reason == "" || artifact.Size == 0 {
			h.t.Errorf("%+v has no reason or size", artifact)
		}
	}
	if !slices.Equal(before, h.keys(h.store.Site+"/")) {
		h.t.Error("a dry run changed something")
	}
	keep.DryRun = false
	if wet := collect(keep); removed(wet) != 2 || wet.PacksRemoved != dry.PacksRemoved || wet.BytesFreed != dry.BytesFreed {
		h.t.Errorf("wet: %+v, and not as %+v", wet, dry)
	}
	h.wantVisible(kept)
	h.nothingVisible(old)
	h.nothingVisible(shared)
	if packs := h.keys(h.layout().Packs()); len(packs) != len(kept.packs) {
		h.t.Errorf("packs: %q", packs)
	}
	if again := collect(keep); removed(again) != 0 || again.PacksRemoved != 0 {
		h.t.Errorf("again: %+v", again)
	}
	h.push("collect-back", old)
	h.wantVisible(old)
}

func removed(answer writesession.Collected) int {
	count := 0
	for _, artifact := range answer.Artifacts {
		if artifact.Removed {
			count++
		}
	}
	return count
}

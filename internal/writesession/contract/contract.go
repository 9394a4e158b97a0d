// Package contract is what a write-session service promises on any store: the
// same cases run on the store in memory and on real servers.
package contract

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/writesession"
)

// Store is an empty bucket, or one in which nobody else uses Site and what begins
// with it and a dash.
type Store struct {
	Bucket writesession.Bucket
	// HTTP reaches the presigned URLs. Default http.DefaultClient.
	HTTP *http.Client
	// Enforces: the store refuses an upload with another hash than was signed.
	Enforces bool
	// Site is whose objects these are. Default "gamma".
	Site string
}

// Run runs all cases, each on a store of its own. Faults are put between the
// service and the bucket, so that any store can be tested.
func Run(t *testing.T, newStore func(t *testing.T) Store) {
	t.Helper()
	for _, one := range []struct {
		name string
		run  func(*harness)
	}{
		{"what was uploaded becomes visible, and is not asked for again", visible},
		{"a wrong byte is refused", wrongByte},
		{"a wrong size is refused", wrongSize},
		{"a pack that was not uploaded is named", missingPack},
		{"a blob with a chunk that is nowhere is named", missingChunk},
		{"a name without its blob is named", missingBlob},
		{"a request that is wrong about a pack is refused, and the pack stays", wrongClaim},
		{"a second complete gives the same answer", duplicateComplete},
		{"sessions at once for one digest all complete", concurrentSessions},
		{"the same key with another body is a conflict", sameKey},
		{"an expired session is over, and its uploads are swept", expired},
		{"an aborted session is over", aborted},
		{"an abort waits for what is being published", abortedMeanwhile},
		{"a service that is killed at any write leaves nothing half visible", killedAnywhere},
		{"a store that is away for a while only delays", storeAway},
		{"keys that are refused, or a clock that is wrong, are said", storeDenies},
		{"an upload that changes while it is proven is refused", changedMeanwhile},
		{"a damaged pack is sent again", damagedPack},
		{"a lost pack is sent again", lostPack},
		{"collecting removes what nothing keeps, and nothing else", collecting},
	} {
		t.Run(one.name, func(t *testing.T) {
			store := newStore(t)
			if store.HTTP == nil {
				store.HTTP = http.DefaultClient
			}
			if store.Site == "" {
				store.Site = "gamma"
			}
			one.run(newHarness(t, store))
		})
	}
}

func visible(h *harness) {
	one := h.content("shop", 1, 400_000)
	h.wantMissing(one, true)
	session := h.begin("visible-key", one)
	h.uploadAll(session, one)
	done := h.complete(session.ID, one.complete(), http.StatusOK)
	if done.State != writesession.Complete || done.Result == nil || done.Result.Packs != len(one.packs) || done.Result.Blobs != 1 {
		h.t.Errorf("complete: %+v, %+v", done, done.Result)
	}
	h.wantVisible(one)
	h.wantMissing(one, false)
	h.wantNoStaged(session.ID)
	again := h.begin("visible-again", one)
	for _, object := range again.Objects {
		if object.State != writesession.Present || object.Put != nil {
			h.t.Errorf("%s is %s the second time", object.SHA256, object.State)
		}
	}
	second := h.complete(again.ID, one.complete(), http.StatusOK)
	if second.Result.Packs != 0 || second.Result.Blobs != 0 {
		h.t.Errorf("the second time: %+v", second.Result)
	}
	// A change of a part brings that part only.
	changed := h.change("shop", one)
	h.push("visible-changed", changed)
	h.wantVisible(changed)
	h.wantVisible(one)
	h.wantSingleWrites()
}

func wrongByte(h *harness) {
	h.wrongUpload(func(content []byte) []byte { content[len(content)/2] ^= 1; return content })
}

func wrongSize(h *harness) {
	h.wrongUpload(func(content []byte) []byte { return content[:len(content)-1] })
}

func (h *harness) wrongUpload(change func([]byte) []byte) {
	h.t.Helper()
	one := h.content("shop", 2, 300_000)
	session := h.begin("wrong-key-1", one)
	h.uploadAll(session, one)
	wrong := one.packs[0].Digest
	put := h.putOf(session, wrong)
	status := h.retryBusy(func() int { return h.put(put, change(append([]byte{}, one.bytes[wrong]...))) })
	if refused := status >= http.StatusBadRequest; refused != h.store.Enforces {
		h.t.Errorf("the wrong upload: status %d from a store that enforces hashes: %v", status, h.store.Enforces)
	}
	if !h.store.Enforces {
		problem := h.unproven(session.ID, one.complete())
		h.wantObject(problem, string(wrong))
	}
	h.nothingVisible(one)
	h.retryBusy(func() int { return h.put(put, one.bytes[wrong]) })
	h.complete(session.ID, one.complete(), http.StatusOK)
	h.wantVisible(one)
}

func missingPack(h *harness) {
	one := h.content("shop", 3, 300_000)
	session := h.begin("missing-key", one)
	for _, pack := range one.packs[1:] {
		h.put(h.putOf(session, pack.Digest), one.bytes[pack.Digest])
	}
	problem := h.unproven(session.ID, one.complete())
	h.wantObject(problem, string(one.packs[0].Digest))
	h.nothingVisible(one)
	h.put(h.putOf(session, one.packs[0].Digest), one.bytes[one.packs[0].Digest])
	h.complete(session.ID, one.complete(), http.StatusOK)
	h.wantVisible(one)
	h.wantSingleWrites()
}

func missingChunk(h *harness) {
	one := h.content("shop", 4, 400_000)
	session := h.begin("chunk-key", one)
	h.uploadAll(session, one)
	lacking := one.complete()
	lacking.Packs = lacking.Packs[1:]
	problem := h.unproven(session.ID, lacking)
	h.wantObject(problem, string(one.manifest.Digest))
	h.nothingVisible(one)
	h.complete(session.ID, one.complete(), http.StatusOK)
	h.wantVisible(one)
}

func missingBlob(h *harness) {
	one, other := h.content("shop", 5, 100_000), h.content("other", 6, 100_000)
	session := h.begin("blob-key-1", one)
	h.uploadAll(session, one)
	request := one.complete()
	request.Names = append(request.Names, other.name)
	problem := h.unproven(session.ID, request)
	h.wantObject(problem, h.store.Site+"/other@"+string(other.name.Digest))
	h.nothingVisible(one)
	h.complete(session.ID, one.complete(), http.StatusOK)
	h.wantVisible(one)
}

func wrongClaim(h *harness) {
	one := h.content("shop", 7, 300_000)
	session := h.begin("claim-key", one)
	h.uploadAll(session, one)
	for what, change := range map[string]func(*writesession.PackedChunk){
		"another digest": func(c *writesession.PackedChunk) { c.Digest = one.manifest.Digest },
		"another size":   func(c *writesession.PackedChunk) { c.Size-- },
	} {
		request := one.complete()
		change(&request.Packs[0].Chunks[0])
		problem := h.unproven(session.ID, request)
		h.wantObject(problem, string(one.packs[0].Digest))
		if h.t.Failed() {
			h.t.Fatalf("with %s", what)
		}
		h.nothingVisible(one)
	}
	h.complete(session.ID, one.complete(), http.StatusOK) // nothing had to be sent again
	h.wantVisible(one)
	h.wantSingleWrites()
}

func duplicateComplete(h *harness) {
	one := h.content("shop", 8, 300_000)
	session := h.begin("duplicate-key", one)
	h.uploadAll(session, one)
	answers := make([]reply, 4)
	h.atOnce(len(answers), func(i int) {
		answers[i] = h.call(http.MethodPost, sessionPath(session.ID, "/complete"), one.complete())
	})
	for _, answer := range append(answers, h.call(http.MethodPost, sessionPath(session.ID, "/complete"), one.complete())) {
		if answer.status != http.StatusOK || string(answer.body) != string(answers[0].body) {
			h.t.Errorf("status %d: %s, and not %s", answer.status, answer.body, answers[0].body)
		}
	}
	h.restart()
	if answer := h.call(http.MethodPost, sessionPath(session.ID, "/complete"), one.complete()); string(answer.body) != string(answers[0].body) {
		h.t.Errorf("the next process answers %s", answer.body)
	}
	other := one.complete()
	other.Names = nil
	h.refused(http.StatusConflict, writesession.ProblemConflict, h.call(http.MethodPost, sessionPath(session.ID, "/complete"), other))
	h.wantVisible(one)
	h.wantSingleWrites()
}

func concurrentSessions(h *harness) {
	one := h.content("shop", 9, 400_000)
	h.atOnce(4, func(i int) { h.push(fmt.Sprintf("concurrent-%d", i), one) })
	h.wantVisible(one)
	h.wantSingleWrites()
	if records := h.keys(h.layout().Blobs()); len(records) != 1 {
		h.t.Errorf("records: %q", records)
	}
}

func sameKey(h *harness) {
	one, other := h.content("shop", 10, 200_000), h.content("shop", 11, 200_000)
	first := h.begin("the-same-key", one)
	h.put(h.putOf(first, one.packs[0].Digest), one.bytes[one.packs[0].Digest])
	again := h.call(http.MethodPost, "write-sessions", one.create(h.store.Site), "the-same-key")
	second := decodeAs[writesession.Session](h, again)
	if again.status != http.StatusOK || second.ID != first.ID || !second.Expires.Equal(first.Expires) {
		h.t.Errorf("status %d, %+v, and not %+v", again.status, second, first)
	}
	want := writesession.ToPut
	if h.store.Enforces {
		want = writesession.Present
	}
	if got := second.Objects[0].State; got != want {
		h.t.Errorf("the object that was uploaded is %s, and not %s", got, want)
	}
	h.refused(http.StatusConflict, writesession.ProblemConflict,
		h.call(http.MethodPost, "write-sessions", other.create(h.store.Site), "the-same-key"))
	if somebodyElse := h.beginAs("operator-b", "the-same-key", other); somebodyElse.ID == first.ID {
		h.t.Error("two operators with one key have one session")
	}
	h.nothingVisible(one)
	for _, object := range second.Objects[1:] {
		if object.State == writesession.ToPut {
			h.retryBusy(func() int { return h.put(*object.Put, one.bytes[digestOf(object)]) })
		}
	}
	h.complete(first.ID, one.complete(), http.StatusOK)
	h.wantVisible(one)
}

func expired(h *harness) {
	one := h.content("shop", 12, 200_000)
	session := h.begin("expired-key", one)
	put := h.putOf(session, one.packs[0].Digest)
	h.uploadAll(session, one)
	h.clock.move(ttl)
	h.notOpen(h.call(http.MethodPost, sessionPath(session.ID, "/complete"), one.complete()))
	h.notOpen(h.call(http.MethodPost, sessionPath(session.ID, "/objects"), writesession.AddRequest{Objects: one.objects()}))
	h.sweep()
	h.wantNoStaged(session.ID)
	h.notOpen(h.call(http.MethodPost, "write-sessions", one.create(h.store.Site), "expired-key"))
	// The store's clock is another one: the URL may still be good.
	h.retryBusy(func() int { return h.put(put, one.bytes[one.packs[0].Digest]) })
	h.nothingVisible(one)
	h.sweep()
	h.wantNoStaged(session.ID)
	h.push("expired-next", one)
	h.wantVisible(one)
	h.clock.move(49 * ttl)
	h.sweep()
	if left := h.keys(h.layout().Sessions()); len(left) > 0 {
		h.t.Errorf("a day later there are still %q", left)
	}
	h.retryBusy(func() int { return h.put(put, one.bytes[one.packs[0].Digest]) })
	h.sweep()
	if left := h.keys(h.layout().Sessions()); len(left) > 0 {
		h.t.Errorf("what came a day later stays: %q", left)
	}
	h.wantVisible(one)
}

func aborted(h *harness) {
	one := h.content("shop", 13, 200_000)
	session := h.begin("aborted-key", one)
	h.uploadAll(session, one)
	for range 2 {
		if got := h.call(http.MethodDelete, sessionPath(session.ID, ""), nil); got.status != http.StatusNoContent {
			h.t.Errorf("abort: status %d: %s", got.status, got.body)
		}
	}
	h.wantNoStaged(session.ID)
	h.notOpen(h.call(http.MethodPost, sessionPath(session.ID, "/complete"), one.complete()))
	h.notOpen(h.call(http.MethodPost, "write-sessions", one.create(h.store.Site), "aborted-key"))
	if got := decodeAs[writesession.Session](h, h.call(http.MethodGet, sessionPath(session.ID, ""), nil)); got.State != writesession.Aborted {
		h.t.Errorf("it is %s", got.State)
	}
	h.nothingVisible(one)
	next := h.push("aborted-next", one)
	h.wantVisible(one)
	h.notOpen(h.call(http.MethodDelete, sessionPath(next.ID, ""), nil))
	h.wantVisible(one)
	h.wantSingleWrites()
}

func abortedMeanwhile(h *harness) {
	one := h.content("shop", 17, 200_000)
	session := h.begin("meanwhile-key", one)
	h.uploadAll(session, one)
	abort := make(chan reply, 1)
	h.faults.beforeCopy(h.layout().Staged(session.ID, one.packs[0].Digest), func() {
		go func() { abort <- h.callAs(operator, http.MethodDelete, sessionPath(session.ID, ""), nil) }()
		select { // it is given the time to be wrong
		case early := <-abort:
			abort <- early
		case <-time.After(100 * time.Millisecond):
		}
	})
	h.complete(session.ID, one.complete(), http.StatusOK)
	h.notOpen(<-abort)
	h.wantVisible(one)
}

func changedMeanwhile(h *harness) {
	one := h.content("shop", 18, 200_000)
	session := h.begin("changed-key", one)
	h.uploadAll(session, one)
	key := h.layout().Staged(session.ID, one.packs[0].Digest)
	h.faults.beforeCopy(key, func() {
		if err := h.retry(func() error {
			return h.store.Bucket.Put(h.t.Context(), key, []byte("what nobody has proven"), false)
		}); err != nil {
			h.t.Error(err)
		}
	})
	problem := h.unproven(session.ID, one.complete())
	h.wantObject(problem, string(one.packs[0].Digest))
	h.nothingVisible(one)
	h.faults.clear()
	h.push("changed-next", one)
	h.wantVisible(one)
}

func damagedPack(h *harness) {
	one := h.content("shop", 19, 200_000)
	digest := one.packs[0].Digest
	h.must(h.store.Bucket.Put(h.t.Context(), h.layout().Pack(digest), []byte(strings.Repeat("x", len(one.bytes[digest]))), true))
	session := h.begin("damaged-key", one)
	for _, object := range session.Objects {
		if object.State == writesession.ToPut {
			h.put(*object.Put, one.bytes[digestOf(object)])
		}
	}
	problem := h.unproven(session.ID, one.complete())
	h.wantObject(problem, string(digest))
	h.nothingVisible(one)
	h.push("damaged-next", one)
	h.wantVisible(one)
}

func lostPack(h *harness) {
	one := h.content("shop", 20, 400_000)
	h.push("lost-key-1", one)
	h.must(h.store.Bucket.Delete(h.t.Context(), h.layout().Pack(one.packs[0].Digest)))
	for range 2 { // the process that wrote it, and the next
		missing := decodeAs[writesession.MissingResponse](h, h.call(http.MethodPost, "missing", one.missing()))
		if len(missing.Blobs) != 1 || len(missing.Chunks) != len(one.packs[0].Chunks) {
			h.t.Errorf("missing: %d blobs, %d chunks", len(missing.Blobs), len(missing.Chunks))
		}
		h.restart()
	}
	h.perPack++ // other packs, so that the record has to be another one, too
	again := h.contentOf("shop", one.plain)
	h.push("lost-key-2", again)
	h.wantVisible(again)
	h.wantMissing(again, false)
}

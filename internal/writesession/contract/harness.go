package contract

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
	"github.com/nomad-site/site/internal/writesession/server"
)

const (
	ttl      = time.Hour
	operator = "operator-a"
)

// clock is the service's.
type clock struct {
	mutex sync.Mutex
	by    time.Duration
}

func (c *clock) now() time.Time {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return time.Now().Add(c.by)
}

func (c *clock) move(by time.Duration) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.by += by
}

// trusting takes a bearer for the name of an operator.
type trusting struct{}

func (trusting) Authorize(_ context.Context, bearer secret.Value) (server.Identity, error) {
	return server.Identity{Subject: bearer.Reveal(), Kind: server.KindOperator}, nil
}

// harness is one service in front of one store.
type harness struct {
	t      *testing.T
	store  Store
	faults *faulty
	clock  *clock
	// perPack is how many chunks lie in one pack.
	perPack int
	server  *server.Server
	http    *httptest.Server
}

func newHarness(t *testing.T, store Store) *harness {
	t.Helper()
	h := &harness{t: t, store: store, clock: &clock{}, perPack: 2, faults: &faulty{Bucket: store.Bucket, writes: map[string]int{}}}
	h.restart()
	return h
}

// restart is the next process: it knows only what is in the bucket.
func (h *harness) restart() {
	h.t.Helper()
	if h.http != nil {
		h.http.Close()
	}
	h.faults.clear()
	made, err := server.New(server.Options{
		Site: h.store.Site, Bucket: h.faults, Authorizer: trusting{}, Log: slog.New(slog.DiscardHandler),
		Now: h.clock.now, Enforces: func() bool { return h.store.Enforces },
	})
	h.must(err)
	h.server, h.http = made, httptest.NewServer(made.Handler())
	h.t.Cleanup(h.http.Close)
}

// inSite is another site in the same bucket.
func (h *harness) inSite(n int, afterwards bool) *harness {
	store := h.store
	store.Site = fmt.Sprintf("%s-%d-%v", h.store.Site, n, afterwards)
	return newHarness(h.t, store)
}

func (h *harness) layout() writesession.Layout { return writesession.Layout{Site: h.store.Site} }

func (h *harness) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) atOnce(n int, do func(i int)) {
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { do(i) })
	}
	group.Wait()
}

func (h *harness) sweep() {
	h.t.Helper()
	h.must(h.server.Sweep(h.t.Context()))
}

// content is an artifact of one blob, and the packs of its chunks.
type content struct {
	plain    []byte
	manifest blob.Manifest
	packs    []writesession.Pack
	bytes    map[blob.Digest][]byte
	name     writesession.Artifact
}

func (h *harness) content(artifact string, seed uint64, size int) content {
	h.t.Helper()
	plain := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(plain)
	return h.contentOf(artifact, plain)
}

// change is another version of which most is the same.
func (h *harness) change(artifact string, before content) content {
	h.t.Helper()
	plain := append([]byte{}, before.plain...)
	plain[len(plain)-10] ^= 1
	after := h.contentOf(artifact, plain)
	known := map[blob.Digest]bool{}
	for _, chunk := range before.manifest.Chunks {
		known[chunk.Digest] = true
	}
	fresh := slices.DeleteFunc(slices.Clone(after.manifest.Chunks), func(chunk blob.ChunkRef) bool { return known[chunk.Digest] })
	if len(fresh) == 0 || len(fresh) == len(after.manifest.Chunks) {
		h.t.Fatalf("%d of %d chunks are new", len(fresh), len(after.manifest.Chunks))
	}
	after.packs, after.bytes = nil, map[blob.Digest][]byte{}
	h.pack(&after, func(digest blob.Digest) bool { return !known[digest] })
	return after
}

func (h *harness) contentOf(artifact string, plain []byte) content {
	h.t.Helper()
	manifest, err := blob.Chunk(bytes.NewReader(plain))
	h.must(err)
	out := content{plain: plain, manifest: manifest, bytes: map[blob.Digest][]byte{}}
	out.name = writesession.Artifact{Artifact: artifact, Name: blob.Name{
		Kind: blob.KindFile, Digest: manifest.Digest, Size: manifest.Size, Blobs: []blob.Digest{manifest.Digest},
	}}
	h.pack(&out, func(blob.Digest) bool { return true })
	return out
}

// pack lays the wanted chunks into packs, a few in each.
func (h *harness) pack(out *content, wanted func(blob.Digest) bool) {
	h.t.Helper()
	packer, err := blob.NewPacker(1)
	h.must(err)
	defer packer.Close()
	var current writesession.Pack
	var stored []byte
	finish := func() {
		if len(current.Chunks) == 0 {
			return
		}
		current.Digest, current.Size = blob.DigestOf(stored), int64(len(stored))
		out.packs, out.bytes[current.Digest] = append(out.packs, current), stored
		current, stored = writesession.Pack{}, nil
	}
	offset := int64(0)
	for _, chunk := range out.manifest.Chunks {
		if wanted(chunk.Digest) {
			begin := int64(len(stored))
			stored, err = packer.Pack(chunk.Digest, out.plain[offset:offset+chunk.Size], stored)
			h.must(err)
			current.Chunks = append(current.Chunks, writesession.PackedChunk{
				Digest: chunk.Digest, Size: chunk.Size, Offset: begin, Length: int64(len(stored)) - begin,
			})
			if len(current.Chunks) == h.perPack {
				finish()
			}
		}
		offset += chunk.Size
	}
	finish()
}

func (c content) objects() []writesession.Object {
	out := []writesession.Object{}
	for i, pack := range c.packs {
		out = append(out, writesession.Object{Name: fmt.Sprintf("pack %d", i), SHA256: pack.Digest.Hex(), Size: pack.Size})
	}
	return out
}

func (c content) create(site string) writesession.CreateRequest {
	return writesession.CreateRequest{
		Capability: writesession.Capability, Namespace: site, Objects: c.objects(), TTLSeconds: int64(ttl / time.Second),
	}
}

// complete is a copy that a case may change.
func (c content) complete() writesession.CompleteRequest {
	out := writesession.CompleteRequest{Blobs: []blob.Manifest{c.manifest}, Names: []writesession.Artifact{c.name}}
	for _, pack := range c.packs {
		pack.Chunks = slices.Clone(pack.Chunks)
		out.Packs = append(out.Packs, pack)
	}
	return out
}

func (c content) missing() writesession.MissingRequest {
	request := writesession.MissingRequest{Names: []writesession.Artifact{c.name}, Blobs: []blob.Digest{c.manifest.Digest}}
	for _, chunk := range c.manifest.Chunks {
		request.Chunks = append(request.Chunks, chunk.Digest)
	}
	return request
}

// reply is an answer of the service.
type reply struct {
	status int
	header http.Header
	body   []byte
}

func sessionPath(id, rest string) string { return "write-sessions/" + id + rest }

// call asks the service, as an operator and with an Idempotency-Key if one is given.
func (h *harness) call(method, path string, body any, key ...string) reply {
	h.t.Helper()
	return h.callAs(operator, method, path, body, key...)
}

func (h *harness) callAs(who, method, path string, body any, key ...string) reply {
	var content io.Reader = http.NoBody
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			h.t.Error(err)
		}
		content = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(h.t.Context(), method, h.http.URL+"/v1/sites/"+h.store.Site+"/"+path, content)
	if err != nil {
		h.t.Error(err)
		return reply{}
	}
	request.Header.Set("Authorization", "Bearer "+who)
	for _, value := range key {
		request.Header.Set(writesession.IdempotencyHeader, value)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		h.t.Error(err)
		return reply{}
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		h.t.Error(err)
	}
	return reply{status: response.StatusCode, header: response.Header, body: answer}
}

func decodeAs[T any](h *harness, answer reply) T {
	var out T
	if answer.status >= http.StatusBadRequest {
		h.t.Errorf("status %d: %s", answer.status, answer.body)
	}
	if err := json.Unmarshal(answer.body, &out); err != nil {
		h.t.Errorf("%v: %s", err, answer.body)
	}
	return out
}

// refused insists on a problem.
func (h *harness) refused(status int, word string, answer reply) writesession.Problem {
	h.t.Helper()
	var problem writesession.Problem
	if err := json.Unmarshal(answer.body, &problem); err != nil || answer.status != status || problem.Status != status ||
		problem.Type != writesession.ProblemPrefix+word || answer.header.Get("Content-Type") != "application/problem+json" {
		h.t.Errorf("status %d: %s, and not %d %s", answer.status, answer.body, status, word)
	}
	return problem
}

// unproven insists that a completion is refused, and names what is wrong.
func (h *harness) unproven(id string, request writesession.CompleteRequest) writesession.Problem {
	h.t.Helper()
	answer := h.call(http.MethodPost, sessionPath(id, "/complete"), request)
	return h.refused(http.StatusUnprocessableEntity, writesession.ProblemUnproven, answer)
}

func (h *harness) notOpen(answer reply) {
	h.t.Helper()
	h.refused(http.StatusConflict, writesession.ProblemNotOpen, answer)
}

func (h *harness) wantObject(problem writesession.Problem, name string) {
	h.t.Helper()
	for _, object := range problem.Objects {
		if object.Name == name && object.Detail != "" {
			return
		}
	}
	h.t.Errorf("%s is not among %+v", name, problem.Objects)
}

func (h *harness) begin(key string, one content) writesession.Session {
	h.t.Helper()
	return h.beginAs(operator, key, one)
}

func (h *harness) beginAs(who, key string, one content) writesession.Session {
	h.t.Helper()
	answer := h.callAs(who, http.MethodPost, "write-sessions", one.create(h.store.Site), key)
	session := decodeAs[writesession.Session](h, answer)
	if answer.status != http.StatusCreated || session.State != writesession.Open || len(session.Objects) != len(one.packs) {
		h.t.Errorf("status %d: %s", answer.status, answer.body)
	}
	return session
}

func digestOf(object writesession.ObjectState) blob.Digest {
	return blob.Digest("sha256:" + object.SHA256)
}

func (h *harness) putOf(session writesession.Session, digest blob.Digest) writesession.Put {
	h.t.Helper()
	for _, object := range session.Objects {
		if digestOf(object) == digest && object.Put != nil {
			return *object.Put
		}
	}
	h.t.Fatalf("%s is not to be put", digest)
	return writesession.Put{}
}

// put uploads content, right or wrong, and gives the status.
func (h *harness) put(put writesession.Put, content []byte) int {
	request, err := http.NewRequestWithContext(h.t.Context(), http.MethodPut, put.URL, bytes.NewReader(content))
	if err != nil {
		h.t.Error(err)
		return 0
	}
	for name, value := range put.Headers {
		request.Header.Set(name, value)
	}
	response, err := h.store.HTTP.Do(request)
	if err != nil {
		h.t.Error(err)
		return 0
	}
	_ = response.Body.Close()
	return response.StatusCode
}

// retryBusy is for a key that was written within this second.
func (h *harness) retryBusy(do func() int) (status int) {
	h.t.Helper()
	h.must(retry.Until(h.t.Context(), "the key", 10*time.Second, func(context.Context) error {
		if status = do(); status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
			return errors.New("it was written within this second")
		}
		return nil
	}))
	return status
}

func (h *harness) retry(do func() error) error {
	return retry.Until(h.t.Context(), "the key", 10*time.Second, func(context.Context) error { return do() })
}

func (h *harness) uploadAll(session writesession.Session, one content) {
	h.t.Helper()
	for _, object := range session.Objects {
		if object.State != writesession.ToPut {
			continue
		}
		if status := h.put(*object.Put, one.bytes[digestOf(object)]); status != http.StatusOK {
			h.t.Errorf("upload of %s: status %d", object.SHA256, status)
		}
	}
}

func (h *harness) complete(id string, request writesession.CompleteRequest, want int) writesession.Session {
	h.t.Helper()
	answer := h.call(http.MethodPost, sessionPath(id, "/complete"), request)
	if answer.status != want {
		h.t.Fatalf("complete: status %d: %s", answer.status, answer.body)
	}
	return decodeAs[writesession.Session](h, answer)
}

// push is a session from its beginning to its end.
func (h *harness) push(key string, one content) writesession.Session {
	h.t.Helper()
	session := h.begin(key, one)
	h.uploadAll(session, one)
	var answer reply
	h.retryBusy(func() int {
		answer = h.call(http.MethodPost, sessionPath(session.ID, "/complete"), one.complete())
		return answer.status
	})
	if answer.status != http.StatusOK {
		h.t.Errorf("push: status %d: %s", answer.status, answer.body)
	}
	return session
}

func (h *harness) keys(prefix string) []string {
	h.t.Helper()
	var out []string
	for info, err := range h.store.Bucket.List(h.t.Context(), prefix) {
		h.must(err)
		out = append(out, info.Key)
	}
	return out
}

func (h *harness) wantNoStaged(id string) {
	h.t.Helper()
	if left := h.keys(h.layout().Staged(id, "")); len(left) > 0 {
		h.t.Errorf("there are still %q", left)
	}
}

func (h *harness) healthy() bool {
	response, err := http.Get(h.http.URL + "/healthz")
	h.must(err)
	defer response.Body.Close()
	var body struct {
		Status string `json:"status"`
	}
	h.must(json.NewDecoder(response.Body).Decode(&body))
	if response.StatusCode != http.StatusOK {
		h.t.Errorf("healthz: status %d", response.StatusCode)
	}
	return body.Status == "ok"
}

// wantSingleWrites: a store may refuse a second write of a key within a second.
func (h *harness) wantSingleWrites() {
	h.t.Helper()
	for key, count := range h.faults.counts() {
		if count > 1 && strings.HasPrefix(key, h.store.Site+"/") {
			h.t.Errorf("%s was written %d times", key, count)
		}
	}
}

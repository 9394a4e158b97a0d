package client

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
	"github.com/nomad-site/site/internal/writesession/storetest"
)

const (
	testSite  = "gamma"
	testToken = "the-token-of-an-operator"
)

// service is the least that keeps the protocol; how well the real one does is
// told by its own tests. intercept may answer in its place.
type service struct {
	t        *testing.T
	store    *storetest.Store
	layout   writesession.Layout
	server   *httptest.Server
	compress bool

	mutex     sync.Mutex
	intercept func(w http.ResponseWriter, r *http.Request, route string) bool
	asked     []string
	keys      []string
	sessions  map[string]*writesession.Session
	blobs     map[blob.Digest]bool
	chunks    map[blob.Digest]bool
	packs     map[blob.Digest]bool
	names     map[string]bool
}

func newService(t *testing.T) *service {
	s := &service{
		t: t, store: storetest.New(t, storetest.Options{Enforces: true}), layout: writesession.Layout{Site: testSite},
		sessions: map[string]*writesession.Session{}, blobs: map[blob.Digest]bool{}, chunks: map[blob.Digest]bool{},
		packs: map[blob.Digest]bool{}, names: map[string]bool{},
	}
	s.server = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.server.Close)
	return s
}

func (s *service) serve(w http.ResponseWriter, r *http.Request) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	route := r.Method + " " + strings.TrimPrefix(r.URL.Path, "/v1/sites/"+testSite)
	id := ""
	if rest, found := strings.CutPrefix(route, r.Method+" /write-sessions/"); found {
		action := ""
		id, action, _ = strings.Cut(rest, "/")
		route = r.Method + " session " + action
	}
	s.asked = append(s.asked, route)
	if s.compress {
		w.Header().Set("Accept-Encoding", "gzip, zstd")
	}
	if s.intercept != nil && s.intercept(w, r, route) {
		return
	}
	if route != "GET /healthz" && r.Header.Get("Authorization") != "Bearer "+testToken {
		problem(w, http.StatusUnauthorized, writesession.ProblemUnauthorized)
		return
	}
	switch route {
	case "POST /missing":
		s.missing(w, r)
	case "POST /write-sessions":
		s.create(w, r)
	case "POST session objects":
		s.add(w, r, s.sessions[id])
	case "POST session complete":
		s.complete(w, r, s.sessions[id])
	case "DELETE session ":
		if s.sessions[id].State == writesession.Open {
			s.sessions[id].State = writesession.Aborted
		}
		w.WriteHeader(http.StatusNoContent)
	default:
		problem(w, http.StatusNotFound, writesession.ProblemNotFound)
	}
}

func answer(w http.ResponseWriter, status int, what any) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(what)
}

func problem(w http.ResponseWriter, status int, word string, objects ...writesession.ObjectProblem) {
	answer(w, status, writesession.Problem{
		Type: writesession.ProblemPrefix + word, Title: "refused: " + word, Status: status, Objects: objects,
	})
}

func (s *service) read(r *http.Request, into any) {
	body := r.Body
	if r.Header.Get("Content-Encoding") == "zstd" {
		decoder, err := zstd.NewReader(body)
		if err != nil {
			s.t.Error(err)
			return
		}
		defer decoder.Close()
		body = decoder.IOReadCloser()
	}
	decoder := json.NewDecoder(body)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		s.t.Errorf("%s: %v", r.URL.Path, err)
	}
}

func (s *service) missing(w http.ResponseWriter, r *http.Request) {
	var request writesession.MissingRequest
	s.read(r, &request)
	var out writesession.MissingResponse
	for i, name := range request.Names {
		if !s.names[name.Artifact+"@"+string(name.Digest)] {
			out.Names = append(out.Names, i)
		}
	}
	for _, digest := range request.Blobs {
		if !s.blobs[digest] {
			out.Blobs = append(out.Blobs, digest)
		}
	}
	for _, digest := range request.Chunks {
		if !s.chunks[digest] {
			out.Chunks = append(out.Chunks, digest)
		}
	}
	answer(w, http.StatusOK, out)
}

func (s *service) create(w http.ResponseWriter, r *http.Request) {
	var request writesession.CreateRequest
	s.read(r, &request)
	key := r.Header.Get(writesession.IdempotencyHeader)
	if len(key) < writesession.MinKeyLength || len(key) > writesession.MaxKeyLength || request.Capability != writesession.Capability ||
		request.Namespace != testSite || request.TTLSeconds < 60 {
		problem(w, http.StatusBadRequest, writesession.ProblemBadRequest)
		return
	}
	s.keys = append(s.keys, key)
	id := blob.DigestOf([]byte(key)).Hex()[:32]
	if old := s.sessions[id]; old != nil && old.State == writesession.Aborted {
		problem(w, http.StatusConflict, writesession.ProblemNotOpen)
		return
	} else if old != nil {
		answer(w, http.StatusOK, old)
		return
	}
	s.sessions[id] = &writesession.Session{
		ID: id, Site: testSite, Namespace: testSite, State: writesession.Open,
		Created: time.Now(), Expires: time.Now().Add(time.Duration(request.TTLSeconds) * time.Second),
	}
	answer(w, http.StatusCreated, s.sessions[id])
}

func (s *service) add(w http.ResponseWriter, r *http.Request, session *writesession.Session) {
	var request writesession.AddRequest
	s.read(r, &request)
	if session == nil || session.State != writesession.Open {
		problem(w, http.StatusConflict, writesession.ProblemNotOpen)
		return
	}
	out := *session
	for _, object := range request.Objects {
		digest := blob.Digest("sha256:" + object.SHA256)
		state := writesession.ObjectState{Object: object, State: writesession.Present}
		key := s.layout.Staged(session.ID, digest)
		if !s.packs[digest] && s.store.Content(key) == nil {
			put, err := s.store.PresignPut(r.Context(), key, digest, object.Size, time.Hour)
			if err != nil {
				problem(w, http.StatusServiceUnavailable, writesession.ProblemStore)
				return
			}
			state.State, state.Put = writesession.ToPut, &put
		}
		out.Objects = append(out.Objects, state)
	}
	answer(w, http.StatusOK, out)
}

func (s *service) complete(w http.ResponseWriter, r *http.Request, session *writesession.Session) {
	var request writesession.CompleteRequest
	s.read(r, &request)
	if session == nil || session.State != writesession.Open {
		problem(w, http.StatusConflict, writesession.ProblemNotOpen)
		return
	}
	proven := map[blob.Digest]bool{}
	for _, pack := range request.Packs {
		if err := s.prove(session.ID, pack, proven); err != nil {
			problem(w, http.StatusUnprocessableEntity, writesession.ProblemUnproven,
				writesession.ObjectProblem{Name: string(pack.Digest), Detail: err.Error()})
			return
		}
	}
	for _, manifest := range request.Blobs {
		for _, chunk := range manifest.Chunks {
			if !proven[chunk.Digest] && !s.chunks[chunk.Digest] {
				problem(w, http.StatusUnprocessableEntity, writesession.ProblemUnproven,
					writesession.ObjectProblem{Name: string(manifest.Digest), Detail: "a chunk is missing"})
				return
			}
		}
	}
	for digest := range proven {
		s.chunks[digest] = true
	}
	for _, manifest := range request.Blobs {
		s.blobs[manifest.Digest] = true
	}
	for _, pack := range request.Packs {
		s.packs[pack.Digest] = true
	}
	for _, name := range request.Names {
		for _, digest := range name.Blobs {
			if !s.blobs[digest] {
				problem(w, http.StatusUnprocessableEntity, writesession.ProblemUnproven,
					writesession.ObjectProblem{Name: name.Artifact, Detail: "blob " + string(digest) + " is missing"})
				return
			}
		}
		s.names[name.Artifact+"@"+string(name.Digest)] = true
	}
	session.State = writesession.Complete
	answer(w, http.StatusOK, session)
}

// prove unpacks each chunk with the store that hosts have.
func (s *service) prove(id string, pack writesession.Pack, proven map[blob.Digest]bool) error {
	stored := s.store.Content(s.layout.Staged(id, pack.Digest))
	if err := pack.Digest.Check(stored); err != nil {
		return err
	}
	host, err := blob.OpenStore(s.t.TempDir())
	if err != nil {
		return err
	}
	defer host.Close()
	var end int64
	for _, chunk := range pack.Chunks {
		if chunk.Offset != end || chunk.Offset+chunk.Length > int64(len(stored)) {
			return fmt.Errorf("chunk %s at %d, want %d", chunk.Digest, chunk.Offset, end)
		}
		end = chunk.Offset + chunk.Length
		if err := host.PutChunk(chunk.Digest, stored[chunk.Offset:end]); err != nil {
			return err
		}
		proven[chunk.Digest] = true
	}
	if end != pack.Size || end != int64(len(stored)) {
		return fmt.Errorf("the pack is %d bytes long, not %d", len(stored), end)
	}
	return nil
}

// when sets what may answer in place of the service.
func (s *service) when(intercept func(w http.ResponseWriter, r *http.Request, route string) bool) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.intercept = intercept
}

// count says how often a route was asked.
func (s *service) count(route string) int {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return len(slices.DeleteFunc(slices.Clone(s.asked), func(asked string) bool { return asked != route }))
}

// states are those of all sessions, sorted.
func (s *service) states() []writesession.State {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	var out []writesession.State
	for _, session := range s.sessions {
		out = append(out, session.State)
	}
	slices.Sort(out)
	return out
}

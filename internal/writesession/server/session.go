package server

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

const (
	documentVersion = 1
	maxDocument     = 4 << 20
	// idLength is that of a session's id: half of a hash.
	idLength = 32
)

var keyPattern = regexp.MustCompile(`^[\x21-\x7e]+$`)

// sessionDocument is what a session was begun with, as the bucket has it.
type sessionDocument struct {
	Version int       `json:"version"`
	ID      string    `json:"id"`
	Owner   string    `json:"owner"`
	Request string    `json:"request"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
}

// endDocument is what it came to.
type endDocument struct {
	Version int                  `json:"version"`
	State   writesession.State   `json:"state"`
	Request string               `json:"request,omitempty"`
	Ended   time.Time            `json:"ended"`
	Result  *writesession.Result `json:"result,omitempty"`
}

func (s *Server) answerFor(document sessionDocument, state writesession.State) writesession.Session {
	return writesession.Session{
		ID: document.ID, Site: s.site, Namespace: s.site, State: state, Owner: document.Owner,
		Created: document.Created, Expires: document.Expires,
	}
}

func (s *Server) stateOf(document sessionDocument, end *endDocument) writesession.State {
	switch {
	case end != nil:
		return end.State
	case !s.now().Before(document.Expires):
		return writesession.Expired
	default:
		return writesession.Open
	}
}

// create begins a session, or finds the one that the same request began.
func (s *Server) create(w http.ResponseWriter, r *http.Request, who Identity) (answer, error) {
	key := r.Header.Get(writesession.IdempotencyHeader)
	if len(key) < writesession.MinKeyLength || len(key) > writesession.MaxKeyLength || !keyPattern.MatchString(key) {
		return answer{}, badRequest("%s: want %d to %d printable characters without spaces",
			writesession.IdempotencyHeader, writesession.MinKeyLength, writesession.MaxKeyLength)
	}
	var request writesession.CreateRequest
	if err := s.readBody(w, r, smallBody, func(body io.Reader) error { return strictJSON(body, &request) }); err != nil {
		return answer{}, err
	}
	if err := s.checkCreate(request); err != nil {
		return answer{}, err
	}
	canonical, err := json.Marshal(request)
	if err != nil {
		return answer{}, fmt.Errorf("encode the request: %w", err)
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	now := s.now().UTC().Truncate(time.Second)
	document := sessionDocument{
		Version: documentVersion, ID: hashOf(s.site, who.owner(), key)[:idLength], Owner: who.owner(),
		Request: hashOf(string(canonical)), Created: now, Expires: now.Add(time.Duration(request.TTLSeconds) * time.Second),
	}
	unlock, err := s.sessions.lock(r.Context(), document.ID)
	if err != nil {
		return answer{}, err
	}
	defer unlock()
	return s.begin(r.Context(), document, request.Objects)
}

func (s *Server) begin(ctx context.Context, document sessionDocument, objects []writesession.Object) (answer, error) {
	status := http.StatusCreated
	err := s.putDocument(ctx, s.layout.Session(document.ID), document)
	var end *endDocument
	if errors.Is(err, writesession.ErrExists) {
		status = http.StatusOK
		var before sessionDocument
		if before, end, err = s.read(ctx, document.ID); err != nil {
			return answer{}, err
		}
		if before.Request != document.Request {
			return answer{}, refuse(http.StatusConflict, writesession.ProblemConflict,
				"this %s began session %s with another body", writesession.IdempotencyHeader, document.ID)
		}
		document = before
	}
	if err != nil {
		return answer{}, err
	}
	state := s.stateOf(document, end)
	reply := s.answerFor(document, state)
	switch state {
	case writesession.Complete:
		reply.Result = end.Result
		return answer{status, reply}, nil
	case writesession.Open:
		reply.Objects, err = s.objectStates(ctx, document, objects, status == http.StatusOK)
		return answer{status, reply}, err
	default:
		return answer{}, notOpen(document.ID, state)
	}
}

func notOpen(id string, state writesession.State) *problemError {
	return refuse(http.StatusConflict, writesession.ProblemNotOpen, "session %s is %s: begin another, with another %s",
		id, state, writesession.IdempotencyHeader)
}

// add hands out more uploads of an open session; it writes nothing.
func (s *Server) add(w http.ResponseWriter, r *http.Request, who Identity) (answer, error) {
	var request writesession.AddRequest
	if err := s.readBody(w, r, smallBody, func(body io.Reader) error { return strictJSON(body, &request) }); err != nil {
		return answer{}, err
	}
	if err := checkObjects(request.Objects); err != nil {
		return answer{}, err
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	document, end, err := s.readFor(r.Context(), r.PathValue("id"), who)
	if err != nil {
		return answer{}, err
	}
	state := s.stateOf(document, end)
	if state != writesession.Open {
		return answer{}, notOpen(document.ID, state)
	}
	reply := s.answerFor(document, state)
	reply.Objects, err = s.objectStates(r.Context(), document, request.Objects, true)
	return answer{http.StatusOK, reply}, err
}

// objectStates presigns what is not there. Where the store enforces hashes, what
// was uploaded into this session counts as there too.
func (s *Server) objectStates(
	ctx context.Context, document sessionDocument, objects []writesession.Object, again bool,
) ([]writesession.ObjectState, error) {
	if len(objects) == 0 {
		return nil, nil
	}
	if err := s.index.refresh(ctx); err != nil {
		return nil, err
	}
	staged := map[raw]writesession.Info{}
	if again && s.enforces() {
		var err error
		if staged, err = listDigests(ctx, s.bucket, s.layout.Staged(document.ID, "")); err != nil {
			return nil, err
		}
	}
	ttl := min(document.Expires.Sub(s.now()), writesession.MaxTTL)
	out := make([]writesession.ObjectState, 0, len(objects))
	for _, object := range objects {
		state, err := s.objectState(ctx, document.ID, object, staged, ttl)
		if err != nil {
			return nil, err
		}
		out = append(out, state)
	}
	return out, nil
}

func (s *Server) objectState(
	ctx context.Context, id string, object writesession.Object, staged map[raw]writesession.Info, ttl time.Duration,
) (writesession.ObjectState, error) {
	digest, err := objectDigest(object)
	if err != nil {
		return writesession.ObjectState{}, badRequest("%s", err)
	}
	size, there := s.index.pack(digest)
	if there && size != object.Size {
		return writesession.ObjectState{}, badRequest("object %.100q: %s has %d bytes, and not %d", object.Name, digest, size, object.Size)
	}
	if info, ok := staged[rawOf(digest)]; ok && info.Size == object.Size {
		there = true
	}
	if there {
		return writesession.ObjectState{Object: object, State: writesession.Present}, nil
	}
	put, err := s.bucket.PresignPut(ctx, s.layout.Staged(id, digest), digest, object.Size, max(ttl, time.Second))
	if err != nil {
		return writesession.ObjectState{}, err
	}
	return writesession.ObjectState{Object: object, State: writesession.ToPut, Put: &put}, nil
}

// show answers what has become of a session.
func (s *Server) show(_ http.ResponseWriter, r *http.Request, who Identity) (answer, error) {
	document, end, err := s.readFor(r.Context(), r.PathValue("id"), who)
	if err != nil {
		return answer{}, err
	}
	reply := s.answerFor(document, s.stateOf(document, end))
	if end != nil {
		reply.Result = end.Result
	}
	return answer{http.StatusOK, reply}, nil
}

// abort ends a session. It is done where that has been done.
func (s *Server) abort(_ http.ResponseWriter, r *http.Request, who Identity) (answer, error) {
	ctx, id := r.Context(), r.PathValue("id")
	unlock, err := s.sessions.lock(ctx, id)
	if err != nil {
		return answer{}, err
	}
	defer unlock()
	_, end, err := s.readFor(ctx, id, who)
	if err != nil {
		return answer{}, err
	}
	if end == nil {
		if end, err = s.end(ctx, id, endDocument{State: writesession.Aborted}); err != nil {
			return answer{}, err
		}
	}
	if end.State == writesession.Complete {
		return answer{}, notOpen(id, end.State)
	}
	s.dropStaged(ctx, id)
	return answer{status: http.StatusNoContent}, nil
}

// end writes how a session ended, and gives what it ended with: a process that was
// faster has the last word.
func (s *Server) end(ctx context.Context, id string, document endDocument) (*endDocument, error) {
	document.Version, document.Ended = documentVersion, s.now().UTC().Truncate(time.Second)
	err := s.putDocument(ctx, s.layout.End(id), document)
	if errors.Is(err, writesession.ErrExists) {
		_, end, err := s.read(ctx, id)
		if err == nil && end == nil {
			err = fmt.Errorf("session %s: its end was removed at once", id)
		}
		return end, err
	}
	if err != nil {
		return nil, err
	}
	s.metrics.ended.WithLabelValues(string(document.State)).Inc()
	return &document, nil
}

// dropStaged removes uploads that nobody needs. What remains is swept.
func (s *Server) dropStaged(ctx context.Context, id string) {
	var keys []string
	for info, err := range s.bucket.List(ctx, s.layout.Staged(id, "")) {
		if err != nil {
			s.log.Warn("cannot list staged uploads", "session", id, "error", err)
			return
		}
		keys = append(keys, info.Key)
	}
	if len(keys) == 0 {
		return
	}
	if err := s.bucket.Delete(ctx, keys...); err != nil {
		s.log.Warn("cannot remove staged uploads", "session", id, "error", err)
	}
}

// read gives a session and its end; nil where it has none.
func (s *Server) read(ctx context.Context, id string) (sessionDocument, *endDocument, error) {
	var document sessionDocument
	if err := s.getDocument(ctx, s.layout.Session(id), &document); err != nil {
		if errors.Is(err, writesession.ErrNotFound) {
			return document, nil, refuse(http.StatusNotFound, writesession.ProblemNotFound, "there is no session %s", id)
		}
		return document, nil, err
	}
	var end endDocument
	err := s.getDocument(ctx, s.layout.End(id), &end)
	if errors.Is(err, writesession.ErrNotFound) {
		return document, nil, nil
	}
	if err != nil {
		return document, nil, err
	}
	return document, &end, nil
}

// readFor is read for who may see it: operators all, a job its own.
func (s *Server) readFor(ctx context.Context, id string, who Identity) (sessionDocument, *endDocument, error) {
	document, end, err := s.read(ctx, id)
	if err == nil && who.Kind != KindOperator && document.Owner != who.owner() {
		err = refuse(http.StatusForbidden, writesession.ProblemForbidden, "session %s belongs to %s", id, document.Owner)
	}
	return document, end, err
}

func (s *Server) putDocument(ctx context.Context, key string, document any) error {
	encoded, err := json.Marshal(document)
	if err != nil {
		return fmt.Errorf("encode %s: %w", key, err)
	}
	return s.bucket.Put(ctx, key, encoded, true)
}

func (s *Server) getDocument(ctx context.Context, key string, into any) error {
	content, _, err := getAll(ctx, s.bucket, key, maxDocument)
	if err != nil {
		return err
	}
	if err := strictJSON(bytes.NewReader(content), into); err != nil {
		return fmt.Errorf("read %s: %w", key, err)
	}
	return nil
}

// sessionKeys is what the bucket holds of one session.
type sessionKeys struct {
	id             string
	begun, hasEnd  bool
	newest         time.Time
	staged, others []string
}

// eachSession groups what lies below the prefix of sessions, sorted by id.
func (s *Server) eachSession(ctx context.Context) ([]*sessionKeys, error) {
	var out []*sessionKeys
	for info, err := range s.bucket.List(ctx, s.layout.Sessions()) {
		if err != nil {
			return nil, err
		}
		id, rest, ok := strings.Cut(strings.TrimPrefix(info.Key, s.layout.Sessions()), "/")
		if !ok || !idPattern.MatchString(id) {
			continue
		}
		if len(out) == 0 || out[len(out)-1].id != id {
			out = append(out, &sessionKeys{id: id})
		}
		one := out[len(out)-1]
		if info.Modified.After(one.newest) {
			one.newest = info.Modified
		}
		switch rest {
		case "session.json":
			one.begun = true
		case "end.json":
			one.hasEnd = true
		default:
			if _, ours := digestOfKey(s.layout.Staged(id, ""), info.Key); ours {
				one.staged = append(one.staged, info.Key)
			} else {
				one.others = append(one.others, info.Key)
			}
		}
	}
	return out, nil
}

// listSessions answers all that are known, the newest first.
func (s *Server) listSessions(_ http.ResponseWriter, r *http.Request, who Identity) (answer, error) {
	found, err := s.eachSession(r.Context())
	if err != nil {
		return answer{}, err
	}
	replies := make([]*writesession.Session, len(found))
	group, ctx := errgroup.WithContext(r.Context())
	group.SetLimit(parallelRequests)
	for i, one := range found {
		if !one.begun {
			continue
		}
		group.Go(func() error {
			document, end, err := s.readFor(ctx, one.id, who)
			var gone *problemError
			if errors.As(err, &gone) { // removed since, or of somebody else
				return nil
			}
			if err != nil {
				return err
			}
			reply := s.answerFor(document, s.stateOf(document, end))
			if end != nil {
				reply.Result = end.Result
			}
			replies[i] = &reply
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return answer{}, err
	}
	out := struct {
		Sessions []*writesession.Session `json:"sessions"`
	}{Sessions: slices.DeleteFunc(replies, func(reply *writesession.Session) bool { return reply == nil })}
	slices.SortFunc(out.Sessions, func(a, b *writesession.Session) int {
		return cmp.Or(b.Created.Compare(a.Created), strings.Compare(a.ID, b.ID))
	})
	return answer{http.StatusOK, out}, nil
}

// openSessions are those that may still complete.
func (s *Server) openSessions(ctx context.Context) ([]sessionDocument, error) {
	found, err := s.eachSession(ctx)
	if err != nil {
		return nil, err
	}
	var out []sessionDocument
	for _, one := range found {
		if !one.begun || one.hasEnd {
			continue
		}
		document, end, err := s.read(ctx, one.id)
		var gone *problemError
		if errors.As(err, &gone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if s.stateOf(document, end) == writesession.Open {
			out = append(out, document)
		}
	}
	return out, nil
}

// nameOf is how errors and results call an artifact.
func (s *Server) nameOf(artifact string, digest blob.Digest) string {
	return s.site + "/" + artifact + "@" + string(digest)
}

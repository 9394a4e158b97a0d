package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// publishLimit bounds what goes on after the client may have gone.
const publishLimit = 15 * time.Minute

// complete proves all that a request says, then makes it visible in an order in
// which nothing visible refers to what is not.
func (s *Server) complete(w http.ResponseWriter, r *http.Request, who Identity) (answer, error) {
	// Reading back takes as long as it takes; the connection's limits are for others.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(completeLimit))
	ctx, cancel := context.WithTimeout(r.Context(), completeLimit)
	defer cancel()
	var request writesession.CompleteRequest
	var hash string
	err := s.readBody(w, r, writesession.MaxBodyBytes, func(body io.Reader) error {
		sum := sha256.New()
		var err error
		request, err = decodeComplete(io.TeeReader(body, sum))
		hash = hex.EncodeToString(sum.Sum(nil))
		return err
	})
	if err != nil {
		return answer{}, err
	}
	if err := s.checkComplete(request); err != nil {
		return answer{}, err
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	id := r.PathValue("id")
	unlock, err := s.sessions.lock(ctx, id)
	if err != nil {
		return answer{}, err
	}
	defer unlock()
	document, end, err := s.readFor(ctx, id, who)
	if err != nil {
		return answer{}, err
	}
	if state := s.stateOf(document, end); state == writesession.Open {
		end, err = s.finish(ctx, document, request, hash)
		if err != nil {
			return answer{}, err
		}
	}
	return s.completed(document, end, hash)
}

// completed answers for a session that has ended, or expired.
func (s *Server) completed(document sessionDocument, end *endDocument, hash string) (answer, error) {
	state := s.stateOf(document, end)
	if state != writesession.Complete {
		return answer{}, notOpen(document.ID, state)
	}
	if end.Request != hash {
		return answer{}, refuse(http.StatusConflict, writesession.ProblemConflict,
			"session %s was completed with another body", document.ID)
	}
	reply := s.answerFor(document, state)
	reply.Result = end.Result
	return answer{http.StatusOK, reply}, nil
}

func (s *Server) finish(ctx context.Context, document sessionDocument, request writesession.CompleteRequest, hash string) (*endDocument, error) {
	if err := s.index.refresh(ctx); err != nil {
		return nil, err
	}
	proofs, wrong, err := s.prove(ctx, document.ID, request.Packs)
	if err != nil {
		return nil, err
	}
	if len(wrong) > 0 {
		return nil, s.unproven(document, wrong)
	}
	select {
	case s.publishing <- struct{}{}:
		defer func() { <-s.publishing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	// What is proven is published, whether or not somebody still waits for it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), publishLimit)
	defer cancel()
	todo, wrong := s.layOut(request, proofs)
	if len(wrong) > 0 {
		return nil, s.unproven(document, wrong)
	}
	result, err := s.publish(ctx, document, todo)
	if err != nil {
		return nil, err
	}
	end, err := s.end(ctx, document.ID, endDocument{State: writesession.Complete, Request: hash, Result: result})
	if err != nil {
		return nil, err
	}
	s.log.Info("a write session is complete", "session", document.ID, "owner", document.Owner,
		"names", result.Names, "blobs", result.Blobs, "packs", result.Packs, "bytes", result.BytesStored)
	s.dropStaged(ctx, document.ID)
	return end, nil
}

func (s *Server) unproven(document sessionDocument, wrong []writesession.ObjectProblem) error {
	s.metrics.unproven.Add(float64(len(wrong)))
	s.log.Warn("a write session was refused", "session", document.ID, "owner", document.Owner,
		"problems", len(wrong), "first", wrong[0].Name, "detail", wrong[0].Detail)
	return unproven(wrong)
}

// publication is what there is to write, in its order.
type publication struct {
	packs   []proof
	records []writesession.Record
	names   []writesession.Artifact
}

// layOut finds a place for each chunk of each new blob. A pack that none of them
// needs is not published: somebody else was faster with its chunks.
func (s *Server) layOut(request writesession.CompleteRequest, proofs []proof) (publication, []writesession.ObjectProblem) {
	fresh := map[raw]place{}
	for _, proven := range proofs {
		for _, chunk := range proven.pack.Chunks {
			fresh[rawOf(chunk.Digest)] = place{pack: proven.pack.Digest, offset: chunk.Offset, length: chunk.Length, size: chunk.Size}
		}
	}
	var todo publication
	var wrong []writesession.ObjectProblem
	needed, coming := map[blob.Digest]bool{}, map[blob.Digest]bool{}
	for _, manifest := range request.Blobs {
		coming[manifest.Digest] = true
		if _, intact := s.index.record(manifest.Digest); intact {
			continue
		}
		record, problem := s.recordOf(manifest, fresh)
		if problem != "" {
			wrong = append(wrong, writesession.ObjectProblem{Name: string(manifest.Digest), Detail: problem})
			continue
		}
		for _, pack := range record.Packs {
			needed[pack] = true
		}
		todo.records = append(todo.records, record)
	}
	for _, proven := range proofs {
		if _, there := s.index.pack(proven.pack.Digest); needed[proven.pack.Digest] && !there {
			todo.packs = append(todo.packs, proven)
		}
	}
	for _, name := range request.Names {
		for _, digest := range name.Blobs {
			if _, intact := s.index.record(digest); !intact && !coming[digest] {
				wrong = append(wrong, writesession.ObjectProblem{
					Name:   s.nameOf(name.Artifact, name.Digest),
					Detail: fmt.Sprintf("its blob %s is neither in the request nor in the store", digest),
				})
			}
		}
		todo.names = append(todo.names, name)
	}
	return todo, wrong
}

// recordOf says where the chunks of a blob lie: where they lay before, if they did.
func (s *Server) recordOf(manifest blob.Manifest, fresh map[raw]place) (record writesession.Record, problem string) {
	record = writesession.Record{
		Version: writesession.RecordVersion, Manifest: manifest, Places: make([]writesession.Place, 0, len(manifest.Chunks)),
	}
	positions := map[blob.Digest]int{}
	for i, chunk := range manifest.Chunks {
		at, known := s.index.chunk(chunk.Digest)
		if !known {
			at, known = fresh[rawOf(chunk.Digest)]
		}
		if !known {
			return record, fmt.Sprintf("chunk %d, %s, is in no pack of the request and not in the store", i, chunk.Digest)
		}
		if at.size != chunk.Size {
			return record, fmt.Sprintf("chunk %d, %s, has %d bytes, and not %d", i, chunk.Digest, at.size, chunk.Size)
		}
		position, seen := positions[at.pack]
		if !seen {
			position = len(record.Packs)
			positions[at.pack] = position
			record.Packs = append(record.Packs, at.pack)
		}
		record.Places = append(record.Places, writesession.Place{Pack: position, Offset: at.offset, Length: at.length})
	}
	return record, ""
}

// publish writes packs, then records, then names.
func (s *Server) publish(ctx context.Context, document sessionDocument, todo publication) (*writesession.Result, error) {
	result := &writesession.Result{Names: []string{}, Blobs: len(todo.records), Packs: len(todo.packs)}
	err := inParallel(ctx, todo.packs, func(ctx context.Context, proven proof) error { return s.publishPack(ctx, document, proven) })
	if err != nil {
		return nil, err
	}
	if err := inParallel(ctx, todo.records, s.publishRecord); err != nil {
		return nil, err
	}
	if err := inParallel(ctx, todo.names, s.publishName); err != nil {
		return nil, err
	}
	for _, proven := range todo.packs {
		result.BytesStored += proven.pack.Size
	}
	for _, name := range todo.names {
		result.Names = append(result.Names, s.nameOf(name.Artifact, name.Digest))
	}
	slices.Sort(result.Names)
	return result, nil
}

func inParallel[T any](ctx context.Context, all []T, do func(context.Context, T) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallelPacks)
	for _, one := range all {
		group.Go(func() error { return do(ctx, one) })
	}
	return group.Wait()
}

// publishPack has the store copy exactly the version that was proven.
func (s *Server) publishPack(ctx context.Context, document sessionDocument, proven proof) error {
	digest := proven.pack.Digest
	err := writesession.ErrNotFound // of one that was there, and has been removed since
	if proven.from != "" {
		err = s.bucket.Copy(ctx, proven.from, s.layout.Pack(digest), proven.etag)
	}
	if errors.Is(err, writesession.ErrChanged) || errors.Is(err, writesession.ErrNotFound) {
		return s.unproven(document, []writesession.ObjectProblem{{
			Name: string(digest), Detail: "it changed after it was proven; send the request again",
		}})
	}
	if err != nil {
		return err
	}
	s.index.addPack(digest, proven.pack.Size, s.now())
	s.metrics.published.WithLabelValues("pack").Inc()
	return nil
}

// publishRecord makes a blob visible. A record that is there stays, but for one
// that hosts cannot use.
func (s *Server) publishRecord(ctx context.Context, record writesession.Record) error {
	encoded, err := record.Encode()
	if err != nil {
		return err
	}
	known, _ := s.index.record(record.Manifest.Digest)
	err = s.bucket.Put(ctx, s.layout.Blob(record.Manifest.Digest), encoded, !known)
	if errors.Is(err, writesession.ErrExists) {
		return nil // the next refresh reads it
	}
	if err != nil {
		return err
	}
	s.index.addRecord(record, "", s.now())
	s.metrics.published.WithLabelValues("blob").Inc()
	return nil
}

// publishName is last. An equal name stays as it is.
func (s *Server) publishName(ctx context.Context, name writesession.Artifact) error {
	name.Site = ""
	key := s.layout.Name(name.Artifact, name.Digest)
	if name.Created.IsZero() {
		name.Created = s.now().UTC().Truncate(time.Second)
	}
	encoded, err := json.Marshal(name)
	if err != nil {
		return fmt.Errorf("encode %s: %w", key, err)
	}
	err = s.bucket.Put(ctx, key, encoded, true)
	if errors.Is(err, writesession.ErrExists) {
		before, readErr := s.readName(ctx, writesession.Info{Key: key}, name.Artifact, name.Digest)
		var unreadable *nameError
		switch {
		case readErr == nil && sameName(before, name):
			return nil
		case readErr != nil && !errors.As(readErr, &unreadable) && !errors.Is(readErr, writesession.ErrNotFound):
			return readErr
		}
		err = s.bucket.Put(ctx, key, encoded, false)
	}
	if err != nil {
		return err
	}
	s.metrics.published.WithLabelValues("name").Inc()
	return nil
}

func sameName(a, b writesession.Artifact) bool {
	return a.Kind == b.Kind && a.Digest == b.Digest && a.Size == b.Size && slices.Equal(a.Blobs, b.Blobs)
}

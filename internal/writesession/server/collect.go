package server

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/nomad-site/site/internal/writesession"
)

// youngAge keeps what a deploy that is still running may have brought.
const youngAge = time.Hour

// deleteBatch is how many keys one request removes.
const deleteBatch = 1000

// collect removes the names that are not kept, and then what only they needed.
func (s *Server) collect(w http.ResponseWriter, r *http.Request, who Identity) (answer, error) {
	if who.Kind != KindOperator {
		return answer{}, refuse(http.StatusForbidden, writesession.ProblemForbidden, "only operators remove artifacts")
	}
	var request writesession.CollectRequest
	if err := s.readBody(w, r, smallBody, func(body io.Reader) error { return strictJSON(body, &request) }); err != nil {
		return answer{}, err
	}
	if len(request.Keep) == 0 {
		return answer{}, badRequest("keep is empty: a site always has something that runs")
	}
	for i, kept := range request.Keep {
		if !kept.Digest.Valid() || !sitePattern.MatchString(kept.Artifact) {
			return answer{}, badRequest("keep %d: %.100q and %.100q are no artifact and digest", i, kept.Artifact, kept.Digest)
		}
	}
	ctx := r.Context()
	if !s.closeGate(ctx) {
		return answer{http.StatusOK, writesession.Collected{
			DryRun: request.DryRun, Artifacts: []writesession.CollectedArtifact{}, Refused: "uploads are being published",
		}}, nil
	}
	defer s.gate.Unlock()
	todo, err := s.decide(ctx, request)
	if err != nil {
		return answer{}, err
	}
	if todo.answer.Refused == "" && !request.DryRun {
		s.log.Info("collecting artifacts", "by", who.owner(), "names", len(todo.names), "packs", todo.answer.PacksRemoved, "bytes", todo.answer.BytesFreed)
		// Begun is finished: what remains of half of it is only found by the next one.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), publishLimit)
		defer cancel()
		if err := s.remove(ctx, todo); err != nil {
			return answer{}, err
		}
	}
	return answer{http.StatusOK, todo.answer}, nil
}

// closeGate waits a little for running requests. It never queues: new requests
// would wait behind it.
func (s *Server) closeGate(ctx context.Context) bool {
	limit := time.NewTimer(collectPatience)
	defer limit.Stop()
	ticker := time.NewTicker(collectPatience / 100)
	defer ticker.Stop()
	for {
		if s.gate.TryLock() {
			return true
		}
		select {
		case <-ticker.C:
		case <-limit.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// collection is what goes, in its order.
type collection struct {
	answer                writesession.Collected
	names, records, packs []string
}

func (s *Server) decide(ctx context.Context, request writesession.CollectRequest) (collection, error) {
	todo := collection{answer: writesession.Collected{DryRun: request.DryRun, Artifacts: []writesession.CollectedArtifact{}}}
	open, err := s.openSessions(ctx)
	if err != nil {
		return todo, err
	}
	if len(open) > 0 {
		todo.answer.Refused = fmt.Sprintf("%d sessions are open, such as %s of %s, until %s: upload it again to its end, or wait",
			len(open), open[0].ID, open[0].Owner, open[0].Expires.Format(time.RFC3339))
	}
	names, err := s.readNames(ctx)
	if err != nil {
		return todo, err
	}
	if err := s.index.refresh(ctx); err != nil {
		return todo, err
	}
	live := s.decideNames(&todo, names, request.Keep)
	found := s.index.garbage(live, s.young)
	for _, digest := range found.records {
		todo.records = append(todo.records, s.layout.Blob(digest.digest()))
	}
	for _, digest := range found.packs {
		todo.packs = append(todo.packs, s.layout.Pack(digest.digest()))
	}
	todo.answer.PacksRemoved, todo.answer.BytesFreed, todo.answer.BytesWasted = len(found.packs), found.freed, found.wasted
	if todo.answer.Refused != "" { // nothing goes
		for i := range todo.answer.Artifacts {
			todo.answer.Artifacts[i].Removed = false
		}
		todo.answer.PacksRemoved, todo.answer.BytesFreed = 0, 0
	}
	return todo, nil
}

func (s *Server) young(modified time.Time) bool { return s.now().Sub(modified) < youngAge }

// decideNames gives the blobs that names which stay refer to.
func (s *Server) decideNames(todo *collection, names []published, keep []writesession.Kept) map[raw]bool {
	reasons := make(map[string]string, len(keep))
	for _, kept := range keep {
		reasons[s.layout.Name(kept.Artifact, kept.Digest)] = kept.Reason
	}
	live := map[raw]bool{}
	for _, one := range names {
		reason, kept := reasons[one.info.Key]
		switch {
		case kept:
		case s.young(one.info.Modified):
			kept, reason = true, "younger than an hour"
		default:
			reason = "nothing keeps it"
			todo.names = append(todo.names, one.info.Key)
		}
		if kept && one.err != nil && todo.answer.Refused == "" {
			todo.answer.Refused = fmt.Sprintf("%s is kept, and cannot be understood: %v", s.nameOf(one.artifact, one.digest), one.err)
		}
		if kept {
			for _, digest := range one.name.Blobs {
				live[rawOf(digest)] = true
			}
		}
		todo.answer.Artifacts = append(todo.answer.Artifacts, writesession.CollectedArtifact{
			Artifact: one.artifact, Digest: one.digest, Size: one.name.Size, Removed: !kept, Reason: reason,
		})
	}
	return live
}

// remove takes away what refers before what is referred to.
func (s *Server) remove(ctx context.Context, todo collection) error {
	for _, keys := range [][]string{todo.names, todo.records, todo.packs} {
		for len(keys) > 0 {
			batch := keys[:min(len(keys), deleteBatch)]
			if err := s.bucket.Delete(ctx, batch...); err != nil {
				return err
			}
			keys = keys[len(batch):]
		}
	}
	return s.index.refresh(ctx)
}

// garbage is what nobody needs.
type garbage struct {
	records, packs []raw
	freed, wasted  int64
}

// garbage finds the records of blobs that are not live, and the packs that no
// remaining record needs. What is young stays.
func (x *index) garbage(live map[raw]bool, young func(time.Time) bool) garbage {
	x.mutex.RLock()
	defer x.mutex.RUnlock()
	var out garbage
	needed, counted := map[uint32]int64{}, map[chunkEntry]bool{}
	for digest, record := range x.records {
		if !live[digest] && !young(record.modified) {
			out.records = append(out.records, digest)
			continue
		}
		for _, pack := range record.packs {
			needed[pack] += 0
		}
		for _, id := range record.chunks {
			if chunk := x.chunks[id]; !counted[chunk] {
				counted[chunk] = true
				needed[chunk.pack] += int64(chunk.length)
			}
		}
	}
	for id, pack := range x.packs {
		used, kept := needed[uint32(id)]
		switch {
		case !pack.there:
		case kept:
			out.wasted += pack.size - used
		case young(pack.modified):
		default:
			out.packs = append(out.packs, pack.digest)
			out.freed += pack.size
		}
	}
	return out
}

package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

const (
	maxNameBytes = 1 << 20
	nameSuffix   = ".json"
)

// nameError is a name that cannot be understood.
type nameError struct {
	key string
	err error
}

func (e *nameError) Error() string { return fmt.Sprintf("read %s: %v", e.key, e.err) }
func (e *nameError) Unwrap() error { return e.err }

// published is a name in the bucket.
type published struct {
	info     writesession.Info
	artifact string
	digest   blob.Digest
	name     writesession.Artifact
	// err is a *nameError, or nil.
	err error
}

// nameCache saves reading names again: they are never changed, only replaced.
type nameCache struct {
	mutex sync.Mutex
	known map[string]published
}

func (c *nameCache) get(info writesession.Info) (published, bool) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	found, ok := c.known[info.Key]
	return found, ok && found.info.ETag == info.ETag && found.info.Modified.Equal(info.Modified)
}

// replace keeps the names that there are, and forgets all others.
func (c *nameCache) replace(all []published) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.known = make(map[string]published, len(all))
	for _, one := range all {
		c.known[one.info.Key] = one
	}
}

// parseNameKey gives the two parts of a name's key; false for what is not ours.
func parseNameKey(layout writesession.Layout, key string) (artifact string, digest blob.Digest, ok bool) {
	rest, found := strings.CutPrefix(key, layout.Names())
	artifact, file, cut := strings.Cut(rest, "/")
	hex, suffixed := strings.CutSuffix(file, nameSuffix)
	digest, err := blob.ParseDigest("sha256:" + hex)
	if !found || !cut || !suffixed || err != nil || !sitePattern.MatchString(artifact) {
		return "", "", false
	}
	return artifact, digest, true
}

// listNames gives the keys of names, without what is in them.
func (s *Server) listNames(ctx context.Context) ([]published, error) {
	var out []published
	for info, err := range s.bucket.List(ctx, s.layout.Names()) {
		if err != nil {
			return nil, err
		}
		if artifact, digest, ok := parseNameKey(s.layout, info.Key); ok {
			out = append(out, published{info: info, artifact: artifact, digest: digest})
		}
	}
	return out, nil
}

// readNames gives all names, with those that cannot be understood.
func (s *Server) readNames(ctx context.Context) ([]published, error) {
	found, err := s.listNames(ctx)
	if err != nil {
		return nil, err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallelRequests)
	for i, one := range found {
		if known, ok := s.names.get(one.info); ok {
			found[i] = known
			continue
		}
		group.Go(func() error {
			name, err := s.readName(ctx, one.info, one.artifact, one.digest)
			var unreadable *nameError
			if err != nil && !errors.As(err, &unreadable) && !errors.Is(err, writesession.ErrNotFound) {
				return err
			}
			if err != nil && unreadable == nil { // removed since it was listed
				err = &nameError{one.info.Key, err}
			}
			found[i].name, found[i].err = name, err
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	s.names.replace(found)
	return found, nil
}

func (s *Server) readName(ctx context.Context, info writesession.Info, artifact string, digest blob.Digest) (writesession.Artifact, error) {
	var name writesession.Artifact
	content, _, err := getAll(ctx, s.bucket, info.Key, maxNameBytes)
	var long *tooLongError
	if errors.As(err, &long) {
		return name, &nameError{info.Key, err}
	}
	if err != nil {
		return name, err
	}
	if err := strictJSON(bytes.NewReader(content), &name); err != nil {
		return name, &nameError{info.Key, err}
	}
	if name.Artifact != artifact || name.Digest != digest {
		return name, &nameError{info.Key, fmt.Errorf("it is of %s", s.nameOf(name.Artifact, name.Digest))}
	}
	if err := s.checkName(name); err != nil {
		return name, &nameError{info.Key, err}
	}
	return name, nil
}

// missing answers what of a list the store lacks.
func (s *Server) missing(w http.ResponseWriter, r *http.Request, _ Identity) (answer, error) {
	var request writesession.MissingRequest
	if err := s.readBody(w, r, writesession.MaxBodyBytes, func(body io.Reader) error { return strictJSON(body, &request) }); err != nil {
		return answer{}, err
	}
	for i, digest := range append(append([]blob.Digest{}, request.Blobs...), request.Chunks...) {
		if !digest.Valid() {
			return answer{}, badRequest("digest %d: %.100q is none", i, digest)
		}
	}
	for i := range request.Names {
		if err := s.checkName(request.Names[i]); err != nil {
			return answer{}, badRequest("name %d: %s", i, err)
		}
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	if err := s.index.refresh(r.Context()); err != nil {
		return answer{}, err
	}
	reply := writesession.MissingResponse{Names: []int{}, Blobs: []blob.Digest{}, Chunks: []blob.Digest{}}
	if len(request.Names) > 0 {
		found, err := s.readNames(r.Context())
		if err != nil {
			return answer{}, err
		}
		reply.Names = s.lackingNames(request.Names, found)
	}
	for _, digest := range request.Blobs {
		if _, intact := s.index.record(digest); !intact {
			reply.Blobs = append(reply.Blobs, digest)
		}
	}
	for _, digest := range request.Chunks {
		if _, known := s.index.chunk(digest); !known {
			reply.Chunks = append(reply.Chunks, digest)
		}
	}
	return answer{http.StatusOK, reply}, nil
}

func (s *Server) lackingNames(wanted []writesession.Artifact, found []published) []int {
	there := make(map[string]published, len(found))
	for _, one := range found {
		there[one.info.Key] = one
	}
	out := []int{}
	for i, name := range wanted {
		// One that is damaged, or says something else, is lacking: it is written anew.
		one, known := there[s.layout.Name(name.Artifact, name.Digest)]
		if !known || one.err != nil || !sameName(one.name, name) {
			out = append(out, i)
		}
	}
	return out
}

// listArtifacts answers what is published, by artifact and digest.
func (s *Server) listArtifacts(_ http.ResponseWriter, r *http.Request, _ Identity) (answer, error) {
	found, err := s.readNames(r.Context())
	if err != nil {
		return answer{}, err
	}
	open, err := s.openSessions(r.Context())
	if err != nil {
		return answer{}, err
	}
	if err := s.index.refresh(r.Context()); err != nil {
		return answer{}, err
	}
	listing := writesession.Listing{Artifacts: []writesession.Listed{}, OpenSessions: len(open), Enforces: s.enforces()}
	listing.Packs, listing.BytesStored = s.index.totals()
	for _, one := range found {
		if one.err == nil {
			listing.Artifacts = append(listing.Artifacts, writesession.Listed{Artifact: one.name, Stored: one.info.Modified})
		}
	}
	return answer{http.StatusOK, listing}, nil
}

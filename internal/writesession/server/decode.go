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
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

const maxNameLength = 300

// zstdCoding is a coding of bodies that answers say we take (RFC 7694).
const zstdCoding = "zstd"

// maxWindow bounds what a compressed body makes us remember of it.
const maxWindow = 8 << 20

// readBody decodes a whole body strictly. What all requests together may hold in
// memory is bounded, so a greedy one waits.
func (s *Server) readBody(w http.ResponseWriter, r *http.Request, limit int64, decode func(io.Reader) error) error {
	weight := limit
	if r.ContentLength > limit {
		return &http.MaxBytesError{Limit: limit}
	}
	coding := r.Header.Get("Content-Encoding")
	if coding == "" && r.ContentLength >= 0 {
		weight = r.ContentLength
	}
	if err := s.bodies.Acquire(r.Context(), weight); err != nil {
		return err
	}
	defer s.bodies.Release(weight)
	var body io.Reader = http.MaxBytesReader(w, r.Body, limit)
	switch coding {
	case "", "identity":
	case zstdCoding:
		unpacked, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return fmt.Errorf("make a decompressor: %w", err)
		}
		defer unpacked.Close()
		body = &atMost{reader: unpacked, limit: limit, left: limit}
	default:
		return refuse(http.StatusUnsupportedMediaType, writesession.ProblemBadRequest, "content coding %.50q is none of ours: %s", coding, zstdCoding)
	}
	return bodyError(r.Context(), decode(body))
}

func bodyError(ctx context.Context, err error) error {
	var long *http.MaxBytesError
	var problem *problemError
	switch {
	case err == nil, errors.As(err, &long), errors.As(err, &problem):
		return err
	case ctx.Err() != nil:
		return context.Cause(ctx)
	default:
		return badRequest("the body is not what it should be: %.500s", err)
	}
}

// atMost fails where a body unpacks to more than it may.
type atMost struct {
	reader      io.Reader
	limit, left int64
}

func (a *atMost) Read(into []byte) (int, error) {
	n, err := a.reader.Read(into)
	if a.left -= int64(n); a.left < 0 {
		return n, &http.MaxBytesError{Limit: a.limit}
	}
	return n, err
}

// strictJSON reads one document and nothing else.
func strictJSON(reader io.Reader, into any) error {
	decoder := json.NewDecoder(reader)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return err
	}
	return nothingFollows(decoder)
}

func nothingFollows(decoder *json.Decoder) error {
	_, err := decoder.Token()
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.New("something follows the document")
}

// decodeComplete reads one pack, blob and name after the other: the text of a big
// request is never in memory as a whole.
func decodeComplete(reader io.Reader) (writesession.CompleteRequest, error) {
	var request writesession.CompleteRequest
	decoder := json.NewDecoder(reader)
	decoder.DisallowUnknownFields()
	if err := wantDelim(decoder, '{'); err != nil {
		return request, err
	}
	seen := map[string]bool{}
	for decoder.More() {
		token, err := decoder.Token()
		if err != nil {
			return request, err
		}
		key, _ := token.(string)
		if seen[key] {
			return request, fmt.Errorf("%q is there twice", key)
		}
		seen[key] = true
		switch key {
		case "packs":
			err = decodeArray(decoder, &request.Packs)
		case "blobs":
			err = decodeArray(decoder, &request.Blobs)
		case "names":
			err = decodeArray(decoder, &request.Names)
		default:
			err = fmt.Errorf("unknown field %.100q", key)
		}
		if err != nil {
			return request, err
		}
	}
	if err := wantDelim(decoder, '}'); err != nil {
		return request, err
	}
	return request, nothingFollows(decoder)
}

func decodeArray[T any](decoder *json.Decoder, into *[]T) error {
	token, err := decoder.Token()
	if err != nil {
		return err
	}
	if token == nil { // null is an empty list
		return nil
	}
	if token != json.Delim('[') {
		return fmt.Errorf("want a list, got %.20v", token)
	}
	for decoder.More() {
		var one T
		if err := decoder.Decode(&one); err != nil {
			return err
		}
		*into = append(*into, one)
	}
	return wantDelim(decoder, ']')
}

func wantDelim(decoder *json.Decoder, want json.Delim) error {
	token, err := decoder.Token()
	if err != nil {
		return err
	}
	if token != want {
		return fmt.Errorf("want %q, got %.20v", want.String(), token)
	}
	return nil
}

// checkCreate refuses what no session can be.
func (s *Server) checkCreate(request writesession.CreateRequest) error {
	if request.Capability != writesession.Capability {
		return badRequest("capability %.50q is unknown: want %q", request.Capability, writesession.Capability)
	}
	if request.Namespace != s.site {
		return refuse(http.StatusForbidden, writesession.ProblemForbidden,
			"a session writes below namespace %q, and not %.100q", s.site, request.Namespace)
	}
	ttl := time.Duration(request.TTLSeconds) * time.Second
	if request.TTLSeconds > int64(writesession.MaxTTL/time.Second) || ttl < writesession.MinTTL {
		return badRequest("ttl_seconds %d is not from %d to %d", request.TTLSeconds,
			int64(writesession.MinTTL/time.Second), int64(writesession.MaxTTL/time.Second))
	}
	return checkObjects(request.Objects)
}

func checkObjects(objects []writesession.Object) error {
	if len(objects) > writesession.MaxObjects {
		return badRequest("%d objects, at most %d are allowed in a request", len(objects), writesession.MaxObjects)
	}
	seen := make(map[string]bool, len(objects))
	for i, object := range objects {
		if _, err := objectDigest(object); err != nil {
			return badRequest("object %d: sha256 %.100q is not of 64 digits 0-9 and a-f", i, object.SHA256)
		}
		if object.Size < 1 || object.Size > writesession.MaxPackSize {
			return badRequest("object %d: size %d is not from 1 to %d", i, object.Size, writesession.MaxPackSize)
		}
		if object.Name == "" || len(object.Name) > maxNameLength || !printable(object.Name) {
			return badRequest("object %d: name %.100q is not of 1 to %d printable characters", i, object.Name, maxNameLength)
		}
		if seen[object.SHA256] {
			return badRequest("object %d: %s is there twice", i, object.SHA256)
		}
		seen[object.SHA256] = true
	}
	return nil
}

func objectDigest(object writesession.Object) (blob.Digest, error) {
	return blob.ParseDigest("sha256:" + object.SHA256)
}

func printable(text string) bool {
	if !utf8.ValidString(text) {
		return false
	}
	for _, c := range text {
		if c < ' ' || c == 0x7f {
			return false
		}
	}
	return true
}

// checkComplete refuses what cannot be true of any bytes.
func (s *Server) checkComplete(request writesession.CompleteRequest) error {
	packs := map[blob.Digest]bool{}
	for i, pack := range request.Packs {
		if err := checkPack(pack); err != nil {
			return badRequest("pack %d: %s", i, err)
		}
		if packs[pack.Digest] {
			return badRequest("pack %d: %s is there twice", i, pack.Digest)
		}
		packs[pack.Digest] = true
	}
	blobs := map[blob.Digest]bool{}
	for i, manifest := range request.Blobs {
		if err := manifest.Validate(); err != nil {
			return badRequest("blob %d: %s", i, err)
		}
		if blobs[manifest.Digest] {
			return badRequest("blob %d: %s is there twice", i, manifest.Digest)
		}
		blobs[manifest.Digest] = true
	}
	for i := range request.Names {
		if err := s.checkName(request.Names[i]); err != nil {
			return badRequest("name %d: %s", i, err)
		}
	}
	return nil
}

func (s *Server) checkName(artifact writesession.Artifact) error {
	name := artifact.Name
	name.Site, name.Artifact = s.site, artifact.Artifact
	if err := name.Validate(); err != nil {
		return err
	}
	if name.Platform {
		return fmt.Errorf("%s is of the platform, which travels by SSH", name)
	}
	return nil
}

// checkPack insists that the chunks lie one behind the other and fill the pack, so
// that no byte of it is unproven.
func checkPack(pack writesession.Pack) error {
	if !pack.Digest.Valid() {
		return fmt.Errorf("%.100q is no digest", pack.Digest)
	}
	if pack.Size < 1 || pack.Size > writesession.MaxPackSize {
		return fmt.Errorf("size %d is not from 1 to %d", pack.Size, writesession.MaxPackSize)
	}
	var end int64
	for i, chunk := range pack.Chunks {
		switch {
		case !chunk.Digest.Valid():
			return fmt.Errorf("chunk %d: %.100q is no digest", i, chunk.Digest)
		case chunk.Size < 1 || chunk.Size > blob.MaxChunkSize:
			return fmt.Errorf("chunk %d: size %d is not from 1 to %d", i, chunk.Size, blob.MaxChunkSize)
		case chunk.Length < 1 || chunk.Length > writesession.MaxPackedChunk:
			return fmt.Errorf("chunk %d: length %d is not from 1 to %d", i, chunk.Length, writesession.MaxPackedChunk)
		case chunk.Offset != end:
			return fmt.Errorf("chunk %d: begins at %d, and the one before it ends at %d", i, chunk.Offset, end)
		}
		end += chunk.Length
	}
	if end != pack.Size {
		return fmt.Errorf("its chunks end at %d of %d bytes", end, pack.Size)
	}
	return nil
}

func hashOf(parts ...string) string {
	hash := sha256.New()
	for _, part := range parts {
		_, _ = fmt.Fprintf(hash, "%d:%s|", len(part), part)
	}
	return hex.EncodeToString(hash.Sum(nil))
}

// Package writesession is the protocol by which artifacts get into a site's
// object storage. A session hands out presigned uploads for packs of chunks;
// nothing is visible before the service has read all of it back and proven each
// chunk by the digest of its plain bytes. Whoever uploads holds no credential of
// the store.
//
// The service is in writesession/server, who uploads in writesession/client. The
// names of objects and what is in them are here, for hosts read them too.
package writesession

import (
	"time"

	"github.com/nomad-site/site/internal/blob"
)

// Capability is the only one there is so far: to add artifacts.
const Capability = "artifacts.write"

// The limits of a request.
const (
	MinTTL = time.Minute
	MaxTTL = 7 * 24 * time.Hour
	// DefaultTTL is what `site deploy` asks for.
	DefaultTTL = time.Hour
	// MaxPackSize is that of one object, and of one presigned upload.
	MaxPackSize = 32 << 20
	// MaxObjects are those of one request; a session may have more.
	MaxObjects = 1000
	// MinKeyLength and MaxKeyLength are those of an Idempotency-Key.
	MinKeyLength = 8
	MaxKeyLength = 128
	// MaxBodyBytes is the largest request body.
	MaxBodyBytes = 64 << 20
)

// IdempotencyHeader names the key by which a request that is sent again gives the
// same session (draft-ietf-httpapi-idempotency-key-header).
const IdempotencyHeader = "Idempotency-Key"

// CreateRequest is the body of POST /v1/sites/{site}/write-sessions.
type CreateRequest struct {
	// Capability is Capability.
	Capability string `json:"capability"`
	// Namespace is the site: a session writes below it and nowhere else.
	Namespace string `json:"namespace"`
	// Objects may be empty: more are added while the session is open.
	Objects []Object `json:"objects"`
	// TTLSeconds is from MinTTL to MaxTTL.
	TTLSeconds int64 `json:"ttl_seconds"`
}

// Object is one upload: a pack of compressed chunks, as the store will have it.
type Object struct {
	// Name is for people and errors.
	Name string `json:"name"`
	// SHA256 is the hex digest of the stored bytes, not of what is in them.
	SHA256 string `json:"sha256"`
	// Size is in bytes, from 1 to MaxPackSize.
	Size int64 `json:"size"`
}

// The states of an object.
const (
	// Present objects were proven before: nothing is to be sent.
	Present = "present"
	// ToPut objects are awaited at a presigned URL.
	ToPut = "put"
)

// ObjectState is what is to be done about an object.
type ObjectState struct {
	Object
	State string `json:"state"`
	// Put is set where State is ToPut, and never stored or logged.
	Put *Put `json:"put,omitempty"`
}

// Put is a presigned upload: PUT with exactly these headers, and no others that
// are signed.
type Put struct {
	URL     string            `json:"url"`
	Headers map[string]string `json:"headers"`
	Expires time.Time         `json:"expires"`
}

// State is that of a session.
type State string

// The states of a session.
const (
	Open     State = "open"
	Complete State = "complete"
	Aborted  State = "aborted"
	Expired  State = "expired"
)

// Session is the answer to every request about one.
type Session struct {
	ID        string    `json:"id"`
	Site      string    `json:"site"`
	Namespace string    `json:"namespace"`
	State     State     `json:"state"`
	Owner     string    `json:"owner"`
	Created   time.Time `json:"created"`
	Expires   time.Time `json:"expires"`
	// Objects are those of the request that is answered.
	Objects []ObjectState `json:"objects,omitempty"`
	// Result is set once the session is complete.
	Result *Result `json:"result,omitempty"`
}

// AddRequest is the body of POST …/{id}/objects: more uploads of an open session.
type AddRequest struct {
	Objects []Object `json:"objects"`
}

// CompleteRequest is the body of POST …/{id}/complete.
type CompleteRequest struct {
	// Packs say where the new chunks lie: each pack was an object of the session,
	// or was present.
	Packs []Pack `json:"packs"`
	// Blobs become visible. Each of their chunks is in Packs, or in the store.
	Blobs []blob.Manifest `json:"blobs"`
	// Names are published last. Their blobs are in Blobs or in the store.
	Names []Artifact `json:"names"`
}

// Pack is one stored object: zstd frames of chunks, one behind the other.
type Pack struct {
	// Digest is that of the stored bytes.
	Digest blob.Digest   `json:"digest"`
	Size   int64         `json:"size"`
	Chunks []PackedChunk `json:"chunks"`
}

// PackedChunk is one chunk in a pack: Length compressed bytes from Offset, which
// are Size plain bytes with Digest.
type PackedChunk struct {
	Digest blob.Digest `json:"digest"`
	Size   int64       `json:"size"`
	Offset int64       `json:"offset"`
	Length int64       `json:"length"`
}

// Artifact is a name as the store has it, with the two parts that blob.Name keeps
// in its path.
type Artifact struct {
	Artifact string `json:"artifact"`
	blob.Name
}

// Result says what a session brought.
type Result struct {
	Names []string `json:"names"`
	// Blobs and Packs became visible with it; BytesStored are those of the packs.
	Blobs       int   `json:"blobs"`
	Packs       int   `json:"packs"`
	BytesStored int64 `json:"bytes_stored"`
}

// MissingRequest is the body of POST /v1/sites/{site}/missing.
type MissingRequest struct {
	Names  []Artifact    `json:"names,omitempty"`
	Blobs  []blob.Digest `json:"blobs,omitempty"`
	Chunks []blob.Digest `json:"chunks,omitempty"`
}

// MissingResponse has what of it the store lacks, in the order of the request.
type MissingResponse struct {
	// Names are indexes into those of the request.
	Names  []int         `json:"names"`
	Blobs  []blob.Digest `json:"blobs"`
	Chunks []blob.Digest `json:"chunks"`
}

// Listing is the answer to GET /v1/sites/{site}/artifacts.
type Listing struct {
	Artifacts []Listed `json:"artifacts"`
	// Packs, and what they take of the store.
	Packs       int   `json:"packs"`
	BytesStored int64 `json:"bytes_stored"`
	// OpenSessions is how many may still complete.
	OpenSessions int `json:"open_sessions"`
	// Enforces: the store refuses an upload with another hash than was signed.
	Enforces bool `json:"store_enforces_hashes"`
}

// Listed is one artifact.
type Listed struct {
	Artifact
	// Stored is when it became visible.
	Stored time.Time `json:"stored"`
}

// CollectRequest is the body of POST /v1/sites/{site}/collect: what is not kept goes.
type CollectRequest struct {
	Keep   []Kept `json:"keep"`
	DryRun bool   `json:"dry_run"`
}

// Kept is an artifact that stays, and why.
type Kept struct {
	Artifact string      `json:"artifact"`
	Digest   blob.Digest `json:"digest"`
	Reason   string      `json:"reason"`
}

// Collected is the answer.
type Collected struct {
	DryRun bool `json:"dry_run"`
	// Refused says why nothing was removed, such as an open session.
	Refused string `json:"refused,omitempty"`
	// Artifacts are all there are: those with Removed go.
	Artifacts []CollectedArtifact `json:"artifacts"`
	// PacksRemoved and BytesFreed; BytesWasted lie in packs that are kept for others of their chunks.
	PacksRemoved int   `json:"packs_removed"`
	BytesFreed   int64 `json:"bytes_freed"`
	BytesWasted  int64 `json:"bytes_wasted"`
}

// CollectedArtifact is one artifact and its fate.
type CollectedArtifact struct {
	Artifact string      `json:"artifact"`
	Digest   blob.Digest `json:"digest"`
	Size     int64       `json:"size"`
	Removed  bool        `json:"removed"`
	Reason   string      `json:"reason"`
}

// Problem is an error answer (RFC 9457, application/problem+json).
type Problem struct {
	// Type is "urn:site:problem:" and a word of the constants below.
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
	// Objects name what is wrong with which object, pack, chunk or blob.
	Objects []ObjectProblem `json:"objects,omitempty"`
}

// ObjectProblem is one of them.
type ObjectProblem struct {
	Name   string `json:"name"`
	Detail string `json:"detail"`
}

// The words behind "urn:site:problem:".
const (
	ProblemBadRequest   = "bad-request"
	ProblemUnauthorized = "unauthorized"
	ProblemForbidden    = "forbidden"
	ProblemNotFound     = "not-found"
	ProblemConflict     = "idempotency-conflict" // same key, another body
	ProblemNotOpen      = "not-open"             // 409: complete, aborted or expired
	ProblemUnproven     = "unproven"             // 422: Objects are missing or wrong
	ProblemTooLarge     = "too-large"            // 413
	ProblemStore        = "store-unavailable"    // 503: the bucket does not answer
	ProblemStoreDenied  = "store-denied"         // 502: the bucket refuses the service's keys
	ProblemInternal     = "internal"
)

// ProblemPrefix begins every Problem.Type.
const ProblemPrefix = "urn:site:problem:"

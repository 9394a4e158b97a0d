package writesession

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/nomad-site/site/internal/blob"
)

// Bucket is what the service needs of an object store. All errors are one of
// those below, or wrap one, but for a context that ended.
type Bucket interface {
	// Get reads length bytes from offset, or all from there where length is 0.
	Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, Info, error)
	Head(ctx context.Context, key string) (Info, error)
	// Put writes a small object. With create it is ErrExists where there is one.
	Put(ctx context.Context, key string, content []byte, create bool) error
	// Copy is ErrChanged where from has another etag.
	Copy(ctx context.Context, from, to, etag string) error
	// Delete removes the objects; those that are not there are no error.
	Delete(ctx context.Context, keys ...string) error
	// List gives the objects whose keys begin with prefix, sorted by key.
	List(ctx context.Context, prefix string) iter.Seq2[Info, error]
	// PresignPut allows one upload of exactly these bytes. What the store does not
	// enforce of that is found out by reading back.
	PresignPut(ctx context.Context, key string, digest blob.Digest, size int64, ttl time.Duration) (Put, error)
}

// Info is what a store says about an object.
type Info struct {
	Key      string
	Size     int64
	ETag     string
	Modified time.Time
}

// What a store answers.
var (
	ErrNotFound = errors.New("no such object")
	ErrExists   = errors.New("the object exists")
	ErrChanged  = errors.New("the object has changed")
)

// UnavailableError is a store that does not answer, or answers that it cannot now:
// trying again may help.
type UnavailableError struct {
	// What was tried, without credentials or signed parameters.
	What string
	// RetryAfter is what the store asks for; 0 if it did not say.
	RetryAfter time.Duration
	Err        error
}

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("%s: the object store is unavailable: %v", e.What, e.Err)
}

// Unwrap gives the cause.
func (e *UnavailableError) Unwrap() error { return e.Err }

// DeniedError is a store that refuses the keys, the clock or the action.
type DeniedError struct {
	What string
	// Code is the store's, such as AccessDenied, InvalidAccessKeyId, SignatureDoesNotMatch, RequestTimeTooSkewed, NoSuchBucket.
	Code string
}

func (e *DeniedError) Error() string {
	return fmt.Sprintf("%s: the object store refuses it: %s", e.What, e.Code)
}

// Hint implements plan.Hinter.
func (e *DeniedError) Hint() string {
	switch e.Code {
	case "RequestTimeTooSkewed":
		return "set the clock of the host that runs object-storage-service"
	case "NoSuchBucket":
		return "correct bucket in object_store of site.hcl, or make the bucket"
	}
	return "check the store's keys: `site provider doctor` where a provider makes them, else bring good ones with `site secrets import`"
}

package pull

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/nomad-site/site/internal/blob"
)

// The words by which a failed pull is told apart.
const (
	CodeUnreachable = "unreachable"
	CodeDenied      = "denied"
	CodeNoKeys      = "no_keys"
	CodeNotFound    = "not_found"
	CodeCorrupt     = "corrupt"
	CodeNoSpace     = "no_space"
	CodeInternal    = "internal"
)

// UnreachableError is an object store that does not answer, or answers that it
// cannot now.
type UnreachableError struct {
	What string
	Err  error
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("%s: the object store is unavailable: %v", e.What, e.Err)
}

// Unwrap gives the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *UnreachableError) Hint() string {
	return "what is on the host is served all the same; check the way from the host to the store, or deploy with --via=ssh"
}

// DeniedError is an object store that refuses the host's keys, or its clock.
type DeniedError struct {
	What string
	// Code is the store's, such as AccessDenied or InvalidAccessKeyId.
	Code string
	// Generation is that of the keys.
	Generation int
}

func (e *DeniedError) Error() string {
	return fmt.Sprintf("%s: the object store refuses the host's keys (generation %d): %s", e.What, e.Generation, e.Code)
}

// Hint implements plan.Hinter.
func (e *DeniedError) Hint() string {
	if e.Code == codeSkewed {
		return "set the clock of the host"
	}
	return "check the store's keys: `site provider doctor` where a provider makes them, else bring good ones with `site secrets import`; meanwhile deploy with --via=ssh"
}

// NoKeysError says that the host has no keys to the object store.
type NoKeysError struct{ Err error }

func (e *NoKeysError) Error() string {
	return fmt.Sprintf("the host has no keys to the object store: %v", e.Err)
}

// Unwrap gives the cause.
func (e *NoKeysError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *NoKeysError) Hint() string {
	return "the host reads them from OpenBao: check that it is unsealed and holds them (site secrets status)"
}

// NotFoundError says that the object store does not have something. It is fs.ErrNotExist.
type NotFoundError struct{ What string }

func (e *NotFoundError) Error() string { return e.What + ": the object store does not have it" }

// Is makes it an fs.ErrNotExist.
func (e *NotFoundError) Is(target error) bool { return target == fs.ErrNotExist }

// Hint implements plan.Hinter.
func (e *NotFoundError) Hint() string {
	return "bring it there with: site artifacts push; or deploy with --via=ssh"
}

// CorruptError says that the object store holds something that it should not.
// Nothing of it was kept.
type CorruptError struct {
	What string
	Err  error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s: the object store holds something else: %v", e.What, e.Err)
}

// Unwrap gives the cause.
func (e *CorruptError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *CorruptError) Hint() string {
	return "nothing of it was kept; deploy with --via=ssh, and find out who writes to the bucket"
}

// Code gives the word for an error of this package.
func Code(err error) string {
	var unreachable *UnreachableError
	var denied *DeniedError
	var noKeys *NoKeysError
	var notFound *NotFoundError
	var corrupt *CorruptError
	var full *blob.NoSpaceError
	switch {
	case errors.As(err, &full):
		return CodeNoSpace
	case errors.As(err, &noKeys):
		return CodeNoKeys
	case errors.As(err, &denied):
		return CodeDenied
	case errors.As(err, &corrupt):
		return CodeCorrupt
	case errors.As(err, &notFound):
		return CodeNotFound
	case errors.As(err, &unreachable):
		return CodeUnreachable
	}
	return CodeInternal
}

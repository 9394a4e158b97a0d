package blob

import (
	"errors"
	"fmt"
	"syscall"
)

// MismatchError says that bytes are not what their digest promises.
type MismatchError struct {
	// What names the bytes for a reader: a file, a blob, a chunk. May be empty.
	What string
	Want Digest
	Got  Digest
}

func (e *MismatchError) Error() string {
	what := e.What
	if what == "" {
		what = "content"
	}
	return fmt.Sprintf("%s has digest %s, want %s", what, e.Got, e.Want)
}

// SourceChangedError says that a source no longer holds the bytes of its
// manifest: it was changed, truncated or damaged since it was chunked.
type SourceChangedError struct {
	Source string
	Blob   Digest
	Chunk  Digest
	Err    error
}

func (e *SourceChangedError) Error() string {
	return fmt.Sprintf("read %s: no longer what was chunked (blob %s, chunk %s): %v", e.Source, e.Blob, e.Chunk, e.Err)
}

func (e *SourceChangedError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *SourceChangedError) Hint() string {
	return fmt.Sprintf("%s changed while it was sent, or the disk is failing; build it again, then run the same command", e.Source)
}

// NoSpaceError says that the disk under Path is full.
type NoSpaceError struct {
	Path string
	Err  error
}

func (e *NoSpaceError) Error() string { return fmt.Sprintf("no space left for %s", e.Path) }

func (e *NoSpaceError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *NoSpaceError) Hint() string {
	return "free space on the disk that holds " + e.Path + ", then run the same command: what has arrived is kept"
}

// MissingChunksError says that a blob cannot be assembled yet.
type MissingChunksError struct {
	Blob   Digest
	Chunks []Digest
}

func (e *MissingChunksError) Error() string {
	if len(e.Chunks) == 0 {
		return fmt.Sprintf("assemble blob %s: chunks are missing", e.Blob)
	}
	return fmt.Sprintf("assemble blob %s: %d chunks are missing, the first is %s", e.Blob, len(e.Chunks), e.Chunks[0])
}

// InUseError says that a blob is kept because a name lists it.
type InUseError struct {
	Blob Digest
	Name string
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("delete blob %s: %s lists it", e.Blob, e.Name)
}

// UnsafeEntryError says that the store holds something that is neither a plain
// file nor a directory where one belongs, such as a symlink.
type UnsafeEntryError struct{ Path string }

func (e *UnsafeEntryError) Error() string {
	return fmt.Sprintf("refuse %s: only plain files and directories belong in the store", e.Path)
}

// ProtocolError says that the peer sent something that the protocol forbids.
type ProtocolError struct{ Reason string }

func (e *ProtocolError) Error() string { return "transfer protocol: " + e.Reason }

func violation(format string, args ...any) error {
	return &ProtocolError{Reason: fmt.Sprintf(format, args...)}
}

// VersionError says that the two sides speak different protocols.
type VersionError struct{ Host, Sender int }

func (e *VersionError) Error() string {
	return fmt.Sprintf("transfer protocol: the host speaks version %d, the sender %d", e.Host, e.Sender)
}

// Hint implements plan.Hinter.
func (e *VersionError) Hint() string {
	return "site and site-host are of different versions; bring site-host up to date first"
}

// The codes of RemoteError.
const (
	CodeNoSpace  = "no_space"
	CodeMismatch = "mismatch"
	CodeProtocol = "protocol"
	CodeVersion  = "version"
	CodeSource   = "source"
	CodeAborted  = "aborted"
	CodeInternal = "internal"
)

// RemoteError is an error that the peer reported.
type RemoteError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Blob    Digest `json:"blob,omitempty"`
	Chunk   Digest `json:"chunk,omitempty"`
	// Name is "site/artifact" where publishing that name failed.
	Name string `json:"name,omitempty"`
	Path string `json:"path,omitempty"`
}

func (e *RemoteError) Error() string { return "the other side: " + e.Message }

// Unwrap gives a full disk on the host the same type as a full disk here.
func (e *RemoteError) Unwrap() error {
	if e.Code == CodeNoSpace {
		return &NoSpaceError{Path: e.Path}
	}
	return nil
}

// locatedError adds the blob, chunk or name to which an error belongs, for the
// message that goes to the peer.
type locatedError struct {
	err         error
	blob, chunk Digest
	name        string
}

func (e *locatedError) Error() string {
	switch {
	case e.name != "":
		return fmt.Sprintf("publish %s: %v", e.name, e.err)
	case e.chunk != "":
		return fmt.Sprintf("chunk %s: %v", e.chunk, e.err)
	default:
		return fmt.Sprintf("blob %s: %v", e.blob, e.err)
	}
}

func (e *locatedError) Unwrap() error { return e.err }

// remoteOf turns err into what the peer is told.
func remoteOf(err error) *RemoteError {
	out := &RemoteError{Code: CodeInternal, Message: err.Error()}
	var located *locatedError
	if errors.As(err, &located) {
		out.Blob, out.Chunk, out.Name = located.blob, located.chunk, located.name
	}
	var full *NoSpaceError
	var mismatch *MismatchError
	var forbidden *ProtocolError
	var changed *SourceChangedError
	var version *VersionError
	var local *localError
	switch {
	case errors.As(err, &full):
		out.Code, out.Path = CodeNoSpace, full.Path
	case errors.As(err, &changed):
		out.Code, out.Blob, out.Chunk = CodeSource, changed.Blob, changed.Chunk
	case errors.As(err, &mismatch):
		out.Code = CodeMismatch
	case errors.As(err, &version):
		out.Code = CodeVersion
	case errors.As(err, &forbidden):
		out.Code = CodeProtocol
	case errors.As(err, &local):
		out.Code = CodeAborted
	}
	const longest = 4096
	if len(out.Message) > longest {
		out.Message = out.Message[:longest]
	}
	return out
}

// diskError names the path and gives a full disk its own type.
func diskError(doing, path string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return &NoSpaceError{Path: path, Err: err}
	}
	return fmt.Errorf("%s %s: %w", doing, path, err)
}

package serve

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"
)

// identity is a file in one state: proved once, it needs no second proof. The
// change time is part of it, since nobody can set it back.
type identity struct {
	device, inode uint64
	size          int64
	modified      unix.Timespec
	changed       unix.Timespec
}

func identityOf(status unix.Stat_t) identity {
	return identity{
		device: uint64(status.Dev), inode: status.Ino, size: status.Size, //nolint:unconvert // its type differs by platform
		modified: status.Mtim, changed: status.Ctim,
	}
}

// CorruptError says that a blob's bytes are not what its name promises.
type CorruptError struct{ Digest, Actual string }

func (e *CorruptError) Error() string {
	return fmt.Sprintf("blob %s is corrupt: its bytes have the digest %s", e.Digest, e.Actual)
}

type proof struct {
	of  identity
	err *CorruptError
}

// maxProofs bounds the memory of proofs; past it all are made anew.
const maxProofs = 8192

// verifier opens blobs whose bytes were proved against their digest.
type verifier struct {
	store   reader
	hashing chan struct{} // bounds how many blobs are hashed at once
	flights singleflight.Group

	mutex  sync.Mutex
	proofs map[string]proof
}

func newVerifier(store reader) *verifier {
	return &verifier{store: store, hashing: make(chan struct{}, max(1, runtime.NumCPU()/2)), proofs: map[string]proof{}}
}

// open returns a blob's file, proved. A corrupt one is a *CorruptError.
func (v *verifier) open(ctx context.Context, hex string) (*os.File, int64, error) {
	for range 3 { // a blob replaced between proof and opening is proved again
		file, found, err := v.store.openFile(blobPath(hex))
		if err != nil {
			return nil, 0, err
		}
		known, ok := v.known(hex)
		if ok && known.of == found {
			if known.err != nil {
				_ = file.Close()
				return nil, 0, known.err
			}
			return file, found.size, nil
		}
		_ = file.Close()
		select {
		// Many clients asking at once wait for one proof, and one that goes
		// away does not end it for the others.
		case result := <-v.flights.DoChan(hex, func() (any, error) { return nil, v.prove(hex) }):
			if result.Err != nil {
				return nil, 0, result.Err
			}
		case <-ctx.Done():
			return nil, 0, context.Cause(ctx)
		}
	}
	return nil, 0, fmt.Errorf("blob sha256:%s changes while it is read", hex)
}

func (v *verifier) known(hex string) (proof, bool) {
	v.mutex.Lock()
	defer v.mutex.Unlock()
	known, ok := v.proofs[hex]
	return known, ok
}

func (v *verifier) prove(digest string) error {
	v.hashing <- struct{}{}
	defer func() { <-v.hashing }()
	file, before, err := v.store.openFile(blobPath(digest))
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	hash := sha256.New()
	buffer := make([]byte, 128<<10)
	// Without the wrapper io would ask the file to write itself and allocate its own buffer.
	if _, err := io.CopyBuffer(hash, struct{ io.Reader }{file}, buffer); err != nil {
		return fmt.Errorf("read blob sha256:%s: %w", digest, err)
	}
	var status unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &status); err != nil {
		return fmt.Errorf("read blob sha256:%s: %w", digest, err)
	}
	if identityOf(status) != before {
		return nil // changed meanwhile: nothing is proved, and open tries again
	}
	made := proof{of: before}
	if actual := hex.EncodeToString(hash.Sum(nil)); actual != digest {
		made.err = &CorruptError{Digest: "sha256:" + digest, Actual: "sha256:" + actual}
	}
	v.mutex.Lock()
	defer v.mutex.Unlock()
	if len(v.proofs) >= maxProofs {
		clear(v.proofs)
	}
	v.proofs[digest] = made
	return nil
}

// Package lease is the lock of a site: a leased file on the first server host.
// It works before Nomad exists and while Nomad restarts. Whoever holds it renews
// the lease; one that ran out may be taken by anybody.
package lease

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/sitehost/atomicfile"
)

// DefaultFile is where the lock lies on a host.
const DefaultFile = "/var/lib/site/lock.json"

// MaxLease bounds how long a holder that vanished can block others.
const MaxLease = time.Hour

// Lock is the content of the lock file.
type Lock struct {
	ID         string    `json:"id"`
	Holder     string    `json:"holder"`
	Reason     string    `json:"reason"`
	Since      time.Time `json:"since"`
	LeaseUntil time.Time `json:"lease_until"`
	// Process is the process on this host that holds the lock as long as it
	// lives; empty for a lock that only its lease bounds.
	Process string `json:"process,omitempty"`
}

// HeldError says that someone else holds the lock; the zero Lock in it, that
// nobody does (which a renewal reports: the lock was lost).
type HeldError struct{ Current Lock }

func (e *HeldError) Error() string {
	if e.Current.ID == "" {
		return "the lock is no longer held: its lease ran out and it was released"
	}
	return fmt.Sprintf("locked by %s (%s) since %s, lease until %s, id %s", e.Current.Holder, e.Current.Reason,
		e.Current.Since.Format(time.RFC3339), e.Current.LeaseUntil.Format(time.RFC3339), e.Current.ID)
}

// Request is what Acquire is asked for.
type Request struct {
	// ID names this holding. Empty: a new random one. Acquiring again under the
	// same ID renews, so that a client may retry after a cut.
	ID     string
	Holder string
	Reason string
	Lease  time.Duration
	// Takeover is the ID of a lock, seen by the user, that may be taken although
	// its lease still runs. Another holder's later lock is not taken.
	Takeover string
	// Attended binds the lock to this process: it is free when that is gone.
	Attended bool
}

// File is a lock file.
type File struct {
	Path string
	// Now is the clock; time.Now where nil.
	Now func() time.Time
}

func (f File) now() time.Time {
	if f.Now != nil {
		return f.Now().UTC()
	}
	return time.Now().UTC()
}

// Acquire takes the lock, or returns a *HeldError.
func (f File) Acquire(ctx context.Context, request Request) (Lock, error) {
	if err := checkLease(request.Lease); err != nil {
		return Lock{}, err
	}
	if request.Holder == "" {
		return Lock{}, errors.New("acquire lock: no holder was given")
	}
	if request.ID == "" {
		request.ID = rand.Text()
	}
	var taken Lock
	err := f.guarded(ctx, func() error {
		current, err := f.read()
		if err != nil {
			return err
		}
		now := f.now()
		ours := current.ID == request.ID
		free := current.ID == "" || !current.LeaseUntil.After(now) || dead(current.Process)
		if !ours && !free && current.ID != request.Takeover {
			return &HeldError{Current: current}
		}
		taken = Lock{ID: request.ID, Holder: request.Holder, Reason: request.Reason, Since: now, LeaseUntil: now.Add(request.Lease)}
		if request.Attended {
			taken.Process = processID(os.Getpid())
		}
		if ours {
			taken.Since = current.Since
		}
		return f.write(taken)
	})
	return taken, err
}

// Renew extends a lock that is still ours; else it returns a *HeldError. A lease
// that ran out may be renewed as long as nobody took the lock meanwhile.
func (f File) Renew(ctx context.Context, id string, lease time.Duration) (Lock, error) {
	if err := checkLease(lease); err != nil {
		return Lock{}, err
	}
	var renewed Lock
	err := f.guarded(ctx, func() error {
		current, err := f.read()
		if err != nil {
			return err
		}
		if id == "" || current.ID != id {
			return &HeldError{Current: current}
		}
		renewed = current
		renewed.LeaseUntil = f.now().Add(lease)
		return f.write(renewed)
	})
	return renewed, err
}

// Release gives up our lock. A lock that is not held at all is released
// already; that of another holder is left alone and a *HeldError returned.
func (f File) Release(ctx context.Context, id string) error {
	return f.guarded(ctx, func() error {
		current, err := f.read()
		if err != nil || current.ID == "" {
			return err
		}
		if current.ID != id {
			return &HeldError{Current: current}
		}
		if err := atomicfile.Remove(f.Path); err != nil {
			return fmt.Errorf("release lock: %w", err)
		}
		return nil
	})
}

// Show returns the lock; held is false where there is none, its lease ran out or
// its process is gone.
func (f File) Show() (current Lock, held bool, err error) {
	current, err = f.read() // writes are atomic: no guard needed
	return current, err == nil && current.ID != "" && current.LeaseUntil.After(f.now()) && !dead(current.Process), err
}

func (f File) read() (Lock, error) {
	content, err := os.ReadFile(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return Lock{}, nil
	}
	if err != nil {
		return Lock{}, fmt.Errorf("read lock: %w", err)
	}
	var lock Lock
	if err := json.Unmarshal(content, &lock); err != nil {
		return Lock{}, fmt.Errorf("read lock %s: %w", f.Path, err)
	}
	if lock.ID == "" {
		return Lock{}, fmt.Errorf("read lock %s: it has no id", f.Path)
	}
	return lock, nil
}

func (f File) write(lock Lock) error {
	content, err := json.Marshal(lock)
	if err != nil {
		return fmt.Errorf("write lock: %w", err)
	}
	return atomicfile.Write(f.Path, bytes.NewReader(append(content, '\n')), atomicfile.Options{Mode: 0o600})
}

// guarded runs work while no other process changes the lock. The kernel lock is
// on a file of its own, since the lock file is replaced by each write.
func (f File) guarded(ctx context.Context, work func() error) error {
	if err := os.MkdirAll(filepath.Dir(f.Path), 0o755); err != nil {
		return fmt.Errorf("guard lock: %w", err)
	}
	guard, err := os.OpenFile(f.Path+".guard", os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("guard lock: %w", err)
	}
	defer func() { _ = guard.Close() }() // closing gives the kernel lock back
	// Held for two small writes only, so a blocking wait is short; a stuck disk
	// is bounded by the caller's own deadline on the connection.
	for {
		err = syscall.Flock(int(guard.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
		if ctx.Err() != nil {
			return fmt.Errorf("guard lock: %w", context.Cause(ctx))
		}
	}
	if err != nil {
		return fmt.Errorf("guard lock: %w", err)
	}
	return work()
}

func checkLease(lease time.Duration) error {
	if lease <= 0 || lease > MaxLease {
		return fmt.Errorf("lease %s: must be more than 0 and at most %s", lease, MaxLease)
	}
	return nil
}

package lease

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// HoldOptions tune Hold.
type HoldOptions struct {
	Lease time.Duration
	// Heartbeat, where set, is how long input may stay silent. Past it the lock
	// is released: a client behind a dead network closes nothing.
	Heartbeat time.Duration
}

// SilentError says that a holder sent no heartbeat in time.
type SilentError struct{ After time.Duration }

func (e *SilentError) Error() string {
	return fmt.Sprintf("released the lock: its holder was silent for %s", e.After)
}

// Hold renews an acquired lock as long as input stays open, and releases it at
// the end of input or of ctx, so that a killed client frees it at once. A lock
// lost to another holder ends it with a *HeldError.
func (f File) Hold(ctx context.Context, lock Lock, input io.Reader, options HoldOptions) error {
	beats, ended := watch(input)
	renewal := time.NewTicker(options.Lease / 3)
	defer renewal.Stop()
	var silence <-chan time.Time
	var timer *time.Timer
	if options.Heartbeat > 0 {
		timer = time.NewTimer(options.Heartbeat)
		defer timer.Stop()
		silence = timer.C
	}
	for {
		select {
		case <-ended:
			return f.Release(context.WithoutCancel(ctx), lock.ID)
		case <-ctx.Done():
			return f.Release(context.WithoutCancel(ctx), lock.ID)
		case <-silence:
			return errors.Join(&SilentError{After: options.Heartbeat}, f.Release(ctx, lock.ID))
		case <-beats:
			if timer != nil {
				timer.Reset(options.Heartbeat)
			}
		case <-renewal.C:
			if _, err := f.Renew(ctx, lock.ID, options.Lease); err != nil {
				var held *HeldError
				if errors.As(err, &held) {
					return err
				}
				// A full disk must not free the lock under a running deploy: the
				// next tick tries again, and the lease bounds how long.
				if current, stillHeld, showErr := f.Show(); showErr == nil && (!stillHeld || current.ID != lock.ID) {
					return fmt.Errorf("renew lock: %w", err)
				}
			}
		}
	}
}

// watch reads input to its end. Its goroutine ends with input, which is the
// process's own standard input.
func watch(input io.Reader) (beats <-chan struct{}, ended <-chan struct{}) {
	beat, end := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(end)
		buffer := make([]byte, 512)
		for {
			n, err := input.Read(buffer)
			if n > 0 {
				select {
				case beat <- struct{}{}:
				default:
				}
			}
			if err != nil {
				return
			}
		}
	}()
	return beat, end
}

// Package retry holds bounded waits: each has a deadline and says what it waits for.
package retry

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// TimeoutError says what a wait was for when its time ran out, and the last
// reason why it was not there yet.
type TimeoutError struct {
	What  string
	After time.Duration
	Last  error
}

func (e *TimeoutError) Error() string {
	if e.Last == nil {
		return fmt.Sprintf("gave up waiting for %s after %s", e.What, e.After.Round(time.Second))
	}
	return fmt.Sprintf("gave up waiting for %s after %s: %v", e.What, e.After.Round(time.Second), e.Last)
}

func (e *TimeoutError) Unwrap() error { return e.Last }

// Permanent marks an error that further attempts cannot mend.
func Permanent(err error) error { return backoff.Permanent(err) }

// Until calls attempt until it returns nil, a Permanent error, or limit has
// passed; intervals grow from 100 ms to 2 s with jitter. A cancelled context
// ends it at once with the context's error.
func Until(ctx context.Context, what string, limit time.Duration, attempt func(context.Context) error) error {
	start := time.Now()
	ctxLimit, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	interval := backoff.NewExponentialBackOff()
	interval.InitialInterval = 100 * time.Millisecond
	interval.MaxInterval = 2 * time.Second
	var last error
	permanent := false
	_, err := backoff.Retry(ctxLimit, func() (struct{}, error) {
		attemptErr := attempt(ctxLimit)
		var stop *backoff.PermanentError
		permanent = errors.As(attemptErr, &stop)
		if attemptErr != nil && (last == nil || ctxLimit.Err() == nil) {
			last = attemptErr
		}
		return struct{}{}, attemptErr
	}, backoff.WithBackOff(interval), backoff.WithMaxElapsedTime(0))
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("wait for %s: %w", what, context.Cause(ctx))
	case permanent:
		return err
	default:
		return &TimeoutError{What: what, After: time.Since(start), Last: last}
	}
}

// Pause waits for length. A cancelled context ends it with the context's cause.
func Pause(ctx context.Context, length time.Duration) error {
	timer := time.NewTimer(length)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

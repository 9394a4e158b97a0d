package retry_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nomad-site/site/internal/retry"
)

var errNotYet = errors.New("not yet")

func TestUntilGoesOnUntilItSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attempts := 0
		err := retry.Until(t.Context(), "the agent", time.Minute, func(context.Context) error {
			if attempts++; attempts < 5 {
				return errNotYet
			}
			return nil
		})
		if err != nil || attempts != 5 {
			t.Errorf("%d attempts, %v", attempts, err)
		}
	})
}

func TestUntilIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, attempts := time.Now(), 0
		err := retry.Until(t.Context(), "the agent", 30*time.Second, func(context.Context) error {
			attempts++
			return errNotYet
		})
		if passed := time.Since(start); passed < 25*time.Second || passed > 30*time.Second {
			t.Errorf("gave up after %s", passed)
		}
		// Intervals grow to 2 s: neither a busy loop nor a long sleep.
		if attempts < 12 || attempts > 60 {
			t.Errorf("%d attempts", attempts)
		}
		var timeout *retry.TimeoutError
		if !errors.As(err, &timeout) || timeout.What != "the agent" || !errors.Is(err, errNotYet) {
			t.Fatalf("got %v", err)
		}
		if text := err.Error(); !strings.HasPrefix(text, "gave up waiting for the agent after ") || !strings.HasSuffix(text, "s: not yet") {
			t.Errorf("got %q", text)
		}
	})
}

func TestAnAttemptThatHangsEndsWithTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		err := retry.Until(t.Context(), "an answer", 10*time.Second, func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		})
		var timeout *retry.TimeoutError
		if !errors.As(err, &timeout) || time.Since(start) != 10*time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
}

func TestTheReasonIsNotThatTimeRanOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attempts := 0
		err := retry.Until(t.Context(), "an answer", 10*time.Second, func(ctx context.Context) error {
			if attempts++; attempts == 1 {
				return errNotYet
			}
			<-ctx.Done()
			return ctx.Err()
		})
		if !errors.Is(err, errNotYet) {
			t.Errorf("the real reason is lost: %v", err)
		}
	})
}

func TestAPermanentErrorEndsTheWaitAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, attempts := time.Now(), 0
		errGone := errors.New("gone")
		err := retry.Until(t.Context(), "the agent", time.Minute, func(context.Context) error {
			attempts++
			return retry.Permanent(errGone)
		})
		var timeout *retry.TimeoutError
		if attempts != 1 || time.Since(start) != 0 || !errors.Is(err, errGone) || errors.As(err, &timeout) {
			t.Errorf("%d attempts, %s, %v", attempts, time.Since(start), err)
		}
	})
}

func TestACancelledContextEndsTheWaitAtOnceWithItsCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		errInterrupted := errors.New("interrupted")
		ctx, cancel := context.WithCancelCause(t.Context())
		start := time.Now()
		time.AfterFunc(3*time.Second, func() { cancel(errInterrupted) })
		err := retry.Until(ctx, "the agent", time.Hour, func(context.Context) error { return errNotYet })
		if !errors.Is(err, errInterrupted) || !strings.Contains(err.Error(), "wait for the agent") || time.Since(start) != 3*time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
}

func TestAContextThatIsOverStartsNothing(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	attempts := 0
	err := retry.Until(ctx, "the agent", time.Hour, func(context.Context) error { attempts++; return errNotYet })
	if !errors.Is(err, context.Canceled) || attempts > 1 {
		t.Errorf("%d attempts, %v", attempts, err)
	}
}

func TestAPauseLastsAndMayBeCutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if err := retry.Pause(t.Context(), time.Minute); err != nil || time.Since(start) != time.Minute {
			t.Errorf("%s, %v", time.Since(start), err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(errNotYet) })
		start = time.Now()
		if err := retry.Pause(ctx, time.Minute); !errors.Is(err, errNotYet) || time.Since(start) != time.Second {
			t.Errorf("cut short: %s, %v", time.Since(start), err)
		}
	})
}

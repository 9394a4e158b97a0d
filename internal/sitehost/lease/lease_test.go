package lease

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/retry"
)

func TestLockTable(t *testing.T) {
	const minute = time.Minute
	type step struct {
		after   time.Duration
		acquire *Request
		renew   string
		release string
		heldBy  string // the holder that a refusal must name; "-" for nobody
		holder  string // the holder afterwards, "" for none
	}
	anna := &Request{ID: "a", Holder: "anna", Reason: "deploy", Lease: minute}
	ben := &Request{ID: "b", Holder: "ben", Reason: "rollback", Lease: minute}
	benTakes := func(id string) *Request {
		return &Request{ID: "b", Holder: "ben", Lease: minute, Takeover: id}
	}
	for name, steps := range map[string][]step{
		"a free lock is taken and released":               {{acquire: anna, holder: "anna"}, {release: "a"}},
		"a second holder is refused while the lease runs": {{acquire: anna, holder: "anna"}, {after: 59 * time.Second, acquire: ben, heldBy: "anna", holder: "anna"}},
		"an expired lease can be taken":                   {{acquire: anna, holder: "anna"}, {after: minute, acquire: ben, holder: "ben"}},
		"the old holder cannot renew what was taken":      {{acquire: anna, holder: "anna"}, {after: minute, acquire: ben, holder: "ben"}, {renew: "a", heldBy: "ben", holder: "ben"}},
		"the old holder cannot release what was taken":    {{acquire: anna, holder: "anna"}, {after: minute, acquire: ben, holder: "ben"}, {release: "a", heldBy: "ben", holder: "ben"}},
		"a renewed lease outlives its first end":          {{acquire: anna, holder: "anna"}, {after: 50 * time.Second, renew: "a", holder: "anna"}, {after: 50 * time.Second, acquire: ben, heldBy: "anna", holder: "anna"}},
		"takeover takes the lock that was named":          {{acquire: anna, holder: "anna"}, {acquire: benTakes("a"), holder: "ben"}},
		"takeover of another id is refused":               {{acquire: anna, holder: "anna"}, {acquire: benTakes("z"), heldBy: "anna", holder: "anna"}},
		"acquiring twice under one id is a retry":         {{acquire: anna, holder: "anna"}, {acquire: anna, holder: "anna"}},
		"releasing a free lock is no error":               {{release: "a"}},
		"renewing a free lock says that it was lost":      {{renew: "a", heldBy: "-"}},
		"an expired lock that nobody took can be renewed": {{acquire: anna, holder: "anna"}, {after: 2 * minute, renew: "a", holder: "anna"}},
	} {
		t.Run(name, func(t *testing.T) {
			now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
			file := File{Path: filepath.Join(t.TempDir(), "new", "lock.json"), Now: func() time.Time { return now }}
			for number, step := range steps {
				now = now.Add(step.after)
				var err error
				switch {
				case step.acquire != nil:
					_, err = file.Acquire(t.Context(), *step.acquire)
				case step.renew != "":
					_, err = file.Renew(t.Context(), step.renew, minute)
				default:
					err = file.Release(t.Context(), step.release)
				}
				var held *HeldError
				switch {
				case step.heldBy == "" && err != nil:
					t.Fatalf("step %d: %v", number, err)
				case step.heldBy != "" && !errors.As(err, &held):
					t.Fatalf("step %d: want a refusal, got %v", number, err)
				case step.heldBy == "-" && held.Current != (Lock{}):
					t.Fatalf("step %d: want nobody, got %v", number, held.Current)
				case step.heldBy != "" && step.heldBy != "-" && held.Current.Holder != step.heldBy:
					t.Fatalf("step %d: refused for %q", number, held.Current.Holder)
				}
				current, isHeld, err := file.Show()
				if err != nil || current.Holder != step.holder || isHeld != (step.holder != "") {
					t.Fatalf("step %d: holder %q held %v %v", number, current.Holder, isHeld, err)
				}
			}
		})
	}
}

func TestOfManyAtOnceExactlyOneGetsTheLock(t *testing.T) {
	file := File{Path: filepath.Join(t.TempDir(), "lock.json")}
	var won, refused atomic.Int32
	var group sync.WaitGroup
	for number := range 50 {
		group.Go(func() {
			_, err := file.Acquire(context.Background(), Request{Holder: fmt.Sprint(number), Lease: time.Minute})
			var held *HeldError
			switch {
			case err == nil:
				won.Add(1)
			case errors.As(err, &held):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	group.Wait()
	if won.Load() != 1 || refused.Load() != 49 {
		t.Errorf("%d won, %d refused", won.Load(), refused.Load())
	}
}

func TestATornLockFileIsAnErrorAndNotAFreeLock(t *testing.T) {
	for _, content := range []string{"", "{", "{}"} {
		file := File{Path: filepath.Join(t.TempDir(), "lock.json")}
		if err := os.WriteFile(file.Path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := file.Acquire(t.Context(), Request{Holder: "anna", Lease: time.Minute}); err == nil {
			t.Errorf("%q was taken for a free lock", content)
		}
	}
}

func TestALockIsHeldWhileInputIsOpenAndReleasedAtItsEnd(t *testing.T) {
	file := File{Path: filepath.Join(t.TempDir(), "lock.json")}
	lock, err := file.Acquire(t.Context(), Request{Holder: "anna", Lease: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	reader, writer := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- file.Hold(context.Background(), lock, reader, HoldOptions{Lease: 300 * time.Millisecond})
	}()
	err = retry.Until(t.Context(), "two renewals", 5*time.Second, func(context.Context) error {
		current, held, err := file.Show()
		if err != nil || !held {
			return retry.Permanent(fmt.Errorf("not held: %v %w", held, err))
		}
		if current.LeaseUntil.Sub(lock.LeaseUntil) < 200*time.Millisecond {
			return errors.New("not renewed")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = writer.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if current, _, _ := file.Show(); current.ID != "" {
		t.Errorf("still there: %v", current)
	}
}

func TestASilentHolderLosesTheLockAndAChattyOneKeepsIt(t *testing.T) {
	file := File{Path: filepath.Join(t.TempDir(), "lock.json")}
	lock, err := file.Acquire(t.Context(), Request{Holder: "anna", Lease: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	reader, writer := io.Pipe()
	started := time.Now()
	go func() {
		for range 5 { // bounded: then silence
			_, _ = writer.Write([]byte("\n"))
			time.Sleep(60 * time.Millisecond) //nolint:forbidigo // the beat itself is what is tested
		}
	}()
	err = file.Hold(t.Context(), lock, reader, HoldOptions{Lease: time.Minute, Heartbeat: 200 * time.Millisecond})
	var silent *SilentError
	if !errors.As(err, &silent) || time.Since(started) < 400*time.Millisecond {
		t.Fatalf("after %s: %v", time.Since(started), err)
	}
	if current, _, _ := file.Show(); current.ID != "" {
		t.Errorf("still there: %v", current)
	}
}

func TestAHolderLearnsThatItsLockWasTaken(t *testing.T) {
	file := File{Path: filepath.Join(t.TempDir(), "lock.json")}
	lock, err := file.Acquire(t.Context(), Request{Holder: "anna", Lease: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.Acquire(t.Context(), Request{Holder: "ben", Lease: time.Minute, Takeover: lock.ID}); err != nil {
		t.Fatal(err)
	}
	reader, writer := io.Pipe()
	defer func() { _ = writer.Close() }()
	err = file.Hold(t.Context(), lock, reader, HoldOptions{Lease: 90 * time.Millisecond})
	var held *HeldError
	if !errors.As(err, &held) || held.Current.Holder != "ben" {
		t.Fatalf("got %v", err)
	}
}

func TestALockIsFreeWhenItsProcessIsGone(t *testing.T) {
	file := File{Path: filepath.Join(t.TempDir(), "lock.json")}
	anna := Request{ID: "a", Holder: "anna", Lease: time.Hour, Attended: true}
	ben := Request{ID: "b", Holder: "ben", Lease: time.Hour}
	lock, err := file.Acquire(t.Context(), anna)
	if err != nil || lock.Process == "" {
		t.Fatalf("lock %+v, %v", lock, err)
	}
	var held *HeldError
	if _, err := file.Acquire(t.Context(), ben); !errors.As(err, &held) {
		t.Fatalf("got %v although the holder lives", err)
	}
	// As after a reboot, and as if the number was given to another process.
	for _, gone := range []string{"another-boot/1/1", lock.Process + "1"} {
		lock.Process = gone
		if err := file.write(lock); err != nil {
			t.Fatal(err)
		}
		if _, stillHeld, err := file.Show(); err != nil || stillHeld {
			t.Errorf("process %s: held %t, %v", gone, stillHeld, err)
		}
	}
	if _, err := file.Acquire(t.Context(), ben); err != nil {
		t.Fatal(err)
	}
	// Without a process, only the lease frees it.
	if _, err := file.Acquire(t.Context(), anna); !errors.As(err, &held) || held.Current.Holder != "ben" {
		t.Fatalf("got %v", err)
	}
}

package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
	"github.com/nomad-site/site/internal/writesession/storetest"
)

// text compresses by half.
func text(size int, seed byte) []byte {
	out := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(out)
	for i := range out {
		out[i] = 'a' + out[i]%16
	}
	return out
}

// offerOf is one artifact with one blob for each content.
func offerOf(t *testing.T, artifact string, contents ...[]byte) blob.Offer {
	t.Helper()
	var offer blob.Offer
	name := blob.Name{Site: testSite, Artifact: artifact, Kind: blob.KindImage}
	for i, content := range contents {
		path := filepath.Join(t.TempDir(), fmt.Sprintf("layer-%d.tar", i))
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		source, err := blob.HashFile(path)
		if err != nil {
			t.Fatal(err)
		}
		offer.Blobs = append(offer.Blobs, blob.Offered{Source: source})
		name.Blobs = append(name.Blobs, source.Digest())
		name.Size += source.Size()
		name.Digest = source.Digest()
	}
	offer.Names = []blob.Name{name}
	return offer
}

func (s *service) client(t *testing.T) *Client {
	t.Helper()
	c, err := New(Options{
		BaseURL: s.server.URL, Site: testSite, Version: "test",
		Token: func(context.Context) (secret.Value, error) { return secret.New(testToken), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	c.packSize, c.storePatience = 512<<10, time.Second
	return c
}

func TestAPushBringsWhatIsMissingOnceAndInPacks(t *testing.T) {
	for _, compress := range []bool{false, true} {
		t.Run(fmt.Sprintf("the service takes zstd %v", compress), func(t *testing.T) {
			service := newService(t)
			service.compress = compress
			c := service.client(t)
			base := text(6<<20, 1)
			offer := offerOf(t, "hello", base, []byte("a small config"), base)
			report, err := c.Missing(t.Context(), offer)
			if err != nil || len(report.Blobs) != 2 || len(report.Names) != 1 || report.BytesToSend != int64(len(base)+14) ||
				report.BytesOf[offer.Blobs[1].Source.Digest()] != 14 || report.BytesTotal != report.BytesToSend {
				t.Fatalf("missing: %+v, %v", report, err)
			}
			if service.count("POST /write-sessions") != 0 {
				t.Error("a question has begun a session")
			}
			var done, total atomic.Int64
			result, err := c.Push(t.Context(), offer, PushOptions{Progress: func(d, all int64) {
				if d < done.Load() || d > all {
					t.Errorf("progress goes from %d to %d of %d", done.Load(), d, all)
				}
				done.Store(d)
				total.Store(all)
			}})
			if err != nil {
				t.Fatal(err)
			}
			if done.Load() != report.BytesToSend || total.Load() != report.BytesToSend {
				t.Errorf("progress ends with %d of %d, want %d", done.Load(), total.Load(), report.BytesToSend)
			}
			if result.Blobs != 2 || result.Names != 1 || result.Chunks != report.Chunks || result.BytesPlain != report.BytesToSend ||
				result.Packs < 3 || result.Requests != result.Packs || result.Packs > result.Chunks/2 || result.BytesWire >= result.BytesPlain {
				t.Errorf("result %+v", result)
			}
			again, err := c.Push(t.Context(), offer, PushOptions{})
			if err != nil || again.Requests != 0 || again.Blobs != 0 || service.count("POST /write-sessions") != 1 {
				t.Errorf("a second push: %+v, %v", again, err)
			}
		})
	}
}

func TestAChangedLineTravelsAlone(t *testing.T) {
	service := newService(t)
	c := service.client(t)
	base := text(6<<20, 2)
	if _, err := c.Push(t.Context(), offerOf(t, "hello", base), PushOptions{}); err != nil {
		t.Fatal(err)
	}
	changed := append(append(bytes.Clone(base[:3<<20]), "one line more\n"...), base[3<<20:]...)
	result, err := c.Push(t.Context(), offerOf(t, "hello", changed), PushOptions{})
	if err != nil || result.Packs != 1 || result.Chunks > 3 || result.ChunksDeduped < 20 {
		t.Errorf("%+v, %v", result, err)
	}
}

func TestAChunkThatComesOftenTravelsOnce(t *testing.T) {
	service := newService(t)
	result, err := service.client(t).Push(t.Context(), offerOf(t, "hello", make([]byte, 4<<20)), PushOptions{})
	if err != nil || result.Names != 1 || result.Chunks > 2 || result.Packs != 1 {
		t.Errorf("%+v, %v", result, err)
	}
}

func TestAnArtifactOfKnownBlobsNeedsNoUpload(t *testing.T) {
	service := newService(t)
	c := service.client(t)
	offer := offerOf(t, "hello", text(1<<20, 3), nil)
	if _, err := c.Push(t.Context(), offer, PushOptions{}); err != nil {
		t.Fatal(err)
	}
	offer.Names[0].Artifact = "other"
	result, err := c.Push(t.Context(), offer, PushOptions{})
	if err != nil || !reflect.DeepEqual(result, PushResult{Names: 1, BytesWire: result.BytesWire}) {
		t.Errorf("%+v, %v", result, err)
	}
}

func TestAPushThatWasCutOffGoesOnWhereItWas(t *testing.T) {
	service := newService(t)
	c := service.client(t)
	offer := offerOf(t, "hello", text(6<<20, 4))
	// The connection to the store goes away after three uploads.
	var uploads atomic.Int64
	service.store.Fail(func(operation, _ string) error {
		if operation == storetest.Upload && uploads.Add(1) > 3 {
			return errors.New("gone")
		}
		return nil
	})
	c.storePatience = 0
	_, err := c.Push(t.Context(), offer, PushOptions{Workers: 1})
	var upload *UploadError
	if !errors.As(err, &upload) || upload.Code != "SlowDown" || !strings.Contains(plan.HintOf(err), "run the same command again") {
		t.Fatalf("got %v", err)
	}
	if states := service.states(); !reflect.DeepEqual(states, []writesession.State{writesession.Open}) {
		t.Errorf("sessions are %v", states)
	}
	service.store.Fail(nil)
	result, err := service.client(t).Push(t.Context(), offer, PushOptions{})
	if err != nil || result.Names != 1 {
		t.Fatalf("%+v, %v", result, err)
	}
	for key, writes := range service.store.Writes() {
		if writes != 1 {
			t.Errorf("%s was written %d times", key, writes)
		}
	}
	if states := service.states(); !reflect.DeepEqual(states, []writesession.State{writesession.Complete}) {
		t.Errorf("sessions are %v", states)
	}
}

func TestAPushWhoseContextEndsTakesItsSessionBack(t *testing.T) {
	service := newService(t)
	c := service.client(t)
	offer := offerOf(t, "hello", text(6<<20, 5))
	errInterrupted := errors.New("interrupted")
	ctx, cancel := context.WithCancelCause(t.Context())
	service.store.Fail(func(operation, _ string) error {
		if operation == storetest.Upload {
			cancel(errInterrupted)
		}
		return nil
	})
	_, err := c.Push(ctx, offer, PushOptions{})
	if !errors.Is(err, errInterrupted) && !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if states := service.states(); !reflect.DeepEqual(states, []writesession.State{writesession.Aborted}) {
		t.Errorf("sessions are %v", states)
	}
	service.store.Fail(nil)
	if result, err := c.Push(t.Context(), offer, PushOptions{}); err != nil || result.Names != 1 {
		t.Errorf("the next push: %+v, %v", result, err)
	}
}

func TestFaultsThatPassAreSurvived(t *testing.T) {
	uploadOnce := func(fail error, after bool) func(*service) {
		return func(s *service) {
			var failed atomic.Bool
			hook := func(operation, _ string) error {
				if operation == storetest.Upload && failed.CompareAndSwap(false, true) {
					return fail
				}
				return nil
			}
			if after {
				s.store.FailAfter(hook)
			} else {
				s.store.Fail(hook)
			}
		}
	}
	once := func(route string, reply func(w http.ResponseWriter)) func(*service) {
		return func(s *service) {
			var done atomic.Bool
			s.when(func(w http.ResponseWriter, _ *http.Request, asked string) bool {
				if asked != route || !done.CompareAndSwap(false, true) {
					return false
				}
				reply(w)
				return true
			})
		}
	}
	unavailable := func(w http.ResponseWriter) {
		problem(w, http.StatusServiceUnavailable, writesession.ProblemStore)
	}
	cut := func(http.ResponseWriter) { panic(http.ErrAbortHandler) }
	gone := func(w http.ResponseWriter) { problem(w, http.StatusConflict, writesession.ProblemNotOpen) }
	for _, test := range []struct {
		name  string
		fault func(*service)
	}{
		{"the store says 503", uploadOnce(errors.New("busy"), false)},
		{"the store refuses a key that was just made", uploadOnce(&writesession.DeniedError{Code: "InvalidAccessKeyId"}, false)},
		{"the answer of the store is lost", uploadOnce(errors.New("lost"), true)},
		{"the service says 503 to the question", once("POST /missing", unavailable)},
		{"the service says 503 to the beginning", once("POST /write-sessions", unavailable)},
		{"the service says 503 to an object", once("POST session objects", unavailable)},
		{"the service says 503 to the end", once("POST session complete", unavailable)},
		{"the connection is cut at the beginning", once("POST /write-sessions", cut)},
		{"the connection is cut at the end", once("POST session complete", cut)},
		{"a proxy says 502", once("POST session objects", func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) })},
		{"the session is gone at an object", once("POST session objects", gone)},
		{"the session is gone at the end", once("POST session complete", gone)},
		{"an upload was found damaged", once("POST session complete", func(w http.ResponseWriter) {
			problem(w, http.StatusUnprocessableEntity, writesession.ProblemUnproven)
		})},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			service := newService(t)
			c := service.client(t)
			test.fault(service)
			result, err := c.Push(t.Context(), offerOf(t, "hello", text(2<<20, 6)), PushOptions{Workers: 2})
			if err != nil || result.Names != 1 || result.Blobs != 1 {
				t.Errorf("%+v, %v", result, err)
			}
		})
	}
}

func TestAnUploadThatStandsStillIsBegunAgain(t *testing.T) {
	service := newService(t)
	c := service.client(t)
	c.stalledAfter = 200 * time.Millisecond
	end := make(chan struct{})
	t.Cleanup(func() { close(end) })
	var stood atomic.Bool
	service.store.Fail(func(operation, _ string) error {
		if operation == storetest.Upload && stood.CompareAndSwap(false, true) {
			<-end // neither reads nor answers
		}
		return nil
	})
	result, err := c.Push(t.Context(), offerOf(t, "hello", text(1<<20, 7)), PushOptions{})
	if err != nil || result.Names != 1 || result.Requests != result.Packs+1 {
		t.Errorf("%+v, %v", result, err)
	}
}

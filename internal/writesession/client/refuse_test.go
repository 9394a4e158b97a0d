package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
	"github.com/nomad-site/site/internal/writesession/storetest"
)

func TestOptionsThatCannotWorkAreRefused(t *testing.T) {
	token := func(context.Context) (secret.Value, error) { return secret.New("x"), nil }
	for _, test := range []struct {
		name    string
		options Options
	}{
		{"no address", Options{Site: testSite, Token: token}},
		{"another scheme", Options{BaseURL: "ftp://store", Site: testSite, Token: token}},
		{"a password in the address", Options{BaseURL: "http://a:b@store", Site: testSite, Token: token}},
		{"a query in the address", Options{BaseURL: "http://store/?a=b", Site: testSite, Token: token}},
		{"a site that is a path", Options{BaseURL: "http://store", Site: "../other", Token: token}},
		{"no token", Options{BaseURL: "http://store", Site: testSite}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if c, err := New(test.options); err == nil || c != nil || strings.Contains(err.Error(), "a:b") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestARefusalIsToldAtOnceWithAWayOut(t *testing.T) {
	for _, test := range []struct {
		name   string
		status int
		body   string
		word   string
		says   string
		hint   string
	}{
		{
			"forbidden", http.StatusForbidden, `{"type":"urn:site:problem:forbidden","title":"Forbidden","detail":"rotators may not"}`,
			writesession.ProblemForbidden, "Forbidden: rotators may not", "operators",
		},
		{
			"the store refuses the service's keys", http.StatusBadGateway,
			`{"type":"urn:site:problem:store-denied","title":"Bad Gateway","detail":"AccessDenied"}`,
			writesession.ProblemStoreDenied, "AccessDenied", "site provider doctor",
		},
		{
			"objects are named", http.StatusBadRequest,
			`{"type":"urn:site:problem:bad-request","title":"Bad Request","objects":[{"name":"pack-1","detail":"too long"}]}`,
			writesession.ProblemBadRequest, "pack-1: too long", "versions",
		},
		{"someone else answers", http.StatusTeapot, `<html>`, "", "I'm a teapot", "--via=ssh"},
		{"a type that is not ours", http.StatusConflict, `{"type":"about:blank","title":"x"}`, "", "Conflict", "--via=ssh"},
		{"a redirect, which is not followed", http.StatusTemporaryRedirect, ``, "", "Temporary Redirect", "--via=ssh"},
	} {
		t.Run(test.name, func(t *testing.T) {
			service := newService(t)
			service.when(func(w http.ResponseWriter, _ *http.Request, _ string) bool {
				w.Header().Set("Location", "/elsewhere")
				w.WriteHeader(test.status)
				_, _ = w.Write([]byte(test.body))
				return true
			})
			_, err := service.client(t).Push(t.Context(), offerOf(t, "hello", []byte("x")), PushOptions{})
			var problem *ProblemError
			if !errors.As(err, &problem) || problem.Type != test.word || problem.Status != test.status ||
				!strings.Contains(err.Error(), test.says) || !strings.Contains(plan.HintOf(err), test.hint) {
				t.Errorf("got %v (%s)", err, plan.HintOf(err))
			}
			if asked := service.count("POST /missing"); asked != 1 {
				t.Errorf("it was asked %d times", asked)
			}
		})
	}
}

func TestARefusedTokenIsReplacedByANewOneOnly(t *testing.T) {
	for _, test := range []struct {
		name          string
		tokens        []string
		works         bool
		wantedAnswers int
	}{
		{"a new one", []string{"old", testToken}, true, 2},
		{"the same again", []string{"old", "old"}, false, 1},
		{"two old ones", []string{"old", "older"}, false, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			service := newService(t)
			c, offer := service.client(t), offerOf(t, "hello", []byte("x"))
			offer.Blobs = nil
			given := 0
			c.options.Token = func(context.Context) (secret.Value, error) {
				given++
				return secret.New(test.tokens[min(given, len(test.tokens))-1]), nil
			}
			_, err := c.Missing(t.Context(), offer)
			var problem *ProblemError
			if (err == nil) != test.works || (err != nil && (!errors.As(err, &problem) || problem.Status != http.StatusUnauthorized)) {
				t.Errorf("got %v", err)
			}
			if asked := service.count("POST /missing"); asked != test.wantedAnswers {
				t.Errorf("it was asked %d times", asked)
			}
		})
	}
}

func TestNothingSignedIsInAnError(t *testing.T) {
	for _, test := range []struct {
		name  string
		fault func(*service)
		says  string
	}{
		{"the store refuses", func(s *service) {
			s.store.Fail(func(operation, _ string) error {
				if operation == storetest.Upload {
					return &writesession.DeniedError{Code: "AccessDenied"}
				}
				return nil
			})
		}, "status 403, AccessDenied"},
		{"the store cannot be reached", func(s *service) {
			closed := httptest.NewServer(nil)
			closed.Close()
			s.when(func(w http.ResponseWriter, r *http.Request, route string) bool {
				return route == "POST session objects" && s.putAt(w, r, closed.URL+"/x?X-Amz-Signature=secret")
			})
		}, "connection refused"},
		{"the address is none", func(s *service) {
			s.when(func(w http.ResponseWriter, r *http.Request, route string) bool {
				return route == "POST session objects" && s.putAt(w, r, "https:///x?X-Amz-Signature=secret\x7f")
			})
		}, "the address is none"},
		{"the store sends it elsewhere", func(s *service) {
			elsewhere := httptest.NewServer(http.RedirectHandler("/y?X-Amz-Signature=secret", http.StatusTemporaryRedirect))
			s.t.Cleanup(elsewhere.Close)
			s.when(func(w http.ResponseWriter, r *http.Request, route string) bool {
				return route == "POST session objects" && s.putAt(w, r, elsewhere.URL+"/x?X-Amz-Signature=secret")
			})
		}, "status 307"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			service := newService(t)
			test.fault(service)
			c := service.client(t)
			c.storePatience = 0
			_, err := c.Push(t.Context(), offerOf(t, "hello", []byte("x")), PushOptions{})
			if err == nil || !strings.Contains(err.Error(), test.says) {
				t.Fatalf("got %v", err)
			}
			text := err.Error() + plan.HintOf(err)
			for _, secret := range []string{"Amz", "secret", testToken} {
				if strings.Contains(text, secret) {
					t.Errorf("got %s", text)
				}
			}
		})
	}
}

// putAt answers that the objects are to be put at an address.
func (s *service) putAt(w http.ResponseWriter, r *http.Request, address string) bool {
	var request writesession.AddRequest
	s.read(r, &request)
	var out writesession.Session
	for _, object := range request.Objects {
		put := &writesession.Put{URL: address}
		out.Objects = append(out.Objects, writesession.ObjectState{Object: object, State: writesession.ToPut, Put: put})
	}
	answer(w, http.StatusOK, out)
	return true
}

func TestAnswersThatCannotBeAreRefused(t *testing.T) {
	for _, test := range []struct {
		name, route string
		answer      any
		says        string
	}{
		{
			"a blob that was not asked for", "POST /missing",
			writesession.MissingResponse{Blobs: []blob.Digest{blob.DigestOf(nil)}}, "not asked for",
		},
		{"a name that was not asked for", "POST /missing", writesession.MissingResponse{Names: []int{1}}, "not asked for"},
		{"a name before the first", "POST /missing", writesession.MissingResponse{Names: []int{-1}}, "not asked for"},
		{"the same name twice", "POST /missing", writesession.MissingResponse{Names: []int{0, 0}}, "not asked for"},
		{"a session without an id", "POST /write-sessions", writesession.Session{State: writesession.Open}, "without an id"},
		{"no object", "POST session objects", writesession.Session{}, "does not say"},
		{"no document", "POST /missing", "text", "answer"},
	} {
		t.Run(test.name, func(t *testing.T) {
			service := newService(t)
			service.when(func(w http.ResponseWriter, _ *http.Request, route string) bool {
				if route == test.route {
					answer(w, http.StatusOK, test.answer)
				}
				return route == test.route
			})
			_, err := service.client(t).Push(t.Context(), offerOf(t, "hello", []byte("x")), PushOptions{})
			if err == nil || !strings.Contains(err.Error(), test.says) || !strings.Contains(plan.HintOf(err), "versions") {
				t.Errorf("got %v (%s)", err, plan.HintOf(err))
			}
		})
	}
}

func TestAnOfferThatDoesNotBelongHereIsRefusedBeforeAnythingIsAsked(t *testing.T) {
	for _, test := range []struct {
		name string
		edit func(*blob.Name)
		says string
	}{
		{"another site's name", func(n *blob.Name) { n.Site = "other" }, "not of site gamma"},
		{"a platform artifact", func(n *blob.Name) { n.Platform = true }, "travels by SSH alone"},
		{"a name that is a path", func(n *blob.Name) { n.Artifact = "../x" }, "artifact name"},
	} {
		t.Run(test.name, func(t *testing.T) {
			service := newService(t)
			offer := offerOf(t, "hello", []byte("x"))
			test.edit(&offer.Names[0])
			_, err := service.client(t).Push(t.Context(), offer, PushOptions{})
			if err == nil || !strings.Contains(err.Error(), test.says) || service.count("POST /missing") != 0 {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestASourceThatChangesIsNotUploadedAndItsSessionIsTakenBack(t *testing.T) {
	for _, test := range []struct {
		name  string
		spoil func(path string) error
	}{
		{"another byte", func(path string) error { return os.WriteFile(path, text(1<<20, 99), 0o600) }},
		{"shorter", func(path string) error { return os.Truncate(path, 1000) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			service := newService(t)
			offer := offerOf(t, "hello", text(1<<20, 8))
			manifest, err := blob.ChunkSource(offer.Blobs[0].Source)
			if err != nil {
				t.Fatal(err)
			}
			offer.Blobs[0].Manifest = func() (blob.Manifest, error) { return manifest, nil }
			if err := test.spoil(offer.Blobs[0].Source.Name()); err != nil {
				t.Fatal(err)
			}
			_, err = service.client(t).Push(t.Context(), offer, PushOptions{})
			var changed *blob.SourceChangedError
			if !errors.As(err, &changed) {
				t.Errorf("got %v", err)
			}
			if states := service.states(); !reflect.DeepEqual(states, []writesession.State{writesession.Aborted}) {
				t.Errorf("sessions are %v", states)
			}
		})
	}
}

func TestAChunkListOfAnotherBlobIsRefused(t *testing.T) {
	service := newService(t)
	offer := offerOf(t, "hello", text(1<<20, 9))
	offer.Blobs[0].Manifest = func() (blob.Manifest, error) { return blob.Chunk(bytes.NewReader(text(1<<20, 99))) }
	if _, err := service.client(t).Push(t.Context(), offer, PushOptions{}); err == nil || !strings.Contains(err.Error(), "chunk list of") {
		t.Errorf("got %v", err)
	}
}

func TestASessionThatIsAboutToRunOutIsNotTakenUp(t *testing.T) {
	service := newService(t)
	c := service.client(t)
	c.storePatience = 0
	offer := offerOf(t, "hello", text(1<<20, 10))
	service.store.Fail(func(operation, _ string) error {
		if operation == storetest.Upload {
			return errors.New("gone")
		}
		return nil
	})
	if _, err := c.Push(t.Context(), offer, PushOptions{}); err == nil {
		t.Fatal("no error")
	}
	service.store.Fail(nil)
	for _, session := range service.sessions {
		session.Expires = time.Now().Add(time.Minute)
	}
	if _, err := c.Push(t.Context(), offer, PushOptions{}); err != nil {
		t.Fatal(err)
	}
	if states := service.states(); !reflect.DeepEqual(states, []writesession.State{writesession.Aborted, writesession.Complete}) {
		t.Errorf("sessions are %v", states)
	}
}

func TestAnyNumberOfAbortedSessionsIsNoObstacle(t *testing.T) {
	service := newService(t)
	offer := offerOf(t, "hello", []byte("x"))
	for range sameKeys + 3 {
		ctx, cancel := context.WithCancel(t.Context())
		service.when(func(_ http.ResponseWriter, _ *http.Request, route string) bool {
			if route == "POST session objects" {
				cancel()
			}
			return false
		})
		if _, err := service.client(t).Push(ctx, offer, PushOptions{}); err == nil {
			t.Fatal("no error")
		}
		cancel()
	}
	service.when(nil)
	if result, err := service.client(t).Push(t.Context(), offer, PushOptions{}); err != nil || result.Names != 1 {
		t.Errorf("%+v, %v", result, err)
	}
}

func TestPushesOfTheSameAtOnceAllSucceed(t *testing.T) {
	service := newService(t)
	offer := offerOf(t, "hello", text(2<<20, 11))
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			if _, err := service.client(t).Push(t.Context(), offer, PushOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
}

func TestALotIsBroughtInSeveralSessions(t *testing.T) {
	service := newService(t)
	c := service.client(t)
	c.atOnce = 1 << 20
	shared := text(1<<20, 12)
	offer := offerOf(t, "hello", text(700<<10, 13), shared, text(800<<10, 14), []byte("end"), append(slices.Clone(shared), "more"...))
	result, err := c.Push(t.Context(), offer, PushOptions{})
	if err != nil || result.Blobs != 5 || result.Names != 1 || len(service.states()) != 4 || result.ChunksDeduped < 5 {
		t.Errorf("%+v, %v, %v", result, err, service.states())
	}
}

// randomSource is a big blob that takes no memory.
type randomSource struct {
	blob.Source
	manifest blob.Manifest
}

func (r randomSource) Name() string        { return "random" }
func (r randomSource) Digest() blob.Digest { return r.manifest.Digest }
func (r randomSource) Size() int64         { return r.manifest.Size }
func (r randomSource) Close() error        { return nil }

func (r randomSource) Open() (blob.SourceReader, error) { return r, nil }

// ReadAt gives half a mebibyte of noise, which begins with where it is.
func (r randomSource) ReadAt(into []byte, offset int64) (int, error) {
	source := rand.NewChaCha8([32]byte{byte(offset >> 19), byte(offset >> 27)})
	return source.Read(into)
}

func TestMemoryDoesNotGrowWithWhatIsPushed(t *testing.T) {
	const chunks = 320 // 160 MiB
	source := randomSource{manifest: blob.Manifest{
		Version: blob.ManifestVersion, Digest: blob.DigestOf([]byte("random")), Size: chunks * blob.MaxChunkSize,
	}}
	content := make([]byte, blob.MaxChunkSize)
	for i := range int64(chunks) {
		_, _ = source.ReadAt(content, i*blob.MaxChunkSize)
		source.manifest.Chunks = append(source.manifest.Chunks, blob.ChunkRef{Digest: blob.DigestOf(content), Size: blob.MaxChunkSize})
	}
	before := inUse()
	var most atomic.Uint64
	discard := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		buffer := make([]byte, 32<<10)
		for {
			if _, err := r.Body.Read(buffer); err != nil {
				break
			}
		}
		most.Store(max(most.Load(), inUse()))
	}))
	t.Cleanup(discard.Close)
	service := newService(t)
	service.when(func(w http.ResponseWriter, r *http.Request, route string) bool {
		switch route {
		case "POST session objects":
			return service.putAt(w, r, discard.URL)
		case "POST session complete":
			var request writesession.CompleteRequest
			service.read(r, &request)
			if n := len(request.Packs); n != 22 {
				t.Errorf("%d packs", n)
			}
			answer(w, http.StatusOK, writesession.Session{})
			return true
		}
		return false
	})
	c := service.client(t)
	c.packSize = PackSize
	offer := blob.Offer{Blobs: []blob.Offered{{Source: source, Manifest: func() (blob.Manifest, error) { return source.manifest, nil }}}}
	if _, err := c.Push(t.Context(), offer, PushOptions{}); err != nil {
		t.Fatal(err)
	}
	// A pack for each upload and one more, and the chunks between.
	if limit := before + 64<<20; most.Load() > limit {
		t.Errorf("%d MiB of memory", (most.Load()-before)>>20)
	}
}

// inUse is what is reachable.
func inUse() uint64 {
	var memory runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&memory)
	return memory.HeapAlloc
}

func TestQuestionsThatChangeNothing(t *testing.T) {
	service := newService(t)
	c := service.client(t)
	replies := map[string]any{
		"GET /artifacts":      writesession.Listing{Packs: 3},
		"GET /write-sessions": map[string]any{"sessions": []writesession.Session{{ID: "one"}}},
		"POST /collect":       writesession.Collected{Refused: "a session is open"},
		"GET /healthz":        map[string]string{"store": "ok", "new": "field"},
	}
	service.when(func(w http.ResponseWriter, r *http.Request, route string) bool {
		if authorized := r.Header.Get("Authorization") != ""; authorized != (route != "GET /healthz") {
			t.Errorf("%s: with a token %v", route, authorized)
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(replies[route])
		return true
	})
	if listing, err := c.List(t.Context()); err != nil || listing.Packs != 3 {
		t.Errorf("%+v, %v", listing, err)
	}
	if sessions, err := c.Sessions(t.Context()); err != nil || len(sessions) != 1 {
		t.Errorf("%+v, %v", sessions, err)
	}
	if collected, err := c.Collect(t.Context(), writesession.CollectRequest{}); err != nil || collected.Refused == "" {
		t.Errorf("%+v, %v", collected, err)
	}
	if err := c.Healthy(t.Context()); err != nil {
		t.Error(err)
	}
	replies["GET /healthz"] = map[string]string{"store": "the bucket is away"}
	if err := c.Healthy(t.Context()); err == nil || !strings.Contains(err.Error(), "the bucket is away") {
		t.Errorf("got %v", err)
	}
	service.server.Close()
	var unreachable *UnreachableError
	if err := c.Healthy(t.Context()); !errors.As(err, &unreachable) || plan.HintOf(err) == "" {
		t.Errorf("got %v", err)
	}
}

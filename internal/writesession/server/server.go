// Package server is the service half of write sessions: it hands out uploads,
// reads back what arrived, and makes visible only what it has proven.
//
// All state is in the bucket, in objects that are written once: a second process,
// or the next one after a crash, goes on where the last one was.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
)

// The kinds of an Identity.
const (
	KindOperator = "operator"
	KindJob      = "job"
)

// Identity is who sends a request.
type Identity struct {
	Subject string
	// Kind is KindOperator or KindJob.
	Kind string
}

// owner is how a session names who began it.
func (i Identity) owner() string { return i.Kind + "/" + i.Subject }

// Authorizer finds out who a bearer is. A *DeniedError refuses; any other error
// means that nobody can tell now.
type Authorizer interface {
	Authorize(ctx context.Context, bearer secret.Value) (Identity, error)
}

// DeniedError refuses a request.
type DeniedError struct {
	// Status is 401 for a bearer that nobody knows, and 403 for one without the right.
	Status int
	Reason string
}

func (e *DeniedError) Error() string { return e.Reason }

// Options are what a Server needs.
type Options struct {
	Site       string
	Bucket     writesession.Bucket
	Authorizer Authorizer
	Log        *slog.Logger
	// Now is the clock. Default time.Now.
	Now func() time.Time
	// Enforces tells whether the store refuses an upload with another hash than was
	// signed. Default: it does not.
	Enforces func() bool
	// Version is for the metrics.
	Version string
}

const (
	// sweepEvery is how often expired sessions are looked for.
	sweepEvery = time.Minute
	// parallelPacks bounds the packs that are read back at once, for all sessions:
	// each has a few buffers of a chunk's size.
	parallelPacks = 4
	// parallelRequests bounds other requests to the bucket for one request of ours.
	parallelRequests = 8
	// bodyBytes bounds the request bodies that are read at once.
	bodyBytes = writesession.MaxBodyBytes
	// collectPatience is how long a collection waits for running requests.
	collectPatience = 5 * time.Second
)

var sitePattern = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$`)

// Server answers for the write sessions of one site.
type Server struct {
	site     string
	layout   writesession.Layout
	bucket   writesession.Bucket
	auth     Authorizer
	log      *slog.Logger
	now      func() time.Time
	enforces func() bool
	metrics  *metrics

	index *index
	names nameCache
	// gate is held by whoever relies on what the store has, and alone by a collection.
	gate sync.RWMutex
	// publishing has one place: no key is written twice in a second.
	publishing chan struct{}
	proving    *semaphore.Weighted
	bodies     *semaphore.Weighted
	sessions   keyedLocks
	// storeFailure is why the bucket could not be used when it last was tried; nil: it could.
	storeFailure atomic.Pointer[string]
}

// New makes a server; it asks the bucket nothing yet.
func New(options Options) (*Server, error) {
	if !sitePattern.MatchString(options.Site) {
		return nil, fmt.Errorf("write-session server: %q is no name of a site", options.Site)
	}
	if options.Bucket == nil || options.Authorizer == nil || options.Log == nil {
		return nil, fmt.Errorf("write-session server of site %q: no bucket, no authorizer or no log", options.Site)
	}
	if options.Now == nil {
		options.Now = time.Now
	}
	if options.Enforces == nil {
		options.Enforces = func() bool { return false }
	}
	layout := writesession.Layout{Site: options.Site}
	counted := newMetrics(options.Version)
	return &Server{
		site: options.Site, layout: layout, bucket: options.Bucket, auth: options.Authorizer,
		log: options.Log, now: options.Now, enforces: options.Enforces, metrics: counted,
		index: newIndex(layout, options.Bucket), publishing: make(chan struct{}, 1),
		proving: semaphore.NewWeighted(parallelPacks), bodies: semaphore.NewWeighted(bodyBytes),
	}, nil
}

// Run ends sessions that expired, until ctx ends; that is its only error.
func (s *Server) Run(ctx context.Context) error {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		if err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("cannot sweep expired sessions", "error", err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

// noteStore remembers for /healthz whether the bucket answers.
func (s *Server) noteStore(err error) {
	var unavailable *writesession.UnavailableError
	var denied *writesession.DeniedError
	switch {
	case err == nil:
		s.storeFailure.Store(nil)
	case errors.As(err, &unavailable), errors.As(err, &denied):
		text := err.Error()
		s.storeFailure.Store(&text)
	}
}

// lookAgainWithin is less than the patience of those who ask how the service is.
const lookAgainWithin = 1500 * time.Millisecond

// lookAgain asks a bucket that failed whether it still does: otherwise it would
// look broken until somebody uses it, and nobody uses what looks broken.
func (s *Server) lookAgain(ctx context.Context) {
	if s.storeFailure.Load() == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, lookAgainWithin)
	defer cancel()
	_, err := s.bucket.Head(ctx, s.layout.Session("health"))
	if errors.Is(err, writesession.ErrNotFound) {
		err = nil
	}
	s.noteStore(err)
}

// HTTP is a server with the limits that keep slow and greedy clients out.
func (s *Server) HTTP() *http.Server {
	return &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       2 * time.Minute,
		WriteTimeout:      5 * time.Minute,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// keyedLocks has one lock for each key that somebody holds or waits for.
type keyedLocks struct {
	mutex sync.Mutex
	held  map[string]*keyedLock
}

type keyedLock struct {
	place chan struct{}
	users int
}

// lock waits for key until ctx ends.
func (k *keyedLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mutex.Lock()
	if k.held == nil {
		k.held = map[string]*keyedLock{}
	}
	one := k.held[key]
	if one == nil {
		one = &keyedLock{place: make(chan struct{}, 1)}
		k.held[key] = one
	}
	one.users++
	k.mutex.Unlock()
	leave := func() {
		k.mutex.Lock()
		defer k.mutex.Unlock()
		if one.users--; one.users == 0 {
			delete(k.held, key)
		}
	}
	select {
	case one.place <- struct{}{}:
		return func() { <-one.place; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}

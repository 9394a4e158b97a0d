package deploy

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// releaseLimit bounds the release of one temporary thing on the way out.
const releaseLimit = 10 * time.Second

// registry holds everything temporary of a run: connections, the lock, tokens in
// OpenBao, secrets in memory. What is in it is released on every path out, the
// latest first. What a killed run leaves behind, the next one finds: see sweep.
type registry struct {
	mutex sync.Mutex
	held  []*temporary
}

// temporary is one thing that must not outlive its run.
type temporary struct {
	// what it is, for a reader: never its value.
	what    string
	once    sync.Once
	release func(context.Context) error
	err     error
}

// let releases it; a second call does nothing and returns what the first did.
func (t *temporary) let(ctx context.Context) error {
	t.once.Do(func() {
		// An interrupted run must release too.
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
		defer cancel()
		if err := t.release(limited); err != nil {
			t.err = fmt.Errorf("release %s: %w", t.what, err)
		}
	})
	return t.err
}

// hold registers a release.
func (r *registry) hold(what string, release func(context.Context) error) *temporary {
	held := &temporary{what: what, release: release}
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.held = append(r.held, held)
	return held
}

// close releases everything and says what could not be.
func (r *registry) close(failed func(error)) {
	r.mutex.Lock()
	held := r.held
	r.held = nil
	r.mutex.Unlock()
	for i := len(held) - 1; i >= 0; i-- {
		if err := held[i].let(context.Background()); err != nil {
			failed(err)
		}
	}
}

package contract

import (
	"context"
	"errors"
	"io"
	"iter"
	"maps"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

var errKilled = errors.New("the process is dead")

// faulty is a bucket whose requests can be made to fail, for the service only.
type faulty struct {
	writesession.Bucket

	mutex  sync.Mutex
	writes map[string]int
	// before is asked before each request, and after once it has had its effect.
	before, after func(write bool, key string) error
	meanwhile     map[string]func()
}

func (f *faulty) set(before, after func(write bool, key string) error) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.before, f.after = before, after
}

func (f *faulty) clear() {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.before, f.after, f.meanwhile = nil, nil, nil
}

// beforeCopy has do happen once, when the service is about to copy from key.
func (f *faulty) beforeCopy(key string, do func()) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.meanwhile = map[string]func(){key: do}
}

func (f *faulty) counts() map[string]int {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	return maps.Clone(f.writes)
}

func (f *faulty) around(write bool, key string, do func() error) error {
	f.mutex.Lock()
	before, after := f.before, f.after
	f.mutex.Unlock()
	if before != nil {
		if err := before(write, key); err != nil {
			return err
		}
	}
	if err := do(); err != nil {
		return err
	}
	if after != nil {
		return after(write, key)
	}
	return nil
}

func (f *faulty) Get(ctx context.Context, key string, offset, length int64) (reader io.ReadCloser, info writesession.Info, err error) {
	err = f.around(false, key, func() error {
		reader, info, err = f.Bucket.Get(ctx, key, offset, length)
		return err
	})
	if err != nil && reader != nil {
		_ = reader.Close()
	}
	return reader, info, err
}

func (f *faulty) Head(ctx context.Context, key string) (info writesession.Info, err error) {
	err = f.around(false, key, func() error {
		info, err = f.Bucket.Head(ctx, key)
		return err
	})
	return info, err
}

func (f *faulty) Put(ctx context.Context, key string, content []byte, create bool) error {
	return f.around(true, key, func() error {
		err := f.Bucket.Put(ctx, key, content, create)
		f.wrote(key, err)
		return err
	})
}

func (f *faulty) Copy(ctx context.Context, from, to, etag string) error {
	f.mutex.Lock()
	do := f.meanwhile[from]
	delete(f.meanwhile, from)
	f.mutex.Unlock()
	if do != nil {
		do()
	}
	return f.around(true, to, func() error {
		err := f.Bucket.Copy(ctx, from, to, etag)
		f.wrote(to, err)
		return err
	})
}

func (f *faulty) wrote(key string, err error) {
	if err != nil {
		return
	}
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.writes[key]++
}

func (f *faulty) Delete(ctx context.Context, keys ...string) error {
	return f.around(true, strings.Join(keys, " "), func() error { return f.Bucket.Delete(ctx, keys...) })
}

func (f *faulty) List(ctx context.Context, prefix string) iter.Seq2[writesession.Info, error] {
	return func(yield func(writesession.Info, error) bool) {
		if err := f.around(false, prefix, func() error { return nil }); err != nil {
			yield(writesession.Info{}, err)
			return
		}
		f.Bucket.List(ctx, prefix)(yield)
	}
}

func (f *faulty) PresignPut(ctx context.Context, key string, digest blob.Digest, size int64, ttl time.Duration) (put writesession.Put, err error) {
	err = f.around(false, key, func() error {
		put, err = f.Bucket.PresignPut(ctx, key, digest, size, ttl)
		return err
	})
	return put, err
}

// dieAt lets a process die at its nth write, before or after that has its effect:
// from then on it reaches nothing. It returns whether that came to pass.
func (f *faulty) dieAt(n int, afterwards bool) (died func() bool) {
	var mutex sync.Mutex
	count, dead := 0, false
	look := func(write, counts bool) error {
		mutex.Lock()
		defer mutex.Unlock()
		if dead {
			return errKilled
		}
		if write && counts {
			if count++; count == n {
				dead = true
				return errKilled
			}
		}
		return nil
	}
	f.set(func(write bool, _ string) error { return look(write, !afterwards) },
		func(write bool, _ string) error { return look(write, afterwards) })
	return func() bool {
		mutex.Lock()
		defer mutex.Unlock()
		return dead
	}
}

// killedAnywhere has the process die at each write there is, in a site of its own.
func killedAnywhere(h *harness) {
	for _, afterwards := range []bool{false, true} {
		for n := 1; ; n++ {
			one := h.inSite(n, afterwards)
			if !one.killedAt(n, afterwards) {
				if n < 5 {
					h.t.Errorf("a session has only %d writes", n)
				}
				break
			}
			if h.t.Failed() {
				h.t.Fatalf("killed at write %d, after it: %v", n, afterwards)
			}
		}
	}
}

func (h *harness) killedAt(n int, afterwards bool) bool {
	one := h.content("shop", 14, 300_000)
	died := h.faults.dieAt(n, afterwards)
	var id string
	if answer := h.call(http.MethodPost, "write-sessions", one.create(h.store.Site), "killed-key"); answer.status == http.StatusCreated {
		session := decodeAs[writesession.Session](h, answer)
		id = session.ID
		h.uploadAll(session, one)
		h.call(http.MethodPost, sessionPath(id, "/complete"), one.complete())
	}
	dead := died()
	h.restart()
	h.consistent()
	if id == "" { // it died before it could say which
		session := decodeAs[writesession.Session](h, h.call(http.MethodPost, "write-sessions", one.create(h.store.Site), "killed-key"))
		id = session.ID
		h.uploadAll(session, one)
	}
	h.complete(id, one.complete(), http.StatusOK)
	h.wantVisible(one)
	h.wantSingleWrites()
	return dead
}

// storeAway has each request of a session fail once, with its effect and without.
func storeAway(h *harness) {
	one := h.content("shop", 15, 200_000)
	session := h.begin("away-key-1", one)
	h.uploadAll(session, one)
	for _, afterwards := range []bool{false, true} {
		gone := &writesession.UnavailableError{What: "a request", RetryAfter: 3 * time.Second, Err: errors.New("SlowDown")}
		fail := func(bool, string) error { return gone }
		if afterwards {
			h.faults.set(nil, fail)
		} else {
			h.faults.set(fail, nil)
		}
		for _, answer := range []reply{
			h.call(http.MethodPost, sessionPath(session.ID, "/complete"), one.complete()),
			h.call(http.MethodPost, "write-sessions", one.create(h.store.Site), "away-key-2"),
			h.call(http.MethodPost, "missing", one.missing()),
			h.call(http.MethodGet, "artifacts", nil),
			h.call(http.MethodPost, "collect", writesession.CollectRequest{Keep: []writesession.Kept{{Artifact: "shop", Digest: one.manifest.Digest}}}),
		} {
			h.refused(http.StatusServiceUnavailable, writesession.ProblemStore, answer)
			if got := answer.header.Get("Retry-After"); got != "3" {
				h.t.Errorf("Retry-After is %q", got)
			}
		}
		// A look at the store that is answered clears it of what was said.
		if !afterwards && h.healthy() {
			h.t.Error("it does not say that the store is away")
		}
		h.faults.clear()
		h.nothingVisible(one)
	}
	h.complete(session.ID, one.complete(), http.StatusOK)
	h.wantVisible(one)
	h.sweep()
	if !h.healthy() {
		h.t.Error("it does not say that the store is back")
	}
}

func storeDenies(h *harness) {
	one := h.content("shop", 16, 200_000)
	session := h.begin("denied-key", one)
	h.uploadAll(session, one)
	for code, hint := range map[string]string{"RequestTimeTooSkewed": "clock", "InvalidAccessKeyId": "keys"} {
		h.faults.set(func(bool, string) error { return &writesession.DeniedError{What: "a request", Code: code} }, nil)
		problem := h.refused(http.StatusBadGateway, writesession.ProblemStoreDenied,
			h.call(http.MethodPost, sessionPath(session.ID, "/complete"), one.complete()))
		if !strings.Contains(problem.Detail, code) || !strings.Contains(problem.Detail, hint) {
			h.t.Errorf("%s: %s", code, problem.Detail)
		}
		h.faults.clear()
		h.nothingVisible(one)
	}
	h.complete(session.ID, one.complete(), http.StatusOK)
	h.wantVisible(one)
}

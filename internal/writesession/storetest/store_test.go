package storetest_test

import (
	"bytes"
	"errors"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
	"github.com/nomad-site/site/internal/writesession/storetest"
)

func TestTheStoreInMemoryBehavesAsABucketDoes(t *testing.T) {
	for name, enforces := range map[string]bool{"enforcing hashes": true, "not enforcing hashes": false} {
		t.Run(name, func(t *testing.T) {
			store := storetest.New(t, storetest.Options{Enforces: enforces})
			storetest.Behave(t, storetest.Case{Bucket: store, HTTP: http.DefaultClient, Enforces: enforces})
		})
	}
}

func TestAFaultComesBeforeOrAfterTheWrite(t *testing.T) {
	fault := errors.New("the fault")
	fail := func(operation, _ string) error {
		if operation == storetest.Put || operation == storetest.Upload {
			return fault
		}
		return nil
	}
	store := storetest.New(t, storetest.Options{})
	store.Fail(fail)
	if err := store.Put(t.Context(), "a", nil, true); !errors.Is(err, fault) {
		t.Errorf("got %v", err)
	}
	if status, _ := put(t, store, "a", "content"); status != http.StatusServiceUnavailable {
		t.Errorf("an upload: status %d", status)
	}
	if keys := store.Keys(); len(keys) > 0 {
		t.Errorf("there are %q", keys)
	}
	store.Fail(nil)
	store.FailAfter(fail)
	if err := store.Put(t.Context(), "a", nil, true); !errors.Is(err, fault) {
		t.Errorf("got %v", err)
	}
	if status, err := put(t, store, "b", "content"); err == nil {
		t.Errorf("the answer is not lost: status %d", status)
	}
	if keys := store.Keys(); !slices.Equal(keys, []string{"a", "b"}) {
		t.Errorf("there are %q", keys)
	}
}

func TestAKeyIsWrittenOnceInASecond(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	store := storetest.New(t, storetest.Options{OneWritePerSecond: true, Now: func() time.Time { return now }})
	if err := store.Put(t.Context(), "a", []byte("1"), false); err != nil {
		t.Fatal(err)
	}
	now = now.Add(900 * time.Millisecond)
	unavailable, ok := errors.AsType[*writesession.UnavailableError](store.Put(t.Context(), "a", []byte("2"), false))
	if !ok || unavailable.RetryAfter != 100*time.Millisecond {
		t.Errorf("got %v", unavailable)
	}
	if status, _ := put(t, store, "a", "content"); status != http.StatusTooManyRequests {
		t.Errorf("an upload: status %d", status)
	}
	if hot := store.Hot(); !slices.Equal(hot, []string{"a"}) {
		t.Errorf("hot are %q", hot)
	}
	now = now.Add(100 * time.Millisecond)
	if err := store.Put(t.Context(), "a", []byte("2"), false); err != nil {
		t.Error(err)
	}
	if writes := store.Writes()["a"]; writes != 2 {
		t.Errorf("%d writes", writes)
	}
}

func TestCorruptChangesTheBytesAndNothingElse(t *testing.T) {
	store := storetest.New(t, storetest.Options{})
	if err := store.Put(t.Context(), "a", []byte("content"), false); err != nil {
		t.Fatal(err)
	}
	before, _ := store.Head(t.Context(), "a")
	store.Corrupt("a")
	after, _ := store.Head(t.Context(), "a")
	if before != after || string(store.Content("a")) == "content" || len(store.Content("a")) != 7 {
		t.Errorf("%+v, then %+v with %q", before, after, store.Content("a"))
	}
}

func TestAnExpiredURLIsRefused(t *testing.T) {
	now := time.Now()
	store := storetest.New(t, storetest.Options{Now: func() time.Time { return now }})
	signed, err := store.PresignPut(t.Context(), "a", blob.DigestOf(nil), 1, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(61 * time.Second)
	if status, _ := send(t, signed, "x"); status != http.StatusForbidden {
		t.Errorf("status %d", status)
	}
}

func put(t *testing.T, store *storetest.Store, key, content string) (int, error) {
	t.Helper()
	signed, err := store.PresignPut(t.Context(), key, blob.DigestOf([]byte(content)), int64(len(content)), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return send(t, signed, content)
}

func send(t *testing.T, signed writesession.Put, content string) (int, error) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, signed.URL, bytes.NewReader([]byte(content)))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range signed.Headers {
		request.Header.Set(name, value)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, err
	}
	return response.StatusCode, response.Body.Close()
}

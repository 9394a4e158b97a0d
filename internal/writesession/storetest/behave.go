package storetest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// Case is one store under Behave.
type Case struct {
	Bucket writesession.Bucket
	// HTTP reaches presigned URLs.
	HTTP     *http.Client
	Enforces bool
}

// Behave holds a bucket against what writesession.Bucket says. That the store in
// memory behaves as real ones do is what makes it worth testing with. Each case
// gets a prefix of its own.
func Behave(t *testing.T, store Case) {
	t.Helper()
	for _, test := range []struct {
		name string
		run  func(*testing.T, Case, string)
	}{
		{"what was put is read back, whole and in parts", behaveReads},
		{"what is not there is not found", behaveMissing},
		{"a create takes place once", behaveCreate},
		{"of creates at once one wins", behaveCreateRace},
		{"a copy is of what was looked at", behaveCopy},
		{"a list is sorted and of one prefix", behaveList},
		{"a delete removes what is there", behaveDelete},
		{"an upload needs what was signed", behaveUpload},
		{"an upload of wrong bytes is refused where the store enforces that", behaveWrongUpload},
		{"an ended context is what it was", behaveContext},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.run(t, store, "behave/"+strings.ReplaceAll(test.name, " ", "-")+"/")
		})
	}
}

func behaveReads(t *testing.T, s Case, prefix string) {
	content := []byte("0123456789")
	must(t, s.Bucket.Put(t.Context(), prefix+"a", content, false))
	info, err := s.Bucket.Head(t.Context(), prefix+"a")
	must(t, err)
	if info.Size != 10 || info.ETag == "" || info.Key != prefix+"a" || time.Since(info.Modified).Abs() > time.Minute {
		t.Errorf("head says %+v", info)
	}
	for _, part := range []struct {
		offset, length int64
		want           string
	}{{0, 0, "0123456789"}, {0, 3, "012"}, {4, 0, "456789"}, {4, 2, "45"}, {8, 100, "89"}} {
		reader, got, err := s.Bucket.Get(t.Context(), prefix+"a", part.offset, part.length)
		must(t, err)
		read, err := io.ReadAll(reader)
		must(t, errors.Join(err, reader.Close()))
		if string(read) != part.want || got.Size != 10 || got.ETag != info.ETag {
			t.Errorf("get %d+%d: %q, %+v", part.offset, part.length, read, got)
		}
	}
	if _, _, err := s.Bucket.Get(t.Context(), prefix+"a", 11, 1); err == nil || errors.Is(err, writesession.ErrNotFound) {
		t.Errorf("a range beyond the end: %v", err)
	}
	must(t, s.Bucket.Put(t.Context(), prefix+"empty", nil, false))
	if info, err := s.Bucket.Head(t.Context(), prefix+"empty"); err != nil || info.Size != 0 {
		t.Errorf("an empty object: %+v, %v", info, err)
	}
}

func behaveMissing(t *testing.T, s Case, prefix string) {
	_, headErr := s.Bucket.Head(t.Context(), prefix+"none")
	_, _, getErr := s.Bucket.Get(t.Context(), prefix+"none", 0, 0)
	copyErr := s.Bucket.Copy(t.Context(), prefix+"none", prefix+"copy", `"etag"`)
	for what, err := range map[string]error{"head": headErr, "get": getErr, "copy": copyErr} {
		if !errors.Is(err, writesession.ErrNotFound) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, err := range s.Bucket.List(t.Context(), prefix) {
		t.Errorf("the list has something: %v", err)
	}
	must(t, s.Bucket.Delete(t.Context(), prefix+"none", prefix+"none-either"))
	must(t, s.Bucket.Delete(t.Context()))
}

func behaveCreate(t *testing.T, s Case, prefix string) {
	must(t, s.Bucket.Put(t.Context(), prefix+"a", []byte("first"), true))
	if err := s.Bucket.Put(t.Context(), prefix+"a", []byte("second"), true); !errors.Is(err, writesession.ErrExists) {
		t.Errorf("the second create: %v", err)
	}
	if got := read(t, s.Bucket, prefix+"a"); got != "first" {
		t.Errorf("it is %q", got)
	}
	must(t, s.Bucket.Delete(t.Context(), prefix+"a"))
	must(t, s.Bucket.Put(t.Context(), prefix+"a", []byte("third"), true))
}

func behaveCreateRace(t *testing.T, s Case, prefix string) {
	const racers = 16
	errs := make([]error, racers)
	var group sync.WaitGroup
	for i := range racers {
		group.Go(func() {
			errs[i] = s.Bucket.Put(t.Context(), prefix+"a", bytes.Repeat([]byte{byte('a' + i)}, 1000), true)
		})
	}
	group.Wait()
	winner := slices.Index(errs, nil)
	for i, err := range errs {
		if i != winner && !errors.Is(err, writesession.ErrExists) {
			t.Errorf("racer %d: %v", i, err)
		}
	}
	if got := read(t, s.Bucket, prefix+"a"); winner < 0 || got != strings.Repeat(string(rune('a'+winner)), 1000) {
		t.Errorf("racer %d won, and it is %.10q", winner, got)
	}
}

func behaveCopy(t *testing.T, s Case, prefix string) {
	must(t, s.Bucket.Put(t.Context(), prefix+"from", []byte("right"), false))
	seen, err := s.Bucket.Head(t.Context(), prefix+"from")
	must(t, err)
	must(t, s.Bucket.Copy(t.Context(), prefix+"from", prefix+"to", seen.ETag))
	if got := read(t, s.Bucket, prefix+"to"); got != "right" {
		t.Errorf("the copy is %q", got)
	}
	must(t, s.Bucket.Put(t.Context(), prefix+"from", []byte("wrong"), false))
	if err := s.Bucket.Copy(t.Context(), prefix+"from", prefix+"late", seen.ETag); !errors.Is(err, writesession.ErrChanged) {
		t.Errorf("a copy of what has changed: %v", err)
	}
	if _, err := s.Bucket.Head(t.Context(), prefix+"late"); !errors.Is(err, writesession.ErrNotFound) {
		t.Errorf("the refused copy is there: %v", err)
	}
}

func behaveList(t *testing.T, s Case, prefix string) {
	// "-" and "." sort before "/", which a walk of folders gets wrong.
	want := []string{"a-b/x", "a.b", "a/x", "a/y/z", "a0", "b"}
	for _, key := range want {
		must(t, s.Bucket.Put(t.Context(), prefix+key, []byte(key), true))
	}
	must(t, s.Bucket.Put(t.Context(), strings.TrimSuffix(prefix, "/")+"-not/a", []byte("other"), true))
	var got []string
	for info, err := range s.Bucket.List(t.Context(), prefix) {
		must(t, err)
		key := strings.TrimPrefix(info.Key, prefix)
		if info.Size != int64(len(key)) || info.ETag == "" || info.Modified.IsZero() {
			t.Errorf("the list says %+v", info)
		}
		got = append(got, key)
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, err := range s.Bucket.List(t.Context(), prefix) {
		must(t, err)
		break // whoever has seen enough may go
	}
}

func behaveDelete(t *testing.T, s Case, prefix string) {
	var keys []string
	for _, name := range []string{"a", "b/c", "b/d", "e"} {
		must(t, s.Bucket.Put(t.Context(), prefix+name, []byte("x"), true))
		keys = append(keys, prefix+name)
	}
	must(t, s.Bucket.Delete(t.Context(), append(keys[:3:3], prefix+"none")...))
	var left []string
	for info, err := range s.Bucket.List(t.Context(), prefix) {
		must(t, err)
		left = append(left, info.Key)
	}
	if !slices.Equal(left, keys[3:]) {
		t.Errorf("left are %q", left)
	}
}

func behaveUpload(t *testing.T, s Case, prefix string) {
	content := []byte("the bytes of a pack")
	put, err := s.Bucket.PresignPut(t.Context(), prefix+"a", blob.DigestOf(content), int64(len(content)), time.Hour)
	must(t, err)
	if left := time.Until(put.Expires); left < 59*time.Minute || left > 61*time.Minute {
		t.Errorf("it expires in %s", left)
	}
	for name := range put.Headers {
		if got := upload(t, s.HTTP, put, content, name); got != http.StatusForbidden && got != http.StatusBadRequest {
			t.Errorf("without %s: status %d", name, got)
		}
	}
	other := put
	other.URL = strings.Replace(put.URL, prefix+"a", prefix+"b", 1)
	if got := upload(t, s.HTTP, other, content, ""); got != http.StatusForbidden {
		t.Errorf("at another key: status %d", got)
	}
	if _, err := s.Bucket.Head(t.Context(), prefix+"a"); !errors.Is(err, writesession.ErrNotFound) {
		t.Errorf("something is there: %v", err)
	}
	if got := upload(t, s.HTTP, put, content, ""); got != http.StatusOK {
		t.Errorf("as it was signed: status %d", got)
	}
	if got := read(t, s.Bucket, prefix+"a"); got != string(content) {
		t.Errorf("it is %q", got)
	}
}

func behaveWrongUpload(t *testing.T, s Case, prefix string) {
	content := []byte("the bytes of a pack")
	for what, wrong := range map[string][]byte{
		"byte": []byte("The bytes of a pack"), "size": []byte("the bytes of a pack!"), "nothing": {},
	} {
		key := prefix + what
		put, err := s.Bucket.PresignPut(t.Context(), key, blob.DigestOf(content), int64(len(content)), time.Hour)
		must(t, err)
		status := upload(t, s.HTTP, put, wrong, "")
		_, err = s.Bucket.Head(t.Context(), key)
		if refused := status >= 400 && errors.Is(err, writesession.ErrNotFound); s.Enforces && !refused {
			t.Errorf("a wrong %s: status %d, then %v", what, status, err)
		}
		if !s.Enforces && (status != http.StatusOK || err != nil) {
			t.Errorf("it enforces a %s after all: status %d, then %v", what, status, err)
		}
	}
}

func behaveContext(t *testing.T, s Case, prefix string) {
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	_, headErr := s.Bucket.Head(ctx, prefix+"a")
	for what, err := range map[string]error{"head": headErr, "put": s.Bucket.Put(ctx, prefix+"a", nil, true)} {
		if !errors.Is(err, context.Canceled) && !errors.Is(err, cause) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// upload sends content as put says, but for the header without.
func upload(t *testing.T, client *http.Client, put writesession.Put, content []byte, without string) int {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, put.URL, bytes.NewReader(content))
	must(t, err)
	for name, value := range put.Headers {
		if name != without {
			request.Header.Set(name, value)
		}
	}
	response, err := client.Do(request)
	must(t, err)
	must(t, response.Body.Close())
	return response.StatusCode
}

func read(t *testing.T, bucket writesession.Bucket, key string) string {
	t.Helper()
	reader, _, err := bucket.Get(t.Context(), key, 0, 0)
	must(t, err)
	content, err := io.ReadAll(reader)
	must(t, errors.Join(err, reader.Close()))
	return string(content)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

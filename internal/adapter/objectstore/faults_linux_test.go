package objectstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
)

func TestAProbeTellsIfHashesAreEnforcedAndLeavesNothing(t *testing.T) {
	g := startGateway(t)
	for _, test := range []struct {
		name   string
		change func(*Options)
		want   bool
	}{
		{"as the gateway is", func(*Options) {}, true},
		// It looks at the hash no more than at any header that it does not know.
		{"as a store that does not know the header", through(func(r *http.Request, next http.RoundTripper) (*http.Response, error) {
			if r.Method == http.MethodPut && r.URL.Query().Has("X-Amz-Signature") {
				content, err := io.ReadAll(r.Body)
				if err != nil {
					return nil, err
				}
				key := strings.TrimPrefix(r.URL.Path, "/"+testBucket+"/")
				put, err := g.bucket(t, g.admin).PresignPut(r.Context(), key, blob.DigestOf(content), int64(len(content)), time.Minute)
				if err != nil {
					return nil, err
				}
				if r, err = http.NewRequestWithContext(r.Context(), http.MethodPut, put.URL, bytes.NewReader(content)); err != nil {
					return nil, err
				}
				for name, value := range put.Headers {
					r.Header.Set(name, value)
				}
			}
			return next.RoundTrip(r)
		}), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := g.bucket(t, g.admin, test.change)
			got, err := b.Probe(t.Context(), "gamma/sessions/")
			if err != nil || got != test.want {
				t.Errorf("got %v, %v", got, err)
			}
			for info, err := range b.List(t.Context(), "") {
				t.Errorf("left is %s, %v", info.Key, err)
			}
		})
	}
}

func TestAReaderMayReadAndNothingElse(t *testing.T) {
	g := startGateway(t)
	admin, proxy := g.bucket(t, g.admin), g.bucket(t, g.proxy)
	if err := admin.Put(t.Context(), "gamma/packs/a", []byte("content"), true); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(proxy.Check(t.Context(), "gamma/packs/a"), proxy.Check(t.Context(), "gamma/packs/none")); err != nil {
		t.Errorf("it may not read: %v", err)
	}
	put, err := proxy.PresignPut(t.Context(), "gamma/packs/b", blob.DigestOf([]byte("b")), 1, time.Minute)
	if err != nil {
		t.Fatal(err) // to sign needs no permission
	}
	_, probe := proxy.Probe(t.Context(), "gamma/sessions/")
	for what, err := range map[string]error{
		"put":           proxy.Put(t.Context(), "gamma/packs/b", []byte("b"), false),
		"delete":        proxy.Delete(t.Context(), "gamma/packs/a"),
		"copy":          proxy.Copy(t.Context(), "gamma/packs/a", "gamma/packs/b", `"x"`),
		"probe":         probe,
		"presigned put": answerOf(t, put, "b"),
	} {
		if denied, ok := errors.AsType[*writesession.DeniedError](err); !ok || denied.Code != "AccessDenied" {
			t.Errorf("%s: %v", what, err)
		}
	}
	var keys []string
	for info, err := range proxy.List(t.Context(), "") {
		keys = append(keys, info.Key)
		if err != nil {
			t.Error(err)
		}
	}
	if !slices.Equal(keys, []string{"gamma/packs/a"}) {
		t.Errorf("there are %q", keys)
	}
}

func TestKeysThatChangeUnderARunningClientAreReadAgain(t *testing.T) {
	g := startGateway(t)
	var refreshes atomic.Int32
	current := &atomic.Pointer[account]{}
	current.Store(&g.admin)
	next := newAccount("admin2")
	b := g.bucket(t, g.admin, func(o *Options) {
		o.Keys = func(_ context.Context, refresh bool) (string, secret.Value, error) {
			if refresh {
				refreshes.Add(1)
				current.Store(&next)
			}
			user := current.Load()
			return user.Access, secret.New(user.Secret), nil
		}
	})
	if err := b.Put(t.Context(), "gamma/a", []byte("1"), true); err != nil {
		t.Fatal(err)
	}
	g.allow(t, next)
	g.grant(t, next.Access, g.proxy.Access)
	g.forget(t, g.admin)
	if err := b.Put(t.Context(), "gamma/b", []byte("2"), true); err != nil || refreshes.Load() != 1 {
		t.Errorf("with the old keys gone: %v, %d refreshes", err, refreshes.Load())
	}
	if err := b.Check(t.Context(), "gamma/a"); err != nil || refreshes.Load() != 1 {
		t.Errorf("once refreshed: %v, %d refreshes", err, refreshes.Load())
	}
	g.forget(t, next)
	err := b.Put(t.Context(), "gamma/c", []byte("3"), true)
	if denied, ok := errors.AsType[*writesession.DeniedError](err); !ok || denied.Code != "InvalidAccessKeyId" || refreshes.Load() != 2 {
		t.Errorf("with no good keys left: %v, %d refreshes", err, refreshes.Load())
	}
	if strings.Contains(err.Error(), next.Secret) || plan.HintOf(err) == "" {
		t.Errorf("the error is %q with hint %q", err, plan.HintOf(err))
	}
}

func TestNoKeysYetAndKeysThatCannotBeReadAreDifferent(t *testing.T) {
	g := &gateway{address: "127.0.0.1:1"}
	none := g.bucket(t, account{})
	if denied, ok := errors.AsType[*writesession.DeniedError](none.Check(t.Context(), "a")); !ok || denied.Code == "" {
		t.Errorf("got %v", denied)
	}
	unreadable := g.bucket(t, account{}, func(o *Options) {
		o.Keys = func(context.Context, bool) (string, secret.Value, error) { return "", secret.Value{}, os.ErrPermission }
	})
	if err := unreadable.Check(t.Context(), "a"); !errors.Is(err, os.ErrPermission) {
		t.Errorf("got %v", err)
	}
}

func TestAMissingBucketIsNotAMissingObject(t *testing.T) {
	g := startGateway(t)
	b := g.bucket(t, g.root, func(o *Options) { o.Bucket = "gamma-other" })
	var listed error
	for _, err := range b.List(t.Context(), "gamma/") {
		listed = err
	}
	for what, err := range map[string]error{
		"list": listed, "check": b.Check(t.Context(), "gamma/a"), "put": b.Put(t.Context(), "gamma/a", []byte("a"), true),
	} {
		denied, ok := errors.AsType[*writesession.DeniedError](err)
		if !ok || denied.Code != "NoSuchBucket" || errors.Is(err, writesession.ErrNotFound) || !strings.Contains(plan.HintOf(err), "object_store") {
			t.Errorf("%s: %v (%s)", what, err, plan.HintOf(err))
		}
	}
	if err := errors.Join(b.MakeBucket(t.Context()), b.MakeBucket(t.Context()), b.Check(t.Context(), "gamma/a")); err != nil {
		t.Errorf("made twice: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(g.folder, "data", "gamma-other")); err != nil {
		t.Fatal(err)
	}
	if denied, ok := errors.AsType[*writesession.DeniedError](b.Check(t.Context(), "gamma/a")); !ok || denied.Code != "NoSuchBucket" {
		t.Errorf("removed under a running client: %v", denied)
	}
}

func TestAStoreThatIsAwayForAWhileIsWaitedForAndThenReported(t *testing.T) {
	g := startGateway(t)
	var failures atomic.Int32
	b := g.bucket(t, g.admin, through(func(r *http.Request, next http.RoundTripper) (*http.Response, error) {
		if failures.Add(-1) >= 0 {
			return refusal(r, http.StatusServiceUnavailable, "SlowDown"), nil
		}
		return next.RoundTrip(r)
	}))
	var pauses []time.Duration
	b.pause = func(ctx context.Context, length time.Duration) error {
		pauses = append(pauses, length)
		return ctx.Err()
	}
	failures.Store(2)
	if err := b.Put(t.Context(), "gamma/a", []byte("a"), true); err != nil {
		t.Errorf("away for two attempts: %v", err)
	}
	failures.Store(1)
	if got := content(t, b, "gamma/a"); got != "a" {
		t.Errorf("got %q", got)
	}
	failures.Store(1000)
	err := b.Put(t.Context(), "gamma/b", []byte("b"), true)
	unavailable, ok := errors.AsType[*writesession.UnavailableError](err)
	if !ok || unavailable.RetryAfter != 7*time.Second || failures.Load() != 1000-attempts {
		t.Errorf("away for long: %v, %d attempts", err, 1000-failures.Load())
	}
	if want := slices.Repeat([]time.Duration{longestPause}, attempts-1); !slices.Equal(pauses[3:], want) {
		t.Errorf("it asked for 7 s, and was given %v", pauses[3:])
	}
	b.pause = retry.Pause
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.Put(ctx, "gamma/c", nil, true); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("whoever has no time waits no longer: %v", err)
	}
}

func TestAStoreThatRestartsIsFoundAgain(t *testing.T) {
	g := startGateway(t)
	b := g.bucket(t, g.admin)
	if err := b.Put(t.Context(), "gamma/a", []byte("a"), true); err != nil {
		t.Fatal(err)
	}
	g.stop(t)
	b.pause = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
	if _, ok := errors.AsType[*writesession.UnavailableError](b.Check(t.Context(), "gamma/a")); !ok {
		t.Error("it answers while it is stopped")
	}
	b.pause = retry.Pause
	started := make(chan error, 1)
	go func() { started <- b.Put(t.Context(), "gamma/b", []byte("b"), true) }()
	g.start(t)
	if err := <-started; err != nil {
		t.Errorf("a put while it starts: %v", err)
	}
	if got := content(t, b, "gamma/a") + content(t, b, "gamma/b"); got != "ab" {
		t.Errorf("got %q", got)
	}
}

func TestACreateWhoseAnswerWasLostIsNoConflict(t *testing.T) {
	g := startGateway(t)
	var lose atomic.Bool
	b := g.bucket(t, g.admin, through(func(r *http.Request, next http.RoundTripper) (*http.Response, error) {
		response, err := next.RoundTrip(r)
		if err == nil && r.Method == http.MethodPut && lose.CompareAndSwap(true, false) {
			_ = response.Body.Close()
			return nil, net.ErrClosed
		}
		return response, err
	}))
	b.pause = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
	lose.Store(true)
	if err := b.Put(t.Context(), "gamma/a", []byte("ours"), true); err != nil {
		t.Errorf("its own answer was lost: %v", err)
	}
	lose.Store(true)
	if err := b.Put(t.Context(), "gamma/a", []byte("others"), true); !errors.Is(err, writesession.ErrExists) {
		t.Errorf("another's was there before: %v", err)
	}
	if got := content(t, b, "gamma/a"); got != "ours" {
		t.Errorf("it is %q", got)
	}
}

func TestATransferThatBreaksIsUnavailableAndNotShort(t *testing.T) {
	g := startGateway(t)
	var cut atomic.Bool
	b := g.bucket(t, g.admin, through(func(r *http.Request, next http.RoundTripper) (*http.Response, error) {
		response, err := next.RoundTrip(r)
		if err == nil && r.Method == http.MethodGet && cut.Load() {
			response.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(io.LimitReader(response.Body, 1000), brokenReader{}), response.Body}
		}
		return response, err
	}))
	if err := b.Put(t.Context(), "gamma/a", make([]byte, 1<<20), true); err != nil {
		t.Fatal(err)
	}
	cut.Store(true)
	reader, info, err := b.Get(t.Context(), "gamma/a", 0, 0)
	if err != nil || info.Size != 1<<20 {
		t.Fatalf("%+v, %v", info, err)
	}
	defer func() { _ = reader.Close() }()
	read, err := io.ReadAll(reader)
	if _, ok := errors.AsType[*writesession.UnavailableError](err); !ok || len(read) > 1000 {
		t.Errorf("%d bytes, then %v", len(read), err)
	}
}

func TestAWrongClockIsNamed(t *testing.T) {
	g := startGateway(t)
	for _, test := range []struct {
		name string
		by   time.Duration
	}{{"an hour behind", -time.Hour}, {"an hour ahead", time.Hour}} {
		t.Run(test.name, func(t *testing.T) {
			keys := aws.Credentials{AccessKeyID: g.admin.Access, SecretAccessKey: g.admin.Secret}
			b := g.bucket(t, g.admin, through(func(r *http.Request, next http.RoundTripper) (*http.Response, error) {
				// As the SDK would have signed it by that clock.
				r.Header.Del("Authorization")
				err := v4.NewSigner().SignHTTP(r.Context(), keys, r, r.Header.Get("X-Amz-Content-Sha256"), "s3", testRegion, time.Now().Add(test.by),
					func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true })
				if err != nil {
					return nil, err
				}
				return next.RoundTrip(r)
			}))
			_, headErr := b.Head(t.Context(), "gamma/a")
			for what, err := range map[string]error{"put": b.Put(t.Context(), "gamma/a", []byte("a"), true), "head": headErr} {
				denied, ok := errors.AsType[*writesession.DeniedError](err)
				if !ok || denied.Code != "RequestTimeTooSkewed" || !strings.Contains(plan.HintOf(err), "clock") {
					t.Errorf("%s: %v (%s)", what, err, plan.HintOf(err))
				}
			}
		})
	}
}

func TestManyObjectsAreListedInPages(t *testing.T) {
	g := startGateway(t)
	folder := filepath.Join(g.folder, "data", testBucket, "gamma", "packs")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	const many = 2500
	for i := range many {
		if err := os.WriteFile(filepath.Join(folder, fmt.Sprintf("%06d", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	next := 0
	for info, err := range g.bucket(t, g.admin).List(t.Context(), "gamma/packs/") {
		if err != nil || info.Key != fmt.Sprintf("gamma/packs/%06d", next) {
			t.Fatalf("at %d: %s, %v", next, info.Key, err)
		}
		next++
	}
	if next != many {
		t.Errorf("%d of %d", next, many)
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// refusal is an answer of S3 that asks for seven seconds.
func refusal(r *http.Request, status int, code string) *http.Response {
	said := "<Error><Code>" + code + "</Code></Error>"
	return &http.Response{
		StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: r,
		Header: http.Header{"Retry-After": {"7"}, "Content-Type": {"application/xml"}},
		Body:   io.NopCloser(strings.NewReader(said)), ContentLength: int64(len(said)),
	}
}

// answerOf uploads and classifies the answer.
func answerOf(t *testing.T, put writesession.Put, content string) error {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, put.URL, strings.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range put.Headers {
		request.Header.Set(name, value)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	return uploaded("upload", response)
}

func content(t *testing.T, b *Bucket, key string) string {
	t.Helper()
	reader, _, err := b.Get(t.Context(), key, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(reader)
	if err = errors.Join(err, reader.Close()); err != nil {
		t.Fatal(err)
	}
	return string(got)
}

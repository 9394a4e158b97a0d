package objectstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
)

func someKeys(context.Context, bool) (string, secret.Value, error) {
	return "the-id", secret.New("the-secret"), nil
}

func TestOptionsThatReachNoBucketAreRefused(t *testing.T) {
	good := Options{Endpoint: "https://store.example", Region: "auto", Bucket: "gamma", Keys: someKeys}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Options){
		"no endpoint":           func(o *Options) { o.Endpoint = "" },
		"no scheme":             func(o *Options) { o.Endpoint = "store.example" },
		"another scheme":        func(o *Options) { o.Endpoint = "ftp://store.example" },
		"a key in the endpoint": func(o *Options) { o.Endpoint = "https://id:key@store.example" },
		"a query":               func(o *Options) { o.Endpoint = "https://store.example?a=b" },
		"no bucket":             func(o *Options) { o.Bucket = "" },
		"no region":             func(o *Options) { o.Region = "" },
		"no keys":               func(o *Options) { o.Keys = nil },
	} {
		t.Run(name, func(t *testing.T) {
			options := good
			change(&options)
			if _, err := New(options); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func TestWhatAnAnswerMeans(t *testing.T) {
	for _, test := range []struct {
		status     int
		code, want string
	}{
		{404, "NoSuchKey", "not found"},
		{404, "Not Found", "not found"},
		{404, "NoSuchBucket", "denied"},
		{403, "AccessDenied", "denied"},
		{401, "Unauthorized", "denied"},
		{403, "RequestTimeTooSkewed", "denied"},
		{429, "SlowDown", "unavailable"},
		{500, "InternalError", "unavailable"},
		{502, "Bad Gateway", "unavailable"},
		{503, "", "unavailable"},
		{408, "Request Timeout", "unavailable"},
		{400, "RequestTimeout", "unavailable"},
		{409, "ConditionalRequestConflict", "unavailable"},
		{200, "InternalError", "unavailable"},
		{501, "NotImplemented", "other"},
		{412, "PreconditionFailed", "other"},
		{400, "BadDigest", "other"},
		{301, "PermanentRedirect", "other"},
	} {
		t.Run(fmt.Sprint(test.status, " ", test.code), func(t *testing.T) {
			err := answer("get a", test.status, test.code, http.Header{"Retry-After": {"3"}}, io.ErrUnexpectedEOF)
			got := "other"
			if errors.Is(err, writesession.ErrNotFound) {
				got = "not found"
			} else if isOurs[*writesession.DeniedError](err) {
				got = "denied"
			} else if unavailable, ok := errors.AsType[*writesession.UnavailableError](err); ok {
				got = "unavailable"
				if unavailable.RetryAfter != 3*time.Second {
					t.Errorf("it asked for 3 s, and we wait %s", unavailable.RetryAfter)
				}
			}
			if got != test.want || !strings.HasPrefix(err.Error(), "get a: ") {
				t.Errorf("got %s: %v", got, err)
			}
			if again := classify("again", err); again != err { //nolint:errorlint // it is the same, not one around it
				t.Errorf("classified twice it is %v", again)
			}
		})
	}
}

func TestAPresignedURLHoldsNoSecretAndSignsTheHashAndTheLength(t *testing.T) {
	b, err := New(Options{Endpoint: "https://store.example/base", Region: "auto", Bucket: "gamma", PathStyle: true, Keys: someKeys})
	if err != nil {
		t.Fatal(err)
	}
	put, err := b.PresignPut(t.Context(), "site/sessions/a b+c", blob.DigestOf([]byte("x")), 1, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	address, err := url.Parse(put.URL)
	if err != nil {
		t.Fatal(err)
	}
	if want := "/base/gamma/site/sessions/a%20b%2Bc"; address.EscapedPath() != want {
		t.Errorf("the path is %s, want %s", address.EscapedPath(), want)
	}
	signed := strings.Split(address.Query().Get("X-Amz-SignedHeaders"), ";")
	if want := []string{"content-length", "host", "x-amz-checksum-sha256"}; !slices.Equal(signed, want) {
		t.Errorf("signed are %q, want %q", signed, want)
	}
	if address.Query().Get("X-Amz-Expires") != "3600" || strings.Contains(put.URL, "the-secret") {
		t.Errorf("the query is %q", address.RawQuery)
	}
	if want := map[string]string{checksumHeader: "LXEWQrcmsEQBYnyp+6wy9chTD7GQPMTbAiWHF5IaSIE="}; fmt.Sprint(put.Headers) != fmt.Sprint(want) {
		t.Errorf("the headers are %v", put.Headers)
	}
	for name, presign := range map[string]func() (writesession.Put, error){
		"nothing": func() (writesession.Put, error) {
			return b.PresignPut(t.Context(), "a", blob.DigestOf(nil), 0, time.Hour)
		},
		"no digest": func() (writesession.Put, error) { return b.PresignPut(t.Context(), "a", "sha256:00", 1, time.Hour) },
		"more than weeks": func() (writesession.Put, error) {
			return b.PresignPut(t.Context(), "a", blob.DigestOf(nil), 1, 8*24*time.Hour)
		},
	} {
		if _, err := presign(); err == nil {
			t.Errorf("%s is presigned", name)
		}
	}
}

func TestErrorsShowNeitherKeysNorSignatures(t *testing.T) {
	refuse := roundTrip(func(r *http.Request) (*http.Response, error) {
		return nil, &url.Error{Op: "Put", URL: r.URL.String() + r.Header.Get("Authorization"), Err: io.ErrUnexpectedEOF}
	})
	b, err := New(Options{
		Endpoint: "https://store.example", Region: "auto", Bucket: "gamma", PathStyle: true, Keys: someKeys,
		HTTP: &http.Client{Transport: refuse},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.pause = func(context.Context, time.Duration) error { return nil }
	_, probe := b.Probe(t.Context(), "gamma/")
	for what, err := range map[string]error{"put": b.Put(t.Context(), "gamma/a", nil, true), "probe": probe} {
		if _, ok := errors.AsType[*writesession.UnavailableError](err); !ok {
			t.Errorf("%s: %v", what, err)
		}
		if text := fmt.Sprintf("%v %+v %s", err, err, plan.HintOf(err)); strings.Contains(text, "Signature") || strings.Contains(text, "the-secret") {
			t.Errorf("%s says %s", what, text)
		}
	}
}

func TestATransferThatStandsStillEndsAndASlowReaderDoesNotEndIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBody(t.Context(), "get a")
		b.begin(io.NopCloser(&oneByteThenNothing{ctx: b.ctx}))
		defer func() { _ = b.Close() }()
		one := make([]byte, 1)
		if _, err := b.Read(one); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * stall) //nolint:forbidigo // a fake clock; whoever reads is slow
		if err := b.ctx.Err(); err != nil {
			t.Fatalf("ended: %v", err)
		}
		start := time.Now()
		_, err := b.Read(one)
		if unavailable, ok := errors.AsType[*writesession.UnavailableError](err); !ok || !errors.Is(unavailable, errStalled) || time.Since(start) != stall {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// oneByteThenNothing stands still as a connection does: till its request ends.
type oneByteThenNothing struct {
	ctx  context.Context //nolint:containedctx // as a response has it
	sent bool
}

func (r *oneByteThenNothing) Read(p []byte) (int, error) {
	if !r.sent {
		r.sent = true
		return copy(p, "x"), nil
	}
	<-r.ctx.Done()
	return 0, r.ctx.Err()
}

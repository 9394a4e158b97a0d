package pull

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	signer "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/cenkalti/backoff/v5"
	_ "golang.org/x/crypto/x509roots/fallback" // for hosts without certificates of their own

	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/retry"
)

const (
	// defaultPatience is how long a store may fail without a byte in between.
	defaultPatience = 30 * time.Second
	// stallLimit is how long one read may wait.
	stallLimit = 30 * time.Second
	// refusals are how often refused keys are read again: a new pair may not be
	// known everywhere yet, and the old one was in use until a moment ago.
	refusals = 4

	emptyPayload = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	codeSkewed   = "RequestTimeTooSkewed"
)

var errStalled = errors.New("nothing came for a long time")

// bucket reads objects.
type bucket struct {
	config   host.ObjectStore
	base     *url.URL
	client   *http.Client
	keys     KeySource
	slots    chan struct{}
	patience time.Duration

	requests, received atomic.Int64
}

func newBucket(options Options) (*bucket, error) {
	base, err := url.Parse(options.Config.Endpoint)
	if err != nil || base.Host == "" || (base.Scheme != "https" && base.Scheme != "http") || base.User != nil {
		return nil, fmt.Errorf("object store: endpoint %q is not a URL", options.Config.Endpoint)
	}
	if options.Config.Bucket == "" || options.Config.Region == "" {
		return nil, errors.New("object store: no bucket or no region is named")
	}
	if options.Config.PathStyle {
		base = base.JoinPath(options.Config.Bucket)
	} else {
		base.Host = options.Config.Bucket + "." + base.Host
	}
	client := http.Client{Transport: newTransport()}
	if options.HTTP != nil {
		client = *options.HTTP
	}
	// What is signed is for this address alone.
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &bucket{
		config: options.Config, base: base, client: &client, keys: options.Keys, patience: defaultPatience,
		slots: make(chan struct{}, options.Parallel),
	}, nil
}

func newTransport() *http.Transport {
	return &http.Transport{
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: stallLimit,
		IdleConnTimeout:       time.Minute,
		MaxIdleConnsPerHost:   16,
		// Small, for one for each connection stays in memory.
		ReadBufferSize: 64 << 10, MaxResponseHeaderBytes: 64 << 10,
	}
}

// answerError is what the store said, or that it did not. It never holds a
// signature: those are in headers.
type answerError struct {
	status     int
	code       string
	retryAfter time.Duration
	err        error
}

func (e *answerError) Error() string {
	switch {
	case e.err != nil:
		return e.err.Error()
	case e.code != "":
		return fmt.Sprintf("status %d, %s", e.status, e.code)
	}
	return fmt.Sprintf("status %d", e.status)
}

func (e *answerError) Unwrap() error { return e.err }

func (e *answerError) denied() bool {
	switch e.code {
	case "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", codeSkewed,
		"XAdminUserNotFound": // versitygw's word for an unknown id, with a 404
		return true
	}
	return e.status == http.StatusForbidden || e.status == http.StatusUnauthorized
}

func (e *answerError) passing() bool {
	return e.err != nil || e.status >= 500 || e.status == http.StatusTooManyRequests || e.status == http.StatusRequestTimeout
}

// read calls use with the bytes of an object; length 0 is all from offset. next
// says, before each attempt, from where; use moves it on as bytes are kept, and
// an attempt that moved it makes the store's time run anew.
func (b *bucket) read(ctx context.Context, what, key string, next func() (offset, length int64), use func(io.Reader) error) error {
	select {
	case b.slots <- struct{}{}:
		defer func() { <-b.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval, pause.MaxInterval = 100*time.Millisecond, 3*time.Second
	refused, quiet := 0, time.Now()
	for {
		offset, length := next()
		generation, err := b.once(ctx, key, offset, length, refused > 0, use)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if moved, _ := next(); moved != offset {
			pause.Reset()
			refused, quiet = 0, time.Now()
		}
		var answer *answerError
		if !errors.As(err, &answer) {
			return err
		}
		wait := max(pause.NextBackOff(), min(answer.retryAfter, 10*time.Second))
		switch {
		case answer.denied():
			if refused++; refused > refusals || time.Since(quiet)+wait > b.patience {
				return &DeniedError{What: what, Code: answer.word(), Generation: generation}
			}
			if refused == 1 { // other keys may be there already
				wait = 0
			}
		case answer.status == http.StatusNotFound && (answer.code == "NoSuchKey" || answer.code == ""):
			return &NotFoundError{What: what}
		case answer.status == http.StatusRequestedRangeNotSatisfiable:
			return &CorruptError{What: what, Err: errors.New("an object is shorter than its record says")}
		case !answer.passing() || time.Since(quiet)+wait > b.patience:
			return &UnreachableError{What: what, Err: answer}
		}
		if err := retry.Pause(ctx, wait); err != nil {
			return err
		}
	}
}

func (e *answerError) word() string {
	if e.code != "" {
		return e.code
	}
	return fmt.Sprintf("status %d", e.status)
}

// once makes one request. What the store or the way to it did wrong is an
// *answerError, all else is an error of use or of the keys.
func (b *bucket) once(
	ctx context.Context, key string, offset, length int64, refresh bool, use func(io.Reader) error,
) (generation int, err error) {
	id, value, generation, err := b.keys.Keys(ctx, refresh)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, b.base.JoinPath(key).String(), nil)
	if err != nil {
		return generation, fmt.Errorf("object store: %w", err)
	}
	if length > 0 {
		request.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	}
	request.Header.Set("Accept-Encoding", "identity")
	request.Header.Set("X-Amz-Content-Sha256", emptyPayload)
	credentials := aws.Credentials{AccessKeyID: id, SecretAccessKey: value.Reveal()}
	// Not one for all: it remembers what it derived of a key by the id alone, and an
	// id may get another key.
	once := signer.NewSigner(func(o *signer.SignerOptions) { o.DisableURIPathEscaping = true })
	if err := once.SignHTTP(ctx, credentials, request, emptyPayload, "s3", b.config.Region, time.Now().UTC()); err != nil {
		return generation, errors.New("object store: the request cannot be signed")
	}
	b.requests.Add(1)
	response, err := b.client.Do(request)
	if err != nil {
		var failed *url.Error
		if errors.As(err, &failed) {
			err = failed.Err
		}
		return generation, &answerError{err: err}
	}
	defer func() { _ = response.Body.Close() }()
	if err := checkAnswer(response, offset, length); err != nil {
		return generation, err
	}
	body := &watched{body: response.Body, cancel: cancel, received: &b.received}
	err = use(body)
	if err != nil && body.err != nil && !errors.Is(body.err, io.EOF) {
		if cause := context.Cause(ctx); cause != nil {
			body.err = cause
		}
		return generation, &answerError{err: body.err}
	}
	return generation, err
}

// checkAnswer insists on the very bytes that were asked for.
func checkAnswer(response *http.Response, offset, length int64) error {
	switch {
	case response.StatusCode == http.StatusOK && length == 0:
		return nil
	case response.StatusCode == http.StatusOK && offset == 0 && response.ContentLength == length:
		return nil
	case response.StatusCode == http.StatusPartialContent && length > 0:
		want := fmt.Sprintf("bytes %d-%d/", offset, offset+length-1)
		if got := response.Header.Get("Content-Range"); !strings.HasPrefix(got, want) {
			return &answerError{status: http.StatusRequestedRangeNotSatisfiable}
		}
		return nil
	case response.StatusCode < http.StatusMultipleChoices:
		return &answerError{status: response.StatusCode, code: "another range than was asked for"}
	}
	const longest = 16 << 10
	var said struct {
		Code string `xml:"Code"`
	}
	// A gateway in between may say anything.
	_ = xml.NewDecoder(io.LimitReader(response.Body, longest)).Decode(&said)
	answer := &answerError{status: response.StatusCode, code: tidyCode(said.Code)}
	if seconds, err := strconv.Atoi(response.Header.Get("Retry-After")); err == nil && seconds > 0 {
		answer.retryAfter = time.Duration(min(seconds, 60)) * time.Second
	}
	return answer
}

// tidyCode keeps a code that looks like one.
func tidyCode(code string) string {
	const longest = 64
	letter := func(r rune) bool { return (r >= 'a' && r <= 'z') || (r >= 'A' && r <= 'Z') || (r >= '0' && r <= '9') }
	if len(code) > longest || strings.ContainsFunc(code, func(r rune) bool { return !letter(r) }) {
		return ""
	}
	return code
}

// watched ends a read that waits for too long. The time that use takes does not count.
type watched struct {
	body     io.Reader
	cancel   context.CancelCauseFunc
	received *atomic.Int64
	err      error
}

func (w *watched) Read(buffer []byte) (int, error) {
	timer := time.AfterFunc(stallLimit, func() { w.cancel(errStalled) })
	n, err := w.body.Read(buffer)
	timer.Stop()
	w.received.Add(int64(n))
	w.err = err
	return n, err
}

// get reads a small object as a whole.
func (b *bucket) get(ctx context.Context, what, key string, limit int64) ([]byte, error) {
	var content []byte
	err := b.read(ctx, what, key, func() (int64, int64) { return 0, 0 }, func(body io.Reader) error {
		var err error
		content, err = io.ReadAll(io.LimitReader(body, limit+1))
		if err == nil && int64(len(content)) > limit {
			err = &CorruptError{What: what, Err: fmt.Errorf("longer than %d bytes", limit)}
		}
		return err
	})
	return content, err
}

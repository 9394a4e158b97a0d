package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/writesession"
)

// How long the service is asked again while it does not answer, and how long one
// answer may take.
const (
	patience     = time.Minute
	answerWithin = time.Minute
)

// zstdCoding is offered by a service that says so (RFC 7694); lists of digests
// take half as many bytes with it.
const zstdCoding = "zstd"

// compressFrom is the least that is worth it.
const compressFrom = 4 << 10

// call is one question to the service; all of them may be asked again.
type call struct {
	// what is asked, for errors.
	what, method, path string
	header             http.Header
	body               any
	// into gets the answer; nil does not read it.
	into any
	// within is how long one answer may take, patience how long to try; 0 are those above.
	within, patience time.Duration
	// anonymous calls carry no token.
	anonymous bool
}

// do asks until there is an answer that another attempt would not change. It
// returns the status and how many bytes of request bodies were sent.
func (c *Client) do(ctx context.Context, ask call) (int, int64, error) {
	ask = ask.withDefaults()
	var encoded []byte
	if ask.body != nil {
		var err error
		if encoded, err = json.Marshal(ask.body); err != nil {
			return 0, 0, fmt.Errorf("%s: %w", ask.what, err)
		}
		if len(encoded) > writesession.MaxBodyBytes {
			return 0, 0, &ProblemError{
				What: ask.what, Type: writesession.ProblemTooLarge, Status: http.StatusRequestEntityTooLarge,
				Title: fmt.Sprintf("its list of chunks is larger than a request may be (%d MiB)", writesession.MaxBodyBytes>>20),
			}
		}
	}
	var status int
	var sent int64
	var last error
	err := retry.Until(ctx, "object-storage-service", ask.patience, func(ctx context.Context) error {
		var n int64
		status, n, last = c.once(ctx, ask, encoded)
		sent += n
		return stopUnlessPassing(ctx, last)
	})
	var timeout *retry.TimeoutError
	if errors.As(err, &timeout) && last != nil {
		// What the service says is more than how long it was asked.
		return status, sent, last
	}
	if err != nil && ctx.Err() != nil {
		return status, sent, fmt.Errorf("%s: %w", ask.what, context.Cause(ctx))
	}
	return status, sent, err
}

func (ask call) withDefaults() call {
	if ask.within == 0 {
		ask.within = answerWithin
	}
	if ask.patience == 0 {
		ask.patience = max(patience, ask.within)
	}
	return ask
}

// passer is an error that knows whether another attempt may help.
type passer interface {
	error
	passing() bool
}

// laterError is a passing error of one who says when to come again.
type laterError struct {
	passer
	after time.Duration
}

func (e *laterError) Unwrap() error { return e.passer }

// stopUnlessPassing marks what another attempt cannot mend, and waits where the
// other side has said for how long.
func stopUnlessPassing(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	var unreachable *UnreachableError
	var may passer
	if errors.As(err, &unreachable) {
		return err
	}
	if !errors.As(err, &may) || !may.passing() {
		return retry.Permanent(err)
	}
	var later *laterError
	if errors.As(err, &later) {
		_ = retry.Pause(ctx, later.after) // an ended context ends the attempts, too
	}
	return err
}

// retryAfter reads the header, in seconds; at most half a minute is believed.
func retryAfter(header http.Header, err passer) error {
	seconds, parseErr := strconv.Atoi(header.Get("Retry-After"))
	if parseErr != nil || seconds <= 0 || !err.passing() {
		return err
	}
	return &laterError{passer: err, after: min(time.Duration(seconds)*time.Second, 30*time.Second)}
}

// once asks once; after a 401 with the token that there is then.
func (c *Client) once(ctx context.Context, ask call, encoded []byte) (int, int64, error) {
	status, sent, used, err := c.send(ctx, ask, encoded, "")
	var problem *ProblemError
	if !errors.As(err, &problem) || problem.Status != http.StatusUnauthorized || ask.anonymous {
		return status, sent, err
	}
	again, n, _, secondErr := c.send(ctx, ask, encoded, used)
	if errors.Is(secondErr, errSameToken) {
		return status, sent, err
	}
	return again, sent + n, secondErr
}

// errSameToken says that there is no other token than the one that was refused.
var errSameToken = errors.New("the token was refused")

// send is one request and its answer. A token equal to refused is not tried again.
func (c *Client) send(ctx context.Context, ask call, encoded []byte, refused string) (int, int64, string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, ask.within, fmt.Errorf("no answer within %s", ask.within))
	defer cancel()
	body, coding := c.coded(encoded)
	request, err := http.NewRequestWithContext(ctx, ask.method, c.base+ask.path, bytes.NewReader(body))
	if err != nil {
		return 0, 0, "", fmt.Errorf("%s: %w", ask.what, err)
	}
	c.dress(request, ask, coding)
	token := ""
	if !ask.anonymous {
		value, err := c.options.Token(ctx)
		if err != nil {
			return 0, 0, "", fmt.Errorf("%s: log in: %w", ask.what, err)
		}
		if token = value.Reveal(); token == refused {
			return 0, 0, token, errSameToken
		}
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := c.options.HTTP.Do(request)
	if err != nil {
		return 0, int64(len(body)), token, &UnreachableError{What: ask.what, Err: withoutAddress(ctx, err)}
	}
	defer response.Body.Close()
	c.learn(response.Header)
	answer, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		return 0, int64(len(body)), token, &UnreachableError{What: ask.what, Err: withoutAddress(ctx, err)}
	}
	return response.StatusCode, int64(len(body)), token, ask.read(response, answer)
}

// maxAnswer bounds an answer of the service.
const maxAnswer = 128 << 20

func (ask call) read(response *http.Response, answer []byte) error {
	if len(answer) > maxAnswer {
		return strange(ask.what, "an answer of more than %d MiB", maxAnswer>>20)
	}
	if response.StatusCode < 200 || response.StatusCode > 299 {
		return retryAfter(response.Header, problemOf(ask.what, response.StatusCode, answer))
	}
	if ask.into == nil {
		return nil
	}
	// Fields that this version does not know are those of a newer service.
	if err := json.Unmarshal(answer, ask.into); err != nil {
		return strange(ask.what, "answer: %w", err)
	}
	return nil
}

func (c *Client) dress(request *http.Request, ask call, coding string) {
	for key, values := range ask.header {
		request.Header[key] = values
	}
	request.Header.Set("Accept", "application/json, application/problem+json")
	request.Header.Set("User-Agent", strings.TrimSuffix("site/"+c.options.Version, "/"))
	if ask.body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if coding != "" {
		request.Header.Set("Content-Encoding", coding)
	}
}

// coded compresses a body where the service has said that it takes that.
func (c *Client) coded(encoded []byte) (body []byte, coding string) {
	if len(encoded) < compressFrom || !c.takesZstd.Load() {
		return encoded, ""
	}
	const window = 256 << 10 // ample for digests, in which nothing comes twice
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window))
	if err != nil {
		return encoded, ""
	}
	defer encoder.Close()
	return encoder.EncodeAll(encoded, nil), zstdCoding
}

// learn notes whether the service takes compressed bodies.
func (c *Client) learn(header http.Header) {
	for _, line := range header.Values("Accept-Encoding") {
		codings := strings.FieldsFunc(line, func(r rune) bool { return r == ',' || r == ' ' })
		if slices.Contains(codings, zstdCoding) {
			c.takesZstd.Store(true)
		}
	}
}

// withoutAddress leaves out the URL, which may be signed, and tells why a context ended.
func withoutAddress(ctx context.Context, err error) error {
	var inURL *url.Error
	if errors.As(err, &inURL) {
		err = inURL.Err
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

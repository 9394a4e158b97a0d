// Package cloudflare makes and revokes the keys of a site's bucket at the
// provider, by the provider's own SDK over its documented API. Nothing else in the
// project knows the provider.
//
// Tokens are the account's own (`/accounts/{id}/tokens`), not a person's: they
// outlive whoever made them. An S3 key of R2 is such a token: its access key id is
// the token's id, its secret access key the SHA-256 of the token's value in hex
// (developers.cloudflare.com/r2/api/tokens).
package cloudflare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cloudflare/cloudflare-go/v6/accounts"
	"github.com/cloudflare/cloudflare-go/v6/option"
	"github.com/cloudflare/cloudflare-go/v6/r2"
	"github.com/cloudflare/cloudflare-go/v6/user"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
)

const (
	// DefaultAPI is the provider's own.
	DefaultAPI = "https://api.cloudflare.com/client/v4"

	defaultPatience = 30 * time.Second
	requestTimeout  = 20 * time.Second
	// maxAnswer bounds what is read of one answer; a page of 50 tokens is far below.
	maxAnswer = 8 << 20
)

// Options say which account, and as whom.
type Options struct {
	AccountID string
	// API is the URL of the provider's API. Default: DefaultAPI.
	API string
	// Jurisdiction of the bucket is empty, "eu" or "fedramp".
	Jurisdiction string
	// Token is one of the admin pair.
	Token secret.Value
	HTTP  *http.Client
	Now   func() time.Time
	// Patience is how long a provider that does not answer, or answers that it
	// cannot now, is asked again. Default: 30 s.
	Patience time.Duration
}

// Client speaks to the provider with one token of the admin pair.
type Client struct {
	options Options
	mask    func(string) string
	tokens  *accounts.TokenService
	users   *user.TokenService
	buckets *r2.BucketService
}

// New checks the options; it asks the provider nothing.
func New(options Options) (*Client, error) {
	if options.API == "" {
		options.API = DefaultAPI
	}
	if options.Now == nil {
		options.Now = time.Now
	}
	if options.Patience == 0 {
		options.Patience = defaultPatience
	}
	if err := options.check(); err != nil {
		return nil, err
	}
	client := &http.Client{}
	if options.HTTP != nil {
		copied := *options.HTTP
		client = &copied
	}
	// The API redirects nobody, and a token goes to no second place.
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	// The services by themselves, for the SDK's own client reads tokens, keys and
	// addresses from the environment. It would also try a conflict again, and a
	// creation of which nobody knows whether it was done.
	common := []option.RequestOption{
		option.WithBaseURL(options.API), option.WithHTTPClient(client), option.WithAPIToken(options.Token.Reveal()),
		option.WithMaxRetries(0), option.WithRequestTimeout(requestTimeout),
	}
	return &Client{
		options: options, mask: secret.Mask(options.Token),
		tokens: accounts.NewTokenService(common...), users: user.NewTokenService(common...), buckets: r2.NewBucketService(common...),
	}, nil
}

func (o Options) check() error {
	if !isIdentifier(o.AccountID) {
		return plan.WithHint(fmt.Errorf("account id %q is not 32 hexadecimal digits", o.AccountID),
			"the account's id is in the address of its dashboard, and under R2 in its overview")
	}
	switch o.Jurisdiction {
	case "", "default", "eu", "fedramp":
	default:
		return plan.WithHint(fmt.Errorf("jurisdiction %q is unknown", o.Jurisdiction), `leave it out, or set "eu" or "fedramp"`)
	}
	api, err := url.Parse(o.API)
	if err != nil || api.Host == "" || (api.Scheme != "https" && api.Scheme != "http") {
		return plan.WithHint(fmt.Errorf("the provider's API %q is no URL", o.API), "leave `api` out for the provider's own")
	}
	if api.Scheme == "http" && !isNear(api.Hostname()) {
		return plan.WithHint(fmt.Errorf("the provider's API %q would get the token unencrypted", o.API), "begin it with https://")
	}
	token := o.Token.Reveal()
	switch {
	case token == "":
		return plan.WithHint(errors.New("the provider's token is empty"), "its file holds the token and nothing else")
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return plan.WithHint(errors.New("the provider's token has characters that no token has"),
			"its file holds the token and nothing else: no quotes, no name, no second line")
	}
	return nil
}

// isNear: a lab's provider is on this machine or its private networks.
func isNear(host string) bool {
	address, err := netip.ParseAddr(host)
	return err == nil && (address.IsLoopback() || address.IsPrivate() || address.IsLinkLocalUnicast())
}

// isIdentifier: accounts and tokens are named by 32 hexadecimal digits.
func isIdentifier(id string) bool {
	return len(id) == 32 && !strings.ContainsFunc(id, func(r rune) bool { return !strings.ContainsRune("0123456789abcdef", r) })
}

// exchange is what is seen of one request beside what the SDK makes of it: an
// answer that is no JSON is an error without a status there.
type exchange struct {
	status     int
	retryAfter time.Duration
}

func (e *exchange) watch(request *http.Request, next option.MiddlewareNext) (*http.Response, error) {
	response, err := next(request)
	if err != nil {
		return response, err
	}
	e.status = response.StatusCode
	if seconds, err := strconv.Atoi(response.Header.Get("Retry-After")); err == nil && seconds > 0 {
		e.retryAfter = time.Duration(seconds) * time.Second
	}
	response.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(response.Body, maxAnswer), response.Body}
	return response, nil
}

// request is one thing that is asked for, and what is needed to be allowed to.
type request struct {
	// what begins errors: "list the account's tokens".
	what       string
	permission string
	do         func(ctx context.Context, watch option.RequestOption) error
}

// once asks one time.
func (c *Client) once(ctx context.Context, r request) error {
	seen := &exchange{}
	err := r.do(ctx, option.WithMiddleware(seen.watch))
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", r.what, context.Cause(ctx))
	}
	return c.explain(r, seen, err)
}

// ask asks again while the provider is unavailable. It is for what may be done
// twice.
func (c *Client) ask(ctx context.Context, r request) error {
	deadline := time.Now().Add(c.options.Patience)
	err := retry.Until(ctx, "the provider's API", c.options.Patience, func(ctx context.Context) error {
		err := c.once(ctx, r)
		if err == nil {
			return nil
		}
		return again(ctx, deadline, err)
	})
	return plainly(err)
}

// again decides whether err passes, and waits as long as the provider asks to.
func again(ctx context.Context, deadline time.Time, err error) error {
	var unavailable *UnavailableError
	if !errors.As(err, &unavailable) || time.Now().Add(unavailable.RetryAfter).After(deadline) {
		return retry.Permanent(err)
	}
	if unavailable.RetryAfter > 0 {
		_ = retry.Pause(ctx, unavailable.RetryAfter) // an ended context ends the attempts, too
	}
	return err
}

// plainly leaves out that there were several attempts: what matters is the last.
func plainly(err error) error {
	var timeout *retry.TimeoutError
	if errors.As(err, &timeout) && timeout.Last != nil {
		return timeout.Last
	}
	return err
}

// Package client is who uploads: it asks the write-session service of a site what
// it lacks, packs the missing chunks, and puts them to the object store at the
// addresses that the service hands out. It holds no credential of the store.
package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
)

// Options are where the service is and who asks.
type Options struct {
	// BaseURL is that of the service, without /v1.
	BaseURL string
	Site    string
	// Token is asked before each request, and once more after a 401.
	Token func(ctx context.Context) (secret.Value, error)
	// HTTP reaches the service, maybe through a tunnel; nil is the default client.
	HTTP *http.Client
	// Store reaches the object store, for the presigned uploads. Without a transport
	// it gets one that keeps a connection for each upload.
	Store *http.Client
	// Version is said in User-Agent.
	Version string
}

// Client speaks with the service of one site. It may be used by several
// goroutines at once.
type Client struct {
	options Options
	base    string
	// These are constants but in tests.
	packSize                    int
	atOnce                      int64
	storePatience, stalledAfter time.Duration
	// takesZstd is set once the service has said so.
	takesZstd atomic.Bool
}

var siteName = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$`)

// New checks the options; it asks nothing yet.
func New(options Options) (*Client, error) {
	base, err := url.Parse(options.BaseURL)
	switch {
	case err != nil:
		return nil, fmt.Errorf("address of object-storage-service: %w", err)
	case base.Scheme != "http" && base.Scheme != "https", base.Host == "", base.User != nil, base.RawQuery != "", base.Fragment != "":
		return nil, fmt.Errorf("address of object-storage-service: %q: want http(s)://host[:port][/path]", base.Redacted())
	case !siteName.MatchString(options.Site):
		return nil, fmt.Errorf("site name %q: want lower-case letters and digits, joined by . _ or -", options.Site)
	case options.Token == nil:
		return nil, errors.New("no token for object-storage-service")
	}
	options.HTTP, options.Store = withoutRedirects(options.HTTP), withoutRedirects(options.Store)
	if options.Store.Transport == nil {
		options.Store.Transport = uploadTransport()
	}
	return &Client{
		options: options, base: strings.TrimSuffix(base.String(), "/"),
		packSize: PackSize, atOnce: mostAtOnce, storePatience: storePatience, stalledAfter: stalledAfter,
	}, nil
}

// withoutRedirects keeps tokens and uploads where they were meant to go.
func withoutRedirects(given *http.Client) *http.Client {
	out := &http.Client{}
	if given != nil {
		*out = *given
	}
	out.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return out
}

// uploadTransport speaks HTTP/1.1, as S3 does: uploads that share one connection
// would share its flow control too.
func uploadTransport() *http.Transport {
	const (
		dialWithin      = 30 * time.Second
		handshakeWithin = 10 * time.Second
		idle            = 90 * time.Second
		connections     = 32
	)
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{Timeout: dialWithin}).DialContext, Protocols: protocols,
		TLSHandshakeTimeout: handshakeWithin, IdleConnTimeout: idle, MaxIdleConnsPerHost: connections,
	}
}

// List says what is in the store.
func (c *Client) List(ctx context.Context) (writesession.Listing, error) {
	var out writesession.Listing
	_, _, err := c.do(ctx, call{what: "list artifacts", method: http.MethodGet, path: c.site("/artifacts"), into: &out})
	return out, err
}

// Collect removes what the request does not keep, or says what would go.
func (c *Client) Collect(ctx context.Context, request writesession.CollectRequest) (writesession.Collected, error) {
	const within = 10 * time.Minute // thousands of deletes
	var out writesession.Collected
	_, _, err := c.do(ctx, call{
		what: "remove old artifacts", method: http.MethodPost, path: c.site("/collect"), body: request, into: &out, within: within,
	})
	return out, err
}

// Sessions lists the write sessions of the site.
func (c *Client) Sessions(ctx context.Context) ([]writesession.Session, error) {
	var out struct {
		Sessions []writesession.Session `json:"sessions"`
	}
	_, _, err := c.do(ctx, call{what: "list write sessions", method: http.MethodGet, path: c.site("/write-sessions"), into: &out})
	return out.Sessions, err
}

// Healthy asks once, without waiting, whether the service answers and reaches the store.
func (c *Client) Healthy(ctx context.Context) error {
	const (
		soon = 10 * time.Second
		what = "ask how object-storage-service is"
	)
	var health struct {
		Store string `json:"store"`
	}
	_, _, err := c.once(ctx, call{what: what, method: http.MethodGet, path: "/healthz", into: &health, anonymous: true, within: soon}, nil)
	if err != nil || health.Store == "" || health.Store == "ok" {
		return err
	}
	return &ProblemError{What: what, Type: writesession.ProblemStore, Status: http.StatusServiceUnavailable, Detail: health.Store}
}

func (c *Client) site(path string) string { return "/v1/sites/" + c.options.Site + path }

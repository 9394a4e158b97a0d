// Package nomad talks to a site's Nomad: parse, plan, register and wait for
// jobs, bootstrap ACLs, let operators log in, read logs.
package nomad

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
)

// DefaultAddress is where each host's agent answers, on loopback only.
const DefaultAddress = "http://127.0.0.1:4646"

// Options say how to reach Nomad's HTTP API.
type Options struct {
	// Address as seen from where Dial ends. Default DefaultAddress.
	Address string
	Token   secret.Value
	// Dial opens each connection, such as through an SSH tunnel; nil dials directly.
	Dial   func(ctx context.Context, network, addr string) (net.Conn, error)
	Region string
}

// Client is a connection to one Nomad region. It is safe for concurrent use.
type Client struct {
	api     *api.Client
	options Options
}

// New makes a client; it connects to nothing yet. Environment variables such
// as NOMAD_TOKEN are not read.
func New(options Options) (*Client, error) {
	if options.Address == "" {
		options.Address = DefaultAddress
	}
	transport := &http.Transport{
		DialContext:         options.Dial,
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     30 * time.Second,
		// No proxy: the address means something only at the end of the tunnel.
		Proxy: nil,
	}
	client, err := api.NewClient(&api.Config{
		Address:    options.Address,
		Region:     options.Region,
		SecretID:   options.Token.Reveal(),
		Namespace:  api.DefaultNamespace,
		HttpClient: &http.Client{Transport: transport},
	})
	if err != nil {
		return nil, fmt.Errorf("nomad client for %s: %w", options.Address, err)
	}
	return &Client{api: client, options: options}, nil
}

// WithToken is the same connection with other rights.
func (c *Client) WithToken(token secret.Value) (*Client, error) {
	options := c.options
	options.Token = token
	return New(options)
}

// Close drops idle connections, so that a tunnel below can end.
func (c *Client) Close() { c.api.Close() }

func (c *Client) query(ctx context.Context) *api.QueryOptions {
	return (&api.QueryOptions{Namespace: api.DefaultNamespace}).WithContext(ctx)
}

func (c *Client) write(ctx context.Context) *api.WriteOptions {
	return (&api.WriteOptions{Namespace: api.DefaultNamespace}).WithContext(ctx)
}

// statusOf is the HTTP status that Nomad answered with, 0 if it did not answer.
func statusOf(err error) int {
	var unexpected api.UnexpectedResponseError
	if errors.As(err, &unexpected) {
		return unexpected.StatusCode()
	}
	return 0
}

// describe turns an API error into one that says what Nomad said, with a hint
// where the token is at fault.
func describe(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	what := fmt.Sprintf(format, args...)
	var unexpected api.UnexpectedResponseError
	if !errors.As(err, &unexpected) || !unexpected.HasBody() {
		return fmt.Errorf("%s: %w", what, err)
	}
	said := &ResponseError{Doing: what, Status: unexpected.StatusCode(), Body: strings.TrimSpace(unexpected.Body()), Err: err}
	if said.Status == http.StatusForbidden {
		return plan.WithHint(said, "the Nomad token is missing, expired or lacks the right; log in again")
	}
	return said
}

// ResponseError is what Nomad answered to a request that it refused.
type ResponseError struct {
	Doing  string
	Status int
	Body   string
	Err    error
}

func (e *ResponseError) Error() string {
	return fmt.Sprintf("%s: nomad answered %d: %s", e.Doing, e.Status, e.Body)
}

func (e *ResponseError) Unwrap() error { return e.Err }

// ReadyOptions say what counts as a cluster that can run jobs.
type ReadyOptions struct {
	// Nodes is how many ready client nodes there must be. Default 1.
	Nodes int
	// Driver must be healthy on each of them. Default "podman".
	Driver string
	Limit  time.Duration
}

// Ready waits for a leader and for client nodes that can run the site's jobs.
// It needs node read rights once ACLs are bootstrapped; see Leader.
func (c *Client) Ready(ctx context.Context, options ReadyOptions, progress plan.Progress) error {
	if options.Nodes == 0 {
		options.Nodes = 1
	}
	if options.Driver == "" {
		options.Driver = "podman"
	}
	what := fmt.Sprintf("nomad: %d ready client node(s) with a healthy %s driver", options.Nodes, options.Driver)
	last := ""
	return retry.Until(ctx, what, options.Limit, func(ctx context.Context) error {
		missing := c.notReady(ctx, options)
		if missing != nil && missing.Error() != last {
			last = missing.Error()
			message(progress, "waiting for nomad: %s", last)
		}
		if status := statusOf(missing); status == http.StatusForbidden {
			return retry.Permanent(missing)
		}
		return missing
	})
}

// Leader waits until Nomad answers and has elected a leader. It needs no token.
func (c *Client) Leader(ctx context.Context, limit time.Duration) error {
	return retry.Until(ctx, "nomad to elect a leader", limit, func(ctx context.Context) error {
		return c.hasLeader(ctx)
	})
}

func (c *Client) hasLeader(ctx context.Context) error {
	var leader string
	// The typed call takes no context, and a tunnel may hang.
	if _, err := c.api.Raw().Query("/v1/status/leader", &leader, c.query(ctx)); err != nil {
		return describe(err, "ask for the leader")
	}
	if leader == "" {
		return errors.New("no leader elected yet")
	}
	return nil
}

func (c *Client) notReady(ctx context.Context, options ReadyOptions) error {
	if err := c.hasLeader(ctx); err != nil {
		return err
	}
	nodes, _, err := c.api.Nodes().List(c.query(ctx))
	if err != nil {
		return describe(err, "list nodes")
	}
	return judgeNodes(nodes, options)
}

func judgeNodes(nodes []*api.NodeListStub, options ReadyOptions) error {
	ready := 0
	var reasons []string
	for _, node := range nodes {
		switch driver := node.Drivers[options.Driver]; {
		case node.Status != api.NodeStatusReady:
			reasons = append(reasons, fmt.Sprintf("node %s is %s", node.Name, node.Status))
		case node.SchedulingEligibility != api.NodeSchedulingEligible:
			reasons = append(reasons, fmt.Sprintf("node %s is not eligible for scheduling", node.Name))
		case driver == nil || !driver.Detected:
			reasons = append(reasons, fmt.Sprintf("node %s has no %s driver yet", node.Name, options.Driver))
		case !driver.Healthy:
			reasons = append(reasons, fmt.Sprintf("the %s driver of node %s is not healthy: %s", options.Driver, node.Name, driver.HealthDescription))
		default:
			ready++
		}
	}
	if ready >= options.Nodes {
		return nil
	}
	if len(reasons) == 0 {
		reasons = []string{"no other node registered"}
	}
	return fmt.Errorf("%d of %d nodes ready: %s", ready, options.Nodes, strings.Join(reasons, "; "))
}

func message(progress plan.Progress, format string, args ...any) {
	if progress != nil {
		progress.Message(format, args...)
	}
}

// Package openbao talks to a site's secrets engine, OpenBao or Vault: init and
// unseal, logins, what the site owns in it, the catalogue of secrets, and the
// tokens that must not be left behind.
package openbao

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

// DefaultAddress is where the engine answers, on loopback only.
const DefaultAddress = "http://127.0.0.1:8200"

const (
	// parallel bounds the requests under way at once: each may be a channel of
	// its own through one SSH connection.
	parallel = 16
	// requestLimit bounds one request.
	requestLimit = time.Minute
)

// Options say how to reach the engine's HTTP API.
type Options struct {
	// Address as seen from where Dial ends. Default DefaultAddress.
	Address string
	// Dial opens each connection, such as through an SSH tunnel; nil dials directly.
	Dial  func(ctx context.Context, network, addr string) (net.Conn, error)
	Token secret.Value
}

// Client is a connection to one engine with one token. It is safe for concurrent use.
type Client struct {
	api       *api.Client
	transport *http.Transport
	token     secret.Value
	address   string
}

// New makes a client; it connects to nothing yet. Environment variables such
// as VAULT_TOKEN change nothing.
func New(options Options) (*Client, error) {
	if options.Address == "" {
		options.Address = DefaultAddress
	}
	transport := &http.Transport{
		DialContext:         options.Dial,
		MaxIdleConnsPerHost: parallel,
		MaxConnsPerHost:     parallel,
		IdleConnTimeout:     30 * time.Second,
		// No proxy: the address means something only at the end of the tunnel.
		Proxy: nil,
	}
	return connect(options.Address, transport, options.Token)
}

func connect(address string, transport *http.Transport, token secret.Value) (*Client, error) {
	client, err := api.NewClient(&api.Config{
		Address:          address,
		HttpClient:       &http.Client{Transport: noRedirects{transport}},
		Timeout:          requestLimit,
		DisableRedirects: true,
		// A lost answer to an init or a write must not be followed by a second try.
		MaxRetries: 0,
	})
	if err != nil {
		return nil, plan.WithHint(fmt.Errorf("client of the secrets engine at %s: %w", address, err),
			"the library reads environment variables whose names begin with VAULT_: unset them")
	}
	// Undo what the library took from the environment.
	client.SetHeaders(http.Header{api.RequestHeaderName: []string{"true"}})
	client.SetWrappingLookupFunc(func(string, string) string { return "" })
	client.ClearToken()
	if !token.IsZero() {
		client.SetToken(token.Reveal())
	}
	return &Client{api: client, transport: transport, token: token, address: address}, nil
}

// noRedirects shows a token to nobody but the address that was asked for, and
// takes no redirect for an answer.
type noRedirects struct{ *http.Transport }

func (n noRedirects) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := n.Transport.RoundTrip(request)
	if err == nil && response.StatusCode >= 300 && response.StatusCode < 400 {
		_ = response.Body.Close()
		return nil, fmt.Errorf("the secrets engine redirects to %s: another server is active", response.Header.Get("Location"))
	}
	return response, err
}

// WithToken is the same connection with other rights.
func (c *Client) WithToken(token secret.Value) (*Client, error) {
	return connect(c.address, c.transport, token)
}

// Close drops idle connections, so that a tunnel below can end.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// ResponseError is what the engine answered to a request that it refused.
type ResponseError struct {
	Doing  string
	Status int
	Reason string
}

func (e *ResponseError) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("%s: the secrets engine answered %d", e.Doing, e.Status)
	}
	return fmt.Sprintf("%s: the secrets engine answered %d: %s", e.Doing, e.Status, e.Reason)
}

// statusOf is the HTTP status that the engine answered with, 0 if it did not answer.
func statusOf(err error) int {
	var response *api.ResponseError
	if errors.As(err, &response) {
		return response.StatusCode
	}
	var ours *ResponseError
	if errors.As(err, &ours) {
		return ours.Status
	}
	return 0
}

// describe turns an error of the library into one that says what was being
// done and what the engine said, without the secrets that were sent, which
// an engine's answer may repeat.
func describe(err error, sent []secret.Value, format string, args ...any) error {
	if err == nil {
		return nil
	}
	what := fmt.Sprintf(format, args...)
	var response *api.ResponseError
	if !errors.As(err, &response) {
		return fmt.Errorf("%s: %w", what, err)
	}
	refused := &ResponseError{Doing: what, Status: response.StatusCode, Reason: redact(strings.Join(response.Errors, "; "), sent)}
	switch refused.Status {
	case http.StatusServiceUnavailable:
		return plan.WithHint(refused, "the secrets engine is sealed or not ready; site-host unseals it within seconds")
	case http.StatusForbidden:
		return plan.WithHint(refused, "the token is expired or lacks the right; log in again, and see that the operator is declared")
	}
	return refused
}

func redact(text string, values []secret.Value) string {
	for _, value := range values {
		if value.IsZero() {
			continue
		}
		text = strings.ReplaceAll(text, value.Reveal(), "[redacted]")
		if quoted, err := json.Marshal(value.Reveal()); err == nil { // as in a request that is repeated
			text = strings.ReplaceAll(text, string(quoted[1:len(quoted)-1]), "[redacted]")
		}
	}
	return strings.Join(strings.Fields(text), " ")
}

// read gives the data of a path; nil where there is nothing.
func (c *Client) read(ctx context.Context, path string) (map[string]any, error) {
	answer, err := c.api.Logical().ReadWithContext(ctx, path)
	if err != nil {
		return nil, describe(err, []secret.Value{c.token}, "read %s", path)
	}
	if answer == nil {
		return nil, nil
	}
	return answer.Data, nil
}

// list gives the names below a path; none where there is nothing.
func (c *Client) list(ctx context.Context, path string) ([]string, error) {
	answer, err := c.api.Logical().ListWithContext(ctx, path)
	if err != nil {
		return nil, describe(err, []secret.Value{c.token}, "list %s", path)
	}
	if answer == nil {
		return nil, nil
	}
	keys, _ := answer.Data["keys"].([]any)
	names := make([]string, 0, len(keys))
	for _, key := range keys {
		if name, ok := key.(string); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

// write sends a document; secrets names the values in it that no error may show.
func (c *Client) write(ctx context.Context, path string, document map[string]any, secrets ...secret.Value) (*api.Secret, error) {
	answer, err := c.api.Logical().WriteWithContext(ctx, path, document)
	return answer, describe(err, append(secrets, c.token), "write %s", path)
}

func (c *Client) remove(ctx context.Context, path string) error {
	_, err := c.api.Logical().DeleteWithContext(ctx, path)
	return describe(err, []secret.Value{c.token}, "delete %s", path)
}

// text gives a field that holds text; empty where it holds something else.
func text(data map[string]any, field string) string {
	value, _ := data[field].(string)
	return value
}

// number gives a field that holds an integer; 0 where it holds something else.
func number(data map[string]any, field string) int {
	if value, ok := data[field].(json.Number); ok {
		whole, _ := value.Int64()
		return int(whole)
	}
	return 0
}

func object(data map[string]any, field string) map[string]any {
	value, _ := data[field].(map[string]any)
	return value
}

// texts gives the members of an object that are text.
func texts(data map[string]any, field string) map[string]string {
	found := map[string]string{}
	for key := range object(data, field) {
		if value, ok := object(data, field)[key].(string); ok {
			found[key] = value
		}
	}
	return found
}

func message(progress plan.Progress, format string, args ...any) {
	if progress != nil {
		progress.Message(format, args...)
	}
}

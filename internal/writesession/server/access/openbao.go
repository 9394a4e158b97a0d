// Package access finds out who sends a request to the write-session service: an
// operator by a token of the secrets engine, or a job by its Nomad identity.
package access

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession/server"
)

// lookupLimit bounds one question about a token.
const lookupLimit = 10 * time.Second

// Operators asks the secrets engine, each time, what a token may: one that was
// revoked is worth nothing from then on.
type Operators struct {
	client   *api.Client
	policies []string
}

// NewOperators makes one for the engine at address. A token needs one of the policies.
func NewOperators(address string, policies ...string) (*Operators, error) {
	client, err := api.NewClient(&api.Config{
		Address:          address,
		HttpClient:       &http.Client{Transport: &http.Transport{Proxy: nil, MaxIdleConnsPerHost: 8, IdleConnTimeout: time.Minute}},
		Timeout:          lookupLimit,
		DisableRedirects: true,
		MaxRetries:       0,
	})
	if err != nil {
		return nil, fmt.Errorf("client of the secrets engine at %s: %w", address, err)
	}
	client.ClearToken() // the library may have one from the environment
	return &Operators{client: client, policies: policies}, nil
}

// Authorize implements server.Authorizer. The token is sent to the engine and to
// nobody else, and is in no error.
func (o *Operators) Authorize(ctx context.Context, bearer secret.Value) (server.Identity, error) {
	client, err := o.client.Clone()
	if err != nil {
		return server.Identity{}, errors.New("make a client of the secrets engine")
	}
	client.SetToken(bearer.Reveal())
	answer, err := client.Auth().Token().LookupSelfWithContext(ctx)
	if err != nil {
		return server.Identity{}, lookupError(err)
	}
	if answer == nil || answer.Data == nil {
		return server.Identity{}, errors.New("the secrets engine answered nothing about a token")
	}
	who := nameOf(answer.Data)
	if who == "" || !o.allowed(answer.Data) {
		return server.Identity{}, &server.DeniedError{
			Status: http.StatusForbidden,
			Reason: fmt.Sprintf("the token of %q has no policy that allows it: %s", who, strings.Join(o.policies, " or ")),
		}
	}
	return server.Identity{Subject: who, Kind: server.KindOperator}, nil
}

// lookupError leaves out what the engine says beyond the status, which may repeat
// what it was sent.
func lookupError(err error) error {
	var refused *api.ResponseError
	if !errors.As(err, &refused) {
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		return errors.New("the secrets engine does not answer")
	}
	switch refused.StatusCode {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound:
		return &server.DeniedError{Status: http.StatusUnauthorized, Reason: "the token is expired, or none of this site's: log in again"}
	default:
		return fmt.Errorf("the secrets engine answered %d: is it sealed?", refused.StatusCode)
	}
}

// nameOf is the operator's own name where the login has put it down, and else
// what the engine calls the token.
func nameOf(data map[string]any) string {
	if meta, ok := data["meta"].(map[string]any); ok {
		if name, ok := meta[reconcile.OperatorClaim].(string); ok && name != "" {
			return name
		}
	}
	name, _ := data["display_name"].(string)
	return name
}

func (o *Operators) allowed(data map[string]any) bool {
	for _, field := range []string{"policies", "identity_policies"} {
		held, _ := data[field].([]any)
		for _, one := range held {
			if name, ok := one.(string); ok && slices.Contains(o.policies, name) {
				return true
			}
		}
	}
	return false
}

package nomad

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
)

// BootstrapError is a Nomad whose ACLs were bootstrapped with another token.
type BootstrapError struct{ Err error }

func (e *BootstrapError) Error() string {
	return "bootstrap ACLs: nomad was bootstrapped already, with another management token"
}

func (e *BootstrapError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *BootstrapError) Hint() string {
	return "use the init.age that belongs to this cluster (its servers hold a copy), or reset the bootstrap on a server: https://developer.hashicorp.com/nomad/docs/secure/acl/bootstrap"
}

// BootstrapACL hands a management token that was made and sealed before to
// Nomad. It reports whether it wrote anything: with the same token a second run does not.
func (c *Client) BootstrapACL(ctx context.Context, token secret.Value, limit time.Duration) (bool, error) {
	managed, err := c.WithToken(token)
	if err != nil {
		return false, err
	}
	defer managed.Close()
	wrote := false
	err = retry.Until(ctx, "nomad to accept the management token", limit, func(ctx context.Context) error {
		own, _, err := managed.api.ACLTokens().Self(managed.query(ctx))
		if err == nil {
			if own.Type != "management" {
				return retry.Permanent(&BootstrapError{Err: fmt.Errorf("the token is of type %s", own.Type)})
			}
			return nil
		}
		_, _, err = c.api.ACLTokens().BootstrapOpts(token.Reveal(), c.write(ctx))
		var unexpected api.UnexpectedResponseError
		switch {
		case err == nil:
			wrote = true
			return nil
		case errors.As(err, &unexpected) && strings.Contains(unexpected.Body(), "bootstrap already done"):
			return retry.Permanent(&BootstrapError{Err: err})
		case statusOf(err) == http.StatusBadRequest:
			return retry.Permanent(describe(err, "bootstrap ACLs"))
		default:
			return describe(err, "bootstrap ACLs") // no leader yet, or not at all reachable
		}
	})
	return wrote, err
}

// LoginError is an operator whom Nomad does not let in.
type LoginError struct{ Err error }

func (e *LoginError) Error() string { return fmt.Sprintf("log in at nomad: %v", e.Err) }
func (e *LoginError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *LoginError) Hint() string {
	return "check that site.hcl names you as operator with this SSH key, that who has the site root token ran `site bootstrap-deploy` since, and that this machine's clock is right"
}

// Login changes an operator's signed token (see SignJWT) into a short Nomad token.
func (c *Client) Login(ctx context.Context, jwt secret.Value) (secret.Value, time.Time, error) {
	return c.login(ctx, jwt, operatorAuthMethod)
}

// LoginRotator is Login for an operator with RightsRotate.
func (c *Client) LoginRotator(ctx context.Context, jwt secret.Value) (secret.Value, time.Time, error) {
	return c.login(ctx, jwt, rotatorAuthMethod)
}

func (c *Client) login(ctx context.Context, jwt secret.Value, method string) (secret.Value, time.Time, error) {
	token, _, err := c.api.ACLAuth().Login(&api.ACLLoginRequest{AuthMethodName: method, LoginToken: jwt.Reveal()}, c.write(ctx))
	if err != nil {
		described := describe(err, "nomad login")
		if status := statusOf(err); status >= 400 && status < 600 && status != http.StatusServiceUnavailable && status != http.StatusTooManyRequests {
			return secret.Value{}, time.Time{}, &LoginError{Err: described}
		}
		return secret.Value{}, time.Time{}, described
	}
	expiry := time.Now().Add(operatorTokenTTL)
	if token.ExpirationTime != nil {
		expiry = *token.ExpirationTime
	}
	secretID := secret.New(token.SecretID)
	return secretID, expiry, c.tokenArrived(ctx, secretID)
}

// tokenLimit bounds how long a server may lag behind the leader, as after a restart.
const tokenLimit = 20 * time.Second

// tokenArrived waits until the server that we talk to knows a new token itself:
// some requests, such as parsing, are answered from what it has.
func (c *Client) tokenArrived(ctx context.Context, token secret.Value) error {
	client, err := c.WithToken(token)
	if err != nil {
		return err
	}
	defer client.Close()
	return retry.Until(ctx, "nomad's server to know the new token", tokenLimit, func(ctx context.Context) error {
		query := client.query(ctx)
		query.AllowStale = true
		if _, _, err := client.api.ACLTokens().Self(query); err != nil {
			return describe(err, "read the new token")
		}
		return nil
	})
}

package openbao

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
)

// LoginError says that the engine does not let someone in.
type LoginError struct {
	Mount string
	Role  string
	Err   error
}

func (e *LoginError) Error() string {
	return fmt.Sprintf("log in to the secrets engine as %s/%s: %v", e.Mount, e.Role, e.Err)
}
func (e *LoginError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *LoginError) Hint() string {
	switch e.Mount {
	case reconcile.OperatorsMount, reconcile.RotatorsMount:
		return "is the key of this operator declared, and deployed by another operator since? see: site operators list; and are both clocks right?"
	case reconcile.HostsMount:
		return "deploy the site: it declares the keys of the hosts; and are both clocks right?"
	default:
		return "deploy the site: it declares one role per job"
	}
}

// Login trades a signed JWT for a token.
func (c *Client) Login(ctx context.Context, mount, role string, jwt secret.Value) (token secret.Value, expiry time.Time, err error) {
	asked := time.Now()
	path := "auth/" + mount + "/login"
	answer, err := c.write(ctx, path, map[string]any{"role": role, "jwt": jwt.Reveal()}, jwt)
	if err != nil {
		switch statusOf(err) {
		case http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound:
			return secret.Value{}, time.Time{}, &LoginError{Mount: mount, Role: role, Err: bare(err)}
		}
		return secret.Value{}, time.Time{}, err
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" {
		return secret.Value{}, time.Time{}, fmt.Errorf("write %s: the secrets engine answered without a token", path)
	}
	return secret.New(answer.Auth.ClientToken), asked.Add(time.Duration(answer.Auth.LeaseDuration) * time.Second), nil
}

// bare is the refusal without the general hint for its status.
func bare(err error) error {
	var refused *ResponseError
	if errors.As(err, &refused) {
		return refused
	}
	return err
}

// RevokeSelf ends the client's own token; one that is dead already is fine.
func (c *Client) RevokeSelf(ctx context.Context) error {
	_, err := c.write(ctx, "auth/token/revoke-self", nil)
	if statusOf(err) == http.StatusForbidden {
		if revoked, lookErr := c.Revoked(ctx); lookErr == nil && revoked {
			return nil
		}
	}
	return err
}

// Renew makes the client's own token live as long as a new one, up to the
// longest life that its role allows, and says until when.
func (c *Client) Renew(ctx context.Context) (expiry time.Time, err error) {
	asked := time.Now()
	answer, err := c.write(ctx, "auth/token/renew-self", nil)
	if err != nil {
		return time.Time{}, err
	}
	if answer == nil || answer.Auth == nil {
		return time.Time{}, errors.New("renew the token: the secrets engine answered without one")
	}
	return asked.Add(time.Duration(answer.Auth.LeaseDuration) * time.Second), nil
}

// Revoked reports whether the client's token is dead.
func (c *Client) Revoked(ctx context.Context) (bool, error) {
	_, err := c.read(ctx, "auth/token/lookup-self")
	if statusOf(err) == http.StatusForbidden {
		return true, nil
	}
	return false, err
}

// liveToken is what can be known of a token without having it.
type liveToken struct {
	accessor string
	path     string
	policies []string
	metadata map[string]string
}

func (t liveToken) root() bool { return slices.Contains(t.policies, "root") }

// operator reports whether the token comes from an operator's login.
func (t liveToken) operator() bool { return t.path == operatorLogin || t.path == rotatorLogin }

const (
	operatorLogin = "auth/" + reconcile.OperatorsMount + "/login"
	rotatorLogin  = "auth/" + reconcile.RotatorsMount + "/login"
)

func tokenOf(data map[string]any) liveToken {
	token := liveToken{accessor: text(data, "accessor"), path: text(data, "path"), metadata: texts(data, "meta")}
	policies, _ := data["policies"].([]any)
	for _, policy := range policies {
		if name, ok := policy.(string); ok {
			token.policies = append(token.policies, name)
		}
	}
	return token
}

// SweepOptions say what is to be swept away.
type SweepOptions struct {
	// Purpose is that of the operators' tokens that were left behind: no one
	// else can hold one, since the site's lock is ours.
	Purpose string
	// Thorough looks at every live token, even where no operator but us is
	// logged in: a lost root token shows in no other way. Wanted once, after
	// a first bootstrap that was cut short.
	Thorough bool
}

// Sweep revokes tokens that an earlier run left behind: every root token and
// operators' tokens of the purpose, but for the client's own. It returns how
// many there were. An operator that only rotates may not look at what others
// hold, so that its sweep finds nothing: its own leftovers end within minutes,
// or with the next sweep of somebody else.
func (c *Client) Sweep(ctx context.Context, options SweepOptions) (int, error) {
	return c.revokeWhere(ctx, options.Thorough, []string{operatorLogin}, func(token liveToken) bool {
		return token.root() || token.operator() && token.metadata[reconcile.PurposeClaim] == options.Purpose
	})
}

// RevokeOperators revokes the live tokens of operators other than those named,
// but for the client's own, and returns how many there were.
func (c *Client) RevokeOperators(ctx context.Context, keep []string) (int, error) {
	return c.revokeWhere(ctx, false, []string{operatorLogin, rotatorLogin}, func(token liveToken) bool {
		return token.operator() && !slices.Contains(keep, token.metadata[reconcile.OperatorClaim])
	})
}

// revokeWhere looks at every live token where one of the logins has given one
// to anybody but us, or where it is to be thorough.
func (c *Client) revokeWhere(ctx context.Context, thorough bool, logins []string, unwanted func(liveToken) bool) (int, error) {
	data, err := c.read(ctx, "auth/token/lookup-self")
	if err != nil {
		return 0, err
	}
	own := tokenOf(data)
	if own.path == rotatorLogin {
		return 0, nil
	}
	if !thorough {
		// The common case costs one request per login: nobody else is there.
		leases := 0
		for _, login := range logins {
			found, err := c.list(ctx, "sys/leases/lookup/"+login)
			if err != nil {
				return 0, err
			}
			leases += len(found)
		}
		if leases == 0 || leases == 1 && own.operator() {
			return 0, nil
		}
	}
	tokens, err := c.liveTokens(ctx)
	if err != nil {
		return 0, err
	}
	revoked := 0
	for _, token := range tokens {
		if token.accessor == own.accessor || !unwanted(token) {
			continue
		}
		if _, err := c.write(ctx, "auth/token/revoke-accessor", map[string]any{"accessor": token.accessor}); err != nil && !gone(err) {
			return revoked, err
		}
		revoked++
	}
	return revoked, nil
}

// liveTokens looks at every token by its accessor.
func (c *Client) liveTokens(ctx context.Context) ([]liveToken, error) {
	accessors, err := c.list(ctx, "auth/token/accessors")
	if err != nil {
		return nil, err
	}
	var mutex sync.Mutex
	var tokens []liveToken
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for _, accessor := range accessors {
		group.Go(func() error {
			answer, err := c.write(groupCtx, "auth/token/lookup-accessor", map[string]any{"accessor": accessor})
			switch {
			case gone(err), err == nil && answer == nil:
				return nil // it ended while we looked
			case err != nil:
				return err
			}
			mutex.Lock()
			defer mutex.Unlock()
			tokens = append(tokens, tokenOf(answer.Data))
			return nil
		})
	}
	return tokens, group.Wait()
}

// gone reports whether a token ended before it was looked at.
func gone(err error) bool {
	var refused *ResponseError
	return errors.As(err, &refused) && (refused.Status == http.StatusNotFound || strings.Contains(refused.Reason, "invalid accessor"))
}

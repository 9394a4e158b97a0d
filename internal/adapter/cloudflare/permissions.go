package cloudflare

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	sdk "github.com/cloudflare/cloudflare-go/v6"
	"github.com/cloudflare/cloudflare-go/v6/accounts"
	"github.com/cloudflare/cloudflare-go/v6/option"
	"github.com/cloudflare/cloudflare-go/v6/shared"

	"github.com/nomad-site/site/internal/retry"
)

// What the admin pair needs, and what it gives to the store's keys, by the names
// of developers.cloudflare.com/fundamentals/api/reference/permissions.
const (
	TokensWrite     = "Account API Tokens Write"
	StorageWrite    = "Workers R2 Storage Write"
	BucketItemRead  = "Workers R2 Storage Bucket Item Read"
	BucketItemWrite = "Workers R2 Storage Bucket Item Write"
)

// settled is how often in a row a fresh token must be known: it gets around by and by.
const settled = 3

// Permission is something that the token needs, and whether it has it.
type Permission struct {
	// Name is the provider's, such as "Workers R2 Storage Write".
	Name    string
	Allowed bool
	// Why it is not allowed, or what shows that it is.
	Why string
}

// Verify asks who the token is; expires is zero where it never does.
func (c *Client) Verify(ctx context.Context) (tokenID string, expires time.Time, err error) {
	var found *accounts.TokenVerifyResponse
	err = c.ask(ctx, request{"verify the token", TokensWrite, func(ctx context.Context, watch option.RequestOption) error {
		found, err = c.tokens.Verify(ctx, accounts.TokenVerifyParams{AccountID: sdk.F(c.options.AccountID)}, watch)
		return err
	}})
	var unknown *TokenError
	if errors.As(err, &unknown) {
		unknown.Personal = c.isPersonal(ctx)
	}
	if err != nil {
		return "", time.Time{}, err
	}
	if !isIdentifier(found.ID) {
		return "", time.Time{}, &UnavailableError{What: "verify the token", Err: errors.New("its answer names no token")}
	}
	if found.Status != accounts.TokenVerifyResponseStatusActive {
		return "", time.Time{}, &TokenError{What: "verify the token", Account: c.options.AccountID, Reason: "it is " + string(found.Status)}
	}
	return found.ID, found.ExpiresOn, nil
}

// isPersonal: a person's token is unknown to the account, and known elsewhere.
func (c *Client) isPersonal(ctx context.Context) bool {
	return c.once(ctx, request{"verify the token", "", func(ctx context.Context, watch option.RequestOption) error {
		_, err := c.users.Verify(ctx, watch)
		return err
	}}) == nil
}

// Await is Verify for a token that was minted just now: a refusal may pass, for
// the provider's places learn of it one by one.
func (c *Client) Await(ctx context.Context, limit time.Duration) (tokenID string, err error) {
	row := 0
	err = retry.Until(ctx, "the new token to be known everywhere", limit, func(ctx context.Context) error {
		for row < settled {
			var failed error
			if tokenID, _, failed = c.Verify(ctx); failed != nil {
				row = 0
				return failed
			}
			row++
		}
		return nil
	})
	return tokenID, err
}

// Permissions tests each needed permission by its name and changes nothing: by
// what the provider says that the token may do, and by reading what it may read.
// An error is a provider that does not answer, or that does not know the token.
func (c *Client) Permissions(ctx context.Context, bucket string) ([]Permission, error) {
	id, _, err := c.Verify(ctx)
	if err != nil {
		return nil, err
	}
	own, hidden := c.get(ctx, id)
	if hidden != nil && !isDenied(hidden) {
		return nil, hidden
	}
	tokens := Permission{Name: TokensWrite}
	storage := Permission{Name: StorageWrite}
	if hidden != nil {
		tokens.Why = because(hidden)
		storage.Why = fmt.Sprintf("cannot be seen without %q", TokensWrite)
	} else {
		tokens.Allowed, tokens.Why = c.grants(own, TokensWrite)
		storage.Allowed, storage.Why = c.grants(own, StorageWrite)
	}
	if _, err := c.hasBucket(ctx, bucket); err != nil {
		if !isDenied(err) {
			return nil, err
		}
		storage.Allowed, storage.Why = false, because(err)
	}
	given, err := c.giveable(ctx)
	if err != nil {
		return nil, err
	}
	return append([]Permission{tokens, storage}, given...), nil
}

// Missing is a *DeniedError that names the permissions which are not allowed, or
// nil.
func (c *Client) Missing(permissions []Permission) error {
	var names []string
	for _, permission := range permissions {
		if !permission.Allowed {
			names = append(names, permission.Name)
		}
	}
	if names == nil {
		return nil
	}
	return &DeniedError{What: "test the token's permissions", Permission: strings.Join(names, ", "), Account: c.options.AccountID}
}

// giveable: a key for a bucket can be made only of permissions that there are.
func (c *Client) giveable(ctx context.Context) ([]Permission, error) {
	var permissions []Permission
	for _, name := range []string{BucketItemRead, BucketItemWrite} {
		_, err := c.group(ctx, name)
		permission := Permission{Name: name, Allowed: err == nil, Why: "the account can give it to keys"}
		if err != nil {
			var refused *RefusedError
			if !isDenied(err) && !errors.As(err, &refused) {
				return nil, err
			}
			permission.Why = because(err)
		}
		permissions = append(permissions, permission)
	}
	return permissions, nil
}

// grants looks a permission up in the token's own policies.
func (c *Client) grants(own *shared.Token, name string) (allowed bool, why string) {
	why = "no policy of the token has it on account " + c.options.AccountID
	for _, policy := range own.Policies {
		names := func(group shared.TokenPolicyPermissionGroup) bool { return group.Name == name }
		if !slices.ContainsFunc(policy.PermissionGroups, names) || !c.covers(policy.Resources) {
			continue
		}
		if policy.Effect == shared.TokenPolicyEffectDeny {
			return false, "a policy of the token denies it on account " + c.options.AccountID
		}
		allowed, why = true, "a policy of the token has it on account "+c.options.AccountID
	}
	return allowed, why
}

// covers: the account by its id, or all that there are.
func (c *Client) covers(resources shared.TokenPolicyResourcesUnion) bool {
	plain, ok := resources.(shared.TokenPolicyResourcesIAMResourcesTypeObjectString)
	if !ok {
		return false // something within the account, not the account
	}
	for _, name := range []string{c.account(), "com.cloudflare.api.account.*"} {
		if plain[name] == "*" {
			return true
		}
	}
	return false
}

func (c *Client) account() string { return "com.cloudflare.api.account." + c.options.AccountID }

func isDenied(err error) bool {
	var denied *DeniedError
	return errors.As(err, &denied)
}

// because is what the provider said, without what it was asked.
func because(err error) string {
	var denied *DeniedError
	if errors.As(err, &denied) && denied.Code != codeR2Disabled {
		return fmt.Sprintf("the provider refuses it on account %s: %s (403, code %d)", denied.Account, denied.Message, denied.Code)
	}
	return err.Error()
}

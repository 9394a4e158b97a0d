package cloudflare

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	sdk "github.com/cloudflare/cloudflare-go/v6"
	"github.com/cloudflare/cloudflare-go/v6/accounts"
	"github.com/cloudflare/cloudflare-go/v6/option"
	"github.com/cloudflare/cloudflare-go/v6/shared"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
)

const (
	maxNameLength = 120 // of a token, by the API's reference
	tokensPerPage = 50  // the most that there can be
	maxPages      = 100 // ten times what an account may have
	// undoLimit is for taking back what may have been made, also after Ctrl-C.
	undoLimit = 20 * time.Second
)

// Minted is a new token. Its value is never shown again, by anyone.
type Minted struct {
	// TokenID is the access key id too.
	TokenID         string
	SecretAccessKey secret.Value
	Value           secret.Value
	Name            string
}

// TokenInfo is what can be known of a token without its value.
type TokenInfo struct {
	ID, Name string
	Issued   time.Time
	// Status is "active", "disabled" or "expired".
	Status string
}

// SecretAccessKey is the S3 half of a token's value.
func SecretAccessKey(value secret.Value) secret.Value {
	sum := sha256.Sum256([]byte(value.Reveal()))
	return secret.New(hex.EncodeToString(sum[:]))
}

// MintStoreKey makes a key that reads one bucket, and with write writes it too. It
// can do nothing else, and does not expire: a rotation retires it.
func (c *Client) MintStoreKey(ctx context.Context, name, bucket string, write bool) (Minted, error) {
	groups := []string{BucketItemRead}
	if write {
		groups = append(groups, BucketItemWrite)
	}
	only := shared.TokenPolicyResourcesIAMResourcesTypeObjectStringParam{c.resource(bucket): "*"}
	policy := shared.TokenPolicyParam{
		Effect:    sdk.F(shared.TokenPolicyEffectAllow),
		Resources: sdk.F[shared.TokenPolicyResourcesUnionParam](only),
	}
	for _, name := range groups {
		id, err := c.group(ctx, name)
		if err != nil {
			return Minted{}, err
		}
		policy.PermissionGroups.Value = append(policy.PermissionGroups.Value, shared.TokenPolicyPermissionGroupParam{ID: sdk.F(id)})
	}
	policy.PermissionGroups = sdk.F(policy.PermissionGroups.Value)
	return c.mint(ctx, accounts.TokenNewParams{Name: sdk.F(name), Policies: sdk.F([]shared.TokenPolicyParam{policy})})
}

// MintAdmin makes a token with the permissions of the one that asks: its policies,
// its filter of addresses, and a life as long as its own.
func (c *Client) MintAdmin(ctx context.Context, name string) (Minted, error) {
	id, _, err := c.Verify(ctx)
	if err != nil {
		return Minted{}, err
	}
	peer, err := c.get(ctx, id)
	if err != nil {
		return Minted{}, err
	}
	wanted := accounts.TokenNewParams{Name: sdk.F(name)}
	var policies []shared.TokenPolicyParam
	for _, policy := range peer.Policies {
		policies = append(policies, policyOf(policy))
	}
	wanted.Policies = sdk.F(policies)
	if condition := conditionOf(peer.Condition.RequestIP); condition != nil {
		wanted.Condition = sdk.F(*condition)
	}
	if !peer.ExpiresOn.IsZero() {
		expires := peer.ExpiresOn
		if !peer.IssuedOn.IsZero() {
			expires = c.options.Now().Add(peer.ExpiresOn.Sub(peer.IssuedOn))
		}
		wanted.ExpiresOn = sdk.F(expires.UTC().Truncate(time.Second)) // the API takes no fractions
	}
	return c.mint(ctx, wanted)
}

func policyOf(policy shared.TokenPolicy) shared.TokenPolicyParam {
	var groups []shared.TokenPolicyPermissionGroupParam
	for _, group := range policy.PermissionGroups {
		one := shared.TokenPolicyPermissionGroupParam{ID: sdk.F(group.ID)}
		if group.Meta.Key != "" {
			one.Meta = sdk.F(shared.TokenPolicyPermissionGroupsMetaParam{Key: sdk.F(group.Meta.Key), Value: sdk.F(group.Meta.Value)})
		}
		groups = append(groups, one)
	}
	same := shared.TokenPolicyParam{Effect: sdk.F(policy.Effect), PermissionGroups: sdk.F(groups)}
	switch resources := policy.Resources.(type) {
	case shared.TokenPolicyResourcesIAMResourcesTypeObjectString:
		same.Resources = sdk.F[shared.TokenPolicyResourcesUnionParam](shared.TokenPolicyResourcesIAMResourcesTypeObjectStringParam(resources))
	case shared.TokenPolicyResourcesIAMResourcesTypeObjectNested:
		same.Resources = sdk.F[shared.TokenPolicyResourcesUnionParam](shared.TokenPolicyResourcesIAMResourcesTypeObjectNestedParam(resources))
	}
	return same
}

// conditionOf keeps the filter; one that is empty would let nobody in.
func conditionOf(filter shared.TokenConditionRequestIP) *accounts.TokenNewParamsCondition {
	if len(filter.In) == 0 && len(filter.NotIn) == 0 {
		return nil
	}
	var same accounts.TokenNewParamsConditionRequestIP
	if len(filter.In) > 0 {
		same.In = sdk.F(filter.In)
	}
	if len(filter.NotIn) > 0 {
		same.NotIn = sdk.F(filter.NotIn)
	}
	return &accounts.TokenNewParamsCondition{RequestIP: sdk.F(same)}
}

// mint never rolls a token, for a rolled one's old secret dies at once. A creation
// of which nobody knows whether it was done is taken back before the next, and on
// every way out: its value is lost, and a token that nobody holds is nobody's.
func (c *Client) mint(ctx context.Context, wanted accounts.TokenNewParams) (Minted, error) {
	name := wanted.Name.Value
	if name == "" || len(name) > maxNameLength {
		err := fmt.Errorf("a token's name has 1 to %d characters: %q", maxNameLength, name)
		return Minted{}, plan.WithHint(err, "give the site a shorter name")
	}
	wanted.AccountID = sdk.F(c.options.AccountID)
	before, err := c.named(ctx, name)
	if err != nil {
		return Minted{}, err
	}
	var minted Minted
	deadline := time.Now().Add(c.options.Patience)
	err = retry.Until(ctx, "the provider's API", c.options.Patience, func(ctx context.Context) error {
		made, err := c.create(ctx, wanted)
		if err == nil {
			minted = made
			return nil
		}
		var unavailable *UnavailableError
		if errors.As(err, &unavailable) && unavailable.Unsure {
			if left := c.takeBack(ctx, name, before); left != nil {
				return retry.Permanent(errors.Join(err, left))
			}
		}
		return again(ctx, deadline, err)
	})
	if err != nil {
		return Minted{}, plainly(err)
	}
	if ctx.Err() != nil { // nobody is there to keep it
		return Minted{}, errors.Join(fmt.Errorf("make token %q: %w", name, context.Cause(ctx)), c.takeBack(ctx, name, before))
	}
	return minted, nil
}

// create is not given up half way, for whoever ends it must know what came of it:
// it has the time of one request, whatever becomes of ctx.
func (c *Client) create(ctx context.Context, wanted accounts.TokenNewParams) (Minted, error) {
	what := fmt.Sprintf("make token %q", wanted.Name.Value)
	var made *accounts.TokenNewResponse
	err := c.once(context.WithoutCancel(ctx), request{what, TokensWrite, func(ctx context.Context, watch option.RequestOption) (err error) {
		made, err = c.tokens.New(ctx, wanted, watch)
		return err
	}})
	if err != nil {
		return Minted{}, err
	}
	if !isIdentifier(made.ID) || made.Value == "" {
		return Minted{}, &UnavailableError{What: what, Unsure: true, Err: errors.New("its answer holds no token")}
	}
	value := secret.New(made.Value)
	return Minted{TokenID: made.ID, SecretAccessKey: SecretAccessKey(value), Value: value, Name: wanted.Name.Value}, nil
}

// takeBack revokes what has the name and was not there before.
func (c *Client) takeBack(ctx context.Context, name string, before map[string]bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	now, err := c.named(ctx, name)
	if err == nil {
		for id := range now {
			if !before[id] {
				err = errors.Join(err, c.Revoke(ctx, id))
			}
		}
	}
	if err != nil {
		return fmt.Errorf("take back token %q, which may have been made: %w", name, err)
	}
	return nil
}

func (c *Client) named(ctx context.Context, name string) (map[string]bool, error) {
	tokens, err := c.Tokens(ctx, name)
	ids := map[string]bool{}
	for _, token := range tokens {
		if token.Name == name {
			ids[token.ID] = true
		}
	}
	return ids, err
}

// Tokens lists those whose names begin with namePrefix, as the provider orders them.
func (c *Client) Tokens(ctx context.Context, namePrefix string) ([]TokenInfo, error) {
	var found []TokenInfo
	seen := map[string]bool{} // a token may move to the next page while they are read
	for page := 1; page <= maxPages; page++ {
		tokens, last, err := c.page(ctx, page)
		if err != nil {
			return nil, err
		}
		for _, token := range tokens {
			if strings.HasPrefix(token.Name, namePrefix) && !seen[token.ID] {
				seen[token.ID] = true
				found = append(found, TokenInfo{ID: token.ID, Name: token.Name, Issued: token.IssuedOn, Status: string(token.Status)})
			}
		}
		if last {
			return found, nil
		}
	}
	return nil, &UnavailableError{What: "list the account's tokens", Err: fmt.Errorf("there are more than %d pages", maxPages)}
}

// page reads one. The SDK's own walk through the pages forgets the context.
func (c *Client) page(ctx context.Context, number int) (tokens []shared.Token, last bool, err error) {
	params := accounts.TokenListParams{
		AccountID: sdk.F(c.options.AccountID), Page: sdk.F(float64(number)), PerPage: sdk.F(float64(tokensPerPage)),
	}
	err = c.ask(ctx, request{"list the account's tokens", TokensWrite, func(ctx context.Context, watch option.RequestOption) error {
		answer, err := c.tokens.List(ctx, params, watch)
		if err != nil {
			return err
		}
		size := int64(tokensPerPage)
		if answer.ResultInfo.PerPage > 0 {
			size = answer.ResultInfo.PerPage
		}
		tokens, last = answer.Result, int64(len(answer.Result)) < size
		return nil
	}})
	return tokens, last, err
}

// Revoke deletes a token; one that is gone already is no error.
func (c *Client) Revoke(ctx context.Context, tokenID string) error {
	if !isIdentifier(tokenID) {
		err := fmt.Errorf("revoke token: %q is no token's id", tokenID)
		return plan.WithHint(err, "an access key id of this provider is 32 hexadecimal digits")
	}
	err := c.ask(ctx, request{"revoke token " + tokenID, TokensWrite, func(ctx context.Context, watch option.RequestOption) error {
		_, err := c.tokens.Delete(ctx, tokenID, accounts.TokenDeleteParams{AccountID: sdk.F(c.options.AccountID)}, watch)
		return err
	}})
	if !isGone(err) {
		return err
	}
	// What is gone is in no list. An address that is not the API's knows no token either.
	left, listErr := c.Tokens(ctx, "")
	if listErr != nil {
		return listErr
	}
	if slices.ContainsFunc(left, func(token TokenInfo) bool { return token.ID == tokenID }) {
		return err
	}
	return nil
}

func (c *Client) get(ctx context.Context, tokenID string) (token *shared.Token, err error) {
	err = c.ask(ctx, request{"read the token's own permissions", TokensWrite, func(ctx context.Context, watch option.RequestOption) error {
		token, err = c.tokens.Get(ctx, tokenID, accounts.TokenGetParams{AccountID: sdk.F(c.options.AccountID)}, watch)
		return err
	}})
	return token, err
}

// group finds a permission's id by its name: ids are the provider's to change.
func (c *Client) group(ctx context.Context, name string) (id string, err error) {
	what := fmt.Sprintf("look permission %q up", name)
	err = c.ask(ctx, request{what, TokensWrite, func(ctx context.Context, watch option.RequestOption) error {
		params := accounts.TokenPermissionGroupListParams{AccountID: sdk.F(c.options.AccountID), Name: sdk.F(name)}
		answer, err := c.tokens.PermissionGroups.List(ctx, params, watch)
		if err != nil {
			return err
		}
		for _, group := range answer.Result {
			if group.Name == name && isIdentifier(group.ID) {
				id = group.ID
			}
		}
		return nil
	}})
	if err == nil && id == "" {
		err = &RefusedError{What: what, Status: 404, Message: "account " + c.options.AccountID + " has no such permission"}
	}
	return id, err
}

package nomad

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
)

const (
	operatorPolicy     = "site-operator"
	operatorAuthMethod = "operators"
	operatorTokenTTL   = 30 * time.Minute
	// operatorTokenName lets us find, and revoke, the tokens of one operator.
	operatorTokenPrefix = "site-operator-"
	operatorTokenFormat = operatorTokenPrefix + "${value." + operatorClaim + "}"
	// ruleMark is the beginning of the description of every binding rule of ours.
	ruleMark = "site operator "
)

// operatorRules are what an operator may do: run the site's jobs, look at
// everything, and keep the mirror of releases. Not: ACLs, or commands on a host.
const operatorRules = `namespace "default" {
  policy       = "read"
  capabilities = ["submit-job", "dispatch-job", "scale-job", "read-logs", "read-fs", "alloc-exec", "alloc-lifecycle", "csi-read-volume", "csi-mount-volume"]
  variables {
    path "site/*" {
      capabilities = ["write", "read", "list", "destroy"]
    }
  }
}
node {
  policy = "read"
}
agent {
  policy = "read"
}
operator {
  policy = "read"
}
host_volume "*" {
  policy = "write"
}
plugin {
  policy = "read"
}
`

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

// Operator may log in with the key of PublicKeyPEM.
type Operator struct {
	Name         string
	PublicKeyPEM string
}

// Operators is what Nomad has for operators to log in.
type Operators struct {
	policy     *api.ACLPolicy
	authMethod *api.ACLAuthMethod
	// rules are those of the auth method, by selector; extra ones are ours too.
	rules []*api.ACLBindingRule
	// tokens are the live tokens that logins made.
	tokens []*api.ACLTokenListStub
}

// ObserveOperators reads it; it needs a management token, as EnsureOperators does.
func (c *Client) ObserveOperators(ctx context.Context) (Operators, error) {
	var have Operators
	var err error
	if have.policy, _, err = c.api.ACLPolicies().Info(operatorPolicy, c.query(ctx)); err != nil && statusOf(err) != http.StatusNotFound {
		return have, describe(err, "read ACL policy %s", operatorPolicy)
	}
	if have.authMethod, _, err = c.api.ACLAuthMethods().Get(operatorAuthMethod, c.query(ctx)); err != nil && statusOf(err) != http.StatusNotFound {
		return have, describe(err, "read ACL auth method %s", operatorAuthMethod)
	}
	stubs, _, err := c.api.ACLBindingRules().List(c.query(ctx))
	if err != nil {
		return have, describe(err, "list ACL binding rules")
	}
	for _, stub := range stubs {
		if stub.AuthMethod != operatorAuthMethod {
			continue
		}
		rule, _, err := c.api.ACLBindingRules().Get(stub.ID, c.query(ctx))
		if err != nil {
			return have, describe(err, "read ACL binding rule %s", stub.ID)
		}
		have.rules = append(have.rules, rule)
	}
	tokens, _, err := c.api.ACLTokens().List(c.query(ctx))
	if err != nil {
		return have, describe(err, "list ACL tokens")
	}
	for _, token := range tokens {
		if strings.HasPrefix(token.Name, operatorTokenPrefix) && (token.ExpirationTime == nil || token.ExpirationTime.After(time.Now())) {
			have.tokens = append(have.tokens, token)
		}
	}
	return have, nil
}

// DiffOperators is pure: what must change so that exactly these may log in.
func DiffOperators(want []Operator, jwksURL string, have Operators) []plan.Change {
	var changes []plan.Change
	add := func(action plan.Action, kind, target, reason string) {
		changes = append(changes, plan.Change{Action: action, Kind: kind, Target: target, Reason: reason})
	}
	switch {
	case have.policy == nil:
		add(plan.Create, "acl policy", operatorPolicy, "not there")
	case have.policy.Rules != operatorRules:
		add(plan.Update, "acl policy", operatorPolicy, "rules differ")
	}
	switch {
	case have.authMethod == nil:
		add(plan.Create, "acl auth method", operatorAuthMethod, "not there")
	case !sameAuthMethod(have.authMethod, desiredAuthMethod(want, jwksURL)):
		add(plan.Update, "acl auth method", operatorAuthMethod, authMethodReason(want, jwksURL, have.authMethod))
	}
	missing, surplus := diffRules(want, have.rules)
	for _, name := range missing {
		add(plan.Create, "acl binding rule", name, "operator added")
	}
	for _, rule := range surplus {
		add(plan.Delete, "acl binding rule", strings.TrimPrefix(rule.Description, ruleMark), "not an operator of the site")
	}
	for _, token := range strayTokens(want, have.tokens) {
		add(plan.Delete, "acl token", strings.TrimPrefix(token.Name, operatorTokenPrefix), "not an operator of the site")
	}
	return changes
}

// EnsureOperators makes exactly these operators able to log in; it writes
// nothing where they are already. Removed ones lose their tokens at once.
//
// Nomad 1.11 reads static public keys of RSA and ECDSA only, and one ed25519
// key among them locks everybody out. Through a JWKS address it knows all of
// them: with jwksURL each server must reach what JWKS returns there; without
// it, operators with ed25519 keys are refused here.
func (c *Client) EnsureOperators(ctx context.Context, want []Operator, jwksURL string) ([]plan.Change, error) {
	for _, operator := range want {
		if operator.Name == "" || strings.ContainsAny(operator.Name, "\"\\${}\n") || operator.PublicKeyPEM == "" {
			return nil, fmt.Errorf("operator %q: a plain name and a public key are needed", operator.Name)
		}
		key, err := parsePEM(operator)
		if err != nil {
			return nil, err
		}
		if _, isEd25519 := key.(ed25519.PublicKey); isEd25519 && jwksURL == "" {
			return nil, plan.WithHint(fmt.Errorf("operator %q: nomad reads ed25519 keys only from a JWKS address", operator.Name),
				"serve the operators' keys at an address that every server reaches")
		}
	}
	if len(want) == 0 {
		return nil, plan.WithHint(errors.New("a site without operators cannot be deployed to"), `add an operator block to site.hcl`)
	}
	have, err := c.ObserveOperators(ctx)
	if err != nil {
		return nil, err
	}
	changes := DiffOperators(want, jwksURL, have)
	if have.policy == nil || have.policy.Rules != operatorRules {
		policy := &api.ACLPolicy{Name: operatorPolicy, Description: "what operators of the site may do", Rules: operatorRules}
		if _, err := c.api.ACLPolicies().Upsert(policy, c.write(ctx)); err != nil {
			return nil, describe(err, "write ACL policy %s", operatorPolicy)
		}
	}
	method := desiredAuthMethod(want, jwksURL)
	switch {
	case have.authMethod == nil:
		if _, _, err := c.api.ACLAuthMethods().Create(method, c.write(ctx)); err != nil {
			return nil, describe(err, "create ACL auth method %s", operatorAuthMethod)
		}
	case !sameAuthMethod(have.authMethod, method):
		if _, _, err := c.api.ACLAuthMethods().Update(method, c.write(ctx)); err != nil {
			return nil, describe(err, "update ACL auth method %s", operatorAuthMethod)
		}
	}
	missing, surplus := diffRules(want, have.rules)
	for _, name := range missing {
		if _, _, err := c.api.ACLBindingRules().Create(desiredRule(name), c.write(ctx)); err != nil {
			return nil, describe(err, "create ACL binding rule of operator %s", name)
		}
	}
	for _, rule := range surplus {
		if _, err := c.api.ACLBindingRules().Delete(rule.ID, c.write(ctx)); err != nil {
			return nil, describe(err, "delete ACL binding rule %s", rule.Description)
		}
	}
	for _, token := range strayTokens(want, have.tokens) {
		if _, err := c.api.ACLTokens().Delete(token.AccessorID, c.write(ctx)); err != nil && statusOf(err) != http.StatusNotFound {
			return nil, describe(err, "revoke ACL token %s", token.Name)
		}
	}
	return changes, nil
}

func desiredAuthMethod(want []Operator, jwksURL string) *api.ACLAuthMethod {
	var keys []string
	if jwksURL == "" {
		for _, operator := range want {
			keys = append(keys, operator.PublicKeyPEM)
		}
	}
	sort.Strings(keys)
	return &api.ACLAuthMethod{
		Name:            operatorAuthMethod,
		Type:            api.ACLAuthMethodTypeJWT,
		TokenLocality:   api.ACLAuthMethodTokenLocalityGlobal,
		TokenNameFormat: operatorTokenFormat,
		MaxTokenTTL:     operatorTokenTTL,
		Config: &api.ACLAuthMethodConfig{
			JWTValidationPubKeys: slices.Compact(keys),
			JWKSURL:              jwksURL,
			BoundAudiences:       []string{Audience},
			BoundIssuer:          []string{Issuer},
			SigningAlgs:          []string{"EdDSA", "RS256", "ES256", "ES384", "ES512"},
			ClaimMappings:        map[string]string{operatorClaim: operatorClaim},
		},
	}
}

func sameAuthMethod(have, want *api.ACLAuthMethod) bool {
	if have.Config == nil {
		return false
	}
	return have.Type == want.Type && have.TokenLocality == want.TokenLocality &&
		have.TokenNameFormat == want.TokenNameFormat && have.MaxTokenTTL == want.MaxTokenTTL &&
		slices.Equal(have.Config.JWTValidationPubKeys, want.Config.JWTValidationPubKeys) &&
		slices.Equal(have.Config.BoundAudiences, want.Config.BoundAudiences) &&
		slices.Equal(have.Config.BoundIssuer, want.Config.BoundIssuer) &&
		slices.Equal(have.Config.SigningAlgs, want.Config.SigningAlgs) &&
		have.Config.ClaimMappings[operatorClaim] == operatorClaim && len(have.Config.ClaimMappings) == 1 &&
		have.Config.JWKSURL == want.Config.JWKSURL && have.Config.OIDCDiscoveryURL == ""
}

func authMethodReason(want []Operator, jwksURL string, have *api.ACLAuthMethod) string {
	if have.Config != nil && !slices.Equal(have.Config.JWTValidationPubKeys, desiredAuthMethod(want, jwksURL).Config.JWTValidationPubKeys) {
		return "public keys differ"
	}
	return "settings differ"
}

func desiredRule(name string) *api.ACLBindingRule {
	return &api.ACLBindingRule{
		Description: ruleMark + name,
		AuthMethod:  operatorAuthMethod,
		Selector:    fmt.Sprintf("value.%s == %q", operatorClaim, name),
		BindType:    api.ACLBindingRuleBindTypePolicy,
		BindName:    operatorPolicy,
	}
}

func diffRules(want []Operator, have []*api.ACLBindingRule) (missing []string, surplus []*api.ACLBindingRule) {
	open := map[string]bool{}
	for _, operator := range want {
		open[operator.Name] = true
	}
	for _, rule := range have {
		name := strings.TrimPrefix(rule.Description, ruleMark)
		exact := desiredRule(name)
		if open[name] && rule.Description == exact.Description && rule.Selector == exact.Selector &&
			rule.BindType == exact.BindType && rule.BindName == exact.BindName {
			open[name] = false // a second one of the same name is surplus
			continue
		}
		// The auth method is ours, and a rule there lets somebody in.
		surplus = append(surplus, rule)
	}
	for _, operator := range want {
		if open[operator.Name] {
			missing = append(missing, operator.Name)
			open[operator.Name] = false
		}
	}
	return missing, surplus
}

func strayTokens(want []Operator, tokens []*api.ACLTokenListStub) []*api.ACLTokenListStub {
	var stray []*api.ACLTokenListStub
	for _, token := range tokens {
		name := strings.TrimPrefix(token.Name, operatorTokenPrefix)
		if !slices.ContainsFunc(want, func(operator Operator) bool { return operator.Name == name }) {
			stray = append(stray, token)
		}
	}
	return stray
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
	token, _, err := c.api.ACLAuth().Login(&api.ACLLoginRequest{AuthMethodName: operatorAuthMethod, LoginToken: jwt.Reveal()}, c.write(ctx))
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

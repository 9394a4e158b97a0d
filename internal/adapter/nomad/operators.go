package nomad

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/http"
	"path"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

const (
	operatorPolicy     = "site-operator"
	operatorAuthMethod = "operators"
	// operatorTokenPrefix lets us find, and revoke, the tokens of one operator.
	operatorTokenPrefix = "site-operator-"
	operatorTokenTTL    = 30 * time.Minute

	rotatorPolicy      = "site-rotator"
	rotatorAuthMethod  = "rotators"
	rotatorTokenPrefix = "site-rotator-"

	// ruleMark is the beginning of the description of every binding rule of ours.
	ruleMark = "site operator "
)

// The rights of an operator, as in site.hcl.
const (
	// RightsDeploy is what the empty text means too.
	RightsDeploy = site.RightsDeploy
	RightsRotate = site.RightsRotate
)

// operatorRules are what an operator may do: run the site's jobs, look at
// everything, keep the mirror of releases, and say which generations of secrets
// tasks read. Not: ACLs, or commands on a host.
const operatorRules = `namespace "default" {
  policy       = "read"
  capabilities = ["submit-job", "dispatch-job", "scale-job", "read-logs", "read-fs", "alloc-exec", "alloc-lifecycle", "csi-read-volume", "csi-mount-volume"]
  variables {
    path "site/*" {
      capabilities = ["write", "read", "list", "destroy"]
    }
    path "nomad/jobs/*" {
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

// rotatorRules are what an operator needs who only rotates secrets: register
// jobs, which use volumes, and the same variables. Not: what runs in tasks,
// their files and logs, or jobs that wait to be dispatched.
const rotatorRules = `namespace "default" {
  policy       = "read"
  capabilities = ["submit-job", "csi-read-volume", "csi-mount-volume"]
  variables {
    path "site/*" {
      capabilities = ["write", "read", "list", "destroy"]
    }
    path "nomad/jobs/*" {
      capabilities = ["write", "read", "list", "destroy"]
    }
  }
}
node {
  policy = "read"
}
host_volume "*" {
  policy = "write"
}
`

// Operator may log in with the key of PublicKeyPEM.
type Operator struct {
	Name         string
	PublicKeyPEM string
	// Rights are RightsDeploy or RightsRotate.
	Rights string
}

// deployers are the operators who do everything.
func deployers(operators []Operator) []Operator {
	return slices.DeleteFunc(slices.Clone(operators), func(operator Operator) bool { return operator.Rights == RightsRotate })
}

// rotators are the operators who only rotate secrets.
func rotators(operators []Operator) []Operator {
	return slices.DeleteFunc(slices.Clone(operators), func(operator Operator) bool { return operator.Rights != RightsRotate })
}

// access is one way to log in: whose keys it takes, and what they may do then.
// A key may sign any name, so that each kind of rights has keys of its own.
type access struct {
	policy      string
	description string
	rules       string
	method      string
	tokenPrefix string
	operators   []Operator
	jwksURL     string
}

// accesses are the ways to log in of these operators: the second one is there
// only while somebody may do no more than rotate.
func accesses(want []Operator, jwksURL string) (all, rotating access) {
	all = access{
		policy: operatorPolicy, description: "what operators of the site may do", rules: operatorRules,
		method: operatorAuthMethod, tokenPrefix: operatorTokenPrefix, operators: deployers(want), jwksURL: jwksURL,
	}
	rotating = access{
		policy: rotatorPolicy, description: "what operators may do who only rotate secrets", rules: rotatorRules,
		method: rotatorAuthMethod, tokenPrefix: rotatorTokenPrefix, operators: rotators(want), jwksURL: RotatorsJWKSURL(jwksURL),
	}
	return all, rotating
}

// RotatorsJWKSURL is where RotatorsJWKS is served: beside what JWKS returns.
func RotatorsJWKSURL(jwksURL string) string {
	if jwksURL == "" {
		return ""
	}
	return strings.TrimSuffix(jwksURL, path.Base(jwksURL)) + "rotators.jwks"
}

// grant is what Nomad has for one way to log in.
type grant struct {
	policy     *api.ACLPolicy
	authMethod *api.ACLAuthMethod
	// rules are those of the auth method; extra ones are ours too.
	rules []*api.ACLBindingRule
}

// Operators is what Nomad has for operators to log in.
type Operators struct {
	grant
	// rotators is the same for those who only rotate.
	rotators grant
	// tokens are the live tokens that logins made.
	tokens []*api.ACLTokenListStub
}

// ObserveOperators reads it; it needs a management token, as EnsureOperators does.
func (c *Client) ObserveOperators(ctx context.Context) (Operators, error) {
	var have Operators
	var err error
	all, rotating := accesses(nil, "")
	if have.grant, err = c.observeGrant(ctx, all); err != nil {
		return have, err
	}
	if have.rotators, err = c.observeGrant(ctx, rotating); err != nil {
		return have, err
	}
	if err := c.observeRules(ctx, &have); err != nil {
		return have, err
	}
	tokens, _, err := c.api.ACLTokens().List(c.query(ctx))
	if err != nil {
		return have, describe(err, "list ACL tokens")
	}
	for _, token := range tokens {
		ours := strings.HasPrefix(token.Name, operatorTokenPrefix) || strings.HasPrefix(token.Name, rotatorTokenPrefix)
		if ours && (token.ExpirationTime == nil || token.ExpirationTime.After(time.Now())) {
			have.tokens = append(have.tokens, token)
		}
	}
	return have, nil
}

func (c *Client) observeGrant(ctx context.Context, way access) (grant, error) {
	var have grant
	var err error
	if have.policy, _, err = c.api.ACLPolicies().Info(way.policy, c.query(ctx)); err != nil && statusOf(err) != http.StatusNotFound {
		return have, describe(err, "read ACL policy %s", way.policy)
	}
	if have.authMethod, _, err = c.api.ACLAuthMethods().Get(way.method, c.query(ctx)); err != nil && statusOf(err) != http.StatusNotFound {
		return have, describe(err, "read ACL auth method %s", way.method)
	}
	return have, nil
}

func (c *Client) observeRules(ctx context.Context, have *Operators) error {
	stubs, _, err := c.api.ACLBindingRules().List(c.query(ctx))
	if err != nil {
		return describe(err, "list ACL binding rules")
	}
	for _, stub := range stubs {
		if stub.AuthMethod != operatorAuthMethod && stub.AuthMethod != rotatorAuthMethod {
			continue
		}
		rule, _, err := c.api.ACLBindingRules().Get(stub.ID, c.query(ctx))
		if err != nil {
			return describe(err, "read ACL binding rule %s", stub.ID)
		}
		if stub.AuthMethod == operatorAuthMethod {
			have.rules = append(have.rules, rule)
		} else {
			have.rotators.rules = append(have.rotators.rules, rule)
		}
	}
	return nil
}

// DiffOperators is pure: what must change so that exactly these may log in.
func DiffOperators(want []Operator, jwksURL string, have Operators) []plan.Change {
	all, rotating := accesses(want, jwksURL)
	changes := diffGrant(all, have.grant)
	if len(rotating.operators) > 0 {
		changes = append(changes, diffGrant(rotating, have.rotators)...)
	} else {
		changes = append(changes, closedGrant(rotating, have.rotators)...)
	}
	for _, token := range strayTokens(want, have.tokens) {
		_, name := cutPrefix(token.Name)
		changes = append(changes, change(plan.Delete, "acl token", name, "not an operator of the site with these rights"))
	}
	return changes
}

func change(action plan.Action, kind, target, reason string) plan.Change {
	return plan.Change{Action: action, Kind: kind, Target: target, Reason: reason}
}

func diffGrant(want access, have grant) []plan.Change {
	var changes []plan.Change
	add := func(action plan.Action, kind, target, reason string) {
		changes = append(changes, change(action, kind, target, reason))
	}
	switch {
	case have.policy == nil:
		add(plan.Create, "acl policy", want.policy, "not there")
	case have.policy.Rules != want.rules:
		add(plan.Update, "acl policy", want.policy, "rules differ")
	}
	switch {
	case have.authMethod == nil:
		add(plan.Create, "acl auth method", want.method, "not there")
	case !sameAuthMethod(have.authMethod, desiredAuthMethod(want)):
		add(plan.Update, "acl auth method", want.method, authMethodReason(want, have.authMethod))
	}
	missing, surplus := diffRules(want, have.rules)
	for _, name := range missing {
		add(plan.Create, "acl binding rule", name, "operator added")
	}
	for _, rule := range surplus {
		add(plan.Delete, "acl binding rule", strings.TrimPrefix(rule.Description, ruleMark), "not an operator of the site")
	}
	return changes
}

// closedGrant are the deletions of a way to log in that nobody has any more.
func closedGrant(want access, have grant) []plan.Change {
	const reason = "no operator only rotates"
	var changes []plan.Change
	for _, rule := range have.rules {
		changes = append(changes, change(plan.Delete, "acl binding rule", strings.TrimPrefix(rule.Description, ruleMark), reason))
	}
	if have.authMethod != nil {
		changes = append(changes, change(plan.Delete, "acl auth method", want.method, reason))
	}
	if have.policy != nil {
		changes = append(changes, change(plan.Delete, "acl policy", want.policy, reason))
	}
	return changes
}

// EnsureOperators makes exactly these operators able to log in; it writes
// nothing where they are already. Removed ones lose their tokens at once.
//
// Nomad 1.11 reads static public keys of RSA and ECDSA only, and one ed25519
// key among them locks everybody out. Through a JWKS address it knows all of
// them: with jwksURL each server must reach what JWKS returns there, and what
// RotatorsJWKS returns at RotatorsJWKSURL; without it, operators with ed25519
// keys are refused here.
func (c *Client) EnsureOperators(ctx context.Context, want []Operator, jwksURL string) ([]plan.Change, error) {
	if err := checkOperators(want, jwksURL); err != nil {
		return nil, err
	}
	have, err := c.ObserveOperators(ctx)
	if err != nil {
		return nil, err
	}
	changes := DiffOperators(want, jwksURL, have)
	all, rotating := accesses(want, jwksURL)
	if err := c.ensureGrant(ctx, all, have.grant); err != nil {
		return nil, err
	}
	if len(rotating.operators) > 0 {
		err = c.ensureGrant(ctx, rotating, have.rotators)
	} else {
		err = c.closeGrant(ctx, rotating, have.rotators)
	}
	if err != nil {
		return nil, err
	}
	for _, token := range strayTokens(want, have.tokens) {
		if _, err := c.api.ACLTokens().Delete(token.AccessorID, c.write(ctx)); err != nil && statusOf(err) != http.StatusNotFound {
			return nil, describe(err, "revoke ACL token %s", token.Name)
		}
	}
	return changes, nil
}

func checkOperators(want []Operator, jwksURL string) error {
	for _, operator := range want {
		if operator.Name == "" || strings.ContainsAny(operator.Name, "\"\\${}\n") || operator.PublicKeyPEM == "" {
			return fmt.Errorf("operator %q: a plain name and a public key are needed", operator.Name)
		}
		key, err := parsePEM(operator)
		if err != nil {
			return err
		}
		if _, isEd25519 := key.(ed25519.PublicKey); isEd25519 && jwksURL == "" {
			return plan.WithHint(fmt.Errorf("operator %q: nomad reads ed25519 keys only from a JWKS address", operator.Name),
				"serve the operators' keys at an address that every server reaches")
		}
	}
	if len(deployers(want)) == 0 {
		return plan.WithHint(errors.New("a site without operators cannot be deployed to"), `add an operator block to site.hcl`)
	}
	return nil
}

func (c *Client) ensureGrant(ctx context.Context, want access, have grant) error {
	if have.policy == nil || have.policy.Rules != want.rules {
		policy := &api.ACLPolicy{Name: want.policy, Description: want.description, Rules: want.rules}
		if _, err := c.api.ACLPolicies().Upsert(policy, c.write(ctx)); err != nil {
			return describe(err, "write ACL policy %s", want.policy)
		}
	}
	method := desiredAuthMethod(want)
	switch {
	case have.authMethod == nil:
		if _, _, err := c.api.ACLAuthMethods().Create(method, c.write(ctx)); err != nil {
			return describe(err, "create ACL auth method %s", want.method)
		}
	case !sameAuthMethod(have.authMethod, method):
		if _, _, err := c.api.ACLAuthMethods().Update(method, c.write(ctx)); err != nil {
			return describe(err, "update ACL auth method %s", want.method)
		}
	}
	missing, surplus := diffRules(want, have.rules)
	for _, name := range missing {
		if _, _, err := c.api.ACLBindingRules().Create(desiredRule(want, name), c.write(ctx)); err != nil {
			return describe(err, "create ACL binding rule of operator %s", name)
		}
	}
	return c.deleteRules(ctx, surplus)
}

func (c *Client) closeGrant(ctx context.Context, want access, have grant) error {
	if err := c.deleteRules(ctx, have.rules); err != nil {
		return err
	}
	if have.authMethod != nil {
		if _, err := c.api.ACLAuthMethods().Delete(want.method, c.write(ctx)); err != nil {
			return describe(err, "delete ACL auth method %s", want.method)
		}
	}
	if have.policy != nil {
		if _, err := c.api.ACLPolicies().Delete(want.policy, c.write(ctx)); err != nil {
			return describe(err, "delete ACL policy %s", want.policy)
		}
	}
	return nil
}

func (c *Client) deleteRules(ctx context.Context, rules []*api.ACLBindingRule) error {
	for _, rule := range rules {
		if _, err := c.api.ACLBindingRules().Delete(rule.ID, c.write(ctx)); err != nil {
			return describe(err, "delete ACL binding rule %s", rule.Description)
		}
	}
	return nil
}

func desiredAuthMethod(want access) *api.ACLAuthMethod {
	var keys []string
	if want.jwksURL == "" {
		for _, operator := range want.operators {
			keys = append(keys, operator.PublicKeyPEM)
		}
	}
	sort.Strings(keys)
	return &api.ACLAuthMethod{
		Name:            want.method,
		Type:            api.ACLAuthMethodTypeJWT,
		TokenLocality:   api.ACLAuthMethodTokenLocalityGlobal,
		TokenNameFormat: want.tokenPrefix + "${value." + operatorClaim + "}",
		MaxTokenTTL:     operatorTokenTTL,
		Config: &api.ACLAuthMethodConfig{
			JWTValidationPubKeys: slices.Compact(keys),
			JWKSURL:              want.jwksURL,
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

func authMethodReason(want access, have *api.ACLAuthMethod) string {
	if have.Config != nil && !slices.Equal(have.Config.JWTValidationPubKeys, desiredAuthMethod(want).Config.JWTValidationPubKeys) {
		return "public keys differ"
	}
	return "settings differ"
}

func desiredRule(want access, name string) *api.ACLBindingRule {
	return &api.ACLBindingRule{
		Description: ruleMark + name,
		AuthMethod:  want.method,
		Selector:    fmt.Sprintf("value.%s == %q", operatorClaim, name),
		BindType:    api.ACLBindingRuleBindTypePolicy,
		BindName:    want.policy,
	}
}

func diffRules(want access, have []*api.ACLBindingRule) (missing []string, surplus []*api.ACLBindingRule) {
	open := map[string]bool{}
	for _, operator := range want.operators {
		open[operator.Name] = true
	}
	for _, rule := range have {
		name := strings.TrimPrefix(rule.Description, ruleMark)
		exact := desiredRule(want, name)
		if open[name] && rule.Description == exact.Description && rule.Selector == exact.Selector &&
			rule.BindType == exact.BindType && rule.BindName == exact.BindName {
			open[name] = false // a second one of the same name is surplus
			continue
		}
		// The auth method is ours, and a rule there lets somebody in.
		surplus = append(surplus, rule)
	}
	for _, operator := range want.operators {
		if open[operator.Name] {
			missing = append(missing, operator.Name)
			open[operator.Name] = false
		}
	}
	return missing, surplus
}

// strayTokens are those of logins whose operators have other rights now, or none.
func strayTokens(want []Operator, tokens []*api.ACLTokenListStub) []*api.ACLTokenListStub {
	var stray []*api.ACLTokenListStub
	for _, token := range tokens {
		rights, name := cutPrefix(token.Name)
		allowed := deployers(want)
		if rights == RightsRotate {
			allowed = rotators(want)
		}
		if !slices.ContainsFunc(allowed, func(operator Operator) bool { return operator.Name == name }) {
			stray = append(stray, token)
		}
	}
	return stray
}

// cutPrefix takes the name of a login's token apart.
func cutPrefix(tokenName string) (rights, operator string) {
	if name, found := strings.CutPrefix(tokenName, rotatorTokenPrefix); found {
		return RightsRotate, name
	}
	return RightsDeploy, strings.TrimPrefix(tokenName, operatorTokenPrefix)
}

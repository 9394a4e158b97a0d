package deploy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/adapter/cloudflare"
	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/bucket"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// ProviderVersion names the schema of what `site provider` prints.
const ProviderVersion = "site.provider/v1"

// previousTokenField is the custom metadata of an admin token that names the one
// which it replaced: until it is empty, that one is still to be revoked.
const previousTokenField = "previous_token_id"

// adminRole begins the role of an admin token in its name: "admin-a".
const adminRole = "admin-"

// ProviderStatus is what the provider says of the admin pair and of the keys.
type ProviderStatus struct {
	Schema  string          `json:"schema"`
	Site    string          `json:"site"`
	Account string          `json:"account"`
	Bucket  string          `json:"bucket"`
	Tokens  []ProviderToken `json:"tokens"`
	// Orphans are tokens of this site at the provider that nothing uses.
	Orphans []string `json:"orphans"`
}

// ProviderToken is one of the admin pair.
type ProviderToken struct {
	Name string `json:"name"`
	// ID is no secret.
	ID          string                  `json:"id,omitempty"`
	Expires     *time.Time              `json:"expires,omitempty"`
	Permissions []cloudflare.Permission `json:"permissions,omitempty"`
	// Problem says why the token cannot do its work.
	Problem string `json:"problem,omitempty"`
}

// Healthy reports whether both tokens can do all that is needed.
func (p ProviderStatus) Healthy() bool {
	return !slices.ContainsFunc(p.Tokens, func(one ProviderToken) bool { return one.Problem != "" }) && len(p.Orphans) == 0
}

// adminTokens are the names of the pair, in its order.
func adminTokens() []string {
	return []string{
		site.ObjectStorageComponent + "." + site.ProviderTokenA,
		site.ObjectStorageComponent + "." + site.ProviderTokenB,
	}
}

// storeKeys are the names of the four keys that the provider makes.
func storeKeys() []string {
	var names []string
	for _, one := range []string{site.StoreAdminID, site.StoreAdminSecret, site.StoreProxyID, site.StoreProxySecret} {
		names = append(names, site.ObjectStorageComponent+"."+one)
	}
	return names
}

// needProvider says what lacks for the commands that ask the provider.
func (s *session) needProvider() error {
	if s.site.ObjectStore == nil || s.site.ObjectStore.Cloudflare == nil {
		return plan.WithHint(fmt.Errorf("site %q has no provider of object storage", s.site.Name),
			"declare object_store { cloudflare { account_id = … } } in sites/%s/site.hcl; keys of any other store are brought with `site secrets import`", s.site.Name)
	}
	return nil
}

func (s *session) provider(token secret.Value) (*cloudflare.Client, error) {
	declared := s.site.ObjectStore.Cloudflare
	return cloudflare.New(cloudflare.Options{
		AccountID: declared.AccountID, API: declared.API, Jurisdiction: declared.Jurisdiction, Token: token,
	})
}

// ImportAdminPair stores the two tokens by which keys are made. Both are proven
// with the provider, each permission by its name, before either is stored.
func ImportAdminPair(ctx context.Context, options Options, a, b secret.Value) (ProviderStatus, error) {
	var status ProviderStatus
	s, err := readAfter(ctx, options, func(s *session) error {
		if err := s.needProvider(); err != nil {
			return err
		}
		var err error
		status, err = s.proveAdminPair(ctx, a, b)
		return err
	})
	if err != nil {
		return status, err
	}
	defer s.close()
	if err := s.openOpenBao(ctx); err != nil {
		return status, err
	}
	names := adminTokens()
	values := []NewValue{{Name: names[0], Value: a}, {Name: names[1], Value: b}}
	return status, s.storeValues(ctx, values, make([]Stored, len(values)))
}

// proveAdminPair says all that is wrong with either token.
func (s *session) proveAdminPair(ctx context.Context, a, b secret.Value) (ProviderStatus, error) {
	status := s.emptyProviderStatus()
	if a.Reveal() == b.Reveal() {
		return status, plan.WithHint(errors.New("both files hold the same token"),
			"make two tokens: each rotates the other, so that neither has to be brought by hand again")
	}
	var problems []error
	for i, token := range []secret.Value{a, b} {
		one := s.proveAdmin(ctx, adminTokens()[i], token)
		status.Tokens = append(status.Tokens, one)
		if one.Problem != "" {
			problems = append(problems, plan.WithHint(fmt.Errorf("token %s: %s", "AB"[i:i+1], one.Problem),
				"nothing was stored; give the token the permission in the provider's dashboard, on account %s", status.Account))
		}
	}
	if status.Tokens[0].ID != "" && status.Tokens[0].ID == status.Tokens[1].ID {
		problems = append(problems, plan.WithHint(errors.New("both files hold values of the same token"), "make a second token"))
	}
	return status, errors.Join(problems...)
}

func (s *session) emptyProviderStatus() ProviderStatus {
	store := s.site.ObjectStore
	return ProviderStatus{Schema: ProviderVersion, Site: s.site.Name, Account: store.Cloudflare.AccountID, Bucket: store.Bucket, Orphans: []string{}}
}

// proveAdmin asks the provider what a token may do; its Problem says what it may not.
func (s *session) proveAdmin(ctx context.Context, name string, token secret.Value) ProviderToken {
	one := ProviderToken{Name: name}
	api, err := s.provider(token)
	if err != nil {
		one.Problem = err.Error()
		return one
	}
	id, expires, err := api.Verify(ctx)
	if err != nil {
		one.Problem = err.Error()
		return one
	}
	one.ID = id
	if !expires.IsZero() {
		one.Expires = &expires
	}
	if one.Permissions, err = api.Permissions(ctx, s.site.ObjectStore.Bucket); err != nil {
		one.Problem = err.Error()
		return one
	}
	var lacking []string
	for _, permission := range one.Permissions {
		if !permission.Allowed {
			lacking = append(lacking, fmt.Sprintf("%q (%s)", permission.Name, permission.Why))
		}
	}
	if len(lacking) > 0 {
		one.Problem = "it lacks " + strings.Join(lacking, ", ")
	}
	return one
}

// ReadProviderStatus asks the provider about the stored pair, and for orphans.
func ReadProviderStatus(ctx context.Context, options Options) (ProviderStatus, error) {
	s, err := readAfter(ctx, options, (*session).needProvider)
	if err != nil {
		return ProviderStatus{}, err
	}
	defer s.close()
	status := s.emptyProviderStatus()
	if err := s.openOpenBao(ctx); err != nil {
		return status, err
	}
	var working *cloudflare.Client
	for _, name := range adminTokens() {
		value, _, err := s.bao.Read(ctx, *s.site.Secret(name))
		var none *openbao.NoValueError
		switch {
		case errors.As(err, &none):
			status.Tokens = append(status.Tokens, ProviderToken{Name: name, Problem: "it was never imported"})
			continue
		case err != nil:
			return status, err
		}
		one := s.proveAdmin(ctx, name, value)
		status.Tokens = append(status.Tokens, one)
		if one.Problem == "" && working == nil {
			if working, err = s.provider(value); err != nil {
				return status, err
			}
		}
	}
	if working == nil {
		return status, nil
	}
	orphans, err := s.orphanTokens(ctx, working)
	for _, one := range orphans {
		status.Orphans = append(status.Orphans, one.Name)
	}
	return status, err
}

// anyAdmin is the provider by whichever token of the pair works.
func (s *session) anyAdmin(ctx context.Context) (*cloudflare.Client, error) {
	var problems []error
	for _, name := range adminTokens() {
		value, _, err := s.bao.Read(ctx, *s.site.Secret(name))
		if err == nil {
			var api *cloudflare.Client
			if api, err = s.provider(value); err == nil {
				if _, _, err = api.Verify(ctx); err == nil {
					return api, nil
				}
			}
		}
		problems = append(problems, fmt.Errorf("%s: %w", name, err))
	}
	return nil, plan.WithHint(fmt.Errorf("no token of the admin pair works: %w", errors.Join(problems...)),
		"site provider import-admin-pair --site=%s --token-a-file=A --token-b-file=B", s.site.Name)
}

// tokensInUse are the ids of all tokens that somebody may read: a candidate that was
// minted again, because others of its generation were lacking, is none. sure is
// false where one of the admin pair does not say which it is.
func (s *session) tokensInUse(ctx context.Context) (inUse map[string]bool, sure bool, err error) {
	inUse, sure = map[string]bool{}, true
	for _, name := range []string{site.StoreAdminID, site.StoreProxyID} {
		one := *s.site.Secret(site.ObjectStorageComponent + "." + name)
		states, err := s.bao.ObserveDeclared(ctx, []site.Secret{one})
		if err != nil {
			return nil, false, err
		}
		state := states[one.FullName()]
		rotation := state.Rotation()
		for _, version := range []int{rotation.Active, rotation.Candidate, rotation.Retiring} {
			// A candidate is noted before it is written.
			if there, written := state.Versions[version]; !written || there.Gone {
				continue
			}
			fields, err := s.bao.ReadGeneration(ctx, one, version)
			if err != nil {
				return nil, false, err
			}
			inUse[fields.Value.Reveal()] = true
		}
	}
	for _, name := range adminTokens() {
		value, _, err := s.bao.Read(ctx, *s.site.Secret(name))
		var none *openbao.NoValueError
		if errors.As(err, &none) {
			continue
		}
		if err != nil {
			return nil, false, err
		}
		api, err := s.provider(value)
		if err != nil {
			return nil, false, err
		}
		id, _, err := api.Verify(ctx)
		var refused *cloudflare.TokenError
		switch {
		case errors.As(err, &refused):
			sure = false
		case err != nil:
			return nil, false, err
		}
		inUse[id] = true
	}
	return inUse, sure, nil
}

// orphanTokens are tokens that an interrupted run of this site left at the provider.
func (s *session) orphanTokens(ctx context.Context, api *cloudflare.Client) ([]cloudflare.TokenInfo, error) {
	found, err := api.Tokens(ctx, bucket.Prefix(s.site.Name))
	if err != nil {
		return nil, err
	}
	inUse, sure, err := s.tokensInUse(ctx)
	if err != nil {
		return nil, err
	}
	byID := map[string]cloudflare.TokenInfo{}
	var tokens []bucket.Token
	for _, one := range found {
		// It may be the one that is refused, which may be so for a while only.
		if _, role, _, _ := bucket.ParseTokenName(one.Name); !sure && strings.HasPrefix(role, adminRole) {
			continue
		}
		byID[one.ID] = one
		tokens = append(tokens, bucket.Token{ID: one.ID, Name: one.Name})
	}
	var orphans []cloudflare.TokenInfo
	for _, one := range bucket.Orphans(tokens, inUse, s.site.Name) {
		orphans = append(orphans, byID[one.ID])
	}
	return orphans, nil
}

// sweepTokens revokes what nothing uses. It looks at what is, so that it may run
// on any path out and after any other.
func (s *session) sweepTokens(ctx context.Context) (int, error) {
	api, err := s.anyAdmin(ctx)
	if err != nil {
		return 0, err
	}
	orphans, err := s.orphanTokens(ctx, api)
	if err != nil {
		return 0, err
	}
	for i, one := range orphans {
		if err := api.Revoke(ctx, one.ID); err != nil {
			return i, err
		}
	}
	return len(orphans), nil
}

// sweepAtTheEnd is said before anything is minted: whatever becomes of this run,
// what it mints and does not keep is revoked.
func (s *session) sweepAtTheEnd() {
	s.temporary.hold("tokens at the provider that nothing uses", func(ctx context.Context) error {
		_, err := s.sweepTokens(ctx)
		return err
	})
}

// nextTokenGeneration is behind all that the provider has seen.
func (s *session) nextTokenGeneration(ctx context.Context, api *cloudflare.Client) (int, error) {
	found, err := api.Tokens(ctx, bucket.Prefix(s.site.Name))
	if err != nil {
		return 0, err
	}
	newest := 0
	for _, one := range found {
		if _, _, generation, ok := bucket.ParseTokenName(one.Name); ok {
			newest = max(newest, generation)
		}
	}
	return newest + 1, nil
}

// mintStoreKeys makes a fresh pair of keys and proves what each may do.
func (s *session) mintStoreKeys(ctx context.Context, progress plan.Progress) (map[string]secret.Value, error) {
	api, err := s.anyAdmin(ctx)
	if err != nil {
		return nil, err
	}
	name := s.site.ObjectStore.Bucket
	if created, err := api.EnsureBucket(ctx, name); err != nil {
		return nil, err
	} else if created {
		progress.Message("made bucket %s", name)
	}
	generation, err := s.nextTokenGeneration(ctx, api)
	if err != nil {
		return nil, err
	}
	s.sweepAtTheEnd()
	values := map[string]secret.Value{}
	for _, role := range []struct {
		name, id, key string
		write         bool
	}{{"admin", site.StoreAdminID, site.StoreAdminSecret, true}, {"proxy", site.StoreProxyID, site.StoreProxySecret, false}} {
		minted, err := api.MintStoreKey(ctx, bucket.TokenName(s.site.Name, role.name, generation), name, role.write)
		if err != nil {
			return nil, err
		}
		values[site.ObjectStorageComponent+"."+role.id] = secret.New(minted.TokenID)
		values[site.ObjectStorageComponent+"."+role.key] = minted.SecretAccessKey
	}
	progress.Message("minted the keys of generation %d", generation)
	return values, s.proveStoreKeys(ctx, values, progress)
}

// RotateAdminPair replaces both tokens of the admin pair, each through the other.
func RotateAdminPair(ctx context.Context, options Options) (plan.Result, error) {
	return run(ctx, options, func(s *session) []plan.Step {
		r := &rotation{session: s}
		return []plan.Step{
			check{title: "check inputs", run: func(ctx context.Context) error {
				if err := r.readRepository(ctx); err != nil {
					return err
				}
				return errors.Join(r.readMaterials(ctx), r.needProvider())
			}},
			r.connectWhatAnswers(),
			s.takeLock("rotate the provider's admin pair"),
			check{title: "open", run: func(ctx context.Context) error { return s.openOpenBaoFor(ctx, purposeDeploy) }},
			s.replaceAdmin(0),
			s.replaceAdmin(1),
		}
	})
}

// replaceAdmin replaces one of the pair through the other.
func (s *session) replaceAdmin(index int) plan.Step {
	names := adminTokens()
	return act{
		title: "token " + "ab"[index:index+1],
		plan: func(context.Context) ([]plan.Change, error) {
			return []plan.Change{{Action: plan.Update, Kind: catalogue.Kind, Target: names[index], Reason: "replaced through the other of the pair"}}, nil
		},
		apply: func(ctx context.Context, progress plan.Progress) error {
			return s.replaceOneAdmin(ctx, names[index], names[1-index], progress)
		},
	}
}

func (s *session) replaceOneAdmin(ctx context.Context, name, peer string, progress plan.Progress) error {
	one := *s.site.Secret(name)
	value, _, err := s.bao.Read(ctx, *s.site.Secret(peer))
	if err != nil {
		return err
	}
	api, err := s.provider(value)
	if err != nil {
		return err
	}
	states, err := s.bao.ObserveDeclared(ctx, []site.Secret{one})
	if err != nil {
		return err
	}
	state := states[name]
	previous, err := s.adminID(ctx, one)
	if err != nil {
		return err
	}
	// What an earlier run replaced and did not come to revoke; it is noted before it
	// is replaced.
	if noted := state.CustomMetadata[previousTokenField]; noted != previous {
		if err := s.revokePrevious(ctx, api, noted, progress); err != nil {
			return err
		}
	}
	generation, err := s.nextTokenGeneration(ctx, api)
	if err != nil {
		return err
	}
	s.sweepAtTheEnd()
	minted, err := api.MintAdmin(ctx, bucket.TokenName(s.site.Name, adminRole+name[len(name)-1:], generation))
	if err != nil {
		return err
	}
	progress.Message("minted token %s", minted.Name)
	fresh, err := s.provider(minted.Value)
	if err != nil {
		return err
	}
	if _, err := fresh.Await(ctx, mintedLimit); err != nil {
		return err
	}
	custom := maps.Clone(state.CustomMetadata)
	if custom == nil {
		custom = map[string]string{}
	}
	custom[previousTokenField] = previous
	if err := s.bao.SetMetadata(ctx, one, custom); err != nil {
		return err
	}
	if _, err := s.bao.WriteFields(ctx, one, openbao.Fields{Value: minted.Value}, state.Version, custom); err != nil {
		return err
	}
	return s.revokePrevious(ctx, api, previous, progress)
}

// adminID is the id of a stored admin token; empty for one that no longer works.
func (s *session) adminID(ctx context.Context, one site.Secret) (string, error) {
	value, _, err := s.bao.Read(ctx, one)
	if err != nil {
		return "", err
	}
	api, err := s.provider(value)
	if err != nil {
		return "", err
	}
	id, _, err := api.Verify(ctx)
	var refused *cloudflare.TokenError
	if err != nil && !errors.As(err, &refused) {
		return "", err // the provider is away, which says nothing about the token
	}
	if err != nil {
		s.options.Warn(fmt.Sprintf("%s no longer works and is replaced: %v", one.FullName(), err))
		return "", nil
	}
	return id, nil
}

func (s *session) revokePrevious(ctx context.Context, api *cloudflare.Client, id string, progress plan.Progress) error {
	if id == "" {
		return nil
	}
	if err := api.Revoke(ctx, id); err != nil {
		return err
	}
	progress.Message("revoked token %s", id)
	return nil
}

package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nomad-site/site/internal/adapter/objectstore"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/writesession"
)

// StoreKeysAlias is what `site secrets rotate` calls the four keys of the object store.
const StoreKeysAlias = "object-storage-provider"

// mintedLimit bounds how long a key that was minted may take to work everywhere:
// the provider says that it takes a while.
const mintedLimit = 90 * time.Second

// probeKey is what new keys are tried with.
const probeKey = "probe/keys"

// withStoreKeys has the alias stand for the keys.
func withStoreKeys(names []string) []string {
	var all []string
	for _, name := range names {
		if name == StoreKeysAlias {
			all = append(all, storeKeys()...)
			continue
		}
		all = append(all, name)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// storeBucket is the site's bucket by one pair of keys.
func (s *session) storeBucket(name string, id, key secret.Value) (*objectstore.Bucket, error) {
	declared := s.site.ObjectStore
	return objectstore.New(objectstore.Options{
		Endpoint: declared.Endpoint, Region: declared.Region, Bucket: name, PathStyle: declared.PathStyle,
		Keys: func(context.Context, bool) (string, secret.Value, error) { return id.Reveal(), key, nil },
	})
}

// proveStoreKeys proves what each pair may do, and what it may not: nothing is
// stored that does not work, or that could do more than it should.
func (s *session) proveStoreKeys(ctx context.Context, values map[string]secret.Value, progress plan.Progress) error {
	of := func(name string) secret.Value { return values[site.ObjectStorageComponent+"."+name] }
	name := s.site.ObjectStore.Bucket
	admin, err := s.storeBucket(name, of(site.StoreAdminID), of(site.StoreAdminSecret))
	if err != nil {
		return err
	}
	proxy, err := s.storeBucket(name, of(site.StoreProxyID), of(site.StoreProxySecret))
	if err != nil {
		return err
	}
	elsewhere, err := s.storeBucket(name+"-of-another-site", of(site.StoreAdminID), of(site.StoreAdminSecret))
	if err != nil {
		return err
	}
	prefix := s.site.Name + "/" + probeKey
	progress.Message("waiting until the keys work")
	err = retry.Until(ctx, "the new keys to work", min(mintedLimit, s.left()), func(ctx context.Context) error {
		_, err := admin.Probe(ctx, prefix)
		return errors.Join(err, proxy.Check(ctx, prefix))
	})
	if err != nil {
		return plan.WithHint(err, "nothing was stored; see `site provider doctor --site=%s`", s.site.Name)
	}
	var denied *writesession.DeniedError
	switch err := proxy.Put(ctx, prefix, []byte("x"), false); {
	case err == nil:
		return errors.New("the hosts' key should only read, and writing with it succeeded")
	case !errors.As(err, &denied):
		return fmt.Errorf("the hosts' key should only read, and writing with it ended with: %w", err)
	}
	// Many stores say of a bucket that is not there that it is not there: then this
	// tells only that the key is not good for everything under any name.
	err = elsewhere.Check(ctx, prefix)
	var away *writesession.UnavailableError
	switch {
	case err == nil:
		return fmt.Errorf("the service's key should reach bucket %s only, and it reaches another", name)
	case errors.As(err, &away): // which proves nothing
		return err
	}
	return nil
}

// movesStoreKeys reports whether the four keys are among what is rotated.
func (r *rotation) movesStoreKeys() bool {
	return slices.ContainsFunc(r.secrets, func(one *rotating) bool { return isStoreKey(one.Secret) })
}

// isStoreKey: the provider makes it.
func isStoreKey(one site.Secret) bool { return one.ProducedBy != nil && one.ProducedBy.Provider != "" }

// oneGeneration has all keys minted again where one of them lacks its candidate:
// a pair of which the halves were minted by two runs is none.
func (r *rotation) oneGeneration() {
	if !slices.ContainsFunc(r.secrets, func(one *rotating) bool { return isStoreKey(one.Secret) && one.lacksCandidate() }) {
		return
	}
	for _, one := range r.secrets {
		one.mintAgain = isStoreKey(one.Secret)
	}
}

// movesKeys reports whether the keys begin a generation, all four of them. While one
// is unfinished they do only where it lacks a candidate of some.
func (r *rotation) movesKeys(secrets []site.Secret, asks func(site.Secret) bool) bool {
	asked, candidate, running := false, false, false
	for _, one := range secrets {
		if !isStoreKey(one) {
			continue
		}
		state := r.entries[one.FullName()].Rotation()
		asked, candidate, running = asked || asks(one), candidate || state.Candidate > 0, running || state.Running()
	}
	return candidate || asked && !running
}

// storeKey gives one of the four keys, which are minted together.
func (r *rotation) storeKey(ctx context.Context, name string, progress plan.Progress) (secret.Value, error) {
	if r.minted == nil {
		minted, err := r.mintStoreKeys(ctx, progress)
		if err != nil {
			return secret.Value{}, err
		}
		r.minted = minted
	}
	return r.minted[name], nil
}

// firstStoreKeys gives the keys their first generation, which nothing runs on yet,
// and again where a run was cut short before all four were there.
func (r *rotation) firstStoreKeys() plan.Step {
	return act{
		title: "first keys",
		plan: func(context.Context) ([]plan.Change, error) {
			if !r.lacksStoreKeys() {
				return nil, nil
			}
			return []plan.Change{{Action: plan.Create, Kind: catalogue.Kind, Target: StoreKeysAlias, Reason: "the site has no keys of its object store yet"}}, nil
		},
		apply: func(ctx context.Context, progress plan.Progress) error {
			minted, err := r.mintStoreKeys(ctx, progress)
			if err != nil {
				return err
			}
			for _, name := range storeKeys() {
				one := *r.site.Secret(name)
				version, err := r.bao.WriteFields(ctx, one, r.fieldsOf(one, minted[name], r.entries[name]), r.entries[name].Version, nil)
				if err != nil {
					return err
				}
				progress.Message("%s: generation %d is written", name, version)
			}
			if _, err := r.observeSecrets(ctx, r.site.Secrets()); err != nil {
				return err
			}
			return r.keepSummary(ctx)
		},
	}
}

// asksStoreKeys: one of them was named, which stands for all.
func (r *rotation) asksStoreKeys() bool {
	return slices.ContainsFunc(storeKeys(), func(name string) bool { return slices.Contains(r.choice.Names, name) })
}

// lacksStoreKeys: they were asked for, and not all four are there.
func (r *rotation) lacksStoreKeys() bool {
	if !r.asksStoreKeys() || r.needProvider() != nil {
		return false
	}
	return !r.hasStoreKeys()
}

// hasStoreKeys reports whether all four are there.
func (r *rotation) hasStoreKeys() bool {
	return !slices.ContainsFunc(storeKeys(), func(name string) bool { return !r.entries[name].HasValue() })
}

// sweepProvider revokes the tokens of generations that are gone.
func (r *rotation) sweepProvider() plan.Step {
	return where{check{title: "provider tokens", run: func(ctx context.Context) error {
		revoked, err := r.sweepTokens(ctx)
		if revoked > 0 {
			observing{r.options.Reporter, "provider tokens"}.Message("revoked %d tokens that nothing uses", revoked)
		}
		return err
	}}, func() bool {
		return r.needProvider() == nil && r.bao != nil && (r.movesStoreKeys() || r.asksStoreKeys())
	}}
}

// storeStatus is what `site-host store status` says of its keys.
type storeStatus struct {
	KeyGeneration int `json:"key_generation"`
}

// hostsBehind names the hosts that still read the store with an older key, once they
// were told that there is a newer one.
func (r *rotation) hostsBehind(ctx context.Context, one *rotating) (string, error) {
	if one.Name != site.StoreProxyID && one.Name != site.StoreProxySecret {
		return "", nil
	}
	behind := ""
	err := retry.Until(ctx, "hosts to take the new key of the store", max(min(endingLimit, r.left()-drainMargin), time.Second), func(ctx context.Context) error {
		behind = ""
		for _, h := range r.hosts {
			took, err := r.tookStoreKey(ctx, h)
			if err != nil {
				return retry.Permanent(err)
			}
			if !took {
				behind = "host " + h.Name + " still reads the store with the old key"
				return errors.New(behind)
			}
		}
		return nil
	})
	var late *retry.TimeoutError
	if errors.As(err, &late) && behind != "" {
		err = nil
	}
	return behind, err
}

// tookStoreKey has a host that is behind ask for its key anew; it would within a
// minute all the same.
func (r *rotation) tookStoreKey(ctx context.Context, h *remoteHost) (bool, error) {
	for again := false; ; again = true {
		var status storeStatus
		if err := h.siteHost(ctx, nil, &status, "store", "status", "--store", host.StorePath); err != nil {
			return false, err
		}
		// A host that never pulled has no key that could be taken from it.
		if status.KeyGeneration == 0 || status.KeyGeneration >= r.proxyGeneration() {
			return true, nil
		}
		if again {
			return false, nil
		}
		// Why it cannot is no reason to end: it is said that the host is behind.
		_ = h.siteHost(ctx, nil, nil, "store", "refresh")
	}
}

// proxyGeneration is what hosts report: the older of both halves, which differ
// where a run was cut short between them.
func (r *rotation) proxyGeneration() int {
	active := func(name string) int {
		return r.entries[site.ObjectStorageComponent+"."+name].Rotation().Active
	}
	return min(active(site.StoreProxyID), active(site.StoreProxySecret))
}

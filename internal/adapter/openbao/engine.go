package openbao

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
)

// ObserveEngine reads what the engine has: all names, and the content of what
// is wanted.
func (c *Client) ObserveEngine(ctx context.Context, want reconcile.Engine) (reconcile.EngineState, error) {
	observation := observation{client: c, state: reconcile.EngineState{
		Audit: map[string]reconcile.AuditDevice{}, Mounts: map[string]reconcile.Mount{}, Auth: map[string]reconcile.Mount{},
		Policies: map[string]string{}, Roles: map[string]reconcile.Role{},
	}}
	// Two rounds, each side by side: the names, then the content of what is there.
	names, namesCtx := errgroup.WithContext(ctx)
	names.SetLimit(parallel)
	names.Go(func() error { return observation.audit(namesCtx) })
	names.Go(func() error { return observation.mounts(namesCtx, "sys/mounts", observation.state.Mounts) })
	names.Go(func() error { return observation.mounts(namesCtx, "sys/auth", observation.state.Auth) })
	names.Go(func() error { return observation.policies(namesCtx) })
	for _, mount := range want.Auth {
		if mount.Path != reconcile.RotatorsMount {
			names.Go(func() error { return observation.roles(namesCtx, mount.Path) })
		}
	}
	if err := names.Wait(); err != nil {
		return reconcile.EngineState{}, err
	}
	_, rotators := observation.state.Auth[reconcile.RotatorsMount] // while nobody else looks at the state
	contents, contentsCtx := errgroup.WithContext(ctx)
	contents.SetLimit(parallel)
	for _, mount := range want.Mounts {
		contents.Go(func() error {
			return observation.config(contentsCtx, observation.state.Mounts, mount, mount.Path+"/config")
		})
	}
	for _, mount := range want.Auth {
		contents.Go(func() error {
			return observation.config(contentsCtx, observation.state.Auth, mount, "auth/"+mount.Path+"/config")
		})
	}
	if rotators {
		contents.Go(func() error { return observation.rotators(contentsCtx, want) })
	}
	for name := range want.Policies {
		contents.Go(func() error { return observation.policy(contentsCtx, name) })
	}
	for _, role := range want.Roles {
		if role.Mount != reconcile.RotatorsMount {
			contents.Go(func() error { return observation.role(contentsCtx, role) })
		}
	}
	if err := contents.Wait(); err != nil {
		return reconcile.EngineState{}, err
	}
	return observation.state, nil
}

// observation collects the state from many requests at once.
type observation struct {
	client *Client
	mutex  sync.Mutex
	state  reconcile.EngineState
}

// rotators looks at the roles of those that only rotate, where their mount is
// there. It may be without being wanted, and an operator's policy from before
// there were any does not let them look where it is not.
func (o *observation) rotators(ctx context.Context, want reconcile.Engine) error {
	if err := o.roles(ctx, reconcile.RotatorsMount); err != nil {
		return err
	}
	for _, role := range want.Roles {
		if role.Mount != reconcile.RotatorsMount {
			continue
		}
		if err := o.role(ctx, role); err != nil {
			return err
		}
	}
	return nil
}

func (o *observation) audit(ctx context.Context) error {
	data, err := o.client.read(ctx, "sys/audit")
	if err != nil {
		return err
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	for slashed := range data {
		device := object(data, slashed)
		path := strings.TrimSuffix(slashed, "/")
		o.state.Audit[path] = reconcile.AuditDevice{Path: path, Type: text(device, "type"), Options: object(device, "options")}
	}
	return nil
}

func (o *observation) mounts(ctx context.Context, from string, into map[string]reconcile.Mount) error {
	data, err := o.client.read(ctx, from)
	if err != nil {
		return err
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	for slashed := range data {
		mount := object(data, slashed)
		tune := reconcile.Settings{"description": mount["description"], "options": mount["options"]}
		maps.Copy(tune, object(mount, "config"))
		path := strings.TrimSuffix(slashed, "/")
		into[path] = reconcile.Mount{Path: path, Type: text(mount, "type"), Tune: tune}
	}
	return nil
}

func (o *observation) policies(ctx context.Context) error {
	names, err := o.client.list(ctx, "sys/policies/acl")
	if err != nil {
		return err
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	for _, name := range names {
		o.state.Policies[name] = ""
	}
	return nil
}

func (o *observation) roles(ctx context.Context, mount string) error {
	names, err := o.client.list(ctx, "auth/"+mount+"/role")
	if err != nil {
		return err
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	for _, name := range names {
		role := reconcile.Role{Mount: mount, Name: name}
		o.state.Roles[role.Target()] = role
	}
	return nil
}

func (o *observation) config(ctx context.Context, mounts map[string]reconcile.Mount, want reconcile.Mount, path string) error {
	o.mutex.Lock()
	found, exists := mounts[want.Path]
	o.mutex.Unlock()
	if !exists || found.Type != want.Type {
		return nil
	}
	data, err := o.client.read(ctx, path)
	if err != nil {
		return err
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	found.Config = data
	mounts[want.Path] = found
	return nil
}

func (o *observation) policy(ctx context.Context, name string) error {
	o.mutex.Lock()
	_, exists := o.state.Policies[name]
	o.mutex.Unlock()
	if !exists {
		return nil
	}
	data, err := o.client.read(ctx, "sys/policies/acl/"+name)
	if err != nil {
		return err
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.state.Policies[name] = text(data, "policy")
	return nil
}

func (o *observation) role(ctx context.Context, want reconcile.Role) error {
	o.mutex.Lock()
	found, exists := o.state.Roles[want.Target()]
	o.mutex.Unlock()
	if !exists {
		return nil
	}
	data, err := o.client.read(ctx, rolePath(want))
	if err != nil {
		return err
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	found.Settings = data
	o.state.Roles[want.Target()] = found
	return nil
}

func rolePath(role reconcile.Role) string {
	return fmt.Sprintf("auth/%s/role/%s", role.Mount, role.Name)
}

// named finds the wanted mount of a change.
func named(mounts []reconcile.Mount, path string) (reconcile.Mount, bool) {
	i := slices.IndexFunc(mounts, func(mount reconcile.Mount) bool { return mount.Path == path })
	if i < 0 {
		return reconcile.Mount{}, false
	}
	return mounts[i], true
}

package openbao

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/plan"
	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/retry"
)

// mountLimit bounds how long a new mount may take to be of use.
const mountLimit = 30 * time.Second

// AuditByFileError says that the product takes audit devices from its
// configuration file only.
type AuditByFileError struct {
	Path string
	Err  error
}

func (e *AuditByFileError) Error() string {
	return fmt.Sprintf("audit device %s cannot be changed through the API: %v", e.Path, e.Err)
}
func (e *AuditByFileError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *AuditByFileError) Hint() string {
	return fmt.Sprintf("declare it in the server's configuration file: audit \"file\" %q { options { file_path = … } }; then restart its job", e.Path)
}

// ApplyEngine makes the changes of a DiffEngine or StrayEngine, in their order.
func (c *Client) ApplyEngine(ctx context.Context, want reconcile.Engine, have reconcile.EngineState, changes []plan.Change, progress plan.Progress) error {
	for batch := range batches(changes) {
		group, groupCtx := errgroup.WithContext(ctx)
		group.SetLimit(parallel)
		for _, change := range batch {
			group.Go(func() error {
				message(progress, "%s", change)
				if err := c.applyOne(groupCtx, want, have, change); err != nil {
					return fmt.Errorf("%s %s %s: %w", change.Action, change.Kind, change.Target, err)
				}
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
	}
	return nil
}

// batches are runs of changes of one kind: those may be made side by side. The
// operators' own policy is alone: it may have to allow the changes that follow.
func batches(changes []plan.Change) func(yield func([]plan.Change) bool) {
	return func(yield func([]plan.Change) bool) {
		for start := 0; start < len(changes); {
			end := start + 1
			for end < len(changes) && changes[end].Kind == changes[start].Kind && !operatorPolicy(changes[start]) && !operatorPolicy(changes[end]) {
				end++
			}
			if !yield(changes[start:end]) {
				return
			}
			start = end
		}
	}
}

func operatorPolicy(change plan.Change) bool {
	return change.Kind == reconcile.KindPolicy && change.Target == reconcile.OperatorPolicy
}

func (c *Client) applyOne(ctx context.Context, want reconcile.Engine, have reconcile.EngineState, change plan.Change) error {
	if change.Action == plan.Delete {
		return c.deleteOne(ctx, change)
	}
	switch change.Kind {
	case reconcile.KindAudit:
		i := slices.IndexFunc(want.Audit, func(device reconcile.AuditDevice) bool { return device.Path == change.Target })
		if i >= 0 {
			return c.applyAudit(ctx, want.Audit[i], have)
		}
	case reconcile.KindMount:
		if mount, wanted := named(want.Mounts, change.Target); wanted {
			found, exists := have.Mounts[mount.Path]
			return c.applyMount(ctx, mount, found, exists, "sys/mounts/"+mount.Path, mount.Path+"/config")
		}
	case reconcile.KindAuth:
		if mount, wanted := named(want.Auth, change.Target); wanted {
			found, exists := have.Auth[mount.Path]
			return c.applyMount(ctx, mount, found, exists, "sys/auth/"+mount.Path, "auth/"+mount.Path+"/config")
		}
	case reconcile.KindPolicy:
		if rules, wanted := want.Policies[change.Target]; wanted {
			_, err := c.write(ctx, "sys/policies/acl/"+change.Target, map[string]any{"policy": rules})
			return err
		}
	case reconcile.KindRole:
		for _, role := range want.Roles {
			if role.Target() == change.Target {
				_, err := c.write(ctx, rolePath(role), role.Settings)
				return err
			}
		}
	}
	return fmt.Errorf("the site wants no such %s", change.Kind)
}

func (c *Client) deleteOne(ctx context.Context, change plan.Change) error {
	switch change.Kind {
	case reconcile.KindPolicy:
		return c.remove(ctx, "sys/policies/acl/"+change.Target)
	case reconcile.KindRole:
		mount, name, _ := strings.Cut(change.Target, "/")
		return c.remove(ctx, rolePath(reconcile.Role{Mount: mount, Name: name}))
	}
	return fmt.Errorf("a %s is never deleted", change.Kind)
}

func (c *Client) applyAudit(ctx context.Context, device reconcile.AuditDevice, have reconcile.EngineState) error {
	path := "sys/audit/" + device.Path
	options := map[string]any{}
	for name, value := range device.Options {
		if value != "" { // an empty option is one that is not set
			options[name] = value
		}
	}
	if _, exists := have.Audit[device.Path]; exists {
		// A device cannot be changed, only made anew.
		if err := c.remove(ctx, path); err != nil {
			return auditError(device.Path, err)
		}
	}
	_, err := c.write(ctx, path, map[string]any{"type": device.Type, "options": options})
	return auditError(device.Path, err)
}

func auditError(path string, err error) error {
	if statusOf(err) == http.StatusBadRequest && strings.Contains(err.Error(), "via API") {
		return &AuditByFileError{Path: path, Err: bare(err)}
	}
	return err
}

func (c *Client) applyMount(ctx context.Context, want, have reconcile.Mount, exists bool, path, configPath string) error {
	if exists && have.Type != want.Type {
		return plan.WithHint(fmt.Errorf("the path is taken by a mount of type %s, and %s is wanted", have.Type, want.Type),
			"site moves nothing of others: move the mount to another path, then deploy again")
	}
	if !exists {
		document := map[string]any{"type": want.Type, "description": want.Tune["description"]}
		if options, set := want.Tune["options"]; set {
			document["options"] = options
		}
		if _, err := c.write(ctx, path, document); err != nil {
			return err
		}
	} else if _, err := c.write(ctx, path+"/tune", tuneDocument(want.Tune)); err != nil {
		return err
	}
	if len(want.Config) == 0 {
		return nil
	}
	// A new mount is upgraded behind the scenes before it is of use.
	return retry.Until(ctx, "mount "+want.Path+" to take its configuration", mountLimit, func(ctx context.Context) error {
		_, err := c.write(ctx, configPath, want.Config)
		if err != nil && !strings.Contains(err.Error(), "Upgrading from non-versioned") {
			return retry.Permanent(configError(want, err))
		}
		return err
	})
}

func configError(want reconcile.Mount, err error) error {
	if strings.Contains(err.Error(), "error checking jwks URL") {
		return plan.WithHint(err, "the secrets engine must reach Nomad at %v; see that Nomad runs on its host", want.Config["jwks_url"])
	}
	if strings.Contains(err.Error(), "exactly one of 'jwt_validation_pubkeys'") {
		return plan.WithHint(err, "declare at least one operator with a public key")
	}
	return err
}

// tuneDocument spells durations of zero as the engine wants them.
func tuneDocument(tune reconcile.Settings) map[string]any {
	document := map[string]any(maps.Clone(tune))
	for _, field := range []string{"default_lease_ttl", "max_lease_ttl"} {
		if document[field] == 0 {
			document[field] = "system"
		}
	}
	return document
}

package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/seal"
)

// sealInitMaterial generates what must exist before there is a secrets engine,
// and keeps it in git and on the server hosts before anything uses it.
func (s *session) sealInitMaterial() plan.Step {
	type copies struct {
		local bool
		hosts perHost[[]byte]
	}
	local := func() string { return filepath.Join(s.root, filepath.FromSlash(s.initPath())) }
	return &plan.Reconciler[[]byte, copies]{
		Title: "init material",
		Desire: func(ctx context.Context) ([]byte, error) {
			if s.rootToken.IsZero() {
				return nil, plan.WithHint(errors.New("a bootstrap needs the site root token"),
					"give it with --root-token-file=FILE; make one with `site root-token new FILE`")
			}
			if s.material != nil {
				return s.material.sealed, nil
			}
			if err := s.recoverMaterial(ctx); err != nil {
				return nil, err
			}
			if s.material != nil {
				return s.material.sealed, nil
			}
			material, err := seal.New(s.site.Name, time.Now())
			if err != nil {
				return nil, err
			}
			sealed, err := seal.Seal(material, s.rootToken)
			if err != nil {
				return nil, err
			}
			s.material = &materialState{Material: material, sealed: sealed}
			return sealed, nil
		},
		Observe: func(ctx context.Context, desired []byte) (copies, error) {
			actual := copies{hosts: perHost[[]byte]{}}
			content, err := os.ReadFile(local())
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return actual, fmt.Errorf("init material: %w", err)
			}
			actual.local = bytes.Equal(content, desired)
			var mutex sync.Mutex
			err = s.each(ctx, s.servers(), func(ctx context.Context, h *remoteHost) error {
				content, err := h.readFile(ctx, host.InitPath)
				mutex.Lock()
				defer mutex.Unlock()
				actual.hosts[h.Name] = content
				return err
			})
			return actual, err
		},
		Diff: func(desired []byte, actual copies) []plan.Change {
			var changes []plan.Change
			if !actual.local {
				changes = append(changes, plan.Change{Action: plan.Create, Kind: "file", Target: s.initPath(), Reason: "the sealed init material belongs in git"})
			}
			for _, h := range s.servers() {
				change := plan.Change{Action: plan.Create, Kind: "file", Host: h.Name, Target: host.InitPath, Reason: "missing"}
				switch have := actual.hosts[h.Name]; {
				case bytes.Equal(have, desired):
					continue
				case len(have) > 0:
					change.Action, change.Reason = plan.Update, "differs from "+s.initPath()
				}
				changes = append(changes, change)
			}
			return changes
		},
		Converge: func(ctx context.Context, desired []byte, actual copies, _ []plan.Change, _ plan.Progress) error {
			for name, have := range actual.hosts {
				if len(have) == 0 || bytes.Equal(have, desired) {
					continue
				}
				// Another material may be what the site runs on: it must open, and be the same.
				existing, err := seal.Open(have, s.rootToken, s.site.Name, name+":"+host.InitPath)
				if err != nil {
					return err
				}
				if existing.NomadManagementToken.Reveal() != s.material.NomadManagementToken.Reveal() {
					return plan.WithHint(fmt.Errorf("%s on %s and %s hold different init material", host.InitPath, name, s.initPath()),
						"the host's copy is what the site runs on: move %s away and run this again", s.initPath())
				}
			}
			if !actual.local {
				if err := writePrivate(local(), desired); err != nil {
					return err
				}
				s.warnUncommitted(ctx)
			}
			return s.each(ctx, s.servers(), func(ctx context.Context, h *remoteHost) error {
				if bytes.Equal(actual.hosts[h.Name], desired) {
					return nil
				}
				return h.siteHost(ctx, desired, nil, "file", "put", host.InitPath, "--mode", "0600")
			})
		},
	}
}

// recoverMaterial takes the host's copy where the work tree has none, as after
// a fresh clone of a commit that lacks it.
func (s *session) recoverMaterial(ctx context.Context) error {
	for _, h := range s.servers() {
		sealed, err := h.readFile(ctx, host.InitPath)
		if err != nil {
			return err
		}
		if len(sealed) > 0 {
			return s.openMaterial(sealed, h.Name+":"+host.InitPath)
		}
	}
	return nil
}

// writePrivate writes a file that is private from its first byte.
func writePrivate(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	file, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = file.Write(content)
	err = errors.Join(err, file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		_ = os.Remove(file.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

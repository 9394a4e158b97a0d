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

// copies are the sealed init material as it lies in the work tree and on hosts.
type copies struct {
	local []byte
	hosts perHost[[]byte]
}

// sealInitMaterial generates what must exist before there is a secrets engine,
// and keeps it in git and on the server hosts before anything uses it. Of
// copies that differ, the newest generation counts: a run that was cut short
// had written only some of them.
func (s *session) sealInitMaterial() plan.Step {
	return &plan.Reconciler[[]byte, copies]{
		Title: "init material",
		Desire: func(ctx context.Context) ([]byte, error) {
			if s.rootToken.IsZero() {
				return nil, plan.WithHint(errors.New("a bootstrap needs the site root token"),
					"give it with --root-token-file=FILE; make one with `site root-token new`")
			}
			if err := s.newestMaterial(ctx); err != nil {
				return nil, err
			}
			if s.material == nil {
				material, err := seal.New(s.site.Name, time.Now())
				if err != nil {
					return nil, err
				}
				sealed, err := seal.Seal(material, s.recipients()...)
				if err != nil {
					return nil, err
				}
				s.material = &materialState{Material: material, sealed: sealed}
			}
			return s.material.sealed, nil
		},
		Observe: func(ctx context.Context, _ []byte) (copies, error) { return s.materialCopies(ctx) },
		Diff: func(desired []byte, actual copies) []plan.Change {
			var changes []plan.Change
			add := func(hostName, path string, have []byte, reason string) {
				change := plan.Change{Action: plan.Create, Kind: "file", Host: hostName, Target: path, Reason: reason}
				if len(have) > 0 {
					change.Action, change.Reason = plan.Update, "older than another copy"
				}
				if !bytes.Equal(have, desired) {
					changes = append(changes, change)
				}
			}
			add("", s.initPath(), actual.local, "the sealed init material belongs in git")
			for _, h := range s.servers() {
				add(h.Name, host.InitPath, actual.hosts[h.Name], "missing")
			}
			return changes
		},
		Converge: func(ctx context.Context, _ []byte, _ copies, _ []plan.Change, _ plan.Progress) error {
			return s.keepMaterial(ctx)
		},
	}
}

func (s *session) materialCopies(ctx context.Context) (copies, error) {
	actual := copies{hosts: perHost[[]byte]{}}
	var err error
	actual.local, err = os.ReadFile(s.localMaterial())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return actual, fmt.Errorf("init material: %w", err)
	}
	var mutex sync.Mutex
	err = s.each(ctx, s.servers(), func(ctx context.Context, h *remoteHost) error {
		content, err := h.readFile(ctx, host.InitPath)
		mutex.Lock()
		defer mutex.Unlock()
		actual.hosts[h.Name] = content
		return err
	})
	return actual, err
}

func (s *session) localMaterial() string {
	return filepath.Join(s.root, filepath.FromSlash(s.initPath()))
}

// newestMaterial takes a host's copy where the work tree has none, as after a
// fresh clone of a commit that lacks it, or an older one.
func (s *session) newestMaterial(ctx context.Context) error {
	actual, err := s.materialCopies(ctx)
	if err != nil {
		return err
	}
	for _, h := range s.servers() {
		sealed := actual.hosts[h.Name]
		if len(sealed) == 0 || s.material != nil && bytes.Equal(sealed, s.material.sealed) {
			continue
		}
		theirs, err := seal.Open(sealed, s.openers(), s.site.Name, h.Name+":"+host.InitPath)
		if err != nil {
			return err
		}
		switch {
		case s.material == nil || theirs.Generation > s.material.Generation:
			if s.material != nil && !theirs.SameSite(s.material.Material) {
				return s.otherMaterial(h)
			}
			s.material = &materialState{Material: theirs, sealed: sealed}
		case !theirs.SameSite(s.material.Material):
			return s.otherMaterial(h)
		}
	}
	return nil
}

func (s *session) otherMaterial(h *remoteHost) error {
	return plan.WithHint(fmt.Errorf("%s on %s and %s hold different init material", host.InitPath, h.Name, s.initPath()),
		"the host's copy is what the site runs on: move %s away and run this again", s.initPath())
}

// changeMaterial seals a changed material and keeps it everywhere before it is used.
func (s *session) changeMaterial(ctx context.Context, change func(*seal.Material)) error {
	material := s.material.Material
	change(&material)
	material.Generation++
	sealed, err := seal.Seal(material, s.recipients()...)
	if err != nil {
		return err
	}
	s.material = &materialState{Material: material, sealed: sealed}
	return s.keepMaterial(ctx)
}

// keepMaterial writes the material to every place that has another one.
func (s *session) keepMaterial(ctx context.Context) error {
	actual, err := s.materialCopies(ctx)
	if err != nil {
		return err
	}
	sealed := s.material.sealed
	if !bytes.Equal(actual.local, sealed) {
		if err := writePrivate(s.localMaterial(), sealed); err != nil {
			return err
		}
		s.warnUncommitted(ctx)
	}
	return s.each(ctx, s.servers(), func(ctx context.Context, h *remoteHost) error {
		if bytes.Equal(actual.hosts[h.Name], sealed) {
			return nil
		}
		return h.siteHost(ctx, sealed, nil, "file", "put", host.InitPath, "--mode", "0600")
	})
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

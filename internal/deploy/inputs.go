package deploy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nomad-site/site/internal/adapter/builder"
	"github.com/nomad-site/site/internal/adapter/debian"
	"github.com/nomad-site/site/internal/adapter/toolchain"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

// platformArtifacts are what every host runs, whatever the site's components.
type platformArtifacts struct {
	lock debian.Lock
	debs []debian.Deb
	// executables by tool name.
	executables map[string]builder.LocalBlob
	ansible     string
}

// The pinned tools that run on hosts.
const (
	toolNomad   = "nomad"
	toolDriver  = "nomad-driver-podman"
	toolAnsible = "ansible"
)

// hostPlatform is what hosts are until one says otherwise: artifacts are built
// before the first remote access.
const hostPlatform = "linux/amd64"

// checkInputs reads everything local and builds the artifacts: whatever is
// wrong here is said before any host is touched.
func (s *session) checkInputs() plan.Step {
	return check{title: "check inputs", run: func(ctx context.Context) error {
		if err := s.readRepository(ctx); err != nil {
			return err
		}
		if err := s.readMaterial(); err != nil {
			return err
		}
		return errors.Join(s.collectPlatform(ctx), s.buildArtifacts(ctx))
	}}
}

// hintTools makes one command of the hints for all tools that are missing.
func hintTools(err error) error {
	var names []string
	plan.EachError(err, func(one error) bool {
		missing, ok := one.(*toolchain.NotInstalledError) //nolint:errorlint // each node of the tree is looked at
		if ok && missing.Platform == toolchain.Host() && !slices.Contains(names, missing.Name) {
			names = append(names, missing.Name)
		}
		return true
	})
	if len(names) < 2 {
		return err
	}
	return plan.WithHint(err, "run: site tool install %s", strings.Join(names, " "))
}

func (s *session) collectPlatform(ctx context.Context) error {
	platform, err := toolchain.ParsePlatform(hostPlatform)
	if err != nil {
		return err
	}
	s.platform.executables = map[string]builder.LocalBlob{}
	var problems []error
	for _, name := range []string{toolNomad, toolDriver} {
		built, err := s.buildOne(ctx, "", site.Artifact{Name: name, Kind: site.File, Tool: name, Executable: name})
		if err != nil {
			problems = append(problems, err)
			continue
		}
		s.platform.executables[name] = built.Blobs[0]
	}
	if s.platform.ansible, err = s.options.Platform.Tools.Which(toolAnsible, toolchain.Host()); err != nil {
		problems = append(problems, err)
	}
	lock, err := s.readLock(platform.Architecture)
	if err != nil {
		return hintTools(errors.Join(append(problems, err)...))
	}
	s.platform.lock = lock
	if len(problems) > 0 {
		return hintTools(errors.Join(problems...)) // before anything is fetched
	}
	s.platform.debs, err = debian.Bundle(ctx, lock, filepath.Join(s.options.CacheDir, "debs"), nil)
	return err
}

func (s *session) readLock(architecture string) (debian.Lock, error) {
	name := "debs/debian-12-" + architecture + ".lock.json"
	content, err := fs.ReadFile(s.options.Platform.Bootstrap, name)
	if err != nil {
		return debian.Lock{}, plan.WithHint(fmt.Errorf("no locked packages for Debian 12 on %s", architecture), "supported is amd64")
	}
	return debian.ParseLock(content)
}

// buildArtifacts builds what the active components need, all problems in one error.
func (s *session) buildArtifacts(ctx context.Context) error {
	var problems []error
	for _, component := range s.site.Components {
		if !s.active(component.Name) {
			continue
		}
		for _, artifact := range component.Artifacts {
			built, err := s.buildOne(ctx, component.Folder, artifact)
			if err != nil {
				problems = append(problems, fmt.Errorf("component %s: %w", component.Name, err))
				continue
			}
			if built.FromWorkTree && artifact.SHA256 == "" {
				s.options.Warn(fmt.Sprintf("artifact %s of component %s is built from %s", artifact.Name, component.Name, built.Source))
			}
			s.built[component.Name] = append(s.built[component.Name], built)
		}
	}
	return errors.Join(problems...)
}

func (s *session) buildOne(ctx context.Context, folder string, artifact site.Artifact) (builder.Built, error) {
	tools := s.options.Platform.Tools
	return builder.Build(ctx, builder.Request{
		Site: s.site.Name, RepoRoot: s.root, Tree: s.tree, TreeID: s.treeID, Artifact: artifact,
		ComponentFolder: folder, Platform: hostPlatform, CacheDir: s.options.CacheDir,
		Tool: func(_ context.Context, name string) (string, error) {
			platform, err := toolchain.ParsePlatform(hostPlatform)
			if err != nil {
				return "", err
			}
			executable, err := tools.Which(name, platform)
			if err != nil {
				return "", err
			}
			return filepath.Dir(filepath.Dir(executable)), nil
		},
		Debs: s.debFiles, Embedded: s.options.Platform.Embedded,
	})
}

// debFiles gives the paths of a locked closure, for an image made of it.
func (s *session) debFiles(ctx context.Context, packages []string) ([]string, error) {
	lock, err := s.imageLock(packages)
	if err != nil {
		return nil, err
	}
	debs, err := debian.Bundle(ctx, lock, filepath.Join(s.options.CacheDir, "debs"), nil)
	if err != nil {
		return nil, err
	}
	paths := make([]string, len(debs))
	for i, deb := range debs {
		paths[i] = deb.Path
	}
	return paths, nil
}

// imageLock is the smallest lock for images that was made for the packages,
// whatever else it was made for: an image has all of its lock.
func (s *session) imageLock(packages []string) (debian.Lock, error) {
	platform, err := toolchain.ParsePlatform(hostPlatform)
	if err != nil {
		return debian.Lock{}, err
	}
	names, err := fs.Glob(s.options.Platform.Bootstrap, "debs/image-*.lock.json")
	if err != nil {
		return debian.Lock{}, err
	}
	var found debian.Lock
	var known []string
	for _, name := range names {
		content, err := fs.ReadFile(s.options.Platform.Bootstrap, name)
		if err != nil {
			return debian.Lock{}, err
		}
		lock, err := debian.ParseLock(content)
		if err != nil {
			return debian.Lock{}, fmt.Errorf("%s: %w", name, err)
		}
		if lock.Architecture != platform.Architecture {
			continue
		}
		known = append(known, strings.Join(lock.Asked, ", "))
		lacks := slices.ContainsFunc(packages, func(name string) bool { return !slices.Contains(lock.Asked, name) })
		if !lacks && (found.Packages == nil || len(lock.Packages) < len(found.Packages)) {
			found = lock
		}
	}
	if found.Packages == nil {
		return debian.Lock{}, plan.WithHint(fmt.Errorf("no lock for images on %s was made for %s together", platform.Architecture, strings.Join(packages, ", ")),
			"there are locks for: %s", strings.Join(known, "; "))
	}
	return found, nil
}

package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/plan"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/release"
)

// pinnedJob is a job with the generations of the secrets that its templates read.
type pinnedJob struct {
	*nomad.Prepared
	// live are those of templates that restart nothing.
	live []nomad.LiveGenerations
	// stale: the variable that they read has others.
	stale bool
	// unpinned is the spec as releases keep it.
	unpinned []byte
}

// pins are the generations that jobs read. A secret that a job produces is not
// pinned: its producer writes a new value whenever it likes, and who reads it
// follows.
func (s *session) pins(entries map[string]catalogue.EntryState, candidates bool) nomad.Pins {
	pins := nomad.Pins{Engine: s.engine, Active: map[string]int{}, Previous: map[string]int{}}
	// The store's keys are of one generation: where a rotation was cut short between
	// them, all are read as they were before.
	halfway := slices.ContainsFunc(s.site.Secrets(), func(one site.Secret) bool {
		return isStoreKey(one) && entries[one.FullName()].Rotation().Candidate > 0
	})
	for _, one := range s.site.Secrets() {
		if one.ProducedBy != nil && one.ProducedBy.Component != "" {
			continue
		}
		name := one.FullName()
		rotation := entries[name].Rotation()
		if rotation.Active == 0 {
			// Lost with all that was known of it: its jobs stay as they are.
			if rotation.Active = s.recorded[name]; rotation.Active == 0 {
				continue
			}
		}
		pins.Active[name], pins.Previous[name] = rotation.Active, rotation.Active
		switch {
		case !candidates && halfway && isStoreKey(one) && rotation.Candidate == 0 && rotation.Retiring > 0:
			pins.Active[name] = rotation.Retiring
		case candidates && rotation.Candidate > 0:
			pins.Active[name] = rotation.Candidate
		case rotation.Retiring > 0:
			pins.Previous[name] = rotation.Retiring
		}
	}
	return pins
}

// pin gives a parsed job its generations.
func pin(parsed *api.Job, brief nomad.Brief, pins nomad.Pins) (*pinnedJob, error) {
	unpinned, err := nomad.Prepare(parsed, brief)
	if err != nil {
		return nil, err
	}
	pinned, err := nomad.Pin(parsed, pins)
	if err != nil {
		return nil, err
	}
	brief.Secrets, brief.SecretsEngine = pinned.Generations, pinned.Engine
	prepared, err := nomad.Prepare(pinned.Job, brief)
	if err != nil {
		return nil, err
	}
	return &pinnedJob{Prepared: prepared, live: pinned.Live, unpinned: unpinned.Desired.Spec}, nil
}

// repin makes a job of what a release recorded of it.
func (s *session) repin(name string, recorded release.Component, pins nomad.Pins) (*pinnedJob, error) {
	var parsed api.Job
	if err := json.Unmarshal([]byte(recorded.Jobspec), &parsed); err != nil {
		return nil, fmt.Errorf("job of component %s in the last release: %w", name, err)
	}
	maps.DeleteFunc(parsed.Meta, func(key, _ string) bool { return strings.HasPrefix(key, "site_") })
	return pin(&parsed, nomad.Brief{
		Site: s.site.Name, Component: name, GitSHA: recorded.GitSHA, Artifacts: recorded.Artifacts,
	}, pins)
}

// pinsFor are the pins of a component's job, once the secrets were looked at.
func (s *session) pinsFor(component site.Component) (nomad.Pins, error) {
	if len(component.Reads) == 0 {
		return nomad.Pins{}, nil
	}
	if s.entries == nil {
		return nomad.Pins{}, &plan.UnknownError{Until: "secrets"}
	}
	return s.pins(s.entries, false), nil
}

// liveDiffers reports whether templates that restart nothing read other generations.
func (s *session) liveDiffers(ctx context.Context, want []nomad.LiveGenerations) (bool, error) {
	if len(want) == 0 {
		return false, nil
	}
	paths := make([]string, len(want))
	for i, one := range want {
		paths[i] = one.Path
	}
	have, err := s.nomad.Live(ctx, paths)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(want, func(one nomad.LiveGenerations) bool {
		for key, value := range one.Items {
			if have[one.Path][key] != value {
				return true
			}
		}
		return false
	}), nil
}

package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/sitehost/release"
)

// recordRelease writes what this rollout put there: on the first server host,
// which is the authority, and in a Nomad variable, which is a copy.
func (s *session) recordRelease() plan.Step {
	return &plan.Reconciler[map[string]release.Component, *release.Record]{
		Title: "release",
		Desire: func(context.Context) (map[string]release.Component, error) {
			if s.nomad == nil {
				return nil, &plan.UnknownError{Until: "jobs"}
			}
			components := map[string]release.Component{}
			for name := range s.jobs {
				components[name] = s.pinned[name].component()
			}
			return components, nil
		},
		Observe: func(ctx context.Context, desired map[string]release.Component) (*release.Record, error) {
			latest, err := s.latestRelease(ctx)
			if err != nil || latest == nil {
				return nil, err
			}
			// A deploy of some components leaves the others as they were.
			for name, component := range latest.Components {
				if _, ours := desired[name]; !ours && (!s.active(name) || s.blocked[name] != "") {
					desired[name] = component
				}
			}
			return latest, nil
		},
		Diff: func(desired map[string]release.Component, actual *release.Record) []plan.Change {
			change := plan.Change{Action: plan.Create, Kind: "release", Target: short(s.sha)}
			switch {
			case actual == nil:
				change.Reason = "the first of this site"
			case !maps.EqualFunc(desired, actual.Components, func(a, b release.Component) bool {
				return a.SpecDigest == b.SpecDigest && reflect.DeepEqual(a.Artifacts, b.Artifacts)
			}):
				change.Reason = "jobs changed since release " + actual.ID
			default:
				return nil
			}
			return []plan.Change{change}
		},
		Converge: func(ctx context.Context, desired map[string]release.Component, _ *release.Record, _ []plan.Change, _ plan.Progress) error {
			return s.putRelease(ctx, s.sha, desired)
		},
		Settled: func(context.Context, map[string]release.Component) error { return nil },
	}
}

// component is what a release records of a job.
func (p *pinnedJob) component() release.Component {
	return release.Component{
		SpecDigest: p.Desired.SpecDigest, Jobspec: string(p.unpinned),
		Artifacts: p.Desired.Artifacts, Secrets: p.Desired.Secrets, GitSHA: p.Desired.GitSHA,
	}
}

// putRelease writes the record of a new release.
func (s *session) putRelease(ctx context.Context, sha string, components map[string]release.Component) error {
	now := time.Now().UTC()
	record := release.Record{
		Schema: release.Schema, ID: now.Format("20060102T150405.000Z") + "-" + short(sha), Site: s.site.Name,
		GitSHA: sha, Created: now, Components: components, Status: "healthy",
	}
	if err := s.servers()[0].siteHost(ctx, record, nil, "release", "put", "--dir", host.ReleasesPath); err != nil {
		return err
	}
	s.released = true
	// The copy is small: the specs stay in the record on the host.
	brief := map[string]release.Component{}
	for name, component := range components {
		component.Jobspec = ""
		brief[name] = component
	}
	record.Components = brief
	encoded, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("encode release: %w", err)
	}
	return s.nomad.PutReleaseVariable(ctx, "site/"+s.site.Name+"/release", encoded)
}

// releases are the records that are kept, newest first.
func (s *session) releases(ctx context.Context) ([]release.Record, error) {
	var records []release.Record
	err := s.servers()[0].siteHost(ctx, nil, &records, "release", "list", "--dir", host.ReleasesPath)
	return records, err
}

// latestRelease is nil for a site without any.
func (s *session) latestRelease(ctx context.Context) (*release.Record, error) {
	records, err := s.releases(ctx)
	if err != nil || len(records) == 0 {
		return nil, err
	}
	return &records[0], nil
}

func short(sha string) string { return sha[:min(len(sha), 12)] }

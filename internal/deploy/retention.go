package deploy

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/artifact"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/writesession"
)

// retention is all that decides which artifacts stay, as it is now. The first server
// has the records, and nobody else.
func (s *session) retention(ctx context.Context) ([]artifact.Kept, error) {
	if first := s.servers()[0].Name; first != s.site.FirstServer() {
		return nil, plan.WithHint(fmt.Errorf("host %s, which has the records of releases, does not answer", s.site.FirstServer()),
			"nothing was removed; see `site status`")
	}
	records, err := s.releases(ctx)
	if err != nil {
		return nil, err
	}
	if len(records) == 0 { // what cannot be known to be old stays
		return nil, plan.WithHint(fmt.Errorf("site %q has no release", s.site.Name), "nothing was removed; deploy first")
	}
	in := artifact.Retention{KeepReleases: s.site.KeepReleases, Running: map[string][]string{}}
	for _, record := range records {
		of := artifact.ReleaseArtifacts{}
		for name, component := range record.Components {
			of[name] = component.Artifacts
		}
		in.Releases = append(in.Releases, of)
	}
	jobs, err := s.nomad.ObserveSite(ctx, s.site.Name)
	if err != nil {
		return nil, err
	}
	for _, live := range jobs {
		for name, digest := range live.Artifacts {
			in.Running[name] = append(in.Running[name], digest)
		}
	}
	return artifact.Keep(in), nil
}

// keepArtifacts tells every host what it must never remove, so that a host whose
// disk is full may make room by itself. It comes behind each release.
func (s *session) keepArtifacts() plan.Step {
	return where{check{title: "retention", run: func(ctx context.Context) error {
		kept, err := s.retention(ctx)
		if err != nil {
			return err
		}
		return s.tellKept(ctx, kept)
	}}, func() bool { return !s.options.DryRun && s.nomad != nil && s.released }}
}

// tellKept writes the list on every host.
func (s *session) tellKept(ctx context.Context, kept []artifact.Kept) error {
	list := struct {
		Names []string `json:"names"`
	}{Names: []string{}}
	for _, one := range kept {
		list.Names = append(list.Names, s.site.Name+"/"+one.Artifact+"@"+one.Digest)
	}
	return s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
		return h.siteHost(ctx, list, nil, "store", "keep", "--store", host.StorePath)
	})
}

// ArtifactsVersion names the schema of what `site artifacts` prints.
const ArtifactsVersion = "site.artifacts/v1"

// Collected is what `site artifacts gc` removed, or would, and why the rest stays.
type Collected struct {
	Schema string `json:"schema"`
	Site   string `json:"site"`
	DryRun bool   `json:"dry_run"`
	// Store is nil where the site has no object store.
	Store *writesession.Collected  `json:"store,omitempty"`
	Hosts map[string]HostCollected `json:"hosts"`
}

// HostCollected is what one host says.
type HostCollected struct {
	Artifacts []writesession.CollectedArtifact `json:"artifacts"`
	// Images are podman's copies.
	Images     []CollectedImage `json:"images"`
	BytesFreed int64            `json:"bytes_freed"`
}

// CollectedImage is one image in podman's own storage.
type CollectedImage struct {
	Name    string `json:"name"`
	Removed bool   `json:"removed"`
	Reason  string `json:"reason"`
}

// CollectOptions choose what CollectArtifacts removes.
type CollectOptions struct {
	// DryRun gives reasons and removes nothing.
	DryRun bool
}

// CollectArtifacts removes artifacts that no kept release and no running job needs,
// from the object store and from every host. It holds the site's lock: a deploy
// counts on what it has found.
func CollectArtifacts(ctx context.Context, options Options, choice CollectOptions) (Collected, error) {
	answer := Collected{Schema: ArtifactsVersion, DryRun: choice.DryRun, Hosts: map[string]HostCollected{}}
	_, err := run(ctx, options, func(s *session) []plan.Step {
		r := &rotation{session: s}
		return []plan.Step{
			check{title: "check inputs", run: func(ctx context.Context) error {
				if err := s.readRepository(ctx); err != nil {
					return err
				}
				return s.readMaterial()
			}},
			r.connectWhatAnswers(),
			s.takeLock("artifacts gc"),
			check{title: "open", run: s.openNomad},
			check{title: "collect", run: func(ctx context.Context) error { return s.collectArtifacts(ctx, choice, &answer) }},
		}
	})
	return answer, err
}

func (s *session) collectArtifacts(ctx context.Context, choice CollectOptions, answer *Collected) error {
	answer.Site = s.site.Name
	kept, err := s.retention(ctx)
	if err != nil {
		return err
	}
	if err := s.collectHosts(ctx, kept, choice, answer); err != nil || s.site.ObjectStore == nil {
		return err
	}
	if err := s.openStore(ctx); err != nil {
		return err
	}
	request := writesession.CollectRequest{DryRun: choice.DryRun}
	for _, one := range kept {
		request.Keep = append(request.Keep, writesession.Kept{Artifact: one.Artifact, Digest: blob.Digest(one.Digest), Reason: one.Reason})
	}
	collected, err := s.store.Collect(ctx, request)
	answer.Store = &collected
	return err
}

func (s *session) collectHosts(ctx context.Context, kept []artifact.Kept, choice CollectOptions, answer *Collected) error {
	if err := s.tellKept(ctx, kept); err != nil {
		return err
	}
	args := []string{"store", "collect", "--store", host.StorePath}
	if choice.DryRun {
		args = append(args, "--dry-run")
	}
	var mutex sync.Mutex
	return s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
		var of HostCollected
		if err := h.siteHost(ctx, nil, &of, args...); err != nil {
			return err
		}
		for i := range of.Artifacts {
			one := &of.Artifacts[i]
			at := slices.IndexFunc(kept, func(k artifact.Kept) bool { return k.Artifact == one.Artifact && k.Digest == string(one.Digest) })
			if at >= 0 {
				one.Reason = kept[at].Reason
			}
		}
		mutex.Lock()
		defer mutex.Unlock()
		answer.Hosts[h.Name] = of
		return nil
	})
}

// PushArtifacts brings the artifacts of a commit to the object store, and to no host.
func PushArtifacts(ctx context.Context, options Options) (plan.Result, error) {
	options.Via = ViaStore
	return run(ctx, options, func(s *session) []plan.Step {
		return []plan.Step{
			s.checkInputs(),
			check{title: "object store", run: func(context.Context) error { return s.needObjectStore() }},
			s.connectHosts(),
			s.refuseBareHosts(),
			check{title: "open", run: s.openNomad},
			s.uploadArtifacts(),
		}
	})
}

func (s *session) needObjectStore() error {
	if s.site.ObjectStore != nil {
		return nil
	}
	return plan.WithHint(fmt.Errorf("site %q has no object store", s.site.Name), "declare object_store in sites/%s/site.hcl", s.site.Name)
}

// Artifacts is what `site artifacts ls` prints.
type Artifacts struct {
	Schema string `json:"schema"`
	Site   string `json:"site"`
	writesession.Listing
	// Kept gives the reason why an artifact stays, by artifact@digest.
	Kept map[string]string `json:"kept"`
}

// ListArtifacts tells what is in the object store, and what a gc would keep.
func ListArtifacts(ctx context.Context, options Options) (Artifacts, error) {
	answer := Artifacts{Schema: ArtifactsVersion, Kept: map[string]string{}}
	s, err := readAfter(ctx, options, (*session).needObjectStore)
	if err != nil {
		return answer, err
	}
	defer s.close()
	answer.Site = s.site.Name
	if err := s.openNomad(ctx); err != nil {
		return answer, err
	}
	if err := s.openStore(ctx); err != nil {
		return answer, err
	}
	kept, err := s.retention(ctx)
	if err != nil {
		return answer, err
	}
	for _, one := range kept {
		answer.Kept[one.Artifact+"@"+one.Digest] = one.Reason
	}
	answer.Listing, err = s.store.List(ctx)
	return answer, err
}

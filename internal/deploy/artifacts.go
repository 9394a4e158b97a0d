package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/nomad-site/site/internal/adapter/builder"
	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/artifact"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/site"
)

// shipment is one artifact on its way: what hosts are offered for it.
type shipment struct {
	desired artifact.Desired
	offer   blob.Offer
}

// perHost is what the steps over several hosts observe.
type perHost[T any] map[string]T

// sendPlatformArtifacts brings packages, Nomad and its driver to every host, always over SSH.
func (s *session) sendPlatformArtifacts() plan.Step {
	return s.bringStep("platform artifacts", func() []*remoteHost { return s.hosts }, func(context.Context) ([]shipment, error) {
		var shipments []shipment
		for _, tool := range []string{toolNomad, toolDriver} {
			file := s.platform.executables[tool]
			one, err := s.shipFile(tool, file.Digest, file.Path, file.Size)
			if err != nil {
				return nil, err
			}
			shipments = append(shipments, one)
		}
		bundle := shipment{desired: artifact.Desired{Name: s.site.Name + "/debian-packages"}}
		var digests []blob.Digest
		for _, deb := range s.platform.debs {
			one, err := s.shipFile("debian-packages", "sha256:"+deb.SHA256, deb.Path, deb.Size)
			if err != nil {
				return nil, err
			}
			bundle.offer.Blobs = append(bundle.offer.Blobs, one.offer.Blobs...)
			bundle.desired.Size += deb.Size
			digests = append(digests, blob.Digest("sha256:"+deb.SHA256))
		}
		// The bundle is known by the list of its packages, which is a blob itself.
		list, err := json.Marshal(s.platform.lock)
		if err != nil {
			return nil, fmt.Errorf("encode the package list: %w", err)
		}
		source := blob.BytesSource("package list", list)
		bundle.desired.Digest = string(source.Digest())
		bundle.offer.Blobs = append(bundle.offer.Blobs, blob.Offered{Source: source})
		bundle.offer.Names = []blob.Name{{
			Site: s.site.Name, Artifact: "debian-packages", Kind: blob.KindFile, Digest: source.Digest(),
			Size: source.Size(), Platform: true, Blobs: append(digests, source.Digest()),
		}}
		return append(shipments, bundle), nil
	}, s.send)
}

func (s *session) shipFile(name, digest, path string, size int64) (shipment, error) {
	source, err := blob.FileSource(path, blob.Digest(digest))
	if err != nil {
		return shipment{}, err
	}
	return shipment{
		desired: artifact.Desired{Name: s.site.Name + "/" + name, Digest: digest, Size: size},
		offer: blob.Offer{
			Blobs: []blob.Offered{s.offered(source)},
			Names: []blob.Name{{
				Site: s.site.Name, Artifact: name, Kind: blob.KindFile, Digest: blob.Digest(digest), Size: size,
				Platform: true, Blobs: []blob.Digest{blob.Digest(digest)},
			}},
		},
	}, nil
}

// sendArtifacts brings the components' artifacts to every host that runs jobs, but
// for those that hosts pull from the object store.
func (s *session) sendArtifacts() plan.Step {
	return s.bringStep("artifacts", s.jobHosts, func(ctx context.Context) ([]shipment, error) {
		if err := s.needSiteHost(); err != nil {
			return nil, err
		}
		return s.componentShipments(ctx, ViaSSH)
	}, s.send)
}

func (s *session) shipBuilt(component site.Component, built builder.Built) (shipment, error) {
	one := shipment{desired: artifact.Desired{Name: s.site.Name + "/" + built.Name, Digest: built.Digest, Size: built.Size}}
	name := blob.Name{
		Site: s.site.Name, Artifact: built.Name, Kind: string(built.Kind), Digest: blob.Digest(built.Digest),
		Size: built.Size, Platform: component.Platform,
	}
	for _, local := range built.Blobs {
		source, err := blob.FileSource(local.Path, blob.Digest(local.Digest))
		if err != nil {
			return shipment{}, fmt.Errorf("artifact %s: %w", built.Name, err)
		}
		one.offer.Blobs = append(one.offer.Blobs, s.offered(source))
		name.Blobs = append(name.Blobs, blob.Digest(local.Digest))
	}
	one.offer.Names = []blob.Name{name}
	return one, nil
}

// offered keeps a blob's chunk list in the cache: cutting a large blob again
// for every host and run would cost more than sending its changes.
func (s *session) offered(source blob.Source) blob.Offered {
	path := filepath.Join(s.options.CacheDir, "manifests", fmt.Sprintf("%d", blob.ManifestVersion), source.Digest().Hex()+".json")
	return blob.Offered{Source: source, Manifest: func() (blob.Manifest, error) {
		if content, err := os.ReadFile(path); err == nil {
			if manifest, err := blob.ParseManifest(content); err == nil && manifest.Digest == source.Digest() {
				return manifest, nil
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return blob.Manifest{}, fmt.Errorf("chunk list cache: %w", err)
		}
		manifest, err := blob.ChunkSource(source)
		if err != nil {
			return blob.Manifest{}, err
		}
		return manifest, writeCache(path, manifest)
	}}
}

func writeCache(path string, manifest blob.Manifest) error {
	content, err := manifest.Encode()
	if err != nil {
		return err
	}
	if err := writePrivate(path, content); err != nil {
		return fmt.Errorf("chunk list cache: %w", err)
	}
	return nil
}

// deliver brings shipments to one host.
type deliver func(ctx context.Context, h *remoteHost, shipments []shipment, progress plan.Progress) error

// bringStep brings shipments to hosts, in one way or the other: only missing chunks travel.
func (s *session) bringStep(title string, hosts func() []*remoteHost, desire func(context.Context) ([]shipment, error), bring deliver) plan.Step {
	return &plan.Reconciler[[]shipment, perHost[[]artifact.Actual]]{
		Title:  title,
		Desire: desire,
		Observe: func(ctx context.Context, desired []shipment) (perHost[[]artifact.Actual], error) {
			if err := s.needSiteHost(); err != nil {
				return nil, err
			}
			actual := perHost[[]artifact.Actual]{}
			var mutex sync.Mutex
			err := s.each(ctx, hosts(), func(ctx context.Context, h *remoteHost) error {
				found, err := s.probe(ctx, h, desired)
				mutex.Lock()
				defer mutex.Unlock()
				actual[h.Name] = found
				return err
			})
			return actual, err
		},
		Diff: func(desired []shipment, actual perHost[[]artifact.Actual]) []plan.Change {
			var changes []plan.Change
			for _, h := range hosts() {
				changes = append(changes, artifact.Diff(h.Name, wanted(desired), actual[h.Name])...)
			}
			return changes
		},
		Converge: func(ctx context.Context, desired []shipment, _ perHost[[]artifact.Actual], changes []plan.Change, progress plan.Progress) error {
			waiting := map[string]bool{}
			for _, change := range changes {
				waiting[change.Host] = true
			}
			return s.each(ctx, hosts(), func(ctx context.Context, h *remoteHost) error {
				if !waiting[h.Name] {
					return nil
				}
				return bring(ctx, h, desired, progress)
			})
		},
	}
}

func wanted(shipments []shipment) []artifact.Desired {
	desired := make([]artifact.Desired, len(shipments))
	for i := range shipments {
		desired[i] = shipments[i].desired
	}
	return desired
}

func joinOffers(shipments []shipment) blob.Offer {
	var offer blob.Offer
	for _, one := range shipments {
		offer.Blobs = append(offer.Blobs, one.offer.Blobs...)
		offer.Names = append(offer.Names, one.offer.Names...)
	}
	return offer
}

// probe asks one host what it lacks: one question for all, since each carries
// the chunk lists of what is lacking.
func (s *session) probe(ctx context.Context, h *remoteHost, desired []shipment) ([]artifact.Actual, error) {
	missing, err := s.missing(ctx, h, joinOffers(desired))
	if err != nil {
		return nil, err
	}
	return lackingOf(desired, missing), nil
}

// lackingOf sorts what somebody lacks by shipment.
func lackingOf(desired []shipment, missing blob.Report) []artifact.Actual {
	actual := make([]artifact.Actual, len(desired))
	lacking := map[blob.Digest]bool{}
	for _, digest := range missing.Blobs {
		lacking[digest] = true
	}
	unpublished := map[string]bool{}
	for _, name := range missing.Names {
		unpublished[name.String()] = true
	}
	for i, one := range desired {
		actual[i].Published = !unpublished[one.offer.Names[0].String()]
		for _, offered := range one.offer.Blobs {
			if lacking[offered.Source.Digest()] {
				actual[i].MissingBlobs++
				actual[i].MissingBytes += missing.BytesOf[offered.Source.Digest()]
			}
		}
	}
	return actual
}

func (s *session) missing(ctx context.Context, h *remoteHost, offer blob.Offer) (blob.Report, error) {
	if len(offer.Blobs) == 0 {
		return blob.Report{}, nil
	}
	process, err := h.conn.Start(ctx, receiveCommand)
	if err != nil {
		return blob.Report{}, err
	}
	report, err := blob.Missing(ctx, process, offer)
	return report, finish(process, err)
}

func (s *session) send(ctx context.Context, h *remoteHost, shipments []shipment, progress plan.Progress) error {
	process, err := h.conn.Start(ctx, receiveCommand)
	if err != nil {
		return err
	}
	result, err := blob.Send(ctx, process, joinOffers(shipments), blob.SendOptions{
		Progress: func(done, total int64) { progress.Bytes("to "+h.Name, done, total) },
	})
	if err = finish(process, err); err != nil {
		var full *blob.NoSpaceError
		if errors.As(err, &full) {
			return plan.WithHint(err, "free some space on %s: `site status` shows how full it is", h.Name)
		}
		return err
	}
	progress.Message("%s: sent %d of %d chunks, %d bytes on the wire", h.Name, result.Chunks, result.Chunks+result.ChunksDeduped, result.BytesWire)
	return nil
}

var receiveCommand = []string{host.SiteHostPath, "receive", "--store", host.StorePath}

// needSiteHost says that nothing can be asked of a host that has no site-host yet.
func (s *session) needSiteHost() error {
	for _, h := range s.hosts {
		if h.siteHostDigest == "" {
			return &plan.UnknownError{Until: "site-host"}
		}
	}
	return nil
}

package builder

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

type archiveForm string

const (
	dockerArchive archiveForm = "docker archive"
	ociLayout     archiveForm = "oci layout"
	anyArchive    archiveForm = "image archive"
)

// archivedImage is one image found in an archive: its config, and the names of
// its layers there.
type archivedImage struct {
	config []byte
	layers []string
}

// imageAt converts the image archive at a declared path.
func (b *builder) imageAt(ctx context.Context, name string, form archiveForm) (Built, error) {
	at, err := b.locate(name)
	if err != nil {
		return Built{}, err
	}
	built, err := b.imageIn(ctx, at, form)
	built.Source, built.FromWorkTree = at.describe(string(form)+" "), at.fromWorkTree
	return built, err
}

func (b *builder) imageIn(ctx context.Context, at place, form archiveForm) (Built, error) {
	if b.Artifact.Kind != site.Image {
		return Built{}, plan.WithHint(fmt.Errorf("%s is an %s, but the artifact's kind is %s", at.name, form, b.Artifact.Kind),
			`use "path" to serve the archive itself as a file`)
	}
	proof := at.path
	if at.dir {
		if form == dockerArchive {
			return Built{}, plan.WithHint(fmt.Errorf("%s is a folder, not a docker archive", at.name), "declare it as an OCI layout")
		}
		// The index names all the rest by digest.
		proof = filepath.Join(at.path, "index.json")
		if err := inside(at.within, proof); err != nil {
			return Built{}, fmt.Errorf("%s is not an OCI layout: %w", at.name, err)
		}
	}
	digest, err := b.store.fileDigest(ctx, proof)
	if err != nil {
		return Built{}, err
	}
	if err := b.checkSource(at.name, digest); err != nil {
		return Built{}, err
	}
	return b.recorded(ctx, string(form), []string{digest}, func() (Built, error) {
		built, err := b.convert(ctx, at, form)
		if err != nil {
			err = fmt.Errorf("read %s %s: %w", form, at.name, err)
			if plan.HintOf(err) == "" && ctx.Err() == nil {
				err = plan.WithHint(err, "%s is cut short, damaged or no %s, or it is still being written: build it again", at.name, form)
			}
			return Built{}, err
		}
		// The record is by the digest from before: it must still hold.
		if after, err := b.store.fileDigest(ctx, proof); err != nil || after != digest {
			return Built{}, errors.Join(err, changedError(proof))
		}
		return built, nil
	})
}

func (b *builder) convert(ctx context.Context, at place, form archiveForm) (Built, error) {
	from, err := b.openArchive(ctx, at)
	if err != nil {
		return Built{}, err
	}
	defer from.Close()
	var image archivedImage
	switch {
	case form == dockerArchive || (form == anyArchive && !holds(from, "index.json")):
		image, err = readDockerArchive(from)
	default:
		image, err = readLayout(from, b.platform)
	}
	if err != nil {
		return Built{}, err
	}
	return b.repack(ctx, from, image)
}

func holds(from archive, name string) bool {
	file, err := from.open(name)
	if err == nil {
		_ = file.Close()
	}
	return err == nil
}

func readDockerArchive(from archive) (archivedImage, error) {
	var manifest tarball.Manifest
	if err := decodeDocument(from, "manifest.json", &manifest); err != nil {
		if errors.Is(err, fs.ErrNotExist) && holds(from, "index.json") {
			return archivedImage{}, plan.WithHint(err, "this is an OCI layout: declare it as one")
		}
		return archivedImage{}, err
	}
	if len(manifest) != 1 {
		return archivedImage{}, plan.WithHint(fmt.Errorf("it holds %d images, exactly one is needed", len(manifest)), "save one image per archive")
	}
	config, err := readDocument(from, manifest[0].Config)
	return archivedImage{config: config, layers: manifest[0].Layers}, err
}

// readLayout follows the index to the one manifest for a platform.
func readLayout(from archive, platform v1.Platform) (archivedImage, error) {
	if !holds(from, "index.json") && holds(from, "manifest.json") {
		return archivedImage{}, plan.WithHint(errors.New("it has no index.json"), "this is a docker archive: declare it as one")
	}
	var index v1.IndexManifest
	if err := decodeDocument(from, "index.json", &index); err != nil {
		return archivedImage{}, err
	}
	all, err := flatten(from, index, 0)
	if err != nil {
		return archivedImage{}, err
	}
	chosen, err := choose(all, platform)
	if err != nil {
		return archivedImage{}, err
	}
	content, err := readBlob(from, chosen.Digest)
	if err != nil {
		return archivedImage{}, err
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(content, &manifest); err != nil {
		return archivedImage{}, fmt.Errorf("read manifest %s: %w", chosen.Digest, err)
	}
	image := archivedImage{}
	for _, layer := range manifest.Layers {
		name, err := blobName(layer.Digest)
		if err != nil {
			return archivedImage{}, err
		}
		image.layers = append(image.layers, name)
	}
	image.config, err = readBlob(from, manifest.Config.Digest)
	return image, err
}

// flatten lists the image manifests of an index and of the indexes in it.
func flatten(from archive, index v1.IndexManifest, depth int) ([]v1.Descriptor, error) {
	if depth > 5 {
		return nil, errors.New("indexes are nested too deep")
	}
	var manifests []v1.Descriptor
	for _, entry := range index.Manifests {
		switch {
		case entry.MediaType.IsIndex():
			content, err := readBlob(from, entry.Digest)
			if err != nil {
				return nil, err
			}
			var nested v1.IndexManifest
			if err := json.Unmarshal(content, &nested); err != nil {
				return nil, fmt.Errorf("read index %s: %w", entry.Digest, err)
			}
			deeper, err := flatten(from, nested, depth+1)
			if err != nil {
				return nil, err
			}
			manifests = append(manifests, deeper...)
		case entry.MediaType.IsImage():
			// Several tags of one image are one image.
			known := slices.ContainsFunc(manifests, func(other v1.Descriptor) bool { return other.Digest == entry.Digest })
			if !known {
				manifests = append(manifests, entry)
			}
		}
	}
	return manifests, nil
}

func choose(manifests []v1.Descriptor, wanted v1.Platform) (v1.Descriptor, error) {
	var fitting, undescribed []v1.Descriptor
	var offered []string
	for _, entry := range manifests {
		if entry.Platform == nil || entry.Platform.OS == "" {
			undescribed = append(undescribed, entry)
			continue
		}
		offered = append(offered, entry.Platform.String())
		if fits(wanted, *entry.Platform) {
			fitting = append(fitting, entry)
		}
	}
	if len(fitting) == 0 {
		// An index need not name platforms; the config does, and is checked.
		fitting = undescribed
	}
	switch {
	case len(fitting) == 1:
		return fitting[0], nil
	case len(fitting) > 1:
		return v1.Descriptor{}, plan.WithHint(fmt.Errorf("%d images fit platform %s", len(fitting), wanted), "write one image per layout")
	}
	return v1.Descriptor{}, plan.WithHint(fmt.Errorf("no image for platform %s, only for: %s", wanted, strings.Join(offered, ", ")),
		"build the image for %s", wanted)
}

func fits(wanted, offered v1.Platform) bool {
	return wanted.OS == offered.OS && wanted.Architecture == offered.Architecture &&
		(wanted.Variant == "" || offered.Variant == "" || wanted.Variant == offered.Variant)
}

func blobName(digest v1.Hash) (string, error) {
	// Decoding has checked that the hex digits are such.
	if digest.Algorithm != "sha256" {
		return "", fmt.Errorf("digest %s is not a sha256", digest)
	}
	return "blobs/sha256/" + digest.Hex, nil
}

// readBlob reads a document of a layout and proves its name.
func readBlob(from archive, digest v1.Hash) ([]byte, error) {
	name, err := blobName(digest)
	if err != nil {
		return nil, err
	}
	content, err := readDocument(from, name)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(content)
	if actual := hex.EncodeToString(sum[:]); actual != digest.Hex {
		return nil, fmt.Errorf("%s has digest sha256:%s: the layout is damaged", name, actual)
	}
	return content, nil
}

// repack writes an archived image as blobs, with plain layers.
func (b *builder) repack(ctx context.Context, from archive, image archivedImage) (Built, error) {
	var config v1.ConfigFile
	if err := json.Unmarshal(image.config, &config); err != nil {
		return Built{}, fmt.Errorf("read the image config: %w", err)
	}
	offered := v1.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant}
	if offered.OS != "" && offered.Architecture != "" && !fits(b.platform, offered) {
		return Built{}, plan.WithHint(fmt.Errorf("the image is for %s, but the hosts are %s", offered, b.platform), "build the image for %s", b.platform)
	}
	if len(config.RootFS.DiffIDs) != len(image.layers) {
		return Built{}, fmt.Errorf("the manifest lists %d layers, but the config %d", len(image.layers), len(config.RootFS.DiffIDs))
	}
	var layers []LocalBlob
	for i, name := range image.layers {
		layer, err := b.layer(ctx, from, name, config.RootFS.DiffIDs[i].String())
		if err != nil {
			return Built{}, fmt.Errorf("layer %d of %d (%s): %w", i+1, len(image.layers), name, err)
		}
		layers = append(layers, layer)
	}
	content, err := withOverrides(image.config, b.Artifact)
	if err != nil {
		return Built{}, err
	}
	return b.manifest(layers, content)
}

// layer writes one layer plain and proves that it is the one the config means.
func (b *builder) layer(ctx context.Context, from archive, name, diffID string) (LocalBlob, error) {
	file, err := from.open(name)
	if err != nil {
		return LocalBlob{}, err
	}
	defer file.Close()
	plain, _, err := decompress(file)
	if err != nil {
		return LocalBlob{}, err
	}
	defer plain.Close()
	return b.store.add(MediaTypeLayer, func(w *pending) error {
		if _, err := copyContext(ctx, w, plain); err != nil {
			return err
		}
		if w.digest() != diffID {
			return fmt.Errorf("its content has digest %s, but the image config says %s: the archive is damaged", w.digest(), diffID)
		}
		return nil
	})
}

// withOverrides changes nothing else: what we do not know in a config stays.
func withOverrides(config []byte, artifact site.Artifact) ([]byte, error) {
	if len(artifact.Entrypoint) == 0 && artifact.StopSignal == "" {
		return config, nil
	}
	var document, run map[string]json.RawMessage
	if err := json.Unmarshal(config, &document); err != nil {
		return nil, fmt.Errorf("read the image config: %w", err)
	}
	if err := json.Unmarshal(document["config"], &run); err != nil && len(document["config"]) > 0 {
		return nil, fmt.Errorf("read the image config: %w", err)
	}
	if run == nil {
		run = map[string]json.RawMessage{}
	}
	set := func(into map[string]json.RawMessage, name string, value any) (err error) {
		into[name], err = json.Marshal(value)
		return err
	}
	if len(artifact.Entrypoint) > 0 {
		if err := set(run, "Entrypoint", artifact.Entrypoint); err != nil {
			return nil, err
		}
		// The image's arguments belong to its own entrypoint.
		delete(run, "Cmd")
	}
	if artifact.StopSignal != "" {
		if err := set(run, "StopSignal", artifact.StopSignal); err != nil {
			return nil, err
		}
	}
	if err := set(document, "config", run); err != nil {
		return nil, err
	}
	return json.Marshal(document)
}

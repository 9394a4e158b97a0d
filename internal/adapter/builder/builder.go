// Package builder turns the declared source of an artifact into blobs on the
// local disk: plain files, or images in OCI form with uncompressed layers, so
// that an unchanged part of an image is the same bytes in the next one.
package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

// Media types of the blobs; those of an image are OCI's.
const (
	MediaTypeFile     = "application/octet-stream"
	MediaTypeLayer    = "application/vnd.oci.image.layer.v1.tar"
	MediaTypeConfig   = "application/vnd.oci.image.config.v1+json"
	MediaTypeManifest = "application/vnd.oci.image.manifest.v1+json"
)

// DefaultUser is who runs in an image that we assemble.
const DefaultUser = "65532:65532"

const defaultMaxDownload = 4 << 30

// Request is one artifact to build, and from where.
type Request struct {
	Site string
	// RepoRoot is the work tree: build outputs that are not in git are read from it.
	RepoRoot string
	// Tree is the folder with the exported commit.
	Tree string
	// TreeID names the content of Tree. Empty, it is taken from a Tree in
	// <CacheDir>/trees; without one, Go builds are not recorded.
	TreeID   string
	Artifact site.Artifact
	// ComponentFolder is slash-separated, relative to the repository root. A
	// path that is not there from the root is looked for here.
	ComponentFolder string
	Platform        string // "linux/amd64"
	CacheDir        string
	// Tool returns the folder of a pinned tool.
	Tool func(ctx context.Context, name string) (string, error)
	// Debs returns the files of a locked closure, in the order of unpacking.
	Debs func(ctx context.Context, packages []string) ([]string, error)
	// Embedded returns an executable that site carries, for a platform such as "linux/amd64".
	Embedded func(name, platform string) ([]byte, error)
	// HTTP downloads url sources; nil for http.DefaultClient.
	HTTP *http.Client
	// MaxDownload limits the size of a url source; 0 for 4 GiB.
	MaxDownload int64
}

// LocalBlob is a file in <cache>/blobs/sha256, named by its digest.
type LocalBlob struct {
	Digest    string `json:"digest"` // "sha256:…"
	Size      int64  `json:"size"`
	Path      string `json:"-"`
	MediaType string `json:"mediaType"`
}

// Built is an artifact whose bytes are all on the local disk.
type Built struct {
	Name string            `json:"name"`
	Kind site.ArtifactKind `json:"kind"`
	// Digest is that of the image's manifest, or of the file.
	Digest string `json:"digest"`
	// Size is the sum of the blobs.
	Size int64 `json:"size"`
	// Blobs are in the order in which they refer to each other: layers,
	// config, manifest. Each digest is there once.
	Blobs []LocalBlob `json:"blobs"`
	// Source says in words what the bytes were made from.
	Source string `json:"-"`
	// FromWorkTree says that the bytes are not from the commit.
	FromWorkTree bool `json:"-"`
}

// builder is one Build under way.
type builder struct {
	Request
	platform v1.Platform
	store    blobStore
	sha256   string // expected digest of the source file, or empty
}

// Build makes the blobs of an artifact, or finds them made.
func Build(ctx context.Context, request Request) (Built, error) {
	built, err := build(ctx, request)
	if err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) && plan.HintOf(err) == "" {
			err = plan.WithHint(err, "the file is cut short or still being written: build it again")
		}
		return Built{}, fmt.Errorf("build artifact %q: %w", request.Artifact.Name, err)
	}
	return built, nil
}

func build(ctx context.Context, request Request) (Built, error) {
	artifact := request.Artifact
	if !artifactName.MatchString(artifact.Name) {
		return Built{}, fmt.Errorf("the name may hold only lower case letters, digits, '.', '_' and '-'")
	}
	b := &builder{Request: request, store: blobStore{cacheDir: request.CacheDir}}
	platform, err := v1.ParsePlatform(request.Platform)
	if err != nil || platform.OS == "" || platform.Architecture == "" {
		return Built{}, fmt.Errorf("platform %q is not of the form linux/amd64", request.Platform)
	}
	b.platform = *platform
	if artifact.SHA256 != "" {
		if b.sha256, err = parseDigest(artifact.SHA256); err != nil {
			return Built{}, err
		}
	}
	if err := b.store.prepare(); err != nil {
		return Built{}, err
	}
	if artifact.Kind != site.Image && artifact.Kind != site.File {
		return Built{}, fmt.Errorf("unknown kind %q", artifact.Kind)
	}
	sources := 0
	for _, set := range []bool{artifact.GoPackage != "", artifact.DockerArchive != "", artifact.OCILayout != "",
		artifact.Path != "", artifact.URL != "", artifact.Tool != "", len(artifact.DebPackages) > 0, artifact.Embedded != ""} {
		if set {
			sources++
		}
	}
	if sources != 1 {
		return Built{}, fmt.Errorf("%d sources are set, exactly one is needed", sources)
	}
	var built Built
	switch {
	case artifact.GoPackage != "":
		built, err = b.goPackage(ctx)
	case artifact.DockerArchive != "":
		built, err = b.imageAt(ctx, artifact.DockerArchive, dockerArchive)
	case artifact.OCILayout != "":
		built, err = b.imageAt(ctx, artifact.OCILayout, ociLayout)
	case artifact.Path != "":
		built, err = b.fileAt(ctx)
	case artifact.URL != "":
		built, err = b.download(ctx)
	case artifact.Tool != "":
		built, err = b.tool(ctx)
	case artifact.Embedded != "":
		built, err = b.embedded(ctx)
	default:
		built, err = b.debs(ctx)
	}
	if err != nil {
		return Built{}, err
	}
	built.Name, built.Kind, built.Size = artifact.Name, artifact.Kind, 0
	for _, blob := range built.Blobs {
		built.Size += blob.Size
	}
	return built, nil
}

// artifactName is also a path component of an image reference and of /app.
var artifactName = regexp.MustCompile(`^[a-z0-9]+([._-]+[a-z0-9]+)*$`)

// fileAt serves a plain file; a path of kind image is an image archive or, where
// an executable is named, that alone.
func (b *builder) fileAt(ctx context.Context) (Built, error) {
	if b.Artifact.Kind == site.Image && b.Artifact.Executable == "" {
		return b.imageAt(ctx, b.Artifact.Path, anyArchive)
	}
	place, err := b.locate(b.Artifact.Path)
	if err != nil {
		return Built{}, err
	}
	work := func() (Built, error) { return b.plainFile(ctx, place.path) }
	if b.Artifact.Kind == site.Image {
		work = func() (Built, error) { return b.executableIn(ctx, place) }
	}
	built, err := work()
	built.Source, built.FromWorkTree = place.describe("file "), place.fromWorkTree
	return built, err
}

// plainFile makes a blob of the file at an absolute path.
func (b *builder) plainFile(ctx context.Context, file string) (Built, error) {
	digest, err := b.store.fileDigest(ctx, file)
	if err != nil {
		return Built{}, err
	}
	if err := b.checkSource(file, digest); err != nil {
		return Built{}, err
	}
	blob, found := b.store.find(digest, MediaTypeFile)
	if !found {
		if blob, err = b.store.addFile(ctx, file, MediaTypeFile); err != nil {
			return Built{}, err
		}
		if blob.Digest != digest {
			return Built{}, changedError(file)
		}
	}
	return Built{Digest: blob.Digest, Blobs: []LocalBlob{blob}}, nil
}

// tool serves the executable of a pinned tool, alone or on scratch.
func (b *builder) tool(ctx context.Context) (Built, error) {
	artifact := b.Artifact
	if b.Tool == nil {
		return Built{}, fmt.Errorf("no pinned tools are at hand for tool %q", artifact.Tool)
	}
	folder, err := b.Tool(ctx, artifact.Tool)
	if err != nil {
		return Built{}, fmt.Errorf("get tool %q: %w", artifact.Tool, err)
	}
	executable := artifact.Executable
	if executable == "" {
		executable = artifact.Tool
	}
	if !filepath.IsLocal(filepath.FromSlash(executable)) {
		return Built{}, fmt.Errorf("executable %q leaves the folder of tool %q", executable, artifact.Tool)
	}
	file := filepath.Join(folder, filepath.FromSlash(executable))
	if info, err := os.Stat(file); err != nil || info.IsDir() {
		inBin := filepath.Join(folder, "bin", filepath.FromSlash(executable))
		if _, err := os.Stat(inBin); err != nil {
			return Built{}, plan.WithHint(fmt.Errorf("tool %q has no file %s in %s", artifact.Tool, executable, folder),
				"set executable to a path inside the tool's folder")
		}
		file = inBin
	}
	source := fmt.Sprintf("tool %s (%s)", artifact.Tool, executable)
	if artifact.Kind == site.File {
		built, err := b.plainFile(ctx, file)
		built.Source = source
		return built, err
	}
	digest, err := b.store.fileDigest(ctx, file)
	if err != nil {
		return Built{}, err
	}
	if err := b.checkSource(file, digest); err != nil {
		return Built{}, err
	}
	built, err := b.recorded(ctx, "tool", []string{digest, scratchVersion()}, func() (Built, error) {
		return b.onScratch(ctx, file)
	})
	built.Source = source
	return built, err
}

// checkSource enforces the declared sha256 of a source file.
func (b *builder) checkSource(file, digest string) error {
	if b.sha256 == "" || b.sha256 == digest {
		return nil
	}
	return plan.WithHint(fmt.Errorf("%s has digest %s, but %s is declared", file, digest, b.sha256),
		"the file is not the one that was declared: get the right one, or change sha256 of the artifact after checking where the new one comes from")
}

// parseDigest accepts a sha256 with or without its prefix.
func parseDigest(text string) (string, error) {
	hash, err := v1.NewHash("sha256:" + strings.TrimPrefix(strings.ToLower(strings.TrimSpace(text)), "sha256:"))
	if err != nil {
		return "", fmt.Errorf("%q is not a sha256 digest of 64 hex digits", text)
	}
	return hash.String(), nil
}

func changedError(file string) error {
	return plan.WithHint(fmt.Errorf("%s changed while it was being read", file), "wait until its build has ended")
}

package builder

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

const rootsPath = "etc/ssl/certs/ca-certificates.crt"

// certificateRoots is the CA bundle in PEM. Roots with a constraint are left
// out: a PEM file cannot express it, and without it they would be trusted for more.
var certificateRoots = sync.OnceValue(func() []byte {
	var file bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			// A bytes.Buffer takes every write.
			_ = pem.Encode(&file, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})
		}
	}
	return file.Bytes()
})

// scratchVersion changes with what we put into assembled images besides the
// artifact's own files.
func scratchVersion() string {
	sum := sha256.Sum256(certificateRoots())
	return "roots " + hex.EncodeToString(sum[:])
}

// user is the numeric user of an assembled image.
func (b *builder) user() (text string, uid, gid int, err error) {
	text = b.Artifact.User
	if text == "" {
		text = DefaultUser
	}
	first, second, both := strings.Cut(text, ":")
	if !both {
		second = first
	}
	uid, err = strconv.Atoi(first)
	if err == nil {
		gid, err = strconv.Atoi(second)
	}
	if err != nil || uid < 0 || gid < 0 {
		return "", 0, 0, fmt.Errorf("user %q is not a numeric uid or uid:gid", text)
	}
	return fmt.Sprintf("%d:%d", uid, gid), uid, gid, nil
}

// base puts in what a static program looks for: roots, a user database, /tmp.
func (b *builder) base(files *filesystem) error {
	_, uid, gid, err := b.user()
	if err != nil {
		return err
	}
	passwd := "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n"
	group := "root:x:0:\nnobody:x:65534:\nnonroot:x:65532:\n"
	// Programs such as initdb insist that the user they run as has a name.
	if uid != 0 && uid != 65532 && uid != 65534 {
		passwd += fmt.Sprintf("app:x:%d:%d:app:/:/sbin/nologin\n", uid, gid)
	}
	if gid != 0 && gid != 65532 && gid != 65534 {
		group += fmt.Sprintf("app:x:%d:\n", gid)
	}
	for _, add := range []func() error{
		func() error { return files.bytes("etc/passwd", 0o644, []byte(passwd)) },
		func() error { return files.bytes("etc/group", 0o644, []byte(group)) },
		func() error { return files.bytes(rootsPath, 0o644, certificateRoots()) },
		func() error { return files.dir("tmp", 0o1777) },
	} {
		if err := add(); err != nil {
			return err
		}
	}
	return nil
}

// onScratch makes an image that holds one static executable.
func (b *builder) onScratch(ctx context.Context, executable string) (Built, error) {
	files := newFilesystem()
	if err := b.base(files); err != nil {
		return Built{}, err
	}
	program := "app/" + b.Artifact.Name
	if err := files.file(program, 0o755, executable); err != nil {
		return Built{}, err
	}
	entrypoint := b.Artifact.Entrypoint
	if len(entrypoint) == 0 {
		entrypoint = []string{"/" + program}
	}
	return b.assemble(ctx, files, entrypoint)
}

// assemble makes an image of one layer.
func (b *builder) assemble(ctx context.Context, files *filesystem, entrypoint []string) (Built, error) {
	user, _, _, err := b.user()
	if err != nil {
		return Built{}, err
	}
	layer, err := b.store.add(MediaTypeLayer, func(w *pending) error { return files.write(ctx, w) })
	if err != nil {
		return Built{}, fmt.Errorf("write the image layer: %w", err)
	}
	diffID, err := v1.NewHash(layer.Digest)
	if err != nil {
		return Built{}, err
	}
	epoch := v1.Time{Time: time.Unix(0, 0).UTC()}
	config, err := json.Marshal(v1.ConfigFile{
		OS: b.platform.OS, Architecture: b.platform.Architecture, Variant: b.platform.Variant,
		Created: epoch,
		Config: v1.Config{
			User:       user,
			Entrypoint: entrypoint,
			WorkingDir: "/",
			StopSignal: b.Artifact.StopSignal,
			Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SSL_CERT_FILE=/" + rootsPath},
		},
		RootFS:  v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{diffID}},
		History: []v1.History{{Created: epoch, CreatedBy: "site"}},
	})
	if err != nil {
		return Built{}, err
	}
	return b.manifest([]LocalBlob{layer}, config)
}

// manifest ties layers and a config together into an image.
func (b *builder) manifest(layers []LocalBlob, config []byte) (Built, error) {
	configBlob, err := b.store.addBytes(MediaTypeConfig, config)
	if err != nil {
		return Built{}, fmt.Errorf("write the image config: %w", err)
	}
	document := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{}}
	if document.Config, err = descriptor(configBlob); err != nil {
		return Built{}, err
	}
	var blobs []LocalBlob
	seen := map[string]bool{}
	for _, layer := range layers {
		entry, err := descriptor(layer)
		if err != nil {
			return Built{}, err
		}
		document.Layers = append(document.Layers, entry)
		if !seen[layer.Digest] {
			blobs = append(blobs, layer)
		}
		seen[layer.Digest] = true
	}
	content, err := json.Marshal(document)
	if err != nil {
		return Built{}, err
	}
	manifest, err := b.store.addBytes(MediaTypeManifest, content)
	if err != nil {
		return Built{}, fmt.Errorf("write the image manifest: %w", err)
	}
	return Built{Digest: manifest.Digest, Blobs: append(blobs, configBlob, manifest)}, nil
}

func descriptor(blob LocalBlob) (v1.Descriptor, error) {
	digest, err := v1.NewHash(blob.Digest)
	return v1.Descriptor{MediaType: types.MediaType(blob.MediaType), Size: blob.Size, Digest: digest}, err
}

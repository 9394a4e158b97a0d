package builder

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nomad-site/site/internal/site"
)

// embedded puts an executable that site carries on scratch.
func (b *builder) embedded(ctx context.Context) (Built, error) {
	name := b.Artifact.Embedded
	if b.Embedded == nil {
		return Built{}, fmt.Errorf("no executables are at hand for %q", name)
	}
	if b.Artifact.Kind != site.Image {
		return Built{}, fmt.Errorf("executable %s of site always is an image", name)
	}
	content, err := b.Embedded(name, b.Platform)
	if err != nil {
		return Built{}, err
	}
	sum := sha256.Sum256(content)
	built, err := b.recorded(ctx, "embedded", []string{hex.EncodeToString(sum[:]), scratchVersion()}, func() (Built, error) {
		folder, err := os.MkdirTemp(b.store.scratch(), "embedded-")
		if err != nil {
			return Built{}, err
		}
		defer os.RemoveAll(folder)
		file := filepath.Join(folder, "program")
		if err := os.WriteFile(file, content, 0o600); err != nil {
			return Built{}, fmt.Errorf("write executable %s: %w", name, err)
		}
		return b.onScratch(ctx, file)
	})
	built.Source = fmt.Sprintf("executable %s of site (%s)", name, b.Platform)
	return built, err
}

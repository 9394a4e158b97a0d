package builder

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// executableIn makes an image of one static executable: a file that is one, or
// that of the declared name in an archive, as releases are published.
func (b *builder) executableIn(ctx context.Context, at place) (Built, error) {
	digest, err := b.store.fileDigest(ctx, at.path)
	if err != nil {
		return Built{}, err
	}
	if err := b.checkSource(at.name, digest); err != nil {
		return Built{}, err
	}
	return b.recorded(ctx, "executable", []string{digest, scratchVersion()}, func() (Built, error) {
		head, err := readHead(at.path, len(elf.ELFMAG))
		if err != nil {
			return Built{}, err
		}
		file := at.path
		if !bytes.Equal(head, []byte(elf.ELFMAG)) {
			if file, err = b.extract(ctx, at); err != nil {
				return Built{}, err
			}
			defer os.Remove(file)
		}
		if err := b.checkStatic(file); err != nil {
			return Built{}, err
		}
		built, err := b.onScratch(ctx, file)
		if err != nil {
			return Built{}, err
		}
		// The record is by the digest from before: it must still hold.
		if after, err := b.store.fileDigest(ctx, at.path); err != nil || after != digest {
			return Built{}, errors.Join(err, changedError(at.path))
		}
		return built, nil
	})
}

// extract copies the executable out of an archive, into a file that the caller removes.
func (b *builder) extract(ctx context.Context, at place) (string, error) {
	opened, err := b.openArchive(ctx, at)
	if err != nil {
		return "", plan.WithHint(fmt.Errorf("%s is neither an executable nor a tar: %w", at.name, err),
			"name an executable for linux, or a tar that holds one")
	}
	defer opened.Close()
	archived, isTar := opened.(*tarArchive)
	if !isTar {
		return "", fmt.Errorf("%s is a folder: name the executable in it", at.name)
	}
	var names []string
	for name := range archived.members {
		if path.Base(name) == b.Artifact.Executable {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	switch {
	case len(names) == 0:
		return "", fmt.Errorf("%s holds no file %q", at.name, b.Artifact.Executable)
	case len(names) > 1:
		return "", fmt.Errorf("%s holds several files %q: %s", at.name, b.Artifact.Executable, strings.Join(names, ", "))
	}
	content, err := archived.open(names[0])
	if err != nil {
		return "", err
	}
	defer content.Close()
	file, err := os.CreateTemp(b.store.scratch(), "executable-")
	if err != nil {
		return "", err
	}
	if _, err := copyContext(ctx, file, io.Reader(content)); err != nil {
		return "", errors.Join(err, file.Close(), os.Remove(file.Name()))
	}
	return file.Name(), file.Close()
}

var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// checkStatic refuses what cannot run alone in an image.
func (b *builder) checkStatic(file string) error {
	program, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("%s is not an executable for linux: %w", b.Artifact.Executable, err)
	}
	defer program.Close()
	if wanted := machines[b.platform.Architecture]; program.Machine != wanted {
		return fmt.Errorf("%s is an executable for %s, but the hosts are %s", b.Artifact.Executable, program.Machine, b.platform)
	}
	if slices.ContainsFunc(program.Progs, func(part *elf.Prog) bool { return part.Type == elf.PT_INTERP }) {
		return plan.WithHint(fmt.Errorf("%s needs shared libraries, which an image of it alone has not", b.Artifact.Executable),
			"get a static build of it, or an image that holds it with its libraries")
	}
	return nil
}

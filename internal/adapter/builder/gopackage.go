package builder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

// goPackage compiles a main package of the exported commit, static.
func (b *builder) goPackage(ctx context.Context) (Built, error) {
	if b.Tree == "" {
		return Built{}, errors.New("no exported commit to build from")
	}
	module, target, err := b.goModule()
	if err != nil {
		return Built{}, err
	}
	version, err := b.goCommand(ctx, module, "", "env", "GOVERSION")
	if err != nil {
		return Built{}, fmt.Errorf("ask go for its version: %w", err)
	}
	goVersion := strings.TrimSpace(version)
	work := func() (Built, error) { return b.compile(ctx, module, target) }
	var built Built
	treeID := b.treeID()
	if treeID == "" {
		built, err = work()
	} else {
		// The tree holds go.sum, which pins what comes from elsewhere.
		built, err = b.recorded(ctx, "go package", []string{treeID, b.Artifact.GoPackage, goVersion, scratchVersion(), b.sha256}, work)
	}
	built.Source = fmt.Sprintf("go package %s (%s, %s)", b.Artifact.GoPackage, goVersion, b.Platform)
	return built, err
}

func (b *builder) treeID() string {
	if b.TreeID == "" && filepath.Clean(filepath.Dir(b.Tree)) == filepath.Join(b.CacheDir, "trees") {
		return filepath.Base(b.Tree)
	}
	return b.TreeID
}

// goModule finds the folder to run go in and the package as seen from there.
func (b *builder) goModule() (module, target string, err error) {
	name := b.Artifact.GoPackage
	if strings.HasPrefix(name, "-") || path.IsAbs(name) {
		return "", "", fmt.Errorf("go package %q is neither an import path nor a path relative to the root of the repository", name)
	}
	clean := path.Clean(name)
	if !filepath.IsLocal(filepath.FromSlash(clean)) {
		return "", "", fmt.Errorf("go package %q leaves the repository", name)
	}
	folder := filepath.Join(b.Tree, filepath.FromSlash(clean))
	if info, statErr := os.Stat(folder); statErr != nil || !info.IsDir() {
		if clean == name && strings.Contains(name, ".") {
			return b.Tree, name, nil // an import path
		}
		err := fmt.Errorf("go package %s is not in the commit", name)
		if _, statErr := os.Stat(filepath.Join(b.RepoRoot, filepath.FromSlash(clean))); b.RepoRoot != "" && statErr == nil {
			return "", "", plan.WithHint(err, "it is in the work tree only: commit it")
		}
		return "", "", plan.WithHint(err, "name a main package by its import path, or by a path such as ./cmd/app relative to the root of the repository")
	}
	for at := clean; ; at = path.Dir(at) {
		if _, err := os.Stat(filepath.Join(b.Tree, filepath.FromSlash(at), "go.mod")); err == nil {
			relative, err := filepath.Rel(filepath.FromSlash(at), filepath.FromSlash(clean))
			return filepath.Join(b.Tree, filepath.FromSlash(at)), "./" + filepath.ToSlash(relative), err
		}
		if at == "." {
			return "", "", plan.WithHint(fmt.Errorf("go package %s: no go.mod at or above it in the commit", name), "run `go mod init` and commit go.mod and go.sum")
		}
	}
}

func (b *builder) compile(ctx context.Context, module, target string) (Built, error) {
	work, err := os.MkdirTemp(b.store.scratch(), "go-")
	if err != nil {
		return Built{}, err
	}
	defer os.RemoveAll(work)
	output := filepath.Join(work, "program")
	if _, err := b.goCommand(ctx, module, work, "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", output, target); err != nil {
		return Built{}, fmt.Errorf("compile go package %s: %w", b.Artifact.GoPackage, err)
	}
	head, err := readHead(output, 8)
	if err != nil {
		return Built{}, err
	}
	if string(head) == "!<arch>\n" {
		return Built{}, plan.WithHint(fmt.Errorf("go package %s is not a main package", b.Artifact.GoPackage), "name the folder that has `package main`")
	}
	if b.Artifact.Kind == site.File {
		return b.plainFile(ctx, output)
	}
	if b.sha256 != "" {
		digest, err := b.store.fileDigest(ctx, output)
		if err != nil {
			return Built{}, err
		}
		if err := b.checkSource(b.Artifact.GoPackage, digest); err != nil {
			return Built{}, err
		}
	}
	return b.onScratch(ctx, output)
}

// goCommand runs go with everything fixed that would change the bytes.
func (b *builder) goCommand(ctx context.Context, dir, temporary string, args ...string) (string, error) {
	command := exec.CommandContext(ctx, "go", args...)
	command.Dir = dir
	mode := "-mod=readonly"
	if _, err := os.Stat(filepath.Join(dir, "vendor", "modules.txt")); err == nil {
		mode = "-mod=vendor"
	}
	fixed := []string{
		"GOOS=" + b.platform.OS, "GOARCH=" + b.platform.Architecture, "CGO_ENABLED=0",
		"GOFLAGS=" + mode, "GOWORK=off", "GO111MODULE=on", "GOAMD64=v1", "GOARM64=v8.0", "PWD=" + dir,
	}
	if variant := strings.TrimPrefix(b.platform.Variant, "v"); b.platform.Architecture == "arm" && variant != "" {
		fixed = append(fixed, "GOARM="+variant)
	}
	if temporary != "" {
		fixed = append(fixed, "GOTMPDIR="+temporary)
	}
	command.Env = append(without(os.Environ(), "GOEXPERIMENT", "GOFIPS140", "GOARM", "GODEBUG"), fixed...)
	// The compilers are children of go: they end with it.
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	command.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	err := command.Run()
	switch {
	case err == nil:
		return stdout.String(), nil
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case errors.Is(err, exec.ErrNotFound):
		return "", plan.WithHint(err, "install Go and have it in PATH")
	}
	return "", fmt.Errorf("go %s: %w\n%s", args[0], err, lastLines(stderr.String(), 30))
}

func without(environment []string, names ...string) []string {
	var kept []string
	for _, variable := range environment {
		name, _, _ := strings.Cut(variable, "=")
		drop := false
		for _, unwanted := range names {
			drop = drop || name == unwanted
		}
		if !drop {
			kept = append(kept, variable)
		}
	}
	return kept
}

func lastLines(text string, limit int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-limit):], "\n")
}

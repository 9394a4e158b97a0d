package toolchain

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// goCommand finds the builder's Go: what is built is ours, the builder is not.
func (t *Toolchain) goCommand() (string, error) {
	for _, root := range []string{t.options.GoRoot, os.Getenv("GOROOT")} {
		if root == "" {
			continue
		}
		candidate := filepath.Join(root, "bin", "go")
		if _, err := os.Stat(candidate); err == nil {
			return candidate, nil
		}
	}
	found, err := exec.LookPath("go")
	if err != nil {
		return "", plan.WithHint(fmt.Errorf("no Go to build with: %w", err),
			"install Go and have it on PATH, or set GOROOT; a site can also name a url and sha256 for the tool")
	}
	return filepath.Abs(found)
}

func (t *Toolchain) goVersion(ctx context.Context) (string, error) {
	builder, err := t.goCommand()
	if err != nil {
		return "", err
	}
	command := exec.CommandContext(ctx, builder, "env", "GOVERSION")
	command.Dir = os.TempDir() // not in a module that may ask for another version
	output, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", builder, err)
	}
	return strings.TrimSpace(string(output)), nil
}

// decisive variables of go's own change what is built; ours replace them.
var decisive = []string{
	"CGO_ENABLED", "GOOS", "GOARCH", "GOAMD64", "GOARM64", "GOFLAGS", "GOWORK", "GO111MODULE", "GOEXPERIMENT", "GOFIPS140",
}

func buildEnvironment(platform Platform) []string {
	environment := slices.DeleteFunc(os.Environ(), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return slices.Contains(decisive, name)
	})
	return append(environment, "CGO_ENABLED=0", "GOOS="+platform.OS, "GOARCH="+platform.Architecture,
		"GOAMD64=v1", "GOARM64=v8.0", "GOFLAGS=", "GOWORK=off", "GO111MODULE=on", "GOEXPERIMENT=", "GOFIPS140=off")
}

// build writes the wrapper module out under the names that go wants, and builds it.
func (t *Toolchain) build(ctx context.Context, tool Tool, platform Platform, folder, staged, goVersion string, progress plan.Progress) error {
	builder, err := t.goCommand()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	for name, content := range tool.files {
		switch name {
		case "tool.mod":
			name = "go.mod"
		case "tool.sum":
			name = "go.sum"
		}
		if err := writeFile(filepath.Join(folder, name), content, 0o644); err != nil {
			return err
		}
	}
	progress.Message("building %s %s for %s with %s", tool.Name, tool.Version, platform, goVersion)
	output := filepath.Join(staged, "bin", tool.Executable)
	command := exec.CommandContext(ctx, builder, tool.buildArguments(output)...)
	command.Dir = folder
	command.Env = buildEnvironment(platform)
	lines := &lineWriter{progress: progress, prefix: tool.Name + ": "}
	command.Stdout, command.Stderr = lines, lines
	err = command.Run()
	lines.flush()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("go build %s: %w:\n%s", tool.Module.Package, err, strings.Join(lines.tail, "\n"))
	}
	return os.Chmod(output, 0o755)
}

// lineWriter passes whole lines on and keeps the last ones for an error.
type lineWriter struct {
	progress plan.Progress
	prefix   string
	rest     []byte
	tail     []string
}

const tailLines = 20

func (w *lineWriter) Write(content []byte) (int, error) {
	w.rest = append(w.rest, content...)
	for {
		line, rest, found := bytes.Cut(w.rest, []byte("\n"))
		if !found {
			return len(content), nil
		}
		w.line(string(line))
		w.rest = rest
	}
}

func (w *lineWriter) flush() {
	if len(w.rest) > 0 {
		w.line(string(w.rest))
		w.rest = nil
	}
}

func (w *lineWriter) line(text string) {
	w.progress.Message("%s%s", w.prefix, text)
	w.tail = append(w.tail, text)
	if len(w.tail) > tailLines {
		w.tail = w.tail[1:]
	}
}

// shebang is the interpreter line of a script; empty for anything else.
func shebang(path string) (string, error) {
	opened, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer opened.Close()
	reader := bufio.NewReader(opened)
	if start, err := reader.Peek(2); err != nil || string(start) != "#!" {
		return "", nil
	}
	line, err := reader.ReadString('\n')
	if err != nil {
		return "", errors.Join(fmt.Errorf("read the first line of %s", path), err)
	}
	return strings.TrimSpace(line), nil
}

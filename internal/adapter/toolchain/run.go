package toolchain

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"strings"
)

// basicPath is what a tool may call: the system's own folders.
const basicPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// basics are variables that any program may need.
var basics = []string{
	"HOME", "USER", "LOGNAME", "TERM", "TMPDIR", "LANG", "LC_*", "TZ", "SSH_AUTH_SOCK", "NO_COLOR", "COLUMNS", "LINES",
}

// Command prepares a run of an installed tool on this machine. Its environment
// holds what every program needs and what the catalogue lets this one see: a
// stray variable in the operator's shell changes nothing (Nomad, for one, dies
// of AWS_CA_BUNDLE).
func (t *Toolchain) Command(ctx context.Context, name string, arguments ...string) (*exec.Cmd, error) {
	executable, err := t.Which(name, Host())
	if err != nil {
		return nil, err
	}
	command := exec.CommandContext(ctx, executable, arguments...)
	command.Env = environment(t.tools[name].Environment, os.Environ())
	return command, nil
}

// Streams are what a running tool reads and writes.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Run runs an installed tool to its end. A tool that fails gives an
// *exec.ExitError in the chain.
func (t *Toolchain) Run(ctx context.Context, name string, arguments []string, streams Streams) error {
	command, err := t.Command(ctx, name, arguments...)
	if err != nil {
		return err
	}
	command.Stdin, command.Stdout, command.Stderr = streams.In, streams.Out, streams.Err
	if err := command.Run(); err != nil {
		return fmt.Errorf("run tool %q: %w", name, err)
	}
	return nil
}

func environment(allowed, all []string) []string {
	clean := []string{}
	hasPath := false
	for _, entry := range all {
		name, _, _ := strings.Cut(entry, "=")
		if !matches(basics, name) && !matches(allowed, name) {
			continue
		}
		hasPath = hasPath || name == "PATH"
		clean = append(clean, entry)
	}
	if !hasPath {
		clean = append(clean, "PATH="+basicPath)
	}
	return clean
}

func matches(patterns []string, name string) bool {
	for _, pattern := range patterns {
		// Patterns were proven well-formed when the catalogue was read.
		if matched, err := path.Match(pattern, name); err == nil && matched {
			return true
		}
	}
	return false
}

package observe

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"strings"

	"github.com/nomad-site/site/internal/reconcile/host"
)

// Installed is what dpkg says of one package.
type Installed struct {
	Version      string
	Architecture string
	// Complete is false where dpkg was interrupted, or a package has only its
	// configuration left.
	Complete bool
	// Interrupted says that dpkg --configure -a has something to do.
	Interrupted bool
}

// Packages asks dpkg about all packages at once.
func Packages(ctx context.Context, run Runner) (map[string]Installed, error) {
	output, err := run(ctx, "dpkg-query", "-W", "-f", `${Package}\t${Version}\t${Architecture}\t${db:Status-Status}\n`)
	if err != nil {
		return nil, fmt.Errorf("list packages: %w", err)
	}
	return parsePackages(string(output))
}

func parsePackages(output string) (map[string]Installed, error) {
	native := ""
	type line struct {
		name string
		Installed
	}
	var lines []line
	for text := range strings.Lines(output) {
		fields := strings.Split(strings.TrimSuffix(text, "\n"), "\t")
		if len(fields) != 4 {
			return nil, fmt.Errorf("list packages: cannot understand %q", text)
		}
		each := line{name: fields[0], Installed: Installed{Version: fields[1], Architecture: fields[2]}}
		switch fields[3] {
		case "installed", "triggers-pending", "triggers-awaited":
			each.Complete = true
		case "half-installed", "unpacked", "half-configured":
			each.Interrupted = true
		}
		if each.name == "dpkg" {
			native = each.Architecture
		}
		lines = append(lines, each)
	}
	packages := make(map[string]Installed, len(lines))
	for _, each := range lines {
		// Of a package installed for several architectures the host's own counts.
		if _, known := packages[each.name]; known && each.Architecture != native && each.Architecture != "all" {
			continue
		}
		packages[each.name] = each.Installed
	}
	return packages, nil
}

// Older reports whether the version a is older than b, in dpkg's order.
func Older(ctx context.Context, run Runner, a, b string) (bool, error) {
	if a == b {
		return false, nil
	}
	_, err := run(ctx, "dpkg", "--compare-versions", a, "lt", b)
	var exit interface{ ExitCode() int } // *exec.ExitError
	switch {
	case err == nil:
		return true, nil
	case errors.As(err, &exit) && exit.ExitCode() == 1:
		return false, nil
	default:
		return false, fmt.Errorf("compare versions %s and %s: %w", a, b, err)
	}
}

var _ interface{ ExitCode() int } = (*exec.ExitError)(nil)

func (o Observer) packages(ctx context.Context, document host.Document, installed map[string]Installed, observation *host.Observation) error {
	observation.Packages, observation.OldPackages = map[string]string{}, []string{}
	for _, wanted := range document.Packages {
		found := installed[wanted.Name]
		if !found.Complete {
			continue
		}
		observation.Packages[wanted.Name] = found.Version
		old, err := Older(ctx, o.Run, found.Version, wanted.Version)
		if err != nil {
			return err
		}
		if old {
			observation.OldPackages = append(observation.OldPackages, wanted.Name)
		}
	}
	// dpkg itself is always built for the host's own architecture.
	observation.Architecture = installed["dpkg"].Architecture
	if observation.Architecture == "" {
		observation.Architecture = runtime.GOARCH
	}
	return nil
}

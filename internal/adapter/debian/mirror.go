package debian

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os/exec"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// Mirrors gives each archive's address.
type Mirrors map[string]string

type silent struct{}

func (silent) Message(string, ...any)     {}
func (silent) Bytes(string, int64, int64) {}

// AptMirrors are the archives as this machine's apt is set up. Entries of
// another release serve too, as all releases share an archive's pool.
func AptMirrors(ctx context.Context, codename string) (Mirrors, error) {
	output, err := exec.CommandContext(ctx, "apt-get", "indextargets",
		"--format", "$(RELEASE)\t$(REPO_URI)\t$(ORIGIN)", "Created-By: Packages").Output()
	if err != nil {
		return nil, plan.WithHint(fmt.Errorf("ask apt for its mirrors: %w", err),
			"fetch the packages on a Debian machine, or copy debs/ of its cache here")
	}
	mirrors := parseMirrors(string(output), codename)
	if mirrors[Main] == "" {
		return nil, plan.WithHint(errors.New("apt is set up with no Debian archive over http or https"),
			"add one to /etc/apt/sources.list.d")
	}
	return mirrors, nil
}

func parseMirrors(output, codename string) Mirrors {
	mirrors, exact := Mirrors{}, map[string]bool{}
	for _, line := range strings.Split(output, "\n") {
		fields := strings.Split(line, "\t")
		if len(fields) != 3 {
			continue
		}
		release, address, origin := fields[0], fields[1], fields[2]
		parsed, err := url.Parse(address)
		if err != nil || (parsed.Scheme != "http" && parsed.Scheme != "https") {
			continue
		}
		matches := release == codename || strings.HasPrefix(release, codename+"-")
		// Before its first update apt knows no origin.
		if origin != "Debian" && (origin != "" || !matches) {
			continue
		}
		archive := archiveOf(release)
		if mirrors[archive] == "" || matches && !exact[archive] {
			mirrors[archive] = strings.TrimSuffix(address, "/") + "/"
			exact[archive] = matches
		}
	}
	if mirrors[Security] == "" && mirrors[Main] != "" {
		// Mirrors carry the security archive beside the main one.
		mirrors[Security] = strings.TrimSuffix(mirrors[Main], "/") + "-security/"
	}
	return mirrors
}

// Package hostbinary carries the site-host executables inside the site binary,
// so that one file is all that a workstation needs.
package hostbinary

import (
	"fmt"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// For gives the site-host executable of a platform such as "linux/amd64".
func For(platform string) ([]byte, error) {
	name := "site-host-" + strings.ReplaceAll(platform, "/", "-")
	content, err := executables.ReadFile(name)
	if err != nil {
		return nil, plan.WithHint(fmt.Errorf("this site carries no site-host for %s", platform),
			"build it with `make build`; supported are linux/amd64 and linux/arm64")
	}
	return content, nil
}

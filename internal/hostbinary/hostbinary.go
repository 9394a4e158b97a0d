// Package hostbinary carries the executables that run on the hosts inside the site
// binary, so that one file is all that a workstation needs.
package hostbinary

import (
	"fmt"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// The executables.
const (
	SiteHost             = "site-host"
	ObjectStorageService = "object-storage-service"
)

// For gives the site-host executable of a platform such as "linux/amd64".
func For(platform string) ([]byte, error) { return Executable(SiteHost, platform) }

// Executable gives one of the executables for a platform such as "linux/amd64".
func Executable(name, platform string) ([]byte, error) {
	content, err := executables.ReadFile(name + "-" + strings.ReplaceAll(platform, "/", "-"))
	if err != nil {
		return nil, plan.WithHint(fmt.Errorf("this site carries no %s for %s", name, platform),
			"build it with `make build`; supported are linux/amd64 and linux/arm64")
	}
	return content, nil
}

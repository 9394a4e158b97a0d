// Package deploy holds the ordered flows of site and the wiring of adapters.
package deploy

import (
	"context"
	"fmt"
	"io/fs"
	"time"

	"github.com/nomad-site/site/internal/adapter/toolchain"
	"github.com/nomad-site/site/internal/plan"
)

// Options are the choices of one run.
type Options struct {
	// WorkDir is a folder in the repository that holds sites/ and jobs/.
	WorkDir string
	// Site may be empty when the repository has exactly one.
	Site string
	// Revision is what git resolves to the commit whose content is deployed.
	Revision string
	// RootTokenFile holds the site root token; empty for a daily deploy.
	RootTokenFile string
	// NewRootTokenFile is what init.age is to be sealed to anew: made where there is
	// none. Empty but for a rotation of the site root token.
	NewRootTokenFile string
	// Timeout bounds the whole run; zero for the site's own deadline.
	Timeout time.Duration
	// Only restricts a deploy to these components; empty for all.
	Only []string
	// AcceptNewHostKey records the key of a host that is not pinned yet.
	AcceptNewHostKey bool
	// TakeOverLock is the id of somebody's lock to take.
	TakeOverLock string
	// Prune stops jobs of the site that no component declares.
	Prune bool
	// RemakeSecrets are full names of generated secrets that were lost and may be
	// made anew although jobs run on the lost value.
	RemakeSecrets []string
	// Via is ViaSSH, ViaStore, or empty for the store where there is one that works.
	Via string
	// AfterStep, where set, is called after each step of a run that is not dry;
	// its error ends the run. Tests inject faults with it.
	AfterStep func(ctx context.Context, step string) error
	// DryRun plans and applies nothing.
	DryRun bool
	// CacheDir is the folder of everything that can be made again.
	CacheDir string

	Platform Platform
	Reporter plan.Reporter
	// Warn receives what the user should know and need not act on.
	Warn func(message string)
}

// Platform is what the site binary carries for the hosts.
type Platform struct {
	// Bootstrap holds agent/, units/ and debs/; Playbook holds host.yml and roles/.
	Bootstrap fs.FS
	Playbook  fs.FS
	// Jobs are the platform's own components, in the form of an adopter's jobs/.
	Jobs fs.FS
	// Tools are the pinned tools.
	Tools *toolchain.Toolchain
	// SiteHost gives the site-host executable for a platform such as "linux/amd64".
	SiteHost func(platform string) ([]byte, error)
	// Embedded gives any other executable that the site binary carries, by name.
	Embedded func(name, platform string) ([]byte, error)
}

// LockedError says who holds the site's lock.
type LockedError struct {
	Site, ID, Holder, Reason string
	Since, Until             time.Time
}

func (e *LockedError) Error() string {
	return fmt.Sprintf("site %q is locked by %s since %s (%s), until %s", e.Site, e.Holder,
		e.Since.Local().Format(time.TimeOnly), e.Reason, e.Until.Local().Format(time.TimeOnly))
}

// Hint implements plan.Hinter.
func (e *LockedError) Hint() string {
	return "wait for it; if its holder is gone, take it with --take-over-lock=" + e.ID
}

// Locked makes the command line exit with its code for locks.
func (*LockedError) Locked() bool { return true }

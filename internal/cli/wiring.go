package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/ansible"
	"github.com/nomad-site/site/bootstrap"
	"github.com/nomad-site/site/internal/adapter/debian"
	"github.com/nomad-site/site/internal/adapter/toolchain"
	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/hostbinary"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/jobs"
)

// commands lists every command; each has a file of its own.
func commands(env Environment, flags *globalFlags) []*cobra.Command {
	return []*cobra.Command{
		newInit(env, flags),
		newRootToken(env),
		newBootstrapDeploy(env, flags),
		newDeploy(env, flags),
		newPlan(env, flags),
		newSecrets(env, flags),
		newArtifacts(env, flags),
		newProvider(env, flags),
		newOperators(env, flags),
		newStatus(env, flags),
		newLogs(env, flags),
		newEnv(env, flags),
		newTunnel(env, flags),
		newTool(env, flags),
		newDebs(env, flags),
		newLab(env, flags),
		newVersion(env, flags),
	}
}

// cacheFolder is where everything lies that can be made again.
func cacheFolder() (string, error) {
	if folder := os.Getenv("SITE_CACHE"); folder != "" {
		return filepath.Abs(folder)
	}
	folder, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache folder: %w", err)
	}
	return filepath.Join(folder, "site"), nil
}

func openTools() (*toolchain.Toolchain, error) {
	cache, err := cacheFolder()
	if err != nil {
		return nil, err
	}
	return toolchain.Open(bootstrap.FS, filepath.Join(cache, "tools"), toolchain.Options{
		Packages: &debian.Store{Folder: filepath.Join(cache, "debs")},
	})
}

// siteFlags are the flags of every command that talks to a site.
type siteFlags struct {
	site             string
	acceptNewHostKey bool
	rootTokenFile    string
	longTokenFile    string
}

func (f *siteFlags) add(command *cobra.Command) {
	command.Flags().StringVar(&f.site, "site", "", "the site; may be left out when there is one")
	command.Flags().BoolVar(&f.acceptNewHostKey, "accept-new-host-key", false, "record the SSH key of a host that is not pinned yet")
	command.Flags().StringVar(&f.longTokenFile, "openbao-site-root-token-file", "", "the site root token's file (mode 0600)")
	command.Flags().StringVar(&f.rootTokenFile, "root-token-file", "", "short for --openbao-site-root-token-file")
}

// tokenFile is the one of the two flags that was given.
func (f *siteFlags) tokenFile() (string, error) {
	if f.rootTokenFile != "" && f.longTokenFile != "" && f.rootTokenFile != f.longTokenFile {
		return "", plan.WithHint(errors.New("--root-token-file and --openbao-site-root-token-file name different files"),
			"they are one flag with two names: give one of them")
	}
	if f.longTokenFile != "" {
		return f.longTokenFile, nil
	}
	return f.rootTokenFile, nil
}

// options wires a run of the flows.
func (f *siteFlags) options(env Environment, flags *globalFlags) (deploy.Options, error) {
	cache, err := cacheFolder()
	if err != nil {
		return deploy.Options{}, err
	}
	tools, err := openTools()
	if err != nil {
		return deploy.Options{}, err
	}
	token, err := f.tokenFile()
	if err != nil {
		return deploy.Options{}, err
	}
	var once sync.Map
	return deploy.Options{
		WorkDir: flags.folder, Site: f.site, AcceptNewHostKey: f.acceptNewHostKey, RootTokenFile: token,
		CacheDir: cache,
		Platform: deploy.Platform{
			Bootstrap: bootstrap.FS, Playbook: ansible.FS, Jobs: jobs.FS(), Tools: tools, SiteHost: hostbinary.For,
			Embedded: hostbinary.Executable,
		},
		Reporter: newReporter(env, flags),
		Warn: func(message string) {
			if _, said := once.LoadOrStore(message, true); !said {
				_, _ = fmt.Fprintf(env.Err, "warning: %s\n", message)
			}
		},
	}, nil
}

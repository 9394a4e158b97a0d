package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/adapter/debian"
	"github.com/nomad-site/site/internal/plan"
)

func newDebs(env Environment, _ *globalFlags) *cobra.Command {
	folder := filepath.Join("bootstrap", "debs")
	command := &cobra.Command{
		Use: "debs", Short: "Lock and fetch the .deb packages of hosts and tools", Args: cobra.NoArgs,
		Long: `Hosts install nothing but the packages of a lock, offline. A lock names each
package with its version and digest. Debian's mirrors drop superseded versions:
then the locks are resolved anew with this command, on a Debian machine.
`,
	}
	command.PersistentFlags().StringVar(&folder, "folder", folder, "where the *.lock.json files lie")
	each := func(work func(path string, lock debian.Lock) error) error {
		paths, err := filepath.Glob(filepath.Join(folder, "*.lock.json"))
		if err != nil {
			return err
		}
		if len(paths) == 0 {
			return plan.WithHint(fmt.Errorf("no *.lock.json in %s", folder), "run it in site's own repository, or give --folder")
		}
		for _, path := range paths {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			lock, err := debian.ParseLock(content)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			if err := work(path, lock); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		return nil
	}
	lock := &cobra.Command{
		Use: "lock", Short: "Resolve the locks anew with apt", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			return each(func(path string, old debian.Lock) error {
				fresh, err := debian.Resolve(command.Context(), old.Request(), &lineProgress{w: env.Err, prefix: filepath.Base(path)})
				if err != nil {
					return err
				}
				differences := debian.Compare(old, fresh)
				for _, difference := range differences {
					_, _ = fmt.Fprintf(env.Out, "%s: %v\n", filepath.Base(path), difference)
				}
				if len(differences) == 0 {
					return nil
				}
				content, err := fresh.Encode()
				if err != nil {
					return err
				}
				temporary := path + ".new"
				return errors.Join(os.WriteFile(temporary, content, 0o644), os.Rename(temporary, path))
			})
		},
	}
	fetch := &cobra.Command{
		Use: "fetch", Short: "Fetch all locked packages into the cache, each proven by its digest", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			cache, err := cacheFolder()
			if err != nil {
				return err
			}
			return each(func(path string, lock debian.Lock) error {
				debs, err := debian.Bundle(command.Context(), lock, filepath.Join(cache, "debs"), &lineProgress{w: env.Err, prefix: filepath.Base(path)})
				if err == nil {
					_, _ = fmt.Fprintf(env.Out, "%s: %d packages\n", filepath.Base(path), len(debs))
				}
				return err
			})
		},
	}
	command.AddCommand(lock, fetch)
	return command
}

package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/site"
)

func newInit(env Environment, flags *globalFlags) *cobra.Command {
	answers := site.InitOptions{}
	keyFile := ""
	command := &cobra.Command{
		Use:   "init",
		Short: "Write the start of a repository: sites/ and jobs/",
		Long: `Writes a site with one host and one component into this folder, once. The files
are the truth from then on: edit them by hand, commit them.
`,
		Example: `  site init --site=gamma --host=203.0.113.5 --operator-key=~/.ssh/id_ed25519.pub

  # on a lab of this machine:
  site lab up
  site init --site=lab --host=lab-1 --ssh-config=.lab/lab/ssh_config --operator-key=.lab/lab/id.pub`,
		Args: cobra.NoArgs,
		RunE: func(_ *cobra.Command, _ []string) error {
			if answers.Site == "" || answers.HostAddress == "" {
				return plan.WithHint(errors.New("--site and --host are needed"), "for example: site init --site=gamma --host=203.0.113.5")
			}
			if keyFile != "" {
				content, err := os.ReadFile(expandHome(keyFile))
				if err != nil {
					return plan.WithHint(fmt.Errorf("operator's public key: %w", err), "name your public key, such as ~/.ssh/id_ed25519.pub")
				}
				answers.OperatorPublicKey = string(content)
			}
			files, err := site.Init(flags.folder, answers)
			if err != nil {
				return err
			}
			if flags.json {
				return printJSON(env.Out, map[string][]string{"files": files})
			}
			for _, file := range files {
				_, _ = fmt.Fprintln(env.Out, file)
			}
			_, err = fmt.Fprint(env.Out, nextSteps(answers))
			return err
		},
	}
	command.Flags().StringVar(&answers.Site, "site", "", "the site's name")
	command.Flags().StringVar(&answers.HostAddress, "host", "", "the first host: a DNS name, an IP or a name of the ssh configuration")
	command.Flags().StringVar(&answers.User, "user", "", "who logs in by SSH; default: as the ssh configuration says")
	command.Flags().StringVar(&answers.SSHConfigFile, "ssh-config", "", "an ssh configuration in the repository; default: your own")
	command.Flags().StringVar(&answers.OperatorName, "operator", "operator", "your name as an operator")
	command.Flags().StringVar(&keyFile, "operator-key", "", "your SSH public key file, to log in to the site with")
	command.Flags().StringVar(&answers.Component, "component", "app", "the first component's name")
	command.Flags().BoolVar(&answers.Force, "force", false, "overwrite the files of an earlier init")
	return command
}

// expandHome does what shells leave undone in --flag=~/path.
func expandHome(path string) string {
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		if home, err := os.UserHomeDir(); err == nil {
			return filepath.Join(home, rest)
		}
	}
	return path
}

// nextSteps are the commands from the files of an init to a healthy job.
func nextSteps(answers site.InitOptions) string {
	operator := ""
	if answers.OperatorPublicKey == "" {
		operator = fmt.Sprintf("\nNobody may deploy without the root token yet: add your key as an operator to sites/%s/site.hcl.\n", answers.Site)
	}
	return strings.NewReplacer("SITE", answers.Site, "APP", answers.Component).Replace(`
Next, in this folder:

  # your application's image, from any builder
  mkdir -p images && podman save -o images/APP.tar IMAGE
  # a deploy reads the content of a commit
  git init && git add . && git commit -m "Site SITE"
  # once on each machine that deploys
  site tool install nomad nomad-driver-podman ansible
  # keep it in a safe, never in git
  site root-token new SITE.root-token
  site bootstrap-deploy --site=SITE --root-token-file=SITE.root-token
  git add . && git commit -m "Init material of SITE"

From then on: site plan, site deploy, site status, site logs APP. README.md says more.
`) + operator
}

func newRootToken(env Environment) *cobra.Command {
	command := &cobra.Command{
		Use: "root-token", Short: "Make the site root token", Args: cobra.NoArgs,
		Long: `The site root token opens a site's init material: it is needed for the first
bootstrap and for recovery, not for daily deploys. Keep it in a safe.
`,
	}
	command.AddCommand(&cobra.Command{
		Use: "new FILE", Short: "Write a new site root token to a file of mode 0600", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := seal.WriteNewRootToken(args[0]); err != nil {
				return err
			}
			_, err := fmt.Fprintln(env.Out, args[0])
			return err
		},
	})
	return command
}

func newVersion(env Environment, flags *globalFlags) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if flags.json {
				return printJSON(env.Out, map[string]string{"version": env.Version})
			}
			_, err := fmt.Fprintln(env.Out, "site "+env.Version)
			return err
		},
	}
}

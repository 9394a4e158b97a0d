package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

func newProvider(env Environment, flags *globalFlags) *cobra.Command {
	command := &cobra.Command{
		Use: "provider", Short: "Make and rotate the keys of the object store at its provider", Args: cobra.NoArgs,
		Long: `Two API tokens of the provider, the admin pair, make the keys of the site's
bucket. They lie in OpenBao, and each rotates the other: they are brought once.
`,
	}
	command.AddCommand(newProviderImport(env, flags), newProviderStatus(env, flags), newProviderDoctor(env, flags),
		newProviderRotateAdmin(env, flags), newProviderRotateStore(env, flags))
	return command
}

func newProviderImport(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	var fileA, fileB string
	command := &cobra.Command{
		Use: "import-admin-pair", Short: "Bring the two API tokens that make all keys", Args: cobra.NoArgs,
		Long: `Verifies both tokens with the provider, each permission by its name, and stores
them only if both can do all that is needed. The files have mode 0600.
`,
		Example: "  site provider import-admin-pair --site=gamma --token-a-file=A --token-b-file=B",
		RunE: func(command *cobra.Command, _ []string) error {
			if fileA == "" || fileB == "" {
				return plan.WithHint(errors.New("two tokens are needed"), "give --token-a-file and --token-b-file")
			}
			a, errA := fileValue(env, fileA)
			b, errB := fileValue(env, fileB)
			if err := errors.Join(errA, errB); err != nil {
				return err
			}
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			status, err := deploy.ImportAdminPair(command.Context(), options, trimmed(a), trimmed(b))
			if err != nil {
				return err
			}
			return showProvider(env, flags, status, "both tokens are stored; next: site provider rotate-object-storage")
		},
	}
	of.add(command)
	command.Flags().StringVar(&fileA, "token-a-file", "", "the file with the first token (mode 0600)")
	command.Flags().StringVar(&fileB, "token-b-file", "", "the file with the second token (mode 0600)")
	return command
}

func newProviderStatus(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	command := &cobra.Command{
		Use: "status", Short: "Show the admin pair and what nothing uses", Args: cobra.NoArgs,
		Long: "Asks the provider about both tokens of the pair, and for tokens of this site that an interrupted run left. It writes nothing.",
		RunE: func(command *cobra.Command, _ []string) error {
			status, err := readProvider(command, env, flags, of)
			if err != nil {
				return err
			}
			return showProvider(env, flags, status, "")
		},
	}
	of.add(command)
	return command
}

func newProviderDoctor(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	command := &cobra.Command{
		Use: "doctor", Short: "Test every permission that is needed; exit code 2 if one lacks", Args: cobra.NoArgs,
		Long: "Tests each permission of both tokens by its name and changes nothing. The exit code is 2 where anything is wrong.",
		RunE: func(command *cobra.Command, _ []string) error {
			status, err := readProvider(command, env, flags, of)
			if err != nil {
				return err
			}
			if err := showProvider(env, flags, status, ""); err != nil || status.Healthy() {
				return err
			}
			return errChanges
		},
	}
	of.add(command)
	return command
}

func readProvider(command *cobra.Command, env Environment, flags *globalFlags, of *siteFlags) (deploy.ProviderStatus, error) {
	options, err := of.options(env, flags)
	if err != nil {
		return deploy.ProviderStatus{}, err
	}
	options.Warn = nil // it only looks
	return deploy.ReadProviderStatus(command.Context(), options)
}

func showProvider(env Environment, flags *globalFlags, status deploy.ProviderStatus, then string) error {
	if flags.json {
		return printJSON(env.Out, status)
	}
	return printProvider(env.Out, status, then)
}

func printProvider(w io.Writer, status deploy.ProviderStatus, then string) error {
	writer := newTable("token", "id", "expires", "permission", "state")
	for _, one := range status.Tokens {
		expires := "never"
		if one.Expires != nil {
			expires = one.Expires.Local().Format(time.DateOnly)
		}
		if len(one.Permissions) == 0 {
			writer.AppendRow(table.Row{one.Name, one.ID, "", "", one.Problem})
		}
		for _, permission := range one.Permissions {
			state := "ok"
			if !permission.Allowed {
				state = permission.Why
			}
			writer.AppendRow(table.Row{one.Name, one.ID, expires, permission.Name, state})
		}
	}
	if _, err := fmt.Fprintf(w, "account %s, bucket %s\n%s\n", status.Account, status.Bucket, writer.Render()); err != nil {
		return err
	}
	for _, orphan := range status.Orphans {
		if _, err := fmt.Fprintf(w, "nothing uses token %s: site provider rotate-object-storage revokes it\n", orphan); err != nil {
			return err
		}
	}
	if then == "" {
		return nil
	}
	_, err := fmt.Fprintln(w, then)
	return err
}

func newProviderRotateAdmin(env Environment, flags *globalFlags) *cobra.Command {
	run := &runFlags{}
	command := &cobra.Command{
		Use: "rotate-admin-pair", Short: "Replace both API tokens, each through the other", Args: cobra.NoArgs,
		Long: "Mints a new token through its peer, proves it, stores it, and revokes the old one; then the same the other way round. Whatever cuts it short, the next run finishes.",
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := run.runOptions(env, flags)
			if err != nil {
				return err
			}
			result, err := deploy.RotateAdminPair(command.Context(), options)
			return finishRun(env, flags, result, err)
		},
	}
	run.addRotate(command)
	return command
}

func newProviderRotateStore(env Environment, flags *globalFlags) *cobra.Command {
	run := &runFlags{}
	drain := time.Duration(-1)
	command := &cobra.Command{
		Use: "rotate-object-storage", Short: "Give the object store its first or next keys", Args: cobra.NoArgs,
		Long: `Mints new keys of the bucket, proves what each may do and may not, stores all
four as one generation, rolls who uses them, and revokes the old ones when every
host has the new. It is the same as: site secrets rotate ` + deploy.StoreKeysAlias + `
`,
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := run.runOptions(env, flags)
			if err != nil {
				return err
			}
			result, err := deploy.Rotate(command.Context(), options, deploy.RotateOptions{Names: []string{deploy.StoreKeysAlias}, Drain: drain})
			return finishRotation(env, flags, result, err)
		},
	}
	run.addRotate(command)
	command.Flags().DurationVar(&drain, "drain", -1, "how long the old keys still work, instead of what is declared")
	return command
}

// trimmed is a token without the newline that editors leave.
func trimmed(token secret.Value) secret.Value { return secret.New(strings.TrimSpace(token.Reveal())) }

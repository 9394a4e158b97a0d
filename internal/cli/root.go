// Package cli is the command line: one file per command with its flags, what it
// prints and how it ends. It is the only package that writes to stdout.
package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/nomad-site/site/internal/plan"
)

// Environment is what a run of the command line may touch of its process.
type Environment struct {
	Args    []string
	In      io.Reader
	Out     io.Writer
	Err     io.Writer
	Version string
}

// globalFlags are the flags of every command.
type globalFlags struct {
	json    bool
	verbose bool
	// folder is the repository to work in.
	folder string
}

// Run executes one command line.
func Run(ctx context.Context, env Environment) error {
	root := newRoot(env)
	root.SetArgs(env.Args)
	root.SetIn(env.In)
	root.SetOut(env.Out)
	root.SetErr(env.Err)
	err := root.ExecuteContext(ctx)
	if err != nil && ctx.Err() != nil && ExitCode(err) == ExitError {
		// Whatever failed, failed because the operator ended it.
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return err
}

func newRoot(env Environment) *cobra.Command {
	flags := &globalFlags{}
	root := &cobra.Command{
		Use:   "site",
		Short: "Makes real Linux hosts match a site's directory in git",
		Long: `site takes bare Linux hosts that answer SSH, and a directory in git, and makes
them a production platform: Nomad running podman containers. It then redeploys
in seconds. A second run that finds nothing to do changes nothing.
`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
	}
	root.PersistentFlags().BoolVar(&flags.json, "json", false, "print JSON: results on stdout, one event a line while running")
	root.PersistentFlags().BoolVarP(&flags.verbose, "verbose", "v", false, "print details")
	root.PersistentFlags().StringVarP(&flags.folder, "repository", "C", ".", "work in this folder's repository")
	root.SetFlagErrorFunc(func(command *cobra.Command, err error) error {
		return plan.WithHint(err, "see `%s --help`", command.CommandPath())
	})
	root.SetHelpTemplate(root.HelpTemplate() + exitCodesHelp + "\n")
	root.AddCommand(commands(env, flags)...)
	beStrict(root)
	return root
}

// beStrict makes a wrong command or argument an error with a way out: without
// it, a mistyped command prints the help and ends well.
func beStrict(command *cobra.Command) {
	check := command.Args
	group := command.HasSubCommands()
	command.Args = func(command *cobra.Command, args []string) error {
		switch {
		case group && len(args) > 0:
			err := fmt.Errorf("unknown command %q for %q", args[0], command.CommandPath())
			if near := command.SuggestionsFor(args[0]); len(near) > 0 {
				return plan.WithHint(err, "did you mean `%s %s`?", command.CommandPath(), near[0])
			}
			return plan.WithHint(err, "see `%s --help`", command.CommandPath())
		case check == nil:
			return nil
		}
		return plan.WithHint(check(command, args), "see `%s --help`", command.CommandPath())
	}
	if !command.Runnable() {
		command.RunE = func(command *cobra.Command, _ []string) error { return command.Help() }
	}
	command.SuggestionsMinimumDistance = 2
	for _, sub := range command.Commands() {
		beStrict(sub)
	}
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// printJSON writes a result for programs.
func printJSON(w io.Writer, value any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

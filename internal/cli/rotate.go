package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/plan"
)

func newSecretsRotate(env Environment, flags *globalFlags) *cobra.Command {
	of := &runFlags{}
	choice := deploy.RotateOptions{}
	var file, newToken, drain string
	var fromCommand bool
	command := &cobra.Command{
		Use: "rotate [NAME…]", Short: "Give secrets their next generation while everything runs",
		Long: `Makes the next generation of each secret, verifies it, tries it with one
allocation of each job that reads it, lets the rest follow one job after the
other, and retires the old one when it has drained and every host has the new.
Until the new one has proven itself, every job runs on the old. Whatever cuts a rotation short, the next
one finishes it.

Passwords of Postgres roles rotate where the role has alternating = true. An
external secret needs its next value: --from-file or --from-command.

Roots of trust are rotated by their names, with the site root token:
  ` + strings.Join(deploy.Roots(), ", ") + `
`,
		Example: `  site secrets rotate shop.session_key
  site secrets rotate shop.stripe_key --from-file=stripe.key
  site secrets rotate --all
  site secrets rotate --due                  from cron or CI
  site secrets rotate ca gossip --root-token-file=FILE
  site secrets rotate root-token --root-token-file=OLD --new-root-token-file=NEW`,
		Args: cobra.ArbitraryArgs,
		RunE: func(command *cobra.Command, args []string) error {
			names := args
			if dash := command.ArgsLenAtDash(); dash >= 0 {
				names = args[:dash]
			}
			if err := checkRotateFlags(choice, names); err != nil {
				return err
			}
			choice.Names = names
			if file != "" || fromCommand {
				values, err := importedValues(command, env, args, file, "", fromCommand)
				if err != nil {
					return err
				}
				choice.Values = values
			}
			choice.Drain = -1
			if drain != "" {
				given, err := time.ParseDuration(drain)
				if err != nil || given < 0 {
					return plan.WithHint(fmt.Errorf("--drain %q is not a duration", drain), "write it as 90s or 10m")
				}
				choice.Drain = given
			}
			options, err := of.runOptions(env, flags)
			if err != nil {
				return err
			}
			options.NewRootTokenFile = newToken
			result, err := deploy.Rotate(command.Context(), options, choice)
			return finishRotation(env, flags, result, err)
		},
	}
	of.addRotate(command)
	command.Flags().BoolVar(&choice.All, "all", false, "all secrets for which a new value can be made here")
	command.Flags().BoolVar(&choice.Due, "due", false, "those older than their policy, and what was left unfinished")
	command.Flags().BoolVar(&choice.Roots, "roots", false, "all roots of trust; root-token only with --new-root-token-file")
	command.Flags().StringVar(&file, "from-file", "", "the file with the next value of an external secret (mode 0600), or - for standard input")
	command.Flags().BoolVar(&fromCommand, "from-command", false, "take what the command behind -- prints")
	command.Flags().StringVar(&drain, "drain", "", "how long the old generation still works, instead of what is declared")
	command.Flags().BoolVar(&choice.Detach, "detach", false, "do not wait for the drain: the next run retires the old generation")
	command.Flags().StringSliceVar(&choice.WithoutHosts, "retire-without-host", nil, "retire the old generation although this host is away: what runs there loses it")
	command.Flags().StringVar(&newToken, "new-root-token-file", "", "where the next site root token lies; it is made there if there is none")
	return command
}

// addRotate are the flags of a run that brings no commit.
func (f *runFlags) addRotate(command *cobra.Command) {
	f.add(command)
	f.sha = "HEAD"
	command.Flags().DurationVar(&f.timeout, "timeout", 0, "deadline of the whole run; default: deadline in site.hcl, 15m if it has none")
	command.Flags().StringVar(&f.takeOverLock, "take-over-lock", "", "take the lock with this id from its holder")
}

func checkRotateFlags(choice deploy.RotateOptions, names []string) error {
	chosen := 0
	for _, given := range []bool{len(names) > 0, choice.All, choice.Due} {
		if given {
			chosen++
		}
	}
	switch {
	case chosen == 0 && !choice.Roots:
		return plan.WithHint(errors.New("say what to rotate"), "give names, --all, --due or --roots; `site secrets status` lists the secrets")
	case chosen > 1:
		return plan.WithHint(errors.New("names, --all and --due are three ways to say what to rotate"), "give one of them")
	case choice.Due && choice.Roots:
		return plan.WithHint(errors.New("roots of trust are never due: they need the site root token, which no machine holds"), "give --roots alone")
	}
	return nil
}

// finishRotation says what became of it: a table of the steps, as after a deploy.
func finishRotation(env Environment, flags *globalFlags, result plan.Result, err error) error {
	if err == nil && len(result.Outcomes) == 0 {
		if flags.json {
			return printJSON(env.Out, map[string]any{"schema": "site.rotation/v1", "due": 0})
		}
		_, err = fmt.Fprintln(env.Out, "nothing is due")
		return err
	}
	return finishRun(env, flags, result, err)
}

func newSecretsHistory(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	command := &cobra.Command{
		Use: "history [NAME…]", Short: "Show what rotations did", Args: cobra.ArbitraryArgs,
		Long: "Shows the journal of rotations, the latest last: it lies on the first server and holds no values.",
		RunE: func(command *cobra.Command, args []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil // it only looks
			history, err := deploy.ReadHistory(command.Context(), options, args)
			if err != nil {
				return err
			}
			if flags.json {
				return printJSON(env.Out, history)
			}
			return printHistory(env.Out, history)
		},
	}
	of.add(command)
	return command
}

func printHistory(w io.Writer, history deploy.History) error {
	if len(history.Events) == 0 {
		_, err := fmt.Fprintln(w, "nothing was rotated yet")
		return err
	}
	writer := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintln(writer, "TIME\tNAME\tWHAT\tGENERATION\tBY\tDETAIL")
	for _, event := range history.Events {
		generation := "-"
		if event.Generation > 0 {
			generation = fmt.Sprint(event.Generation)
		}
		_, _ = fmt.Fprintf(writer, "%s\t%s\t%s\t%s\t%s\t%s\n", event.Time.Local().Format(time.DateTime), event.Name, event.What, generation, event.By, event.Detail)
	}
	return writer.Flush()
}

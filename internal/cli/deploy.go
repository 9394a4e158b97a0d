package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/plan"
)

// runFlags are the flags of the commands that change a site.
type runFlags struct {
	siteFlags
	sha          string
	timeout      time.Duration
	takeOverLock string
	only         []string
	prune        bool
	remake       []string
	via          string
}

func (f *runFlags) addRun(command *cobra.Command) {
	f.add(command)
	command.Flags().StringVar(&f.sha, "sha", "HEAD", "the commit whose content is deployed")
	command.Flags().DurationVar(&f.timeout, "timeout", 0, "deadline of the whole run; default: deadline in site.hcl, 15m if it has none")
	command.Flags().StringVar(&f.takeOverLock, "take-over-lock", "", "take the lock with this id from its holder")
	command.Flags().BoolVar(&f.prune, "prune", false, "remove what is the site's own and no component declares: jobs, roles, databases, policies")
	command.Flags().StringVar(&f.via, "via", "", "how artifacts travel: ssh, or store; default: the object store, where the site has one")
	command.Flags().StringSliceVar(&f.remake, "remake-secret", nil, "make a generated secret anew that was lost, although jobs run on the lost value")
}

func (f *runFlags) runOptions(env Environment, flags *globalFlags) (deploy.Options, error) {
	options, err := f.options(env, flags)
	if err != nil {
		return options, err
	}
	if f.timeout < 0 {
		return options, plan.WithHint(fmt.Errorf("--timeout %s is negative", f.timeout), "give a duration such as 15m")
	}
	options.Revision, options.Timeout, options.TakeOverLock = f.sha, f.timeout, f.takeOverLock
	if f.via != "" && f.via != deploy.ViaSSH && f.via != deploy.ViaStore {
		return options, plan.WithHint(fmt.Errorf("--via %q is no way for artifacts", f.via), "give --via=ssh or --via=store")
	}
	options.Only, options.Prune, options.RemakeSecrets, options.Via = f.only, f.prune, f.remake, f.via
	options.AfterStep = injectedFault(os.Getenv(faultVariable))
	return options, nil
}

func newBootstrapDeploy(env Environment, flags *globalFlags) *cobra.Command {
	run := &runFlags{}
	command := &cobra.Command{
		Use:   "bootstrap-deploy",
		Short: "Bring bare hosts to healthy jobs",
		Long: `Brings bare hosts that answer SSH to healthy jobs: our own static binary, the
pinned packages, Nomad with its podman driver, then the site's components from
the content of one commit. Whatever is wrong with the inputs is said before the
first remote access. Running it again resumes, and changes nothing when all is done.
`,
		Example: "  site bootstrap-deploy --site=gamma --sha=$(git rev-parse HEAD) --openbao-site-root-token-file=FILE",
		Args:    cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := run.runOptions(env, flags)
			if err != nil {
				return err
			}
			if options.RootTokenFile == "" {
				return plan.WithHint(errors.New("--openbao-site-root-token-file is not given"),
					"make a token with `site root-token new FILE`; a site that was bootstrapped deploys with `site deploy`")
			}
			result, err := deploy.Bootstrap(command.Context(), options)
			return finishRun(env, flags, result, err)
		},
	}
	run.addRun(command)
	return command
}

func newDeploy(env Environment, flags *globalFlags) *cobra.Command {
	run := &runFlags{}
	command := &cobra.Command{
		Use:   "deploy",
		Short: "Bring a commit to a site",
		Long: `Brings the content of a commit to a site that was bootstrapped: only what
differs is touched, only the chunks that are missing travel. You log in with
your SSH key, if it is an operator's in site.hcl.
`,
		Example: "  site deploy --site=gamma\n  site deploy --site=gamma --only=hello",
		Args:    cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := run.runOptions(env, flags)
			if err != nil {
				return err
			}
			result, err := deploy.Deploy(command.Context(), options)
			return finishRun(env, flags, result, err)
		},
	}
	run.addRun(command)
	command.Flags().StringSliceVar(&run.only, "only", nil, "deal with these components only")
	return command
}

func newPlan(env Environment, flags *globalFlags) *cobra.Command {
	run := &runFlags{}
	checkOnly := false
	command := &cobra.Command{
		Use:   "plan",
		Short: "Show what a deploy would change",
		Long: `Walks the same steps as a deploy and stops before each write: host, artifacts
with the bytes to send, and jobs. It takes no lock and writes nothing.
`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := run.runOptions(env, flags)
			if err != nil {
				return err
			}
			options.Reporter = newQuietReporter(env, flags)
			result, err := deploy.Plan(command.Context(), options)
			if err != nil {
				return err
			}
			if flags.json {
				err = printJSON(env.Out, result)
			} else {
				printPlan(env.Out, result, flags.verbose)
			}
			if err == nil && checkOnly && result.Pending() > 0 {
				return errChanges
			}
			return err
		},
	}
	run.addRun(command)
	command.Flags().StringSliceVar(&run.only, "only", nil, "deal with these components only")
	command.Flags().BoolVar(&checkOnly, "check", false, "exit with code 2 if there is anything to change")
	return command
}

// printPlan writes the changes, by step.
func printPlan(w io.Writer, result plan.Result, verbose bool) {
	for _, outcome := range result.Outcomes {
		if outcome.Unknown != "" {
			_, _ = fmt.Fprintf(w, "? %s: unknown until %q is applied\n", outcome.Step, outcome.Unknown)
		}
		for _, line := range changeLines(outcome.Changes, verbose) {
			_, _ = fmt.Fprintf(w, "%s\n", line)
		}
	}
	switch pending := result.Pending(); pending {
	case 0:
		_, _ = fmt.Fprintln(w, "nothing to do")
	case 1:
		_, _ = fmt.Fprintln(w, "1 change")
	default:
		_, _ = fmt.Fprintf(w, "%d changes\n", pending)
	}
}

// finishRun ends a command that changed a site: a table of the steps with
// their times, or what the error knows beyond its line.
func finishRun(env Environment, flags *globalFlags, result plan.Result, err error) error {
	if flags.json {
		return errors.Join(err, printVerdictEvents(env.Out, err)) // the events said the rest
	}
	if err != nil {
		printVerdicts(env.Err, err)
		return err
	}
	writer := newTable("step", "changes", "seconds")
	var total float64
	changes := 0
	for _, outcome := range result.Outcomes {
		writer.AppendRow(table.Row{outcome.Step, len(outcome.Changes), fmt.Sprintf("%.1f", outcome.Seconds)})
		total += outcome.Seconds
		changes += len(outcome.Changes)
	}
	writer.AppendFooter(table.Row{"all", changes, fmt.Sprintf("%.1f", total)})
	_, _ = fmt.Fprintln(env.Out, writer.Render())
	if changes == 0 {
		_, _ = fmt.Fprintln(env.Out, "nothing to do")
	}
	return nil
}

// verdictEvent is the last event of a rollout that failed, one for each job.
type verdictEvent struct {
	plan.Event
	Verdict nomad.Verdict `json:"verdict"`
}

// rolloutFailed is the type of a verdictEvent.
const rolloutFailed plan.EventType = "rollout_failed"

func printVerdictEvents(w io.Writer, err error) error {
	encoder := json.NewEncoder(w)
	for _, verdict := range deploy.Verdicts(err) {
		event := plan.Event{Schema: plan.EventVersion, Time: time.Now().UTC(), Type: rolloutFailed, Step: "jobs", Error: verdict.Reason, Hint: verdict.Hint}
		if err := encoder.Encode(verdictEvent{event, verdict}); err != nil {
			return err
		}
	}
	return nil
}

// printVerdicts shows the events and the log tail of failed rollouts.
func printVerdicts(w io.Writer, err error) {
	for _, verdict := range deploy.Verdicts(err) {
		_, _ = fmt.Fprintf(w, "\njob %s: %s", verdict.Job, verdict.Class)
		if verdict.Node != "" {
			_, _ = fmt.Fprintf(w, " on %s", verdict.Node)
		}
		_, _ = fmt.Fprintf(w, ": %s\n", verdict.Reason)
		section(w, "events", verdict.Events)
		section(w, "log", verdict.LogTail)
	}
}

func section(w io.Writer, title string, lines []string) {
	if len(lines) > 0 {
		_, _ = fmt.Fprintf(w, "  %s:\n    %s\n", title, strings.Join(lines, "\n    "))
	}
}

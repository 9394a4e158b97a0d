package cli

import (
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/deploy"
)

func newLogs(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	logs := deploy.LogOptions{}
	command := &cobra.Command{
		Use: "logs JOB", Short: "Show what a job says", Args: cobra.ExactArgs(1),
		Long: "Shows stdout and stderr of a job's newest allocation, or of the one given.",
		RunE: func(command *cobra.Command, args []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil
			logs.Job = args[0]
			return deploy.Logs(command.Context(), options, logs, env.Out)
		},
	}
	of.add(command)
	command.Flags().StringVar(&logs.Alloc, "alloc", "", "an allocation's id, or its beginning")
	command.Flags().StringVar(&logs.Task, "task", "", "the task, where there are several")
	command.Flags().BoolVarP(&logs.Follow, "follow", "f", false, "go on until interrupted")
	command.Flags().Int64Var(&logs.Tail, "tail", 0, "only this many bytes from the end")
	return command
}

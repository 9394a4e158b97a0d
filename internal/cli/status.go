package cli

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/deploy"
)

func newStatus(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	command := &cobra.Command{
		Use: "status", Short: "Show hosts, jobs and the latest release", Args: cobra.NoArgs,
		Long: "Shows a site's hosts, jobs and latest release. It writes nothing.",
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil
			status, err := deploy.ReadStatus(command.Context(), options)
			if err != nil {
				return err
			}
			if flags.json {
				return printJSON(env.Out, status)
			}
			return printStatus(env, status)
		},
	}
	of.add(command)
	return command
}

func printStatus(env Environment, status deploy.Status) error {
	writer := tabwriter.NewWriter(env.Out, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintln(writer, "HOST\tSYSTEM\tCPUS\tMEMORY\tFREE DISK")
	for _, host := range status.Hosts {
		if !host.Bootstrapped {
			_, _ = fmt.Fprintf(writer, "%s\tnot bootstrapped\t\t\t\n", host.Name)
			continue
		}
		_, _ = fmt.Fprintf(writer, "%s\t%s %s\t%d\t%s\t%s\n", host.Name, host.OS, host.Architecture, host.CPUs,
			humanize.IBytes(uint64(host.MemoryBytes)), humanize.IBytes(uint64(host.FreeBytes)))
	}
	for _, problem := range status.Unreachable {
		_, _ = fmt.Fprintf(writer, "unreachable: %s\n", problem)
	}
	_, _ = fmt.Fprintln(writer, "\nJOB\tSTATE\tRUNNING\tCOMMIT\tHOSTS")
	for _, job := range status.Jobs {
		state := "healthy"
		if !job.Healthy {
			state = job.Status + ": " + job.Reason
		}
		_, _ = fmt.Fprintf(writer, "%s\t%s\t%d of %d\t%.12s\t%s\n", job.Job, state, job.Running, job.Wanted, job.GitSHA, strings.Join(job.Nodes, ", "))
	}
	if status.Release != nil {
		_, _ = fmt.Fprintf(writer, "\nrelease %s, commit %.12s, %s\n", status.Release.ID, status.Release.GitSHA, humanize.Time(status.Release.Created))
	}
	for _, warning := range status.Warnings {
		_, _ = fmt.Fprintf(writer, "\nwarning: %s\n", warning)
	}
	return writer.Flush()
}

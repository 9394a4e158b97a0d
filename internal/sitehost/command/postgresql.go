package command

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/sitehost/postgresql"
)

func postgreSQLCommand(options Options) *cobra.Command {
	var cluster postgresql.Cluster
	run := &cobra.Command{
		Use: "run [flags] -- [ARGUMENT...]", Short: "Make the cluster where there is none, then become its server",
		Long: "The first process of the database's container. The arguments after -- are the server's.",
		Args: func(command *cobra.Command, arguments []string) error {
			if at := command.ArgsLenAtDash(); len(arguments) > 0 && at != 0 {
				return errors.New("arguments for the server come after --")
			}
			return nil
		},
		RunE: func(command *cobra.Command, arguments []string) error {
			cluster.Output, cluster.Errors = options.Stdout, options.Stderr
			return cluster.Run(command.Context(), arguments)
		},
	}
	flags := run.Flags()
	flags.StringVar(&cluster.Data, "data", "/var/lib/postgresql/data", "folder of the cluster; its parent must be writable")
	flags.StringVar(&cluster.Programs, "bin", "/usr/lib/postgresql/15/bin", "folder of the server's programs")
	flags.StringVar(&cluster.Superuser, "superuser", "postgres", "the superuser of a new cluster")
	flags.StringVar(&cluster.Sockets, "sockets", "/run/postgresql", "folder of the server's sockets")
	flags.StringVar(&cluster.StoppedFile, "stopped-file", "", "while this file is there, the server is not started")
	command := &cobra.Command{Use: "postgresql", Short: "The Postgres server of a container"}
	command.AddCommand(run)
	return command
}

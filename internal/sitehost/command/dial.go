package command

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/sitehost/dial"
)

func dialCommand(options Options) *cobra.Command {
	command := &cobra.Command{
		Use: "dial", Short: "Join standard input and output with a service of this host",
		Long: "Joins standard input and output with a connection. What is not up ends it with exit code 6.",
	}
	join := func(ctx context.Context, address dial.Address, err error) error {
		if err != nil {
			return err
		}
		return address.Join(ctx, options.Stdin, options.Stdout)
	}
	command.AddCommand(&cobra.Command{
		Use: "unix PATH", Short: "A Unix socket, by its absolute path", Args: cobra.ExactArgs(1),
		RunE: func(command *cobra.Command, arguments []string) error {
			address, err := dial.Unix(arguments[0])
			return join(command.Context(), address, err)
		},
	}, &cobra.Command{
		Use: "tcp ADDRESS", Short: "A loopback address and port", Args: cobra.ExactArgs(1),
		RunE: func(command *cobra.Command, arguments []string) error {
			address, err := dial.TCP(arguments[0])
			return join(command.Context(), address, err)
		},
	})
	return command
}

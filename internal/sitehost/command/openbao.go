package command

import (
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/sitehost/openbao"
)

func openBaoCommand(options Options) *cobra.Command {
	var folder string
	command := &cobra.Command{Use: "openbao", Short: "OpenBao's storage on this host"}
	command.PersistentFlags().StringVar(&folder, "data", openbao.DefaultFolder, "folder of the storage")
	command.AddCommand(&cobra.Command{
		Use: "status", Short: "Print whether it is in use, and whether it holds anything", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			status, err := openbao.Storage(folder).Status()
			if err != nil {
				return err
			}
			return options.print(status)
		},
	}, &cobra.Command{
		Use: "mark", Short: "Say that the site's keys to it are safe: it is never wiped from now on", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return notThere(openbao.Storage(folder).Mark()) },
	}, &cobra.Command{
		Use: "wipe", Short: "Remove its content, where it was never marked", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return openbao.Storage(folder).Wipe() },
	})
	return command
}

package command

import (
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/sitehost/hostkey"
)

func hostKeyCommand(options Options) *cobra.Command {
	var path string
	command := &cobra.Command{Use: "host-key", Short: "The key by which this host proves who it is"}
	command.PersistentFlags().StringVar(&path, "file", hostkey.DefaultPath, "file of the key")
	answer := func(public string, err error) error {
		if err != nil {
			return notThere(err)
		}
		return options.print(struct {
			PublicKeyPEM string `json:"public_key_pem"`
		}{public})
	}
	command.AddCommand(&cobra.Command{
		Use: "ensure", Short: "Make the key where there is none; print its public half", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return answer(hostkey.Ensure(path)) },
	}, &cobra.Command{
		Use: "show", Short: "Print its public half", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return answer(hostkey.Public(path)) },
	})
	return command
}

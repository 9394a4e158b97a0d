package command

import (
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/sitehost/hostkey"
)

func hostKeyCommand(options Options) *cobra.Command {
	var path string
	command := &cobra.Command{Use: "host-key", Short: "The key by which this host proves who it is"}
	command.PersistentFlags().StringVar(&path, "file", hostkey.DefaultPath, "file of the key")
	verb := func(use, short string, do func(string) (hostkey.Keys, error)) {
		command.AddCommand(&cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
			keys, err := do(path)
			if err != nil {
				return notThere(err)
			}
			return options.print(struct {
				PublicKeyPEM     string `json:"public_key_pem"`
				NextPublicKeyPEM string `json:"next_public_key_pem,omitempty"`
			}{keys.Current, keys.Next})
		}})
	}
	verb("ensure", "Make the key where there is none; print its public half", func(path string) (hostkey.Keys, error) {
		if _, err := hostkey.Ensure(path); err != nil {
			return hostkey.Keys{}, err
		}
		return hostkey.Read(path)
	})
	verb("show", "Print its public half", hostkey.Read)
	verb("next", "Make the key that is to follow where there is none; print the public halves of both", hostkey.EnsureNext)
	verb("switch", "Put the next key in the place of this one, which is gone then", hostkey.Switch)
	return command
}

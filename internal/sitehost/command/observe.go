package command

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/sitehost/observe"
	"github.com/nomad-site/site/internal/sitehost/packages"
	"github.com/nomad-site/site/internal/sitehost/serve"
)

// observeLimit bounds programs that hang, such as systemctl on a stuck bus.
const observeLimit = time.Minute

func observeCommand(options Options) *cobra.Command {
	var document, store string
	command := &cobra.Command{
		Use: "observe", Short: "Print the actual state of what a host document names", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			input, err := options.document(document)
			if err != nil {
				return err
			}
			defer func() { _ = input.Close() }()
			var desired host.Document
			decoder := json.NewDecoder(input)
			decoder.DisallowUnknownFields() // a field that is not understood is not observed
			if err := decoder.Decode(&desired); err != nil {
				return fmt.Errorf("read the host document: %w", err)
			}
			ctx, cancel := context.WithTimeout(command.Context(), observeLimit)
			defer cancel()
			observation, err := observe.New(store).Observe(ctx, desired)
			if err != nil {
				return err
			}
			return options.print(observation)
		},
	}
	command.Flags().StringVar(&document, "document", "-", "host document; - for standard input")
	command.Flags().StringVar(&store, "store", serve.DefaultStore, "folder whose free space counts")
	return command
}

func packagesCommand(options Options) *cobra.Command {
	var document, store string
	install := &cobra.Command{
		Use: "install", Short: "Install a bundle of .deb files out of the store", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			input, err := options.document(document)
			if err != nil {
				return err
			}
			defer func() { _ = input.Close() }()
			bundle, err := packages.Decode(input)
			if err != nil {
				return err
			}
			result, err := packages.New(store).Install(command.Context(), bundle)
			if err != nil {
				return err
			}
			return options.print(result)
		},
	}
	install.Flags().StringVar(&document, "document", "-", "JSON list of packages; - for standard input")
	install.Flags().StringVar(&store, "store", serve.DefaultStore, "folder of the store")
	command := &cobra.Command{Use: "packages", Short: "Debian packages of the host"}
	command.AddCommand(install)
	return command
}

package command

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/sitehost/serve"
	"github.com/nomad-site/site/internal/sitehost/unseal"
)

func serveCommand(options Options) *cobra.Command {
	var listen, operators, unsealKey string
	var settings pullSettings
	command := &cobra.Command{
		Use: "serve", Short: "Serve the store's artifacts on loopback, and keep OpenBao unsealed", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			log := slog.New(slog.NewTextHandler(options.Stderr, nil))
			unsealer, err := unseal.New(unseal.Options{Address: settings.openBao, KeyFile: unsealKey, Log: log})
			if err != nil {
				return err
			}
			pulls, err := newBackground(settings, log)
			if err != nil {
				return err
			}
			served := serve.Options{
				Store: settings.store, Listen: listen, Version: options.Version, Operators: operators, Log: log,
				Notify: serve.SystemdNotify(options.NotifySocket), Collectors: []prometheus.Collector{unsealer},
			}
			beside := []func(context.Context){unsealer.Run}
			if pulls != nil {
				served.Puller, served.Refresh = pulls.get, pulls.keys.Refresh
				served.Collectors = append(served.Collectors, pulls)
				beside = append(beside, pulls.run)
			}
			return runServer(command.Context(), served, beside)
		},
	}
	command.Flags().StringVar(&settings.store, "store", serve.DefaultStore, "folder of the store")
	command.Flags().StringVar(&operators, "operators", "/etc/site/operators.jwks", "JWKS file with the operators' public keys")
	command.Flags().StringVar(&listen, "listen", serve.DefaultListen, "loopback address and port")
	command.Flags().StringVar(&unsealKey, "unseal-key", UnsealKeyFile, "file with OpenBao's unseal key; it may come later")
	command.Flags().StringVar(&settings.openBao, "openbao", unseal.DefaultAddress, "URL of OpenBao, on loopback")
	settings.flags(command, "")
	return command
}

// runServer serves until ctx ends. What runs beside shares nothing but the process.
func runServer(ctx context.Context, options serve.Options, beside []func(context.Context)) error {
	server, err := serve.New(ctx, options)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var others sync.WaitGroup
	for _, run := range beside {
		others.Go(func() { run(ctx) })
	}
	err = server.Run(ctx)
	cancel()
	others.Wait()
	return err
}

func receiveCommand(options Options) *cobra.Command {
	var folder string
	command := &cobra.Command{
		Use: "receive", Short: "Receive blobs on standard input", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error { return receive(command.Context(), options, folder) },
	}
	command.Flags().StringVar(&folder, "store", serve.DefaultStore, "folder of the store")
	return command
}

func receive(ctx context.Context, options Options, folder string) (err error) {
	store, err := blob.OpenStore(folder)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := store.Close(); err == nil && closeErr != nil {
			err = fmt.Errorf("close the store: %w", closeErr)
		}
	}()
	return blob.Receive(ctx, &duplex{reader: options.Stdin, writer: options.Stdout}, store)
}

// duplex is standard input and output as one connection. Closing it ends a
// pending read, where the input can be closed.
type duplex struct {
	reader io.Reader
	writer io.Writer
	once   sync.Once
	err    error
}

func (d *duplex) Read(buffer []byte) (int, error)   { return d.reader.Read(buffer) }
func (d *duplex) Write(content []byte) (int, error) { return d.writer.Write(content) }

// Close implements io.Closer.
func (d *duplex) Close() error {
	d.once.Do(func() {
		if closer, ok := d.reader.(io.Closer); ok {
			d.err = closer.Close()
		}
	})
	return d.err
}

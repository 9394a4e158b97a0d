package command

import (
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/sitehost/relay"
	"github.com/nomad-site/site/internal/sitehost/serve"
)

func relayCommand(options Options) *cobra.Command {
	command := &cobra.Command{
		Use: "relay", Short: "Take services of the first server to the loopback of all hosts",
		Long: "Services that listen on loopback of one host are at the same address on the others. In between is mutual\n" +
			"TLS 1.3 with the site's certificates, which are read anew for each connection.",
	}
	command.AddCommand(relayServeCommand(options), relayConnectCommand(options))
	return command
}

// relayCommon adds the flags that both ends have.
func relayCommon(options Options, command *cobra.Command) *relay.Common {
	common := &relay.Common{
		Log:    slog.New(slog.NewTextHandler(options.Stderr, nil)),
		Notify: serve.SystemdNotify(options.NotifySocket),
	}
	command.Flags().StringVar(&common.Files.CA, "ca", host.CACertPath, "file with the site CA's certificate")
	command.Flags().StringVar(&common.Files.Certificate, "cert", host.AgentCertPath, "file with this host's certificate")
	command.Flags().StringVar(&common.Files.Key, "key", host.AgentKeyPath, "file with its key")
	return common
}

func relayServeCommand(options Options) *cobra.Command {
	var listen string
	var targets []string
	command := &cobra.Command{
		Use: "serve", Short: "Let the site's other hosts reach services of this one", Args: cobra.NoArgs,
	}
	common := relayCommon(options, command)
	command.RunE = func(command *cobra.Command, _ []string) error {
		services, err := relay.ParseServices(targets)
		if err != nil {
			return err
		}
		server, err := relay.NewServer(command.Context(), relay.ServerOptions{Common: *common, Listen: listen, Targets: services})
		if err != nil {
			return err
		}
		return server.Run(command.Context())
	}
	command.Flags().StringVar(&listen, "listen", "", "private address and port of this host")
	command.Flags().StringArrayVar(&targets, "target", nil, "service as NAME=ADDRESS, its address on loopback; may be repeated")
	return command
}

func relayConnectCommand(options Options) *cobra.Command {
	var to, serverName string
	var locals []string
	command := &cobra.Command{
		Use: "connect", Short: "Have services of another host on this host's loopback", Args: cobra.NoArgs,
	}
	common := relayCommon(options, command)
	command.RunE = func(command *cobra.Command, _ []string) error {
		services, err := relay.ParseServices(locals)
		if err != nil {
			return err
		}
		connector, err := relay.NewConnector(command.Context(), relay.ConnectorOptions{
			Common: *common, To: to, ServerName: serverName, Locals: services,
		})
		if err != nil {
			return err
		}
		return connector.Run(command.Context())
	}
	command.Flags().StringVar(&to, "to", "", "private address and port of the host that serves them")
	command.Flags().StringVar(&serverName, "server-name", "", "name of that host, as in its certificate")
	command.Flags().StringArrayVar(&locals, "local", nil, "service as NAME=ADDRESS, where it is to be on loopback; may be repeated")
	return command
}

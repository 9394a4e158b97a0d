package cli

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/adapter/toolchain"
	"github.com/nomad-site/site/internal/lab"
)

func newLab(env Environment, flags *globalFlags) *cobra.Command {
	name := ""
	open := func() (*lab.Lab, error) { return lab.Open(flags.folder, name) }
	command := &cobra.Command{
		Use:   "lab",
		Short: "Real hosts on this machine to try site on",
		Long: `A lab is one or more bare Debian 12 hosts with systemd and sshd, and an object
store, on a network that leads nowhere else. It needs root and Debian's podman
and debootstrap. site reaches its hosts over SSH, as it would any others.
`,
		Args: cobra.NoArgs,
	}
	command.PersistentFlags().StringVar(&name, "name", "lab", "the lab; several can be up side by side")

	hosts := 0
	up := &cobra.Command{
		Use: "up", Short: "Boot the lab", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			it, err := open()
			if err != nil {
				return err
			}
			options := lab.Options{Hosts: hosts, Progress: func(line string) { _, _ = fmt.Fprintln(env.Err, "lab: "+line) }}
			tools, err := openTools()
			if err != nil {
				return err
			}
			if options.Versitygw, err = tools.Which("versitygw", toolchain.Host()); err != nil {
				return err
			}
			if err := it.Up(command.Context(), options); err != nil {
				return err
			}
			return printLab(env, flags, command, it)
		},
	}
	up.Flags().IntVar(&hosts, "hosts", 0, "how many hosts; default 1, or those there are")

	status := &cobra.Command{
		Use: "status", Short: "Show the lab", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			it, err := open()
			if err != nil {
				return err
			}
			return printLab(env, flags, command, it)
		},
	}
	shell := &cobra.Command{
		Use: "shell [HOST]", Short: "Open a root shell on a host of the lab", Args: cobra.MaximumNArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			it, err := open()
			if err != nil {
				return err
			}
			host := name + "-1"
			if len(args) == 1 {
				host = args[0]
			}
			line := it.SSHCommand(host)
			ssh := exec.CommandContext(command.Context(), line[0], line[1:]...)
			ssh.Stdin, ssh.Stdout, ssh.Stderr = os.Stdin, os.Stdout, os.Stderr
			return ssh.Run()
		},
	}
	simple := func(use, short string, act func(*cobra.Command, *lab.Lab) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(command *cobra.Command, _ []string) error {
			it, err := open()
			if err != nil {
				return err
			}
			return act(command, it)
		}}
	}
	command.AddCommand(up, status, shell,
		simple("down", "Remove the lab", func(command *cobra.Command, it *lab.Lab) error { return it.Down(command.Context()) }),
		simple("reset", "Make the hosts bare again", func(command *cobra.Command, it *lab.Lab) error { return it.Reset(command.Context()) }),
	)
	snapshot := &cobra.Command{
		Use: "snapshot NAME", Short: "Keep the state of the hosts", Args: cobra.ExactArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			it, err := open()
			if err != nil {
				return err
			}
			return it.Snapshot(command.Context(), args[0])
		},
	}
	restore := &cobra.Command{
		Use: "restore NAME", Short: "Go back to a snapshot", Args: cobra.ExactArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			it, err := open()
			if err != nil {
				return err
			}
			return it.Restore(command.Context(), args[0])
		},
	}
	command.AddCommand(snapshot, restore)
	for _, power := range []struct {
		use, short string
		act        func(*lab.Lab, context.Context, string) error
	}{
		{"reboot HOST", "Shut a host down and boot it again", (*lab.Lab).Reboot},
		{"kill HOST", "Cut a host's power", (*lab.Lab).Kill},
		{"start HOST", "Boot a host that was killed", (*lab.Lab).Start},
	} {
		command.AddCommand(&cobra.Command{
			Use: power.use, Short: power.short, Args: cobra.ExactArgs(1),
			RunE: func(command *cobra.Command, args []string) error {
				it, err := open()
				if err != nil {
					return err
				}
				return power.act(it, command.Context(), args[0])
			},
		})
	}
	return command
}

func printLab(env Environment, flags *globalFlags, command *cobra.Command, it *lab.Lab) error {
	status, err := it.Status(command.Context())
	if err != nil {
		return err
	}
	if flags.json {
		return printJSON(env.Out, status)
	}
	if !status.Exists {
		_, err := fmt.Fprintf(env.Out, "lab %s does not exist\n", status.Name)
		return err
	}
	writer := tabwriter.NewWriter(env.Out, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintln(writer, "HOST\tRUNNING\tADDRESS")
	for _, host := range status.Hosts {
		_, _ = fmt.Fprintf(writer, "%s\t%t\t%s:%d\n", host.Name, host.Running, host.Address, host.Port)
	}
	if status.Store != nil {
		_, _ = fmt.Fprintf(writer, "object store\t%t\t%s\n", status.Store.Running, status.Store.Endpoint)
	}
	_, _ = fmt.Fprintf(writer, "\nssh -F %s %s-1\n", status.SSHConfig, status.Name)
	return writer.Flush()
}

package cli

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/adapter/toolchain"
	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/plan"
)

func newTunnel(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	request := deploy.TunnelRequest{}
	get := ""
	command := &cobra.Command{
		Use:   "tunnel [JOB | HOST:PORT]",
		Short: "Open a local port that leads into the site",
		Long: `Opens a local port that leads, through SSH, to a job's service or to an address
as seen from a host of the site; without an argument to Nomad's API. It stays
open until interrupted. With --get it asks for one path, prints the answer and ends.
`,
		Example: "  site tunnel --site=gamma app\n  site tunnel --site=gamma app --get=/version",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil
			if len(args) == 1 {
				request.Remote = args[0]
				if !strings.Contains(request.Remote, ":") {
					if request.Host, request.Remote, err = deploy.JobAddress(command.Context(), options, args[0]); err != nil {
						return err
					}
				}
			}
			return deploy.OpenTunnel(command.Context(), options, request, func(tunnel deploy.Tunnel) error {
				if get != "" {
					if err := printAnswer(command.Context(), env.Out, "http://"+tunnel.Local+get); err != nil {
						return err
					}
					return errDone
				}
				if flags.json {
					return printJSON(env.Out, map[string]string{"local": tunnel.Local})
				}
				_, err := fmt.Fprintf(env.Out, "http://%s\n", tunnel.Local)
				return err
			})
		},
	}
	of.add(command)
	command.Flags().StringVar(&request.Listen, "listen", "", "local address; default: a free port on 127.0.0.1")
	command.Flags().StringVar(&request.Host, "host", "", "the host to go through; default: the first server")
	command.Flags().StringVar(&get, "get", "", "ask for this path by HTTP, print the answer and end")
	return command
}

// answerLimit bounds one request of `site tunnel --get`.
const answerLimit = 30 * time.Second

// printAnswer asks once; anything but a 2xx is an error.
func printAnswer(ctx context.Context, w io.Writer, url string) error {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return plan.WithHint(err, "give --get a path such as /version")
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = answer.Body.Close() }()
	if _, err := io.Copy(w, answer.Body); err != nil {
		return fmt.Errorf("read the answer of %s: %w", request.URL.Path, err)
	}
	if answer.StatusCode < 200 || answer.StatusCode > 299 {
		return fmt.Errorf("%s answered %s", request.URL.Path, answer.Status)
	}
	return nil
}

func newEnv(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	command := &cobra.Command{
		Use:   "env -- COMMAND [ARGUMENT…]",
		Short: "Run a command with a tunnel and a short token, so that nomad just works",
		Long: `Runs a command with NOMAD_ADDR and NOMAD_TOKEN set: the address of a tunnel that
is open as long as the command runs, and a token that is good for minutes. The
pinned nomad comes first in its PATH. Without a command it runs your shell.
`,
		Example: "  site env --site=gamma -- nomad job status",
		RunE: func(command *cobra.Command, args []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil
			if len(args) == 0 {
				shell := os.Getenv("SHELL")
				if shell == "" {
					return plan.WithHint(fmt.Errorf("no command is given and SHELL is not set"), "say what to run after --")
				}
				args = []string{shell}
			}
			return deploy.OpenTunnel(command.Context(), options, deploy.TunnelRequest{WithToken: true}, func(tunnel deploy.Tunnel) error {
				_, _ = fmt.Fprintf(env.Err, "site env: the token is good until %s\n", tunnel.Expiry.Local().Format(time.TimeOnly))
				child, err := envCommand(command.Context(), options.Platform.Tools, args)
				if err != nil {
					return err
				}
				child.Stdin, child.Stdout, child.Stderr = env.In, env.Out, env.Err
				child.Env = append(child.Env, "NOMAD_ADDR=http://"+tunnel.Local, "NOMAD_TOKEN="+tunnel.Token.Reveal())
				if err := child.Run(); err != nil {
					return childEnded(args[0], fmt.Errorf("%s: %w", args[0], err))
				}
				return errDone
			})
		},
	}
	of.add(command)
	return command
}

// envCommand finds a command as the child's shell would: the pinned nomad, which
// fits the site, comes before any other.
func envCommand(ctx context.Context, tools *toolchain.Toolchain, args []string) (*exec.Cmd, error) {
	path := os.Getenv("PATH")
	name := args[0]
	if pinned, err := tools.Which("nomad", toolchain.Host()); err == nil {
		path = filepath.Dir(pinned) + string(os.PathListSeparator) + path
		if name == "nomad" {
			name = pinned
		}
	}
	found, err := exec.LookPath(name)
	if err != nil {
		hint := "install it, or give its path"
		if name == "nomad" {
			hint = "run: site tool install nomad"
		}
		return nil, plan.WithHint(err, "%s", hint)
	}
	child := exec.CommandContext(ctx, found, args[1:]...)
	child.Args[0] = args[0]
	child.Env = append(os.Environ(), "PATH="+path)
	return child, nil
}

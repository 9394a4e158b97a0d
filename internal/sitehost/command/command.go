// Package command is the command line of site-host. Results are JSON on
// standard output, an error is one line on standard error.
package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/sitehost/dial"
	"github.com/nomad-site/site/internal/sitehost/lease"
)

// The exit codes; 0 is success.
const (
	ExitError       = 1
	ExitLocked      = 5 // the lock is held by someone else
	ExitNotThere    = 6 // what was asked for does not exist
	ExitInterrupted = 130
)

// The only files that `file` reads and writes.
const (
	// InitFile is the host's copy of the sealed init material.
	InitFile = host.InitPath
	// UnsealKeyFile is what `serve` unseals OpenBao with.
	UnsealKeyFile = host.UnsealKeyPath
)

// Options are what the process gives to the commands.
type Options struct {
	Version      string
	Stdin        io.Reader
	Stdout       io.Writer
	Stderr       io.Writer
	NotifySocket string
	// InitFile and UnsealKeyFile are the constants but in tests.
	InitFile, UnsealKeyFile string
}

// Run runs one command and returns its exit code.
func Run(ctx context.Context, options Options, arguments []string) int {
	if options.InitFile == "" {
		options.InitFile = InitFile
	}
	if options.UnsealKeyFile == "" {
		options.UnsealKeyFile = UnsealKeyFile
	}
	root := &cobra.Command{
		Use:   "site-host",
		Short: "What site needs on every host",
		Long: "site-host serves the host's artifacts on loopback, keeps OpenBao unsealed and answers site over SSH.\n\n" +
			"Exit codes: 0 done, 1 error, 5 locked by someone else, 6 not there, 130 interrupted.",
		Version:           options.Version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.AddCommand(serveCommand(options), receiveCommand(options), observeCommand(options), packagesCommand(options),
		lockCommand(options), releaseCommand(options), fileCommand(options), dialCommand(options),
		hostKeyCommand(options), openBaoCommand(options), postgreSQLCommand(options), relayCommand(options), journalCommand(options),
		pullCommand(options), storeCommand(options),
		versionCommand(options))
	root.SetArgs(arguments)
	root.SetOut(options.Stdout)
	root.SetErr(options.Stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	line := strings.ReplaceAll(err.Error(), "\n", "; ")
	if hint := plan.HintOf(err); hint != "" {
		line += " (hint: " + hint + ")"
	}
	_, _ = fmt.Fprintln(options.Stderr, "error: "+line)
	return exitCode(ctx, err)
}

func exitCode(ctx context.Context, err error) int {
	var held *lease.HeldError
	switch {
	case errors.As(err, &held):
		return ExitLocked
	case ctx.Err() != nil:
		return ExitInterrupted
	case errors.Is(err, errNotThere), errors.Is(err, dial.ErrNothingListens):
		return ExitNotThere
	}
	return ExitError
}

var errNotThere = errors.New("not there")

// notThere marks a missing file that the caller asked for by name.
func notThere(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", errNotThere, err)
	}
	return err
}

// print writes one line of JSON.
func (o Options) print(value any) error {
	content, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	if _, err := o.Stdout.Write(append(content, '\n')); err != nil {
		return fmt.Errorf("print the answer: %w", err)
	}
	return nil
}

// document opens a path, or standard input for "-".
func (o Options) document(path string) (io.ReadCloser, error) {
	if path == "-" {
		return io.NopCloser(o.Stdin), nil
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the document: %w", err)
	}
	return file, nil
}

func versionCommand(options Options) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the git sha that this was built from", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(options.Stdout, options.Version)
			return err
		},
	}
}

// Command site makes real hosts match a site's directory in git.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/nomad-site/site/internal/cli"
)

// version is set by the linker.
var version = "development"

func main() {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		cancel(cli.ErrInterrupted)
		<-signals // a second one does not wait for the clean-up
		os.Exit(cli.ExitInterrupted)
	}()
	err := cli.Run(ctx, cli.Environment{
		Args: os.Args[1:], In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Version: version,
	})
	if err != nil && !errors.Is(err, context.Canceled) {
		cli.PrintError(os.Stderr, err)
	}
	os.Exit(cli.ExitCode(err))
}

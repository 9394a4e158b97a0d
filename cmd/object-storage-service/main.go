// Command object-storage-service hands out uploads into a site's object store and
// proves what arrived. It runs as a job of the site, and is configured by its
// environment.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/nomad-site/site/internal/plan"
)

// version is the git sha, set by the linker.
var version = "unknown"

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return start(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr, nil)
}

// start is main with what it depends on. ready may be nil, and else is told where
// the service listens.
func start(ctx context.Context, arguments []string, environment func(string) string, stdout, stderr io.Writer, ready func(net.Addr)) int {
	flags := flag.NewFlagSet("object-storage-service", flag.ContinueOnError)
	flags.SetOutput(stderr)
	showVersion := flags.Bool("version", false, "print the version")
	if err := flags.Parse(arguments); err != nil {
		return 1
	}
	if *showVersion {
		_, _ = fmt.Fprintln(stdout, "object-storage-service", version)
		return 0
	}
	err := fmt.Errorf("unexpected argument %q", flags.Arg(0))
	if flags.NArg() == 0 {
		var config config
		if config, err = readConfig(environment); err == nil {
			err = serve(ctx, config, slog.New(slog.NewJSONHandler(stderr, nil)), ready)
		}
	}
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "error:", err)
		if hint := plan.HintOf(err); hint != "" {
			_, _ = fmt.Fprintln(stderr, "hint:", hint)
		}
		return 1
	}
	return 0
}

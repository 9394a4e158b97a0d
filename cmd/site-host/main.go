// Command site-host is on every host: the loopback artifact server, the receiver
// of blobs, and what site asks a host over SSH.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	_ "golang.org/x/crypto/x509roots/fallback" // a host may have no certificates of its own

	"github.com/nomad-site/site/internal/sitehost/command"
)

// version is the git sha, set by the linker.
var version = "unknown"

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	return command.Run(ctx, command.Options{
		Version: version, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, NotifySocket: os.Getenv("NOTIFY_SOCKET"),
	}, os.Args[1:])
}

// Command hello is the application that the lab deploys: it says which commit
// it was deployed from.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const shutdownPatience = 5 * time.Second // less than the job's kill_timeout

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Getenv)
	stop()
	if err != nil {
		slog.Error("hello ended", "error", err)
		os.Exit(1)
	}
}

// run serves until ctx ends, then lets open requests finish.
func run(ctx context.Context, getenv func(string) string) error {
	server := &http.Server{
		Addr:              listenAddress(getenv),
		Handler:           newHandler(getenv),
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
	}
	failed := make(chan error, 1)
	go func() { failed <- server.ListenAndServe() }()
	slog.Info("hello listens", "address", server.Addr)
	select {
	case err := <-failed:
		return fmt.Errorf("serve on %s: %w", server.Addr, err)
	case <-ctx.Done():
	}
	// ctx has ended already; what is left has its own bound.
	patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownPatience)
	defer cancel()
	if err := server.Shutdown(patience); err != nil {
		return fmt.Errorf("shut down: %w", err)
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve on %s: %w", server.Addr, err)
	}
	return nil
}

// listenAddress is every address of the host at the port labelled "http" in the
// jobspec: the health check comes by the host's address, a tunnel by loopback.
func listenAddress(getenv func(string) string) string {
	if address := getenv("HELLO_LISTEN"); address != "" {
		return address
	}
	if port := getenv("NOMAD_PORT_http"); port != "" {
		return ":" + port
	}
	return ":8080"
}

// version is the answer of /version.
type version struct {
	SHA   string `json:"sha"`
	Alloc string `json:"alloc"`
	Job   string `json:"job"`
}

func newHandler(getenv func(string) string) http.Handler {
	is := version{
		SHA:   getenv("NOMAD_META_site_git_sha"),
		Alloc: getenv("NOMAD_ALLOC_ID"),
		Job:   getenv("NOMAD_JOB_NAME"),
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(is)
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, "hello from %s\n", is.SHA)
	})
	return mux
}

// Command hello is the application that the lab deploys: it says which commit
// it was deployed from, and how often it was started.
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
	"sync"
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
	data, err := connect(ctx, getenv)
	if err != nil {
		return err
	}
	server := &http.Server{
		Addr:              listenAddress(getenv),
		Handler:           newHandler(getenv, data),
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
	}
	if data != nil {
		starting, cancel := context.WithCancel(ctx)
		var written sync.WaitGroup
		written.Go(func() { data.start(starting, getenv(shaVariable), getenv(allocVariable)) })
		defer func() {
			cancel()
			written.Wait()
			data.store.Close()
		}()
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

// connect gives no database where none is set, as outside of the job.
func connect(ctx context.Context, getenv func(string) string) (*database, error) {
	address := getenv("DATABASE_URL")
	if address == "" {
		return nil, nil
	}
	opened, err := openPostgres(ctx, address, getenv("DATABASE_PASSWORD_FILE"))
	if err != nil {
		return nil, err
	}
	return newDatabase(opened), nil
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
	// Rows is how many starts the database knows; absent where it does not answer.
	Rows *int `json:"rows,omitempty"`
}

// What Nomad tells the task.
const (
	shaVariable   = "NOMAD_META_site_git_sha"
	allocVariable = "NOMAD_ALLOC_ID"
)

// newHandler answers with what the database says; data may be nil.
func newHandler(getenv func(string) string, data *database) http.Handler {
	is := version{
		SHA:   getenv(shaVariable),
		Alloc: getenv(allocVariable),
		Job:   getenv("NOMAD_JOB_NAME"),
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if data != nil {
			if err := data.check(r.Context()); err != nil {
				slog.Warn("not healthy", "error", err)
				http.Error(w, "the database does not answer", http.StatusServiceUnavailable)
				return
			}
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, r *http.Request) {
		answer := is
		if data != nil {
			if rows, err := data.rows(r.Context()); err != nil {
				slog.Warn("rows are not counted", "error", err)
			} else {
				answer.Rows = &rows
			}
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer)
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, "hello from %s\n", is.SHA)
	})
	return mux
}

// Keys is an application that sends a value with its requests, and lets in whoever
// sends one that it knows. It sends the first that it has.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"
)

const header = "X-Key"

func main() {
	content, err := os.ReadFile(os.Getenv("KEYS"))
	if err != nil {
		log.Fatal(err)
	}
	keys := bytes.Fields(content)
	if len(keys) == 0 {
		log.Fatal("there is no key")
	}
	if broken := os.Getenv("BROKEN"); broken != "" {
		if _, err := os.Stat(broken); err == nil {
			log.Fatal("it is broken")
		}
	}
	http.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("GET /check", func(w http.ResponseWriter, r *http.Request) {
		known := slices.ContainsFunc(keys, func(key []byte) bool { return string(key) == r.Header.Get(header) })
		if !known {
			http.Error(w, "nobody knows this key", http.StatusUnauthorized)
		}
	})
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
	http.HandleFunc("GET /send", func(w http.ResponseWriter, r *http.Request) {
		if err := send(r.Context(), client, r.FormValue("to"), string(keys[0])); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
		}
	})
	if err := serve(); err != nil {
		log.Fatal(err)
	}
}

// serve lets open requests finish when it is told to end.
func serve() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	server := &http.Server{Addr: ":" + os.Getenv("NOMAD_PORT_http")}
	failed := make(chan error, 1)
	go func() { failed <- server.ListenAndServe() }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	patience, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return server.Shutdown(patience)
}

func send(ctx context.Context, client *http.Client, to, key string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+to+"/check", nil)
	if err != nil {
		return err
	}
	request.Header.Set(header, key)
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	said, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", response.Status, bytes.TrimSpace(said))
	}
	return err
}

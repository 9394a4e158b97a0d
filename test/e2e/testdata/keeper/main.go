// Keeper is an application that keeps a secret, and whose health depends on it.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
)

// On a host where this file is, a keeper comes up only with the value whose
// digest it holds.
const digestFile = "/srv/keeper/lives-with"

func main() {
	var kept atomic.Pointer[[]string]
	read := func() {
		values := []string{}
		files, _ := filepath.Glob("/local/key*")
		for _, file := range files {
			if content, err := os.ReadFile(file); err == nil {
				values = append(values, string(content))
			}
		}
		kept.Store(&values)
	}
	read()
	if only, err := os.ReadFile(digestFile); err == nil && digest((*kept.Load())[0]) != string(only) {
		fmt.Fprintln(os.Stderr, "it ends with this secret")
		os.Exit(3)
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	go func() {
		for range hangup {
			read()
		}
	}()
	http.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if values := *kept.Load(); len(values) == 0 || strings.Contains(strings.Join(values, " "), "refused") {
			fmt.Println("the provider says no to", values)
			http.Error(w, "the provider says no", http.StatusServiceUnavailable)
		}
	})
	// Who presents a value is let in where it is one of those that are kept.
	http.HandleFunc("/accepts/{digest}", func(w http.ResponseWriter, r *http.Request) {
		if !slices.ContainsFunc(*kept.Load(), func(value string) bool { return digest(value) == r.PathValue("digest") }) {
			http.Error(w, "another value", http.StatusForbidden)
		}
	})
	log.Fatal(http.ListenAndServe(":"+os.Getenv("NOMAD_PORT_http"), nil))
}

func digest(value string) string {
	sum := sha256.Sum256([]byte(value))
	return hex.EncodeToString(sum[:])
}

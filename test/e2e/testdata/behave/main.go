// Behave is an application that behaves as it is told by MODE.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	mode := os.Getenv("MODE")
	fmt.Println("mode is", mode)
	switch mode {
	case "exit":
		fmt.Fprintln(os.Stderr, "no configuration found")
		os.Exit(3)
	case "done":
		return
	case "memory":
		fill()
	}
	http.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if mode == "sick" {
			http.Error(w, "the database does not answer", http.StatusServiceUnavailable)
		}
	})
	http.HandleFunc("/version", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, os.Getenv("NOMAD_META_site_git_sha"))
	})
	log.Fatal(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
}

// fill takes memory, and uses it, until there is none left.
func fill() {
	for kept := [][]byte{}; ; time.Sleep(10 * time.Millisecond) {
		block := make([]byte, 8<<20)
		for i := 0; i < len(block); i += 4096 {
			block[i] = 1
		}
		kept = append(kept, block)
		if len(kept) > 64 {
			log.Fatal("half a gigabyte and nobody minds")
		}
	}
}

// Leaky reads its secrets and, if MODE is tell, prints one of them before it ends.
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
)

func main() {
	value, err := os.ReadFile("/secrets/external")
	if err != nil {
		log.Fatal(err)
	}
	if os.Getenv("MODE") == "tell" {
		fmt.Printf("the key is %s\n", value)
		encoded, _ := json.Marshal(map[string]string{"key": string(value)})
		fmt.Fprintf(os.Stderr, "%s\n", encoded)
		os.Exit(3)
	}
	http.HandleFunc("/healthz", func(http.ResponseWriter, *http.Request) {})
	log.Fatal(http.ListenAndServe(":8090", nil))
}

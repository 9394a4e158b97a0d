// Shop is the application of an adopter, who knows nothing of site.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"
)

var edition = "first"

func main() {
	fmt.Println("the shop opens")
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, edition+" edition")
	})
	log.Fatal(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
}

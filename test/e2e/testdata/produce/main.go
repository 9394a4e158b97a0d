// Produce is a job that writes a secret of others with its own identity, or reads one.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	switch mode := os.Getenv("MODE"); mode {
	case "produce":
		delay, err := time.ParseDuration(os.Getenv("DELAY"))
		if err == nil {
			time.Sleep(delay)
			err = write(os.Getenv("SECRET"), os.Getenv("VALUE"))
		}
		if err != nil {
			log.Fatal(err)
		}
		log.Println("wrote", os.Getenv("SECRET"))
	case "idle":
		log.Println("writes nothing")
	case "show":
		http.HandleFunc("/", func(w http.ResponseWriter, request *http.Request) {
			content, err := os.ReadFile("/local/value")
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			_, _ = w.Write(content)
		})
		log.Fatal(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
	default:
		log.Fatalf("mode %q", mode)
	}
	// A service that has done its work goes on being healthy, until it is ended.
	time.Sleep(24 * time.Hour)
}

// write stores a value in OpenBao, with the token that Nomad gave the task.
func write(path, value string) error {
	body := fmt.Sprintf(`{"data": {"value": %q}}`, value)
	request, err := http.NewRequest(http.MethodPost, "http://127.0.0.1:8200/v1/"+path, bytes.NewBufferString(body))
	if err != nil {
		return err
	}
	token := os.Getenv("VAULT_TOKEN")
	if token == "" {
		return errors.New("the task has no VAULT_TOKEN")
	}
	request.Header.Set("X-Vault-Token", token)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(response.Body)
		return fmt.Errorf("write %s: %s: %s", path, response.Status, said)
	}
	return nil
}

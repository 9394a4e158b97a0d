package main

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
)

// build makes the executable as a host gets it.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "site-host")
	command := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -X main.version=abc", "-o", path, ".")
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	return path
}

// pipes is a process as a connection.
type pipes struct {
	io.Reader
	io.WriteCloser
}

func TestTheExecutableIsStaticReceivesServesAndStops(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the executable")
	}
	executable := build(t)
	binary, err := elf.Open(executable)
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range binary.Progs {
		if program.Type == elf.PT_INTERP || program.Type == elf.PT_DYNAMIC {
			t.Errorf("it is not static: %s", program.Type)
		}
	}
	_ = binary.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if output, err := exec.CommandContext(ctx, executable, "version").Output(); err != nil || string(output) != "abc\n" {
		t.Errorf("version %q, %v", output, err)
	}

	// The server runs first: what is received later needs no restart.
	store := filepath.Join(t.TempDir(), "store")
	server := exec.CommandContext(ctx, executable, "serve", "--store", store, "--listen", "127.0.0.1:0")
	log, err := server.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Process.Kill() }()
	line, err := bufio.NewReader(log).ReadString('\n')
	match := regexp.MustCompile(`address=(\S+)`).FindStringSubmatch(line)
	if err != nil || match == nil {
		t.Fatalf("log %q, %v", line, err)
	}

	content := bytes.Repeat([]byte("content of the artifact\n"), 100_000)
	source := blob.BytesSource("tool", content)
	receiver := exec.CommandContext(ctx, executable, "receive", "--store", store)
	input, err := receiver.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := receiver.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := receiver.Start(); err != nil {
		t.Fatal(err)
	}
	_, err = blob.Send(ctx, pipes{output, input}, blob.Offer{
		Blobs: []blob.Offered{{Source: source}},
		Names: []blob.Name{{
			Site: "lab", Artifact: "tool", Kind: blob.KindFile, Digest: source.Digest(), Size: source.Size(), Blobs: []blob.Digest{source.Digest()},
		}},
	}, blob.SendOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_ = input.Close()
	if err := receiver.Wait(); err != nil {
		t.Fatal(err)
	}

	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+match[1]+"/artifacts/lab/tool@"+string(source.Digest()), nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(response.Body)
	_ = response.Body.Close()
	if err != nil || response.StatusCode != http.StatusOK || !bytes.Equal(got, content) {
		t.Errorf("%d, %d bytes, %v", response.StatusCode, len(got), err)
	}
	http.DefaultClient.CloseIdleConnections()
	if err := server.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := server.Wait(); err != nil {
		t.Errorf("stopped with %v", err)
	}

	// A lock whose client was killed is free at once.
	lock := filepath.Join(t.TempDir(), "lock.json")
	holder := exec.CommandContext(ctx, executable, "lock", "acquire", "--hold", "--holder=anna", "--lease=1h", "--file="+lock)
	client, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	printed, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	var held struct{ Holder string }
	if err := json.NewDecoder(printed).Decode(&held); err != nil || held.Holder != "anna" {
		t.Fatalf("%v, %v", held, err)
	}
	refused, err := exec.CommandContext(ctx, executable, "lock", "acquire", "--holder=ben", "--file="+lock).Output()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 5 || !strings.Contains(string(refused), `"holder":"anna"`) {
		t.Errorf("while it is held: %q, %v", refused, err)
	}
	_ = client.Close()
	if err := holder.Wait(); err != nil {
		t.Fatal(err)
	}
	if output, err := exec.CommandContext(ctx, executable, "lock", "show", "--file="+lock).Output(); err != nil || string(output) != "null\n" {
		t.Errorf("afterwards: %q, %v", output, err)
	}
}

package program

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/secret"
)

func shell(script string) []string { return []string{"/bin/sh", "-c", script} }

func TestAProgramGetsItsInputAndGivesItsOutput(t *testing.T) {
	output, err := Run(t.Context(), Command{Args: shell("tr a-z A-Z"), Stdin: secret.New("value"), Limit: time.Minute})
	if err != nil || string(output) != "VALUE" {
		t.Fatalf("got %q, %v", output, err)
	}
}

func TestAProgramOfTheRepositoryIsFoundInItsFolder(t *testing.T) {
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "mint"), []byte("#!/bin/sh\necho made\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	output, err := Run(t.Context(), Command{Dir: folder, Args: []string{"./mint"}, Limit: time.Minute})
	if err != nil || string(output) != "made\n" {
		t.Fatalf("got %q, %v", output, err)
	}
}

func TestAFailureSaysWhyWithoutTheValue(t *testing.T) {
	const planted = "planted-value"
	_, err := Run(t.Context(), Command{
		Args: shell(`echo printed-value; read value; echo "refused $value printed-value" >&2; exit 3`), Stdin: secret.New(planted + "\n"), Limit: time.Minute,
	})
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != 3 {
		t.Fatalf("got %v, want exit code 3", err)
	}
	if !strings.Contains(err.Error(), "refused [redacted]") {
		t.Errorf("%q does not say what the program said", err)
	}
	for _, value := range []string{planted, "printed-value"} {
		if strings.Contains(err.Error(), value) {
			t.Errorf("%q shows %s", err, value)
		}
	}
}

func TestAProgramThatDoesNotEndIsEnded(t *testing.T) {
	_, err := Run(t.Context(), Command{Args: shell("exec sleep 60"), Limit: 50 * time.Millisecond})
	if err == nil || !strings.Contains(err.Error(), "did not end within 50ms") {
		t.Fatalf("got %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("operator pressed Ctrl-C")
	time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
	if _, err := Run(ctx, Command{Args: shell("exec sleep 60"), Limit: time.Minute}); !errors.Is(err, cause) {
		t.Fatalf("got %v, want the cause", err)
	}
}

func TestAProgramThatPrintsWithoutEndIsRefused(t *testing.T) {
	_, err := Run(t.Context(), Command{Args: shell("head -c 2000000 /dev/zero"), Limit: time.Minute})
	if err == nil || !strings.Contains(err.Error(), "more than 1048576 bytes") {
		t.Fatalf("got %v", err)
	}
}

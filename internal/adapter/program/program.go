// Package program runs the commands that a site's catalogue or an operator
// names: those that make, read or check a secret.
package program

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

// Command is one program to run. No shell looks at it.
type Command struct {
	// Dir is the working folder; a program named ./x is looked for there.
	Dir  string
	Args []string
	// Stdin is given to it, and is the only way in: never argv or environment.
	Stdin secret.Value
	// Limit bounds how long it may run.
	Limit time.Duration
}

// outputLimit is how much a program may print.
const outputLimit = 1 << 20

// Run gives what the program prints. Its stderr is part of the error, with what
// went in or came out of it blacked out.
func Run(ctx context.Context, command Command) ([]byte, error) {
	name := command.Args[0]
	limited, cancel := context.WithTimeout(ctx, command.Limit)
	defer cancel()
	process := exec.CommandContext(limited, name, command.Args[1:]...)
	process.Dir = command.Dir
	process.WaitDelay = 2 * time.Second // its children may hold the pipes
	process.Stdin = strings.NewReader(command.Stdin.Reveal())
	output, said := &bounded{limit: outputLimit}, &bounded{limit: 4 << 10}
	process.Stdout, process.Stderr = output, said
	err := process.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("run %s: %w", name, context.Cause(ctx))
	case limited.Err() != nil:
		return nil, fmt.Errorf("run %s: it did not end within %s", name, command.Limit)
	case errors.As(err, &exit):
		return nil, &ExitError{Name: name, Code: exit.ExitCode(), Said: command.redact(said.kept.String(), output.kept.String())}
	case err != nil:
		return nil, plan.WithHint(fmt.Errorf("run %s: %w", name, err), "it must be on PATH, or named ./path from the repository's root")
	case output.more:
		return nil, fmt.Errorf("run %s: it printed more than %d bytes", name, outputLimit)
	}
	return output.kept.Bytes(), nil
}

// redact takes the value out of what a program said.
func (c Command) redact(said string, values ...string) string {
	for _, value := range append(values, c.Stdin.Reveal()) {
		if value = strings.TrimSpace(value); value != "" {
			said = strings.ReplaceAll(said, value, secret.New("").String())
		}
	}
	return strings.TrimSpace(said)
}

// ExitError is a program that ended with another code than 0.
type ExitError struct {
	Name string
	Code int
	// Said is the beginning of its stderr, without the secret.
	Said string
}

func (e *ExitError) Error() string {
	text := fmt.Sprintf("%s ended with exit code %d", e.Name, e.Code)
	if e.Said != "" {
		text += ": " + e.Said
	}
	return text
}

// bounded keeps the beginning of what is written to it. The buffer is not
// embedded: io.Copy would read into it past the bound.
type bounded struct {
	kept  bytes.Buffer
	limit int
	more  bool
}

func (b *bounded) Write(content []byte) (int, error) {
	fits := min(len(content), b.limit-b.kept.Len())
	b.more = b.more || fits < len(content)
	b.kept.Write(content[:fits]) // it never fails
	return len(content), nil
}

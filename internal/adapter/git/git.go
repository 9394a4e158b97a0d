// Package git reads commits of the operator's repository through the git
// command, so that the user's own configuration of remotes, worktrees and
// object stores holds.
package git

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

// Repository is a work tree with its history.
type Repository struct {
	root string
}

// Open finds the repository that dir belongs to.
func Open(ctx context.Context, dir string) (*Repository, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("open git repository: %w", err)
	}
	out, err := run(ctx, dir, "rev-parse", "--show-toplevel")
	if err != nil {
		var failed *commandError
		switch {
		case !errors.As(err, &failed):
			return nil, err
		case strings.Contains(failed.stderr, "not a git repository"):
			return nil, plan.WithHint(fmt.Errorf("%s is not in a git repository", dir),
				"a site is deployed from a commit: run inside the repository, or start one with `git init && git add -A && git commit`")
		case strings.Contains(failed.stderr, "must be run in a work tree"):
			return nil, plan.WithHint(fmt.Errorf("%s has no work tree", dir), "run in a clone that is not bare")
		}
		return nil, fmt.Errorf("open git repository %s: %w", dir, err)
	}
	return &Repository{root: filepath.FromSlash(strings.TrimRight(string(out), "\r\n"))}, nil
}

// Root is the top folder of the work tree.
func (r *Repository) Root() string { return r.root }

// Resolve turns a branch, tag or abbreviated sha into a full commit sha; an
// empty rev is HEAD.
func (r *Repository) Resolve(ctx context.Context, rev string) (string, error) {
	if rev == "" {
		rev = "HEAD"
	}
	if strings.HasPrefix(rev, "-") {
		return "", plan.WithHint(fmt.Errorf("git revision %q starts with a dash", rev), "give a commit, a branch or a tag")
	}
	out, err := run(ctx, r.root, "rev-parse", "--verify", "--quiet", rev+"^{commit}")
	if err == nil {
		return strings.TrimSpace(string(out)), nil
	}
	var failed *commandError
	if !errors.As(err, &failed) {
		return "", err
	}
	if rev == "HEAD" {
		return "", plan.WithHint(fmt.Errorf("repository %s has no commit yet", r.root), "commit what you want to deploy first")
	}
	detail := ""
	if failed.stderr != "" {
		detail = ": " + failed.stderr
	}
	return "", plan.WithHint(fmt.Errorf("no commit %q in repository %s%s", rev, r.root, detail),
		"run `git fetch` (in a shallow clone `git fetch --unshallow`), or name a commit that `git log --all` shows")
}

// TreeID names the content of a commit: two commits with the same files have
// the same one.
func (r *Repository) TreeID(ctx context.Context, sha string) (string, error) {
	commit, err := r.Resolve(ctx, sha)
	if err != nil {
		return "", err
	}
	out, err := run(ctx, r.root, "rev-parse", "--verify", "--quiet", commit+"^{tree}")
	if err != nil {
		return "", fmt.Errorf("read the tree of commit %s: %w", commit, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Dirty lists the paths, relative to the root, that differ from HEAD:
// changed, staged, deleted, or untracked and not ignored.
func (r *Repository) Dirty(ctx context.Context) ([]string, error) {
	out, err := run(ctx, r.root, "status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames")
	if err != nil {
		return nil, fmt.Errorf("read the status of repository %s: %w", r.root, err)
	}
	var paths []string
	for entry := range strings.SplitSeq(string(out), "\x00") {
		// Two letters of status and a space stand before the path.
		if len(entry) > 3 {
			paths = append(paths, entry[3:])
		}
	}
	return paths, nil
}

// Tracked says whether a commit holds a file or folder at a slash-separated
// path relative to the root.
func (r *Repository) Tracked(ctx context.Context, sha, name string) (bool, error) {
	commit, err := r.Resolve(ctx, sha)
	if err != nil {
		return false, err
	}
	name = path.Clean(name)
	if name == "." {
		return true, nil
	}
	out, err := run(ctx, r.root, "ls-tree", "--full-tree", "-z", "--name-only", commit, "--", name)
	if err != nil {
		return false, fmt.Errorf("look for %s in commit %s: %w", name, commit, err)
	}
	return strings.TrimRight(string(out), "\x00") == name, nil
}

type commandError struct {
	verb   string
	stderr string
	err    error
}

func (e *commandError) Error() string {
	if e.stderr == "" {
		return fmt.Sprintf("git %s: %v", e.verb, e.err)
	}
	return fmt.Sprintf("git %s: %s", e.verb, e.stderr)
}

func (e *commandError) Unwrap() error { return e.err }

func run(ctx context.Context, dir string, args ...string) ([]byte, error) {
	command := newCommand(ctx, dir, args...)
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		return nil, explain(ctx, args[0], stderr.String(), err)
	}
	return stdout.Bytes(), nil
}

func newCommand(ctx context.Context, dir string, args ...string) *exec.Cmd {
	command := exec.CommandContext(ctx, "git", args...)
	command.Dir = dir
	command.Env = environment(os.Environ())
	command.WaitDelay = 5 * time.Second
	return command
}

// explain leaves a commandError only where git itself ran and said no.
func explain(ctx context.Context, verb, stderr string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("git %s: %w", verb, context.Cause(ctx))
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return &commandError{verb: verb, stderr: strings.TrimSpace(stderr), err: err}
	}
	err = fmt.Errorf("run git %s: %w", verb, err)
	if errors.Is(err, exec.ErrNotFound) {
		return plan.WithHint(err, "install git and have it in PATH")
	}
	return err
}

// environment drops the GIT_* variables: a hook or an outer git command sets
// them to point at another repository than the one that was opened.
func environment(inherited []string) []string {
	var kept []string
	for _, variable := range inherited {
		name, _, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, "GIT_") && name != "LC_ALL" && name != "LANGUAGE" {
			kept = append(kept, variable)
		}
	}
	// Messages are matched in English; reading must neither ask nor write the index.
	return append(kept, "LC_ALL=C", "GIT_TERMINAL_PROMPT=0", "GIT_OPTIONAL_LOCKS=0")
}

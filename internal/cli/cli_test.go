package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
)

// outcome is what a command line did.
type outcome struct {
	out, err string
	code     int
}

// runSite runs one command line as main does, with a cache of its own.
func runSite(t *testing.T, args ...string) outcome {
	t.Helper()
	return runSiteIn(t.Context(), t, args...)
}

func runSiteIn(ctx context.Context, t *testing.T, args ...string) outcome {
	t.Helper()
	t.Setenv("SITE_CACHE", t.TempDir())
	var stdout, stderr bytes.Buffer
	err := Run(ctx, Environment{Args: args, In: strings.NewReader(""), Out: &stdout, Err: &stderr, Version: "1.2.3"})
	if err != nil {
		PrintError(&stderr, err)
	}
	return outcome{out: stdout.String(), err: stderr.String(), code: ExitCode(err)}
}

func TestEveryErrorHasItsExitCode(t *testing.T) {
	rollout := func(reverted bool) error {
		return &nomad.RolloutError{Verdict: nomad.Verdict{Job: "orders", Reverted: reverted}}
	}
	for _, test := range []struct {
		name string
		err  error
		want int
	}{
		{"no error", nil, 0},
		{"any error", errors.New("no such file"), 1},
		{"an error with a hint", plan.WithHint(errors.New("no such file"), "make one"), 1},
		{"changes pending", errChanges, 2},
		{"a rollout that was reverted", rollout(true), 3},
		{"a rollout that was not", rollout(false), 4},
		{"a rollout deep inside of a step", fmt.Errorf("step jobs: %w", errors.Join(errors.New("other"), rollout(true))), 3},
		{"two rollouts of which one was not reverted", errors.Join(rollout(true), rollout(false)), 4},
		{"somebody's lock", fmt.Errorf("step lock: %w", &deploy.LockedError{Site: "gamma", Holder: "anna"}), 5},
		{"an interrupt", fmt.Errorf("step jobs: %w", ErrInterrupted), 130},
		{"a cancelled context", fmt.Errorf("step jobs: %w", context.Canceled), 130},
		{"the end of a command that ran in a tunnel", fmt.Errorf("tunnel: %w", errDone), 0},
		{"a command that ran in a tunnel and failed", fmt.Errorf("tunnel: %w", &childError{name: "nomad", code: 7}), 7},
		{"the run's deadline", &deploy.DeadlineError{}, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := ExitCode(test.err); got != test.want {
				t.Errorf("exit code %d, want %d", got, test.want)
			}
		})
	}
}

func TestAnInterruptEndsACommandWithItsCode(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(ErrInterrupted)
	// Whatever failed then, failed because the operator ended it.
	got := runSiteIn(ctx, t, "deploy", "--site=nowhere", "-C", t.TempDir())
	if got.code != ExitInterrupted || !strings.HasPrefix(got.err, "error: ") || !strings.Contains(got.err, "interrupted") {
		t.Errorf("got %+v", got)
	}
}

func TestErrorsEndWithTheWayOut(t *testing.T) {
	var printed strings.Builder
	PrintError(&printed, plan.WithHint(errors.New("it is broken"), "mend it"))
	if got := printed.String(); got != "error: it is broken\nhint: mend it\n" {
		t.Errorf("got %q", got)
	}
	for _, silent := range []error{errChanges, errDone} {
		printed.Reset()
		PrintError(&printed, silent)
		if printed.Len() != 0 {
			t.Errorf("got %q", printed.String())
		}
	}
}

func TestWrongCommandLinesAreErrorsWithHints(t *testing.T) {
	empty := t.TempDir()
	for _, test := range []struct {
		name, want, hint string
		args             []string
	}{
		{"a mistyped command", `unknown command "depoly"`, "site deploy", []string{"depoly"}},
		{"a mistyped command of a group", `unknown command "upp"`, "site lab up", []string{"lab", "upp"}},
		{"an unknown flag", "unknown flag: --sites", "site deploy --help", []string{"deploy", "--sites=gamma"}},
		{"an argument too many", `"extra"`, "--help", []string{"deploy", "extra"}},
		{"a negative deadline", "is negative", "15m", []string{"deploy", "--timeout=-1s"}},
		{"no site root token", "is not given", "site root-token new", []string{"bootstrap-deploy"}},
		{"two different site root tokens", "different files", "one of them",
			[]string{"bootstrap-deploy", "--root-token-file=a", "--openbao-site-root-token-file=b"}},
		{"init without a host", "--host", "site init", []string{"init", "--site=gamma"}},
		{"a tool that is not in the catalogue", "nosuch", "", []string{"tool", "which", "nosuch"}},
		{"a tool that is not installed", "nomad", "site tool install", []string{"tool", "which", "nomad"}},
		{"no locks", "lock.json", "--folder", []string{"debs", "fetch", "--folder", empty}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := runSite(t, test.args...)
			first, rest, _ := strings.Cut(got.err, "\n")
			if got.code != ExitError || got.out != "" || !strings.HasPrefix(first, "error: ") || !strings.Contains(got.err, test.want) {
				t.Errorf("exit code %d, stdout %q, stderr %q", got.code, got.out, got.err)
			}
			if test.hint != "" && (!strings.Contains(rest, "hint: ") || !strings.Contains(rest, test.hint)) {
				t.Errorf("no hint %q in %q", test.hint, got.err)
			}
		})
	}
}

// each calls do with every command.
func each(command *cobra.Command, do func(*cobra.Command)) {
	do(command)
	for _, sub := range command.Commands() {
		each(sub, do)
	}
}

func TestTheHelpOfEveryCommandNamesTheExitCodes(t *testing.T) {
	codes := []int{ExitDone, ExitError, ExitChanges, ExitReverted, ExitNotReverted, ExitLocked, ExitInterrupted}
	each(newRoot(Environment{}), func(command *cobra.Command) {
		t.Run(command.CommandPath(), func(t *testing.T) {
			got := runSite(t, append(strings.Fields(command.CommandPath())[1:], "--help")...)
			_, listed, found := strings.Cut(got.out, "\nExit codes:\n")
			if got.code != ExitDone || !found {
				t.Fatalf("got %+v", got)
			}
			for i, line := range strings.Split(strings.TrimSpace(listed), "\n") {
				if i >= len(codes) || strings.Fields(line)[0] != fmt.Sprint(codes[i]) {
					t.Errorf("line %q", line)
				}
			}
			if command.Short == "" || strings.HasSuffix(command.Short, ".") {
				t.Errorf("short help %q", command.Short)
			}
		})
	})
}

func TestARootTokenIsPrivateAndNeverOverwritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "safe", "root-token")
	got := runSite(t, "root-token", "new", path)
	if got.code != ExitDone || got.out != path+"\n" || got.err != "" {
		t.Fatalf("got %+v", got)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	token, err := seal.ReadRootToken(path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(got.out+got.err, token.Reveal()) {
		t.Error("the token was printed")
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	again := runSite(t, "root-token", "new", path)
	if again.code != ExitError || !strings.Contains(again.err, "exists") || !strings.Contains(again.err, "hint: ") {
		t.Errorf("got %+v", again)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Error("the token was overwritten")
	}
}

func TestInitWritesARepositoryOnce(t *testing.T) {
	folder := t.TempDir()
	key := filepath.Join(t.TempDir(), "id.pub")
	const public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKcMxMvkYwhxUpMrTt0ieowzFQEWFAZ9pRCnqqqKx0Ks"
	if err := os.WriteFile(key, []byte(public+" anna\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"init", "-C", folder, "--site=gamma", "--host=203.0.113.5", "--operator-key=" + key, "--component=orders"}
	got := runSite(t, args...)
	if got.code != ExitDone {
		t.Fatalf("got %+v", got)
	}
	listed, _, _ := strings.Cut(got.out, "\n\n") // what follows tells the next steps
	files := strings.Fields(listed)
	for _, want := range []string{"sites/gamma/site.hcl", "jobs/orders/component.hcl", "jobs/orders/orders.nomad.hcl"} {
		if !slices.Contains(files, want) {
			t.Errorf("%s is not in %v", want, files)
		}
	}
	for _, file := range files {
		if _, err := os.Stat(filepath.Join(folder, file)); err != nil {
			t.Error(err)
		}
	}
	if content, err := os.ReadFile(filepath.Join(folder, "sites", "gamma", "site.hcl")); err != nil || !strings.Contains(string(content), public) {
		t.Errorf("the operator's key is not in site.hcl: %v", err)
	}
	if again := runSite(t, args...); again.code != ExitError || !strings.Contains(again.err, "already there") {
		t.Errorf("a second run: %+v", again)
	}
	if forced := runSite(t, append(args, "--force", "--json")...); forced.code != ExitDone || !json.Valid([]byte(forced.out)) {
		t.Errorf("with --force: %+v", forced)
	}
	absent := runSite(t, "init", "-C", folder, "--site=gamma", "--host=h", "--operator-key="+filepath.Join(folder, "absent"))
	if absent.code != ExitError || !strings.Contains(absent.err, "public key") {
		t.Errorf("without the key file: %+v", absent)
	}
}

func TestToolListShowsTheCatalogue(t *testing.T) {
	got := runSite(t, "tool", "list")
	lines := strings.Split(strings.TrimSpace(got.out), "\n")
	if got.code != ExitDone || !slices.Equal(strings.Fields(lines[0]), []string{"TOOL", "VERSION", "INSTALLED"}) {
		t.Fatalf("got %+v", got)
	}
	// The cache of this test is empty.
	if !slices.ContainsFunc(lines, func(line string) bool {
		fields := strings.Fields(line)
		return len(fields) == 3 && fields[0] == "nomad" && fields[2] == "false"
	}) {
		t.Errorf("nomad is missing:\n%s", got.out)
	}
}

func TestJSONIsOneDocumentOnStdout(t *testing.T) {
	for _, args := range [][]string{
		{"version"}, {"tool", "list"}, {"lab", "status", "--name=cli-test", "-C", t.TempDir()},
	} {
		t.Run(strings.Join(args[:min(len(args), 2)], " "), func(t *testing.T) {
			got := runSite(t, append(slices.Clone(args), "--json")...)
			if got.code != ExitDone || !json.Valid([]byte(got.out)) {
				t.Errorf("got %+v", got)
			}
		})
	}
	if got := runSite(t, "version"); got.out != "site 1.2.3\n" {
		t.Errorf("got %q", got.out)
	}
}

func TestASecretIsNeverPrinted(t *testing.T) {
	const planted = "planted-and-never-to-be-seen"
	value := secret.New(planted)
	t.Run("in an error", func(t *testing.T) {
		var printed strings.Builder
		PrintError(&printed, plan.WithHint(fmt.Errorf("log in with %v, %s, %q and %#v", value, value, value, value), "try %v", value))
		mustNotHold(t, printed.String(), planted)
	})
	t.Run("in a result", func(t *testing.T) {
		var printed bytes.Buffer
		if err := printJSON(&printed, map[string]any{"tunnel": deploy.Tunnel{Local: "127.0.0.1:1", Token: value}}); err != nil {
			t.Fatal(err)
		}
		mustNotHold(t, printed.String(), planted)
	})
	t.Run("in a site root token file that is not one", func(t *testing.T) {
		folder := t.TempDir()
		if got := runSite(t, "init", "-C", folder, "--site=gamma", "--host=203.0.113.5"); got.code != ExitDone {
			t.Fatalf("got %+v", got)
		}
		commit(t, folder)
		token := filepath.Join(t.TempDir(), "root-token")
		if err := os.WriteFile(token, []byte(planted+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		got := runSite(t, "bootstrap-deploy", "-C", folder, "--root-token-file="+token, "--verbose")
		if got.code != ExitError || !strings.Contains(got.err, token) {
			t.Errorf("got %+v", got)
		}
		mustNotHold(t, got.out+got.err, planted)
		if _, err := os.Stat(filepath.Join(folder, "sites", "gamma", "init.age")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("something was sealed: %v", err)
		}
	})
}

func mustNotHold(t *testing.T, text, planted string) {
	t.Helper()
	if strings.Contains(text, planted) {
		t.Errorf("the secret is in %q", text)
	}
	if text == "" {
		t.Error("nothing was printed")
	}
}

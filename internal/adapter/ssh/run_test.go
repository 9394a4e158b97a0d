package ssh

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
)

func nasty() []string {
	return []string{
		"plain", "", " ", "a b", "it's", `"double"`, "$HOME", "$(id)", "`id`", "back\\slash", "*", "~", "~root", "!!", "#x",
		"line\nbreak", "tab\there", "-n", "--", "a;b", "a&&b", "a|b", ">x", "{a,b}", "[a]", "ünï ✓", "''", "'\\''", "=", "x=y", "%s",
	}
}

func TestQuoteSurvivesALocalShell(t *testing.T) {
	words := nasty()
	output, err := exec.Command("sh", "-c", Quote(append([]string{"printf", `%s\000`}, words...))).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(words, "\x00") + "\x00"; got != string(output) {
		t.Errorf("got  %q\nwant %q", output, got)
	}
	if got := Quote([]string{"ls", "-l", "/opt/site"}); got != "ls -l /opt/site" {
		t.Errorf("plain words are quoted: %s", got)
	}
}

func TestRun(t *testing.T) {
	s := newServer(t, nil)
	conn := s.connect()
	ctx := t.Context()

	t.Run("arguments arrive verbatim", func(t *testing.T) {
		output, err := conn.Run(ctx, Command{Args: append([]string{"printf", `%s\000`}, nasty()...)})
		if want := strings.Join(nasty(), "\x00") + "\x00"; err != nil || string(output) != want {
			t.Errorf("got %q, %v", output, err)
		}
	})
	t.Run("stdin is fed and stdout returned, byte for byte", func(t *testing.T) {
		input := bytes.Repeat([]byte{0, 1, 2, 255, '\n'}, 1<<18)
		output, err := conn.Run(ctx, Command{Args: []string{"cat"}, Stdin: bytes.NewReader(input)})
		if err != nil || !bytes.Equal(output, input) {
			t.Errorf("%d of %d bytes, %v", len(output), len(input), err)
		}
	})
	t.Run("a failure has its code and the tail of stderr", func(t *testing.T) {
		_, err := conn.Run(ctx, Command{Args: []string{"sh", "-c", `head -c 9000 /dev/zero | tr '\0' x >&2; echo the end >&2; exit 7`}})
		exit := mustBe[*ExitError](t, err)
		if exit.Code != 7 || !strings.HasSuffix(exit.Stderr, "the end\n") || len(exit.Stderr) != stderrTail {
			t.Errorf("code %d, %d bytes", exit.Code, len(exit.Stderr))
		}
	})
	t.Run("input that nobody reads does not hang", func(t *testing.T) {
		err := within(t, 10*time.Second, "run", func() error {
			_, err := conn.Run(ctx, Command{Args: []string{"true"}, Stdin: io.LimitReader(zeros{}, 64<<20)})
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("a reader that fails is named", func(t *testing.T) {
		broken := errors.New("disk on fire")
		_, err := conn.Run(ctx, Command{Args: []string{"sh", "-c", "cat >/dev/null; exit 3"}, Stdin: io.MultiReader(strings.NewReader("x"), failing{broken})})
		if !errors.Is(err, broken) {
			t.Errorf("%v", err)
		}
	})
	t.Run("facts", func(t *testing.T) {
		facts, err := conn.Facts(ctx)
		if err != nil || facts.UserID != os.Getuid() || facts.Machine == "" {
			t.Errorf("%+v %v", facts, err)
		}
	})
	t.Run("a cancelled command is gone on the host", func(t *testing.T) {
		short, cancel := context.WithCancel(ctx)
		process, err := conn.Start(short, []string{"sh", "-c", "trap '' HUP; echo $$; sleep 600; true"})
		if err != nil {
			t.Fatal(err)
		}
		buffer := make([]byte, 32)
		n, err := process.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		pid := strings.TrimSpace(string(buffer[:n]))
		cancel()
		if err := within(t, 5*time.Second, "wait", process.Wait); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		mustVanish(t, "/proc/"+pid)
	})
	t.Run("a cancelled Run returns at once", func(t *testing.T) {
		short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		defer cancel()
		err := within(t, 3*time.Second, "run", func() error {
			_, err := conn.Run(short, Command{Args: []string{"sleep", "600"}})
			return err
		})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
	t.Run("a process carries a protocol", func(t *testing.T) {
		process, err := conn.Start(ctx, []string{"sh", "-c", "while read line; do echo got $line; done; echo bye >&2; exit 4"})
		if err != nil {
			t.Fatal(err)
		}
		buffer := make([]byte, 64)
		for _, word := range []string{"one", "two"} {
			if _, err := io.WriteString(process, word+"\n"); err != nil {
				t.Fatal(err)
			}
			if n, err := process.Read(buffer); err != nil || string(buffer[:n]) != "got "+word+"\n" {
				t.Fatalf("%q %v", buffer[:n], err)
			}
		}
		if err := process.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := process.Read(buffer); !errors.Is(err, io.EOF) {
			t.Errorf("read %v, want EOF", err)
		}
		exit := mustBe[*ExitError](t, process.Wait())
		if exit.Code != 4 || exit.Stderr != "bye\n" {
			t.Errorf("%+v", exit)
		}
	})
	t.Run("forty at a time share the sessions that sshd grants", func(t *testing.T) {
		var group sync.WaitGroup
		failures := make(chan error, 40)
		for range 40 {
			group.Go(func() {
				if _, err := conn.Run(ctx, Command{Args: []string{"sleep", "0.05"}}); err != nil {
					failures <- err
				}
			})
		}
		group.Wait()
		close(failures)
		for err := range failures {
			t.Error(err)
		}
	})
	t.Run("a closed connection says so", func(t *testing.T) {
		closed := s.in(t).connect()
		_ = closed.Close()
		if _, err := closed.Run(ctx, Command{Args: []string{"true"}}); err == nil || errors.Is(err, ErrConnectionLost) {
			t.Errorf("%v", err)
		}
	})
}

type zeros struct{}

func (zeros) Read(buffer []byte) (int, error) { return len(buffer), nil }

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func mustVanish(t *testing.T, path string) {
	t.Helper()
	err := retry.Until(t.Context(), path+" to vanish", 5*time.Second, func(context.Context) error {
		if _, err := os.Stat(path); err == nil {
			return errors.New("still there")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// A host where `id` and `sudo` are scripts: this machine may have no sudo and
// no second user who may log in.
func TestSudo(t *testing.T) {
	const notRoot = "#!/bin/sh\necho 1000\n"
	for name, sudo := range map[string]string{
		"works":   "#!/bin/sh\n[ \"$1 $2\" = '-n --' ] || exit 9\nshift 2\nAS_ROOT=yes exec \"$@\"\n",
		"refused": "#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n",
		"missing": "",
	} {
		t.Run(name, func(t *testing.T) {
			bin := t.TempDir()
			scripts := map[string]string{"id": notRoot}
			for _, tool := range []string{"sh", "uname", "true", "cat"} {
				scripts[tool] = "#!/bin/sh\nexec /bin/" + tool + " \"$@\"\n"
			}
			if sudo != "" {
				scripts["sudo"] = sudo
			}
			for file, content := range scripts {
				if err := os.WriteFile(bin+"/"+file, []byte(content), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			s := newServer(t, nil, "SetEnv PATH="+bin)
			conn := s.connect()
			show := []string{"/bin/sh", "-c", `echo "root: $AS_ROOT"`}
			output, err := conn.Run(t.Context(), Command{Args: show})
			switch name {
			case "works":
				if err != nil || string(output) != "root: yes\n" {
					t.Errorf("%q %v", output, err)
				}
				output, err = conn.Run(t.Context(), Command{Args: show, AsLoginUser: true})
				if err != nil || string(output) != "root: \n" {
					t.Errorf("as login user: %q %v", output, err)
				}
			case "refused":
				if refusal := mustBe[*SudoError](t, err); refusal.Missing {
					t.Error("called missing")
				}
				mustContain(t, err.Error(), "a password is required")
				mustContain(t, plan.HintOf(err), "NOPASSWD")
			case "missing":
				if refusal := mustBe[*SudoError](t, err); !refusal.Missing {
					t.Errorf("called refused: %v", err)
				}
				mustContain(t, plan.HintOf(err), "install sudo")
			}
		})
	}
}

package command

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/sitehost/lease"
)

type answer struct {
	code           int
	stdout, stderr string
}

func run(ctx context.Context, initFile, stdin string, arguments ...string) answer {
	var stdout, stderr bytes.Buffer
	code := Run(ctx, Options{Version: "abc", Stdin: strings.NewReader(stdin), Stdout: &stdout, Stderr: &stderr, InitFile: initFile}, arguments)
	return answer{code, stdout.String(), stderr.String()}
}

func TestARefusedLockPrintsTheCurrentOneAndExitsWithFive(t *testing.T) {
	file := "--file=" + filepath.Join(t.TempDir(), "lock.json")
	taken := run(t.Context(), "", "", "lock", "acquire", file, "--holder=anna", "--reason=deploy", "--lease=1m")
	var lock lease.Lock
	if err := json.Unmarshal([]byte(taken.stdout), &lock); err != nil || taken.code != 0 || lock.Holder != "anna" || lock.ID == "" {
		t.Fatalf("%+v, %v", taken, err)
	}
	refused := run(t.Context(), "", "", "lock", "acquire", file, "--holder=ben")
	if refused.code != ExitLocked || refused.stdout != taken.stdout || !strings.HasPrefix(refused.stderr, "error: locked by anna (deploy)") || strings.Count(refused.stderr, "\n") != 1 {
		t.Errorf("%+v", refused)
	}
	if got := run(t.Context(), "", "", "lock", "show", file); got.code != 0 || got.stdout != taken.stdout {
		t.Errorf("show: %+v", got)
	}
	if got := run(t.Context(), "", "", "lock", "renew", file, "--id=other"); got.code != ExitLocked {
		t.Errorf("renew: %+v", got)
	}
	if got := run(t.Context(), "", "", "lock", "release", file, "--id=other"); got.code != ExitLocked {
		t.Errorf("release: %+v", got)
	}
	over := run(t.Context(), "", "", "lock", "acquire", file, "--holder=ben", "--takeover="+lock.ID)
	if over.code != 0 || !strings.Contains(over.stdout, `"holder":"ben"`) {
		t.Errorf("takeover: %+v", over)
	}
	if got := run(t.Context(), "", "", "lock", "renew", file, "--id="+lock.ID); got.code != ExitLocked || got.stdout != over.stdout {
		t.Errorf("renew after the takeover: %+v", got)
	}
	if err := json.Unmarshal([]byte(over.stdout), &lock); err != nil {
		t.Fatal(err)
	}
	if got := run(t.Context(), "", "", "lock", "release", file, "--id="+lock.ID); got.code != 0 {
		t.Errorf("release: %+v", got)
	}
	if got := run(t.Context(), "", "", "lock", "show", file); got.code != 0 || got.stdout != "null\n" {
		t.Errorf("show: %+v", got)
	}
}

func TestAHeldLockIsAnnouncedFirstAndFreedAtTheEndOfInput(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock.json")
	input, client := io.Pipe()
	output, printed := io.Pipe()
	done := make(chan int, 1)
	go func() {
		done <- Run(context.Background(), Options{Stdin: input, Stdout: printed, Stderr: io.Discard}, []string{"lock", "acquire", "--hold", "--file=" + path, "--holder=anna", "--lease=30s"})
	}()
	var lock lease.Lock
	if err := json.NewDecoder(output).Decode(&lock); err != nil || lock.Holder != "anna" {
		t.Fatalf("%+v, %v", lock, err)
	}
	if got := run(t.Context(), "", "", "lock", "acquire", "--file="+path, "--holder=ben"); got.code != ExitLocked {
		t.Errorf("while it is held: %+v", got)
	}
	_ = client.Close()
	select {
	case code := <-done:
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("still held")
	}
	if got := run(t.Context(), "", "", "lock", "acquire", "--file="+path, "--holder=ben"); got.code != 0 {
		t.Errorf("after it was freed: %+v", got)
	}
}

func TestReleaseRecordsAreStoredListedAndShown(t *testing.T) {
	dir := "--dir=" + filepath.Join(t.TempDir(), "releases")
	const record = `{"schema":"site.release/v1","id":"one","site":"lab","git_sha":"abc","created":"2026-01-01T00:00:00Z",` +
		`"components":{"hello":{"spec_digest":"sha256:1","jobspec":"{}","artifacts":{"image":"sha256:2"},"git_sha":"abc"}},"status":"done"}`
	if got := run(t.Context(), "", record, "release", "put", dir); got.code != 0 {
		t.Fatalf("%+v", got)
	}
	if got := run(t.Context(), "", "", "release", "list", dir); got.stdout != "["+record+"]\n" {
		t.Errorf("list: %+v", got)
	}
	if got := run(t.Context(), "", "", "release", "list", "--brief", dir); strings.Contains(got.stdout, "jobspec") || got.code != 0 {
		t.Errorf("brief: %+v", got)
	}
	if got := run(t.Context(), "", "", "release", "show", "one", dir); got.stdout != record+"\n" {
		t.Errorf("show: %+v", got)
	}
	if got := run(t.Context(), "", "", "release", "show", "two", dir); got.code != ExitNotThere {
		t.Errorf("show a missing one: %+v", got)
	}
	if got := run(t.Context(), "", record[:30], "release", "put", dir); got.code != ExitError {
		t.Errorf("half a record: %+v", got)
	}
}

func TestOnlyTheInitFileIsReadAndWritten(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "etc")
	path := filepath.Join(folder, "init.age")
	if got := run(t.Context(), path, "", "file", "get", path); got.code != ExitNotThere {
		t.Errorf("before: %+v", got)
	}
	if got := run(t.Context(), path, "sealed\x00", "file", "put", path); got.code != 0 {
		t.Fatalf("%+v", got)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if got := run(t.Context(), path, "", "file", "get", path); got.stdout != "sealed\x00" || got.code != 0 {
		t.Errorf("%+v", got)
	}
	for name, arguments := range map[string][]string{
		"another file": {"file", "get", "/etc/shadow"}, "another way there": {"file", "get", folder + "/../etc/init.age"},
		"writing another file": {"file", "put", filepath.Join(folder, "other")}, "a mode for all": {"file", "put", path, "--mode=0644"},
	} {
		if got := run(t.Context(), path, "x", arguments...); got.code != ExitError || got.stdout != "" {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := run(t.Context(), path, "", "file", "put", path); got.code != ExitError {
		t.Errorf("an empty file: %+v", got)
	}
	if content, _ := os.ReadFile(path); string(content) != "sealed\x00" {
		t.Errorf("the file became %q", content)
	}
}

func TestTheUnsealKeyIsReadWrittenAndSummed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "etc", "openbao-unseal.key")
	file := func(stdin string, arguments ...string) answer {
		var stdout, stderr bytes.Buffer
		code := Run(t.Context(), Options{Stdin: strings.NewReader(stdin), Stdout: &stdout, Stderr: &stderr, UnsealKeyFile: path}, append([]string{"file"}, arguments...))
		return answer{code, stdout.String(), stderr.String()}
	}
	if got := file("", "sum", path); got.code != 0 || got.stdout != `{"sha256":"","exists":false}`+"\n" {
		t.Errorf("before: %+v", got)
	}
	if got := file("the key", "put", path, "--mode", "0600"); got.code != 0 {
		t.Fatalf("%+v", got)
	}
	const sum = "3a0aac44832e55528a834fec737786c999e7b8dea8bd601bb59f195237d58b2e"
	if got := file("", "sum", path); got.code != 0 || got.stdout != `{"sha256":"`+sum+`","exists":true}`+"\n" {
		t.Errorf("%+v, want %s", got, sum)
	}
	if got := file("", "get", path); got.stdout != "the key" {
		t.Errorf("%+v", got)
	}
	if got := file("", "sum", "/etc/shadow"); got.code != ExitError || got.stdout != "" {
		t.Errorf("%+v", got)
	}
}

func TestTheHostKeyIsMadeOnceAndShown(t *testing.T) {
	path := "--file=" + filepath.Join(t.TempDir(), "host.key")
	if got := run(t.Context(), "", "", "host-key", "show", path); got.code != ExitNotThere || got.stdout != "" {
		t.Errorf("before: %+v", got)
	}
	made := run(t.Context(), "", "", "host-key", "ensure", path)
	if made.code != 0 || !strings.HasPrefix(made.stdout, `{"public_key_pem":"-----BEGIN PUBLIC KEY-----\n`) {
		t.Errorf("%+v", made)
	}
	for _, verb := range []string{"ensure", "show"} {
		if got := run(t.Context(), "", "", "host-key", verb, path); got != made {
			t.Errorf("%s: %+v", verb, got)
		}
	}
}

func TestTheHostKeyRotatesByANextOne(t *testing.T) {
	path := "--file=" + filepath.Join(t.TempDir(), "host.key")
	for _, verb := range []string{"next", "switch"} {
		if got := run(t.Context(), "", "", "host-key", verb, path); got.code != ExitNotThere || got.stdout != "" {
			t.Errorf("%s without a key: %+v", verb, got)
		}
	}
	alone := run(t.Context(), "", "", "host-key", "ensure", path)
	both := run(t.Context(), "", "", "host-key", "next", path)
	if both.code != 0 || !strings.Contains(both.stdout, `,"next_public_key_pem":"-----BEGIN PUBLIC KEY-----\n`) {
		t.Errorf("next: %+v", both)
	}
	for _, verb := range []string{"ensure", "show", "next"} {
		if got := run(t.Context(), "", "", "host-key", verb, path); got != both {
			t.Errorf("%s names one of two keys, or others: %+v", verb, got)
		}
	}
	switched := run(t.Context(), "", "", "host-key", "switch", path)
	if switched.code != 0 || switched == alone || strings.Contains(switched.stdout, "next") {
		t.Errorf("switch: %+v", switched)
	}
	if got := run(t.Context(), "", "", "host-key", "show", path); got != switched {
		t.Errorf("afterwards: %+v", got)
	}
}

func TestOpenBaosStorageIsWipedUntilItIsMarked(t *testing.T) {
	folder := t.TempDir()
	data := "--data=" + folder
	if err := os.WriteFile(filepath.Join(folder, "vault.db"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		verb, stdout string
		code         int
	}{
		{"status", `{"ready":false,"data":true}` + "\n", 0},
		{"wipe", "", 0},
		{"status", `{"ready":false,"data":false}` + "\n", 0},
		{"mark", "", 0},
		{"status", `{"ready":true,"data":false}` + "\n", 0},
		{"wipe", "", ExitError},
	} {
		got := run(t.Context(), "", "", "openbao", step.verb, data)
		if got.code != step.code || got.stdout != step.stdout || (got.code != 0) != strings.Contains(got.stderr, "hint: ") {
			t.Errorf("%s: %+v", step.verb, got)
		}
	}
}

func TestAServiceOfTheHostIsDialled(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	if got := run(t.Context(), "", "", "dial", "unix", socket); got.code != ExitNotThere || !strings.Contains(got.stderr, "nothing listens there") {
		t.Errorf("before: %+v", got)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		_, _ = io.Copy(conn, conn)
		_ = conn.Close()
	}()
	if got := run(t.Context(), "", "hello", "dial", "unix", socket); got.code != 0 || got.stdout != "hello" || got.stderr != "" {
		t.Errorf("%+v", got)
	}
	if got := run(t.Context(), "", "", "dial", "tcp", "203.0.113.5:22"); got.code != ExitError || !strings.Contains(got.stderr, "loopback") {
		t.Errorf("%+v", got)
	}
}

func TestErrorsAreOneLine(t *testing.T) {
	for name, arguments := range map[string][]string{
		"a public address":   {"serve", "--store=" + t.TempDir(), "--listen=0.0.0.0:7380"},
		"a public OpenBao":   {"serve", "--store=" + t.TempDir(), "--listen=127.0.0.1:0", "--openbao=http://203.0.113.5:8200"},
		"no dash":            {"postgresql", "run", "-c", "x"},
		"words before --":    {"postgresql", "run", "word", "--", "word"},
		"an unknown command": {"sing"},
		"an unknown flag":    {"serve", "--public"},
		"a broken document":  {"observe", "--document=-"},
		"a broken bundle":    {"packages", "install"},
		"a missing document": {"observe", "--document=/does/not/exist"},
		"noise to receive":   {"receive", "--store=" + t.TempDir()},
	} {
		got := run(t.Context(), "", "noise", arguments...)
		if got.code != ExitError || !strings.HasPrefix(got.stderr, "error: ") || strings.Count(got.stderr, "\n") != 1 {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := run(t.Context(), "", "", "version"); got.stdout != "abc\n" {
		t.Errorf("version: %+v", got)
	}
}

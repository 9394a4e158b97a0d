package lab

import (
	"context"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/testneeds"
)

// timed logs how long a step took and fails the test on an error.
func timed(t *testing.T, what string, do func() error) {
	t.Helper()
	start := time.Now()
	if err := do(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	t.Logf("%s took %s", what, time.Since(start).Round(10*time.Millisecond))
}

func TestALabLivesThroughItsWholeLife(t *testing.T) {
	testneeds.Lab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	lab, err := Open(t.TempDir(), "labtest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Down(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	})
	ssh := func(host, script string) (string, error) {
		command := lab.SSHCommand(host)
		out, err := exec.CommandContext(ctx, command[0], append(command[1:], script)...).CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	expect := func(host, script, want string) {
		t.Helper()
		if got, err := ssh(host, script); err != nil || got != want {
			t.Errorf("ssh %s %q = %q, %v; want %q", host, script, got, err, want)
		}
	}
	options := Options{Hosts: 2, Versitygw: testneeds.Tool(t, "versitygw"), Progress: func(line string) { t.Log(line) }}

	timed(t, "up", func() error { return lab.Up(ctx, options) })
	expect("labtest-1", "hostname", "labtest-1")
	expect("labtest-2", "systemctl is-system-running; cat /etc/hostname", "running\nlabtest-2")
	expect("labtest-1", "command -v python3 podman sudo; ip route show default; id -u", "0")
	expect("labtest-1", "timeout 5 bash -c 'head -c 7 </dev/tcp/labtest-2/22'", "SSH-2.0")
	if out, err := ssh("labtest-1", "timeout 3 bash -c '</dev/tcp/192.0.2.1/80'"); err == nil || !strings.Contains(out, "unreachable") {
		t.Errorf("a host reached out of the lab: %q, %v", out, err)
	}
	for _, host := range []string{"labtest-1", "labtest-2"} {
		if ids, err := ssh(host, "wc -c </etc/machine-id; stat -c %a /root/.ssh/authorized_keys"); err != nil || ids != "33\n600" {
			t.Errorf("%s was not furnished: %q, %v", host, ids, err)
		}
	}
	timed(t, "up again", func() error { return lab.Up(ctx, options) })

	timed(t, "snapshot", func() error { return lab.Snapshot(ctx, "bare") })
	if has, err := lab.HasSnapshot("bare"); !has || err != nil {
		t.Errorf("HasSnapshot = %v, %v", has, err)
	}
	change := "set -e; echo new >/etc/marker; rm /etc/debian_version; echo c >/var/lib/containers/marker; mv /etc/apt /etc/apt2; sync"
	expect("labtest-1", change, "")
	timed(t, "snapshot of the change", func() error { return lab.Snapshot(ctx, "changed") })
	expect("labtest-1", "cat /etc/marker /var/lib/containers/marker; ls -d /etc/debian_version /etc/apt 2>/dev/null; ls -d /etc/apt2", "new\nc\n/etc/apt2")
	timed(t, "restore", func() error { return lab.Restore(ctx, "bare") })
	expect("labtest-1", "ls -A /etc/marker /var/lib/containers /etc/apt2 2>/dev/null; cat /etc/debian_version | cut -d. -f1; ls -d /etc/apt", "/var/lib/containers:\n12\n/etc/apt")
	timed(t, "restore of the change", func() error { return lab.Restore(ctx, "changed") })
	expect("labtest-1", "cat /etc/marker /var/lib/containers/marker", "new\nc")

	expect("labtest-1", "echo kept >/root/kept; touch /run/gone", "")
	timed(t, "reboot", func() error { return lab.Reboot(ctx, "labtest-1") })
	expect("labtest-1", "cat /root/kept; ls /run/gone 2>/dev/null; true", "kept")
	if out, err := lab.Exec(ctx, "labtest-1", "journalctl", "--no-pager", "-o", "cat", "-u", "ssh"); err != nil || !strings.Contains(string(out), "listening") {
		t.Errorf("Exec = %q, %v", out, err)
	}

	timed(t, "kill", func() error { return lab.Kill(ctx, "labtest-2") })
	if status, err := lab.Status(ctx); err != nil || status.Up || !status.Hosts[0].Running || status.Hosts[1].Running {
		t.Errorf("Status with a dead host = %+v, %v", status, err)
	}
	timed(t, "start", func() error { return lab.Start(ctx, "labtest-2") })
	expect("labtest-2", "hostname", "labtest-2")

	space, err := findNamespace(lab.dir)
	if err != nil || space == nil {
		t.Fatalf("findNamespace = %v, %v", space, err)
	}
	if err := syscall.Kill(space.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	timed(t, "up after everything was killed", func() error { return lab.Up(ctx, options) })
	expect("labtest-1", "cat /root/kept", "kept")

	if options.Versitygw != "" {
		status, err := lab.Status(ctx)
		if err != nil || status.Store == nil || !status.Store.Running {
			t.Fatalf("the store does not run: %+v, %v", status, err)
		}
		address := strings.TrimPrefix(status.Store.Endpoint, "http://")
		conn, err := net.DialTimeout("tcp", address, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		expect("labtest-1", "timeout 5 bash -c '</dev/tcp/labtest-store/7070' && echo open", "open")
	}

	timed(t, "new host key", func() error { return lab.NewHostKey(ctx, "labtest-2") })
	if out, err := ssh("labtest-2", "true"); err == nil || !strings.Contains(out, "Host key verification failed") {
		t.Errorf("ssh with a changed host key = %q, %v", out, err)
	}
	timed(t, "reset", func() error { return lab.Reset(ctx) })
	expect("labtest-1", "ls /root/kept 2>/dev/null; hostname", "labtest-1")
	timed(t, "a third host", func() error { return lab.Up(ctx, Options{Hosts: 3}) })
	expect("labtest-2", "hostname", "labtest-2")
	expect("labtest-3", "hostname", "labtest-3")

	timed(t, "down", func() error { return lab.Down(ctx) })
	left, err := filepath.Glob(filepath.Join(filepath.Dir(lab.dir), "*"))
	if err != nil || len(left) != 0 {
		t.Errorf("down left %v, %v", left, err)
	}
	if linkExists(lab.bridge()) {
		t.Errorf("down left the bridge %s", lab.bridge())
	}
	if left, _ := filepath.Glob("/sys/fs/cgroup/*" + lab.cgroupParent()); len(left) != 0 {
		t.Errorf("down left the control groups %v", left)
	}
	timed(t, "down again", func() error { return lab.Down(ctx) })
}

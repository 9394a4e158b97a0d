package e2e

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/lab"
)

// hostKeyFingerprint is that of the key that the host has.
func (h *testHost) hostKeyFingerprint() string {
	h.site.t.Helper()
	key, _, _, _, err := gossh.ParseAuthorizedKey([]byte(h.exec("cat", "/etc/ssh/ssh_host_ed25519_key.pub")))
	if err != nil {
		h.site.t.Fatal(err)
	}
	return gossh.FingerprintSHA256(key)
}

func TestAChangedHostKeyIsRefusedWithBothFingerprints(t *testing.T) {
	s := newSite(t)
	old := s.host.hostKeyFingerprint()
	t.Cleanup(func() { // known_hosts of the lab is written anew
		if err := shared.lab.Up(context.WithoutCancel(t.Context()), lab.Options{}); err != nil {
			t.Error(err)
		}
	})
	if err := s.lab.NewHostKey(t.Context(), s.host.name); err != nil {
		t.Fatal(err)
	}
	changed := s.host.hostKeyFingerprint()
	if old == changed {
		t.Fatal("the host has its old key")
	}
	s.unchanged("a refused connection", func() {
		for _, args := range [][]string{{"deploy"}, {"deploy", "--accept-new-host-key"}, {"status"}} {
			s.wantRefusal(s.run(args...), []string{s.host.name, "changed", "pinned ssh-ed25519 " + old, "presented ssh-ed25519 " + changed},
				[]string{"ssh-keygen -lf", "known_hosts:"})
		}
	})
	if err := shared.lab.Up(t.Context(), lab.Options{}); err != nil {
		t.Fatal(err)
	}
	s.planIs()
}

func TestAnUnknownHostKeyIsRecordedOnlyWhenToldSo(t *testing.T) {
	s := newSite(t, readOnly)
	empty := filepath.Join(t.TempDir(), "known_hosts")
	s.write(empty, "")
	s.useSSHConfig("UserKnownHostsFile "+empty, "GlobalKnownHostsFile "+empty)
	record := filepath.Join(s.dir, "sites", name, "known_hosts")
	s.wantRefusal(s.run("status"), []string{s.host.name, "not pinned", s.host.hostKeyFingerprint()}, []string{"--accept-new-host-key"})
	if _, err := os.Stat(record); err == nil {
		t.Error("a key was recorded by a refused run")
	}
	s.must("status", "--accept-new-host-key")
	recorded := s.read(record)
	if strings.Count(recorded, "\n") != 1 || !strings.HasPrefix(recorded, s.host.address+" ssh-ed25519 ") {
		t.Errorf("recorded was %q", recorded)
	}
	s.must("status")
	s.planIs() // Ansible has no part in it, and the record is nothing to deploy
	if again := s.read(record); again != recorded || s.read(empty) != "" {
		t.Errorf("the record became %q", again)
	}
}

func TestAHostThatCannotBeReachedIsExplained(t *testing.T) {
	s := newSite(t, readOnly)
	closed, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := closed.Addr().(*net.TCPAddr).Port
	_ = closed.Close()
	network, _, _ := strings.Cut(s.host.address, "/")
	nobody := network[:strings.LastIndex(network, ".")] + ".250"
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	block, err := gossh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	wrongKey := filepath.Join(t.TempDir(), "wrong_id")
	s.write(wrongKey, string(pem.EncodeToMemory(block)))
	for title, test := range map[string]struct{ settings, says, hints []string }{
		"nothing listens there": {
			[]string{"HostName 127.0.0.1", fmt.Sprintf("Port %d", port)}, []string{s.host.name, "connection refused"}, []string{"sshd"},
		},
		"the address is nobody's": {
			[]string{"HostName " + nobody, "ConnectTimeout 5"}, []string{s.host.name, nobody}, []string{"is the host up"},
		},
		"the name is nobody's": {
			[]string{"HostName nobody.invalid", "ConnectTimeout 5"}, []string{s.host.name, "nobody.invalid"}, []string{"site.hcl"},
		},
		"the key is not the host's": {
			[]string{"IdentityFile " + wrongKey, "IdentitiesOnly yes"}, []string{"log in to " + s.host.name + " as root", "permission denied", wrongKey}, []string{"authorized_keys"},
		},
		"the key is not there": {
			[]string{"IdentityFile /nonexistent/key", "IdentitiesOnly yes"}, []string{"log in to " + s.host.name, "permission denied", "/nonexistent/key"}, []string{"authorized_keys"},
		},
	} {
		t.Run(title, func(t *testing.T) {
			// The lab's own IdentityFile would be tried too.
			content := "Host " + s.host.name + "\n    " + strings.Join(test.settings, "\n    ") + "\n    User root\n    UserKnownHostsFile " + filepath.Join(s.lab.Dir(), "known_hosts") + "\n"
			if !strings.Contains(content, "HostName") {
				content += "    HostName " + s.host.address + "\n"
			}
			s.write(filepath.Join(s.dir, ".lab", name, "ssh_config"), content)
			got := s.run("deploy")
			s.wantRefusal(got, append(test.says, "connect: "), test.hints)
			if got.duration > 20*time.Second {
				t.Errorf("it took %s", got.duration)
			}
		})
	}
}

func TestAUserWhoCannotBecomeRootIsToldWhatToDo(t *testing.T) {
	s := newSite(t)
	s.host.shell(`useradd --create-home --shell /bin/sh ann
		install -d -m 700 -o ann -g ann /home/ann/.ssh
		install -m 600 -o ann -g ann /root/.ssh/authorized_keys /home/ann/.ssh/authorized_keys`)
	s.useSSHConfig("User ann")
	become := "become root on " + s.host.name
	s.host.exec("mv", "/usr/bin/sudo", "/usr/bin/sudo.away") // as on a bare host
	s.wantRefusal(s.run(s.bootstrapArgs()...), []string{become, "user ann is not root", "sudo is not installed"}, []string{"log in as root", "install sudo"})
	s.host.exec("mv", "/usr/bin/sudo.away", "/usr/bin/sudo")
	got := s.run("deploy")
	s.wantRefusal(got, []string{become, "sudo refuses user ann", "password"}, []string{"/etc/sudoers.d/ann"})
	// The hint is good as it stands.
	_, line, _ := strings.Cut(got.stderr, "write `")
	line, _, _ = strings.Cut(line, "`")
	s.host.shell("echo '" + line + "' > /etc/sudoers.d/ann && chmod 440 /etc/sudoers.d/ann")
	s.host.shell("echo '# edited' >> /etc/nomad.d/nomad.hcl")
	s.must("deploy")
	s.planIs()
}

func TestTheAgentsOfAHostAreNotReachableFromItsNetwork(t *testing.T) {
	s := newSite(t, readOnly)
	dial := func(port int) error {
		conn, err := (&net.Dialer{Timeout: 3 * time.Second}).DialContext(t.Context(), "tcp", fmt.Sprintf("%s:%d", s.host.address, port))
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	if err := dial(8080); err != nil {
		t.Fatalf("the application is not reachable, so this proves nothing: %v", err)
	}
	for what, port := range map[string]int{"the artifact server": 7380, "Nomad's API": 4646} {
		if err := dial(port); err == nil {
			t.Errorf("%s answers at %s:%d", what, s.host.address, port)
		}
	}
	// Of ours, only what other hosts need listens on the network.
	listening := s.host.exec("ss", "--listening", "--tcp", "--udp", "--numeric", "--no-header", "--processes")
	for line := range strings.Lines(listening) {
		if fields := strings.Fields(line); strings.Contains(line, "site-host") && !strings.HasPrefix(fields[4], "127.0.0.1:") {
			t.Errorf("site-host listens on %s", fields[4])
		}
	}
}

// tunnel opens a tunnel to an address on the host, until the test's end; dial
// connects through it.
func (s *testSite) tunnel(remote string) (dial func() net.Conn) {
	s.t.Helper()
	reader, writer, err := os.Pipe()
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	command := exec.CommandContext(context.WithoutCancel(s.t.Context()), s.site, "tunnel", remote)
	command.Dir, command.Env = s.dir, s.environment()
	command.Stdout, command.Stderr = writer, os.Stderr
	err = command.Start()
	_ = writer.Close()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = command.Process.Signal(syscall.SIGINT)
		_ = command.Wait()
		if code := command.ProcessState.ExitCode(); code != 0 {
			s.t.Errorf("an interrupted tunnel ends with %d", code)
		}
	})
	line, err := bufio.NewReader(reader).ReadString('\n')
	if err != nil {
		s.t.Fatalf("the tunnel does not say where it is: %q, %v", line, err)
	}
	local := strings.TrimPrefix(strings.TrimSpace(line), "http://")
	return func() net.Conn {
		s.t.Helper()
		conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(s.t.Context(), "tcp", local)
		if err != nil {
			s.t.Fatal(err)
		}
		return conn
	}
}

func TestHostilePathsLeadNowhere(t *testing.T) {
	s := newSite(t)
	dial := s.tunnel("127.0.0.1:7380")
	image := s.containers()[0].Image // 127.0.0.1:7380/<site>/<artifact>@sha256:…
	repository, digest, found := strings.Cut(strings.TrimPrefix(image, "127.0.0.1:7380/"), "@")
	if !found {
		t.Fatalf("image %q", image)
	}
	manifest := "/v2/" + repository + "/manifests/" + digest
	request := func(method, target string) (int, string) {
		t.Helper()
		conn := dial()
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		// By hand: a client would clean the path.
		if _, err := fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: 127.0.0.1:7380\r\nConnection: close\r\n\r\n", method, target); err != nil {
			return 0, err.Error() // closed at once: no answer is a refusal too
		}
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			return 0, err.Error()
		}
		defer func() { _ = response.Body.Close() }()
		body, _ := io.ReadAll(io.LimitReader(response.Body, 1<<20))
		return response.StatusCode, string(body)
	}
	answers := func(when string) {
		t.Helper()
		if status, body := request(http.MethodGet, manifest); status != http.StatusOK || !strings.Contains(body, `"schemaVersion":2`) {
			t.Fatalf("%s, the manifest of the running image: %d %.200q", when, status, body)
		}
	}
	answers("before")
	var decoded struct{ Config struct{ Digest string } }
	_, body := request(http.MethodGet, manifest)
	if err := json.Unmarshal([]byte(body), &decoded); err != nil {
		t.Fatal(err)
	}
	blob := "/v2/" + repository + "/blobs/" + decoded.Config.Digest
	if status, _ := request(http.MethodGet, blob); status != http.StatusOK {
		t.Fatalf("the config of the running image: %d", status)
	}

	// A symlink in the store, in place of a blob and under a name of its own.
	secret := "/etc/nomad.d/gossip.hcl"
	hex := strings.TrimPrefix(decoded.Config.Digest, "sha256:")
	s.host.shell(fmt.Sprintf(`cd /var/lib/site/store/blobs/sha256 && mv %[1]s /root/kept && ln -s %[2]s %[1]s
		ln -s %[2]s /var/lib/site/store/names/link`, hex, secret))
	forbidden := []string{"root:x:0:0", "encrypt", "PRIVATE KEY", "BEGIN AGE"}
	targets := []string{
		blob, "/names/link", "/v2/link/x/manifests/" + digest,
		"/v2/../../../../etc/passwd", "/v2/" + repository + "/blobs/../../../../../etc/passwd",
		"/artifacts/../../../etc/passwd", "/artifacts/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/artifacts/..%2f..%2f..%2fetc%2fpasswd",
		"/artifacts/" + repository + "@sha256:" + strings.Repeat("0", 64),
		"/artifacts/" + repository + "@sha256:../../../../etc/passwd", "/artifacts/" + repository + "@sha256:" + url.PathEscape("../../../../../../etc/passwd"),
		"/v2//" + repository + "/manifests/" + digest + "/..", "/v2/" + repository + "/manifests/latest", "/v2/" + repository + "/manifests/" + strings.ToUpper(digest),
		"/v2/" + repository + "/manifests/" + decoded.Config.Digest[:40], "/v2/elsewhere/hello/manifests/" + digest, "/v2/_catalog", "/v2/" + repository + "/tags/list",
		"/v2/" + name + "/nomad/blobs/" + decoded.Config.Digest, // a digest of another name
		"/etc/passwd", "//etc/passwd", `/..\..\..\etc\passwd`, "/v2/%00/manifests/" + digest, "/debug/pprof/", "/%", "*",
		"http://127.0.0.1:4646/v1/agent/self", "/" + strings.Repeat("a/", 40_000), "/artifacts/" + strings.Repeat("%2e%2e%2f", 200) + "etc/passwd",
	}
	for _, target := range targets {
		status, body := request(http.MethodGet, target)
		if status != 0 && status < 300 || status >= 500 && target != blob {
			t.Errorf("GET %.100s: %d %.200q", target, status, body)
		}
		for _, text := range forbidden {
			if strings.Contains(body, text) {
				t.Errorf("GET %.100s shows a file that is none of its own: %.100q", target, body)
			}
		}
	}
	if status, _ := request(http.MethodGet, blob); status == http.StatusOK {
		t.Error("a symlink in the store is followed")
	}
	s.host.shell(fmt.Sprintf(`cd /var/lib/site/store/blobs/sha256 && mv -f /root/kept %s && rm /var/lib/site/store/names/link`, hex))
	before := s.host.shell("find /var/lib/site/store -type f | sort | sha256sum")
	for _, method := range []string{"PUT", "POST", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"} {
		for _, target := range []string{manifest, blob, "/v2/" + repository + "/blobs/uploads/", "/artifacts/x/y@" + digest} {
			if status, body := request(method, target); status != 0 && status < 400 {
				t.Errorf("%s %s: %d %.200q", method, target, status, body)
			}
		}
	}
	if after := s.host.shell("find /var/lib/site/store -type f | sort | sha256sum"); after != before {
		t.Error("a request changed the store")
	}
	answers("after")
	s.planIs()
}

package ssh

import (
	"os/exec"
	"testing"

	"github.com/nomad-site/site/internal/testneeds"
)

func TestPlainSSHReachesTheSameHost(t *testing.T) {
	s := newServer(t, []string{"ecdsa", "ed25519"})
	testneeds.Program(t, "ssh")
	plain := func(t *testing.T, conn *Conn, name string) (string, error) {
		t.Helper()
		path, err := conn.WriteSSHConfig(t.TempDir() + "/with blank")
		if err != nil {
			t.Fatal(err)
		}
		output, err := exec.Command("ssh", "-F", path, name, "echo over plain ssh").CombinedOutput()
		return string(output), err
	}
	t.Run("with the key file", func(t *testing.T) {
		if output, err := plain(t, s.in(t).connect(), "alpha-1"); err != nil || output != "over plain ssh\n" {
			t.Errorf("%q %v", output, err)
		}
	})
	t.Run("with the agent's key", func(t *testing.T) {
		s := s.in(t)
		s.keygen("stranger", "ed25519")
		t.Setenv("SSH_AUTH_SOCK", s.startAgent("stranger", "id"))
		target := s.target()
		target.IdentityFile = ""
		conn := s.dial(target, Options{})
		t.Setenv("SSH_AUTH_SOCK", "")
		if output, err := plain(t, conn, "alpha-1"); err != nil || output != "over plain ssh\n" {
			t.Errorf("%q %v", output, err)
		}
	})
	t.Run("through the jump host", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.KnownHostsFiles = []string{s.knownHosts("known", "host_ecdsa")}
		target.ConfigFile = s.write("jump", "Match all\n  IdentityFile "+s.path("id")+"\nHost 127.0.0.1\n  ProxyJump "+s.user+"@localhost:"+count(s.port)+"\nHost localhost\n  HostName 127.0.0.1\n  ProxyJump none\n")
		conn := s.dial(target, Options{})
		if conn.via == nil {
			t.Fatal("went directly")
		}
		if output, err := plain(t, conn, "alpha-1"); err != nil || output != "over plain ssh\n" {
			t.Errorf("%q %v", output, err)
		}
	})
	t.Run("a host with another key is refused", func(t *testing.T) {
		s := s.in(t)
		conn := s.connect()
		s.keygen("other", "ed25519")
		conn.hostKey = s.publicKey("other")
		if output, err := plain(t, conn, "alpha-1"); err == nil {
			t.Errorf("went through: %q", output)
		}
	})
}

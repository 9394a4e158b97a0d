package ssh

import (
	"context"
	"crypto/rand"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/testneeds"
)

func TestHostKeys(t *testing.T) {
	s := newServer(t, []string{"ed25519", "ecdsa", "rsa"})
	s.keygen("other_ed25519", "ed25519")
	s.keygen("other_ecdsa", "ecdsa")
	read := func(name string) string { return s.read(name + ".pub") }
	fingerprintOf := func(name string) string { return gossh.FingerprintSHA256(s.publicKey(name)) }
	known := s.knownHosts("known_rsa", "host_rsa")
	old := s.knownHosts("known_old", "other_ed25519")
	revoked := s.write("known_revoked", "@revoked * "+read("host_ed25519"))

	for name, pins := range map[string][]string{
		"any one of several keys may be pinned: ed25519": {read("host_ed25519")},
		"any one of several keys may be pinned: ecdsa":   {read("host_ecdsa")},
		"any one of several keys may be pinned: rsa":     {read("host_rsa")},
		"an old pin may stand beside the new one":        {read("other_ed25519"), read("host_ed25519")},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			target := s.target()
			target.HostKeys = pins
			s.dial(target, Options{})
		})
	}
	t.Run("a known_hosts file pins", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.HostKeys, target.KnownHostsFiles = nil, []string{known, s.path("missing")}
		if got := s.dial(target, Options{}).hostKey.Type(); got != "ssh-rsa" {
			t.Errorf("host showed %s, only rsa is pinned", got)
		}
	})
	for name, pin := range map[string]struct {
		keys  []string
		files []string
		old   string
		shown string
	}{
		"a changed pin of the site is refused":            {keys: []string{read("other_ed25519")}, old: "other_ed25519", shown: "host_ed25519"},
		"a changed known_hosts line is refused":           {files: []string{old}, old: "other_ed25519", shown: "host_ed25519"},
		"a changed key is refused though it may be added": {keys: []string{read("other_ecdsa")}, old: "other_ecdsa", shown: "host_ecdsa"},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			target := s.target()
			target.HostKeys, target.KnownHostsFiles = pin.keys, pin.files
			record := filepath.Join(t.TempDir(), "record")
			_, err := Dial(t.Context(), target, Options{AcceptNewHostKey: true, RecordTo: record})
			changed := mustBe[*HostKeyChangedError](t, err)
			mustContain(t, changed.Error(), fingerprintOf(pin.old), fingerprintOf(pin.shown))
			mustContain(t, plan.HintOf(err), changed.Places[0])
			if _, err := os.Stat(record); err == nil {
				t.Error("a changed key was recorded")
			}
		})
	}
	t.Run("a revoked key is refused though it is pinned", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.KnownHostsFiles = []string{revoked}
		_, err := Dial(t.Context(), target, Options{})
		_ = mustBe[*HostKeyRevokedError](t, err)
	})
	t.Run("an unknown key is refused, then recorded on request, then pinned", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.HostKeys = nil
		_, err := Dial(t.Context(), target, Options{})
		unknown := mustBe[*HostKeyUnknownError](t, err)
		mustContain(t, unknown.Error(), fingerprintOf("host_ed25519"))
		mustContain(t, plan.HintOf(err), "--accept-new-host-key")

		record := filepath.Join(t.TempDir(), "new", "known_hosts")
		if err := os.MkdirAll(filepath.Dir(record), 0o755); err != nil {
			t.Fatal(err)
		}
		// Somebody's editor left the last line without an end.
		if err := os.WriteFile(record, []byte("other.example "+strings.TrimSpace(read("other_ed25519"))), 0o644); err != nil {
			t.Fatal(err)
		}
		s.dial(target, Options{AcceptNewHostKey: true, RecordTo: record})
		content, err := os.ReadFile(record)
		if err != nil {
			t.Fatal(err)
		}
		if lines := strings.Count(string(content), "\n"); lines != 2 {
			t.Errorf("%d lines in %q", lines, content)
		}
		mustContain(t, string(content), "[127.0.0.1]:"+count(s.port)+" ssh-ed25519 ")
		if output, err := exec.Command(testneeds.Program(t, "ssh-keygen"), "-F", "[127.0.0.1]:"+count(s.port), "-f", record).CombinedOutput(); err != nil {
			t.Errorf("OpenSSH does not find the line: %v: %s", err, output)
		}
		target.KnownHostsFiles = []string{record}
		s.dial(target, Options{})
		s.dial(target, Options{AcceptNewHostKey: true, RecordTo: record})
		if again, _ := os.ReadFile(record); string(again) != string(content) {
			t.Errorf("recorded twice: %q", again)
		}
	})
	t.Run("nothing is trusted without a place to record it", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.HostKeys = nil
		if _, err := Dial(t.Context(), target, Options{AcceptNewHostKey: true}); err == nil {
			t.Error("trusted")
		}
	})
}

func TestAHostWithoutAnyKeyOfThePinnedTypeHasChanged(t *testing.T) {
	s := newServer(t, []string{"ecdsa"})
	s.keygen("old", "ed25519")
	target := s.target()
	target.HostKeys = []string{s.read("old.pub")}
	_, err := Dial(t.Context(), target, Options{})
	changed := mustBe[*HostKeyChangedError](t, err)
	mustContain(t, changed.Error(), gossh.FingerprintSHA256(s.publicKey("old")), gossh.FingerprintSHA256(s.publicKey("host_ecdsa")))
}

func TestLogin(t *testing.T) {
	s := newServer(t, nil)
	s.keygen("id_rsa", "rsa", "-b", "3072")
	s.keygen("id_ecdsa", "ecdsa")
	s.keygen("id_pem", "rsa", "-b", "2048", "-m", "PEM")
	s.keygen("stranger", "ed25519")
	s.keygen("locked", "ed25519")
	if output, err := exec.Command("ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", s.path("locked")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	s.authorize("id", "id_rsa", "id_ecdsa", "id_pem", "locked")

	for _, key := range []string{"id", "id_rsa", "id_ecdsa", "id_pem"} {
		t.Run(key+" logs in from its file", func(t *testing.T) {
			s := s.in(t)
			target := s.target()
			target.IdentityFile = s.path(key)
			conn := s.dial(target, Options{})
			mustAuthenticate(t, s, conn, key)
		})
	}
	for _, key := range []string{"id", "id_rsa", "id_ecdsa"} {
		t.Run(key+" logs in from the agent", func(t *testing.T) {
			s := s.in(t)
			t.Setenv("SSH_AUTH_SOCK", s.startAgent("stranger", key))
			target := s.target()
			target.IdentityFile = ""
			conn := s.dial(target, Options{})
			mustAuthenticate(t, s, conn, key)
			if len(conn.Signers()) != 2 {
				t.Errorf("%d signers, want both of the agent", len(conn.Signers()))
			}
		})
	}
	t.Run("a public key file picks the agent's key, and IdentitiesOnly offers no other", func(t *testing.T) {
		s := s.in(t)
		socket := s.startAgent("stranger", "id", "id_ecdsa")
		target := s.target()
		target.IdentityFile = ""
		target.ConfigFile = s.write("only", "Host *\n  IdentitiesOnly yes\n  IdentityAgent \""+socket+"\"\n  IdentityFile "+s.path("id_ecdsa.pub")+"\n")
		conn := s.dial(target, Options{})
		mustAuthenticate(t, s, conn, "id_ecdsa")
		if len(conn.identities.offered) != 1 || len(conn.Signers()) != 3 {
			t.Errorf("offered %d of %d", len(conn.identities.offered), len(conn.Signers()))
		}
	})
	t.Run("refused identities are named", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.IdentityFile = s.path("stranger")
		target.ConfigFile = s.write("missing_identity", "IdentityFile /nowhere/id\n")
		_, err := Dial(t.Context(), target, Options{})
		denied := mustBe[*AuthError](t, err)
		mustContain(t, denied.Error(), s.path("stranger"), gossh.FingerprintSHA256(s.publicKey("stranger")), "/nowhere/id", "no such file")
		mustContain(t, plan.HintOf(err), "authorized_keys")
	})
	t.Run("no identity at all", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.IdentityFile = ""
		_, err := Dial(t.Context(), target, Options{})
		_ = mustBe[*AuthError](t, err)
		mustContain(t, plan.HintOf(err), "ssh-agent")
	})
	t.Run("an encrypted key without a passphrase", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.IdentityFile = s.path("locked")
		_, err := Dial(t.Context(), target, Options{})
		mustContain(t, err.Error(), s.path("locked"), "encrypted")
		mustContain(t, plan.HintOf(err), "ssh-add")
	})
	t.Run("an encrypted key is opened once, when the host accepts it", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.IdentityFile = s.path("locked")
		asked := 0
		conn := s.dial(target, Options{Passphrase: func(string) (secret.Value, error) {
			asked++
			return secret.New("open sesame"), nil
		}})
		mustAuthenticate(t, s, conn, "locked")
		if asked != 1 {
			t.Errorf("asked %d times", asked)
		}
	})
	t.Run("an encrypted key that is not needed is not asked for", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.ConfigFile = s.write("locked_too", "IdentityFile "+s.path("locked")+"\n")
		s.dial(target, Options{Passphrase: func(string) (secret.Value, error) {
			t.Error("asked")
			return secret.Value{}, nil
		}})
	})
	t.Run("a wrong passphrase says so", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.IdentityFile = s.path("locked")
		_, err := Dial(t.Context(), target, Options{Passphrase: func(string) (secret.Value, error) { return secret.New("wrong"), nil }})
		if err == nil {
			t.Fatal("no error")
		}
		mustContain(t, err.Error(), "decrypt "+s.path("locked"))
	})
}

func mustAuthenticate(t *testing.T, s *server, conn *Conn, key string) {
	t.Helper()
	if got := conn.AuthenticatedKey(); got == nil || marshalled(got) != marshalled(s.publicKey(key)) {
		t.Fatalf("authenticated with %v, want %s", got, key)
	}
	signer := conn.Signers()[0].(gossh.AlgorithmSigner)
	algorithm := algorithmsByKeyType(signer.PublicKey().Type())[0]
	signature, err := signer.SignWithAlgorithm(rand.Reader, []byte("claims"), algorithm)
	if err != nil {
		t.Fatalf("sign: %v", err)
	}
	if err := signer.PublicKey().Verify([]byte("claims"), signature); err != nil {
		t.Errorf("the signature does not verify: %v", err)
	}
}

func TestConfigFile(t *testing.T) {
	s := newServer(t, nil)
	config := "Host alpha\n  HostName 127.0.0.1\n  Port " + count(s.port) + "\n  User " + s.user +
		"\n  IdentityFile " + s.dir + "/nothing\n  IdentityFile \"" + s.dir + "/i%%d\"\n  IdentityFile %d/../id\n" +
		"  UserKnownHostsFile " + s.path("none") + " " + s.knownHosts("known", "host_ed25519") + "\nHost *\n  User nobody\n  Port 1\n"
	target := Target{Name: "alpha", ConfigFile: s.write("config", config)}
	t.Run("an alias is all that is needed", func(t *testing.T) {
		s := s.in(t)
		s.dial(target, Options{})
	})
	t.Run("the default file is in the home folder", func(t *testing.T) {
		s := s.in(t)
		s.write("home/.ssh/config", config)
		s.dial(Target{Name: "alpha"}, Options{})
	})
	t.Run("the target wins", func(t *testing.T) {
		other := target
		other.Port = freePort(t)
		_, err := Dial(t.Context(), other, Options{})
		refused := mustBe[*ConnectError](t, err)
		if refused.Reason != Refused || plan.HintOf(err) == "" {
			t.Errorf("reason %q, hint %q", refused.Reason, plan.HintOf(err))
		}
	})
	t.Run("a missing file is an error", func(t *testing.T) {
		s := s.in(t)
		if _, err := Dial(t.Context(), Target{Name: "alpha", ConfigFile: s.path("absent")}, Options{}); err == nil {
			t.Error("no error")
		}
	})
	t.Run("a ProxyCommand is not passed over", func(t *testing.T) {
		s := s.in(t)
		_, err := Dial(t.Context(), Target{Name: "alpha", ConfigFile: s.write("proxied", "ProxyCommand nc %h %p\n"+config)}, Options{})
		if err == nil {
			t.Fatal("dialled past the proxy")
		}
		mustContain(t, plan.HintOf(err), "ProxyJump")
	})
	t.Run("a jump host is dialled through", func(t *testing.T) {
		s := s.in(t)
		// The host's name is known to nobody but the jump host's side: a loopback
		// address that only differs in the pin.
		jumping := config + "Host behind\n  HostName 127.0.0.1\n  HostKeyAlias behind\n  ProxyJump alpha\n"
		jumping = strings.Replace(jumping, "Host *\n", "Host behind\n  Port "+count(s.port)+"\n  User "+s.user+"\n  IdentityFile "+s.path("id")+"\nHost *\n", 1)
		behind := Target{Name: "behind", ConfigFile: s.write("jumping", jumping), HostKeys: []string{s.read("host_ed25519.pub")}}
		conn := s.dial(behind, Options{})
		if conn.via == nil {
			t.Fatal("went directly")
		}
		if output, err := conn.Run(t.Context(), Command{Args: []string{"echo", "there"}}); err != nil || string(output) != "there\n" {
			t.Errorf("%q %v", output, err)
		}
		if err := within(t, 5*time.Second, "close", conn.Close); err != nil {
			t.Error(err)
		}
	})
	t.Run("a jump in a circle ends", func(t *testing.T) {
		s := s.in(t)
		_, err := Dial(t.Context(), Target{Name: "loop", ConfigFile: s.write("loop", "Host loop\n  ProxyJump loop\n")}, Options{})
		if err == nil {
			t.Fatal("no error")
		}
		mustContain(t, err.Error(), "jump hosts")
	})
}

func TestUnreachableHosts(t *testing.T) {
	s := newServer(t, nil)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	target := s.target()
	target.Port = silent.Addr().(*net.TCPAddr).Port

	t.Run("a peer that says nothing times out", func(t *testing.T) {
		err := within(t, 5*time.Second, "dial", func() error {
			_, err := Dial(t.Context(), target, Options{ConnectTimeout: 300 * time.Millisecond})
			return err
		})
		if failure := mustBe[*ConnectError](t, err); failure.Reason != TimedOut {
			t.Errorf("%v", err)
		}
	})
	t.Run("a cancelled context ends the handshake", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		err := within(t, 5*time.Second, "dial", func() error {
			_, err := Dial(ctx, target, Options{})
			return err
		})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
	t.Run("a peer that hangs up is not an SSH server", func(t *testing.T) {
		go func() {
			for {
				conn, err := silent.Accept()
				if err != nil {
					return
				}
				_ = conn.Close()
			}
		}()
		_, err := Dial(t.Context(), target, Options{})
		_ = mustBe[*ConnectError](t, err)
	})
	t.Run("a name that does not exist", func(t *testing.T) {
		s := s.in(t)
		target := s.target()
		target.Address = "no-such-host.invalid"
		_, err := Dial(t.Context(), target, Options{})
		_ = mustBe[*ConnectError](t, err)
	})
}

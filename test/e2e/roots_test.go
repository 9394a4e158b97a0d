package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
)

// rootCuts are where a rotation of each root of trust can be cut short, in the
// order in which they are rotated. The first of each is tried in every run of the
// tests: there the old and the new are both about.
var rootCuts = []struct {
	root   string
	points []string
}{
	{"root-token", []string{"sealed to both", "sealed to the new one alone"}},
	{"unseal-key", []string{"the new key is in force", "both keys are kept", "the old key is forgotten"}},
	{"nomad-acl", []string{"sealed", "made", "the old ones are deleted"}},
	{"gossip", []string{
		"all servers send with the new key", "the new key is sealed", "all servers accept the new key",
		"the new key is on all hosts", "the old key is removed",
	}},
	{"ca", []string{
		"all hosts have a certificate by the new CA", "the new CA is sealed", "all hosts trust both CAs",
		"all hosts trust the new CA alone", "the old CA is forgotten",
	}},
	{"certificates", []string{"all agents have new certificates"}},
	{"host-keys", []string{
		"the hosts' keys: switch", "the hosts' keys: next", "OpenBao takes the new keys beside the old", "OpenBao takes the new keys alone",
	}},
}

// rotateRoot rotates a root, or cuts that short at a point.
func (s *testSite) rotateRoot(root, nextToken, cut string) result {
	s.t.Helper()
	args := []string{"secrets", "rotate", root, "--root-token-file=" + s.tokenFile}
	if root == "root-token" {
		args = append(args, "--new-root-token-file="+nextToken)
	}
	if cut == "" {
		return s.must(args...)
	}
	got := s.runWithFault(faultKill, root+": "+cut, args...)
	s.wantFault(got, faultKill, root+": "+cut)
	s.lockIsFree(10 * time.Second)
	return got
}

func TestEveryRootRotatesUnderLoadAndTheOldOneIsWorthNothing(t *testing.T) {
	s := newSite(t, platform)
	before := s.rootsNow()
	oldToken := s.tokenFile
	load := s.underLoad(t, loadOptions{addresses: applications(s.host)})
	for number, one := range rootCuts {
		points := one.points
		if os.Getenv(fullVariable) == "" {
			points = points[:1]
		}
		for at, point := range points {
			next := filepath.Join(s.dir, ".lab", fmt.Sprintf("root-token-%d-%d", number, at))
			cut := s.rotateRoot(one.root, next, point)
			whole := s.rotateRoot(one.root, next, "")
			if one.root == "root-token" {
				s.tokenFile = next
			}
			t.Logf("%s: killed where %s after %s, and again in %s", one.root, point,
				cut.duration.Round(100*time.Millisecond), whole.duration.Round(100*time.Millisecond))
		}
	}
	next := filepath.Join(s.dir, ".lab", "root-token-next")
	all := s.must("secrets", "rotate", "--roots", "--root-token-file="+s.tokenFile, "--new-root-token-file="+next)
	s.tokenFile = next
	t.Logf("all in one run took %s", all.duration.Round(100*time.Millisecond))
	after := s.rootsNow()
	counts := load.stop()
	t.Log(counts)
	counts.isWhole(t)

	t.Run("a daily deploy and one with the root token find nothing to do", func(t *testing.T) {
		s := s.in(t)
		s.commit("the sealed init material", nil)
		for _, args := range [][]string{{"deploy"}, {"bootstrap-deploy", "--root-token-file=" + s.tokenFile}} {
			if got := s.must(args...); !strings.Contains(got.stdout, "nothing to do") {
				t.Errorf("it found something to do:\n%s", got.stdout)
			}
		}
	})
	t.Run("what was is worth nothing", func(t *testing.T) { s.in(t).areWorthNothing(oldToken, before, after) })
	t.Run("after a reboot all is back without an operator", func(t *testing.T) {
		s := s.in(t)
		s.host.reboot()
		s.until("the application to answer", 2*time.Minute, func() error {
			_, err := s.answer()
			return err
		})
		for _, job := range []string{"openbao", "postgresql", "hello"} {
			s.waitHealthy(job)
		}
		s.areWorthNothing(oldToken, before, after)
	})
}

func TestRootsRotateOnThreeServersUnderLoad(t *testing.T) {
	s, hosts := newThreeHosts(t)
	s.bootstrap()
	s.commit("the sealed init material", nil)
	s.allAnswer(hosts)
	before := s.rootsNow()

	t.Run("while a server is away its gossip key stays", func(t *testing.T) {
		s := s.in(t)
		away := hosts[2]
		away.exec("systemctl", "stop", "nomad.service")
		s.until("the other servers to know", time.Minute, func() error {
			_, err := s.gossips(2)
			return err
		})
		got := s.run("secrets", "rotate", "gossip", "--root-token-file="+s.tokenFile)
		if got.code != 1 || !strings.Contains(got.stderr, "2 servers gossip, and site.hcl has 3") || !strings.Contains(got.stderr, "hint: ") {
			t.Errorf("it does not say who is away\n%v", got)
		}
		if keyring, err := s.gossips(2); err != nil || !strings.Contains(keyring, before.GossipKey.Reveal()) {
			t.Errorf("the key that the server comes back with is gone, or unknown: %v", err)
		}
		away.exec("systemctl", "start", "nomad.service")
		s.until("it to be back", time.Minute, func() error {
			_, err := s.gossips(threeHosts)
			return err
		})
		s.allAnswer(hosts)
		s.onIt(away)
	})

	load := s.underLoad(t, loadOptions{addresses: applications(hosts...)})
	for _, root := range []string{"gossip", "nomad-acl", "ca", "certificates", "host-keys"} {
		got := s.rotateRoot(root, "", "")
		t.Logf("%s took %s", root, got.duration.Round(100*time.Millisecond))
	}
	counts := load.stop()
	t.Log(counts)
	if counts.failures > 0 || len(counts.answered) != threeHosts {
		t.Errorf("%d requests failed, the first of them:\n%s", counts.failures, strings.Join(counts.said, "\n"))
	}
	after := s.rootsNow()
	for _, host := range hosts {
		on := *s.in(t)
		on.host = host
		on.trusts(after.Material, after.Material, true)
		on.trusts(before.Material, after.Material, false)
	}
	if keyring, err := s.gossips(threeHosts); err != nil || strings.Contains(keyring, before.GossipKey.Reveal()) {
		t.Errorf("the old gossip key is still taken, or unknown: %v", err)
	}
	if got := s.must("deploy"); !strings.Contains(got.stdout, "nothing to do") {
		t.Errorf("it found something to do:\n%s", got.stdout)
	}
	t.Run("after a reboot of the first server all comes back by itself", func(t *testing.T) {
		s := s.in(t)
		hosts[0].reboot()
		s.allAnswer(hosts)
	})
}

// applications is where the application is on hosts.
func applications(hosts ...*testHost) []string {
	addresses := make([]string, 0, len(hosts))
	for _, host := range hosts {
		addresses = append(addresses, net.JoinHostPort(host.address, "8080"))
	}
	return addresses
}

// gossips gives the keyring, if the servers gossip with so many.
func (s *testSite) gossips(servers int) (keyring string, err error) {
	token, err := s.managementToken()
	if err != nil {
		return "", err
	}
	keyring, err = s.host.tryExec("env", "NOMAD_TOKEN="+token, "/opt/site/bin/nomad", "operator", "api", "/v1/agent/keyring/list")
	if err != nil {
		return "", err
	}
	var answer struct{ NumNodes int }
	if err := json.Unmarshal([]byte(keyring), &answer); err != nil {
		return "", err
	}
	if answer.NumNodes != servers {
		return "", fmt.Errorf("%d servers gossip", answer.NumNodes)
	}
	return keyring, nil
}

// roots are what a site's trust is in, at some time.
type roots struct {
	seal.Material
	hostKey string
}

func (s *testSite) rootsNow() roots {
	s.t.Helper()
	var shown struct {
		PublicKeyPEM     string `json:"public_key_pem"`
		NextPublicKeyPEM string `json:"next_public_key_pem"`
	}
	if err := json.Unmarshal([]byte(s.host.exec("/opt/site/bin/site-host", "host-key", "show")), &shown); err != nil {
		s.t.Fatal(err)
	}
	if shown.NextPublicKeyPEM != "" {
		s.t.Error("a host key is waiting to follow")
	}
	return roots{s.material(), shown.PublicKeyPEM}
}

// areWorthNothing tries what was rotated away, and that the same way works with
// what is there now.
func (s *testSite) areWorthNothing(oldToken string, old, now roots) {
	s.t.Helper()
	if !old.SameSite(now.Material) || now.PreviousCACertPEM != "" || !now.NextGossipKey.IsZero() || !now.NextUnsealKey.IsZero() {
		s.t.Error("a rotation was not ended, or the material is another site's")
	}
	s.oldRootTokenOpensNothing(oldToken)

	for _, one := range []struct {
		token secret.Value
		want  string
	}{{now.NomadManagementToken, `"AccessorID"`}, {old.NomadManagementToken, "Permission denied"}} {
		said := s.host.exec("env", "NOMAD_TOKEN="+one.token.Reveal(), "/opt/site/bin/nomad", "operator", "api", "/v1/acl/tokens")
		if !strings.Contains(said, one.want) {
			s.t.Errorf("Nomad answers %q to a management token, want %s", said, one.want)
		}
	}

	keyring := s.host.exec("env", "NOMAD_TOKEN="+now.NomadManagementToken.Reveal(), "/opt/site/bin/nomad", "operator", "gossip", "keyring", "list")
	file := s.host.exec("cat", "/etc/nomad.d/gossip.hcl", "/var/lib/nomad/server/serf.keyring")
	for what, text := range map[string]string{"the keyring": keyring, "the files": file} {
		if strings.Contains(text, old.GossipKey.Reveal()) || !strings.Contains(text, now.GossipKey.Reveal()) {
			s.t.Errorf("%s: the old gossip key is there, or the new one is not", what)
		}
	}

	s.trusts(now.Material, now.Material, true)
	s.trusts(old.Material, now.Material, false)

	b := s.bao()
	var config struct {
		Data struct {
			Keys []string `json:"jwt_validation_pubkeys"`
		} `json:"data"`
	}
	b.must("GET", "auth/hosts/config", nil, &config)
	if len(config.Data.Keys) != 1 || strings.TrimSpace(config.Data.Keys[0]) != strings.TrimSpace(now.hostKey) || now.hostKey == old.hostKey {
		s.t.Errorf("OpenBao takes %d keys of hosts, want the new one alone", len(config.Data.Keys))
	}
	b.opensWith(now.OpenBaoUnsealKey, true)
	b.opensWith(old.OpenBaoUnsealKey, false)
	if got := s.host.exec("cat", "/etc/site/openbao-unseal.key"); strings.TrimSpace(got) != now.OpenBaoUnsealKey.Reveal() {
		s.t.Error("the host does not hold the new unseal key alone")
	}
}

func (s *testSite) oldRootTokenOpensNothing(tokenFile string) {
	s.t.Helper()
	for file, want := range map[string]bool{tokenFile: false, s.tokenFile: true} {
		token, err := seal.ReadRootToken(file)
		if err != nil {
			s.t.Fatal(err)
		}
		for place, sealed := range map[string]string{
			"git": s.read(filepath.Join(s.dir, "sites", name, "init.age")), "the host": s.host.exec("cat", "/etc/site/init.age"),
		} {
			if _, err := seal.Open([]byte(sealed), []secret.Value{token}, name, place); (err == nil) != want {
				s.t.Errorf("%s opens init.age of %s: %t", filepath.Base(file), place, err == nil)
			}
		}
	}
}

// trusts shows the agent a certificate by the CA of issuer. Under TLS 1.3 its
// refusal comes with the first read; one that it takes it waits to hear from.
func (s *testSite) trusts(issuer, now seal.Material, want bool) {
	s.t.Helper()
	certificate, key, err := issuer.AgentCertificate("probe", "global", true, nil, time.Now())
	if err != nil {
		s.t.Fatal(err)
	}
	pair, err := tls.X509KeyPair([]byte(certificate), []byte(key.Reveal()))
	if err != nil {
		s.t.Fatal(err)
	}
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM([]byte(now.CACertPEM))
	plain, err := net.DialTimeout("tcp", net.JoinHostPort(s.host.address, "4647"), 5*time.Second)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = plain.Close() }()
	if _, err := plain.Write([]byte{0x04}); err != nil { // what is to follow is TLS
		s.t.Fatal(err)
	}
	connection := tls.Client(plain, &tls.Config{
		ServerName: "server.global.nomad", RootCAs: authorities,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil },
	})
	err = connection.HandshakeContext(s.t.Context())
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) {
		s.t.Fatalf("the agent's own certificate is not by the new CA: %v", err)
	}
	if err == nil {
		_ = connection.SetReadDeadline(time.Now().Add(2 * time.Second))
		_, err = connection.Read(make([]byte, 1))
	}
	if taken := errors.Is(err, os.ErrDeadlineExceeded); taken != want {
		s.t.Errorf("a certificate by the CA is taken: %t, want %t (%v)", taken, want, err)
	}
}

// opensWith tells whether OpenBao takes the key for its own, without sealing it:
// by beginning to change it.
func (b *bao) opensWith(key secret.Value, want bool) {
	b.s.t.Helper()
	ctx := b.s.t.Context()
	client, err := openbao.New(openbao.Options{Dial: b.client.Transport.(*http.Transport).DialContext, Token: secret.New(b.token)})
	if err != nil {
		b.s.t.Fatal(err)
	}
	defer client.Close()
	health, err := client.Health(ctx)
	if err != nil {
		b.s.t.Fatal(err)
	}
	rekeyer := client.Rekeyer(health)
	_, _, err = rekeyer.Begin(ctx, key)
	var wrong *openbao.WrongKeyError
	if err != nil && !errors.As(err, &wrong) {
		b.s.t.Fatal(err)
	}
	if (err == nil) != want {
		b.s.t.Errorf("OpenBao takes the key: %t, want %t", err == nil, want)
	}
	if err := rekeyer.Cancel(ctx); err != nil {
		b.s.t.Error(err)
	}
}

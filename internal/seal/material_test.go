package seal_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/seal"
)

func TestMaterialSurvivesSealingAndOnlyTheRightTokenOpensIt(t *testing.T) {
	token, _, err := seal.NewRootToken()
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := seal.NewRootToken()
	if err != nil {
		t.Fatal(err)
	}
	material, err := seal.New("gamma", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := seal.Seal(material, token)
	if err != nil {
		t.Fatal(err)
	}
	for _, plain := range []string{material.GossipKey.Reveal(), material.NomadManagementToken.Reveal(), "PRIVATE KEY"} {
		if bytes.Contains(sealed, []byte(plain)) {
			t.Error("the sealed form shows plain material")
		}
	}
	opened, err := seal.Open(sealed, token, "gamma", "init.age")
	if err != nil {
		t.Fatal(err)
	}
	if opened.GossipKey.Reveal() != material.GossipKey.Reveal() || opened.CAKeyPEM.Reveal() != material.CAKeyPEM.Reveal() {
		t.Error("opened material differs from what was sealed")
	}
	if _, err := seal.Open(sealed, other, "gamma", "init.age"); err == nil || plan.HintOf(err) == "" {
		t.Errorf("another token opened it, or the error has no hint: %v", err)
	}
	if _, err := seal.Open(sealed, token, "delta", "init.age"); err == nil {
		t.Error("material of gamma was taken for delta's")
	}
	sealed[len(sealed)/2] ^= 1
	if _, err := seal.Open(sealed, token, "gamma", "init.age"); err == nil {
		t.Error("a flipped bit went unnoticed")
	}
}

func TestAgentCertificateIsValidForItsRole(t *testing.T) {
	material, err := seal.New("gamma", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	certPEM, _, err := material.AgentCertificate("gamma-1", "global", true, []string{"10.0.0.5"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(certPEM))
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(material.CACertPEM))
	for _, name := range []string{"server.global.nomad", "client.global.nomad", "10.0.0.5", "127.0.0.1"} {
		if _, err := certificate.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("not valid for %s: %v", name, err)
		}
	}
	clientPEM, _, err := material.AgentCertificate("gamma-2", "global", false, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	block, _ = pem.Decode([]byte(clientPEM))
	if certificate, err = x509.ParseCertificate(block.Bytes); err != nil {
		t.Fatal(err)
	}
	if certificate.VerifyHostname("server.global.nomad") == nil {
		t.Error("a client's certificate passes for a server's")
	}
}

func TestRootTokenFileIsRefusedUnlessPrivateAndWhole(t *testing.T) {
	token, _, err := seal.NewRootToken()
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	for _, test := range []struct {
		name, content string
		mode          os.FileMode
		wantError     string
	}{
		{"a private file with a token is read", token.Reveal() + "\n", 0o600, ""},
		{"comments are passed over", "# site gamma\n" + token.Reveal() + "\n", 0o400, ""},
		{"a file that others can read is refused", token.Reveal(), 0o644, "has mode 0644"},
		{"an empty file is refused", "\n", 0o600, "is empty"},
		{"two lines are refused", token.Reveal() + "\n" + token.Reveal() + "\n", 0o600, "holds 2 lines"},
		{"anything else is refused", "s.abcdef", 0o600, "no age X25519 identity"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(folder, strings.ReplaceAll(test.name, " ", "-"))
			if err := os.WriteFile(path, []byte(test.content), test.mode); err != nil {
				t.Fatal(err)
			}
			got, err := seal.ReadRootToken(path)
			switch {
			case test.wantError == "" && (err != nil || got.Reveal() != token.Reveal()):
				t.Errorf("got %v", err)
			case test.wantError != "" && (err == nil || !strings.Contains(err.Error(), test.wantError)):
				t.Errorf("got %v, want %q", err, test.wantError)
			case test.wantError != "" && strings.Contains(err.Error(), "s.abcdef"):
				t.Error("the error repeats the file's content")
			}
		})
	}
	if _, err := seal.ReadRootToken(filepath.Join(folder, "absent")); err == nil || plan.HintOf(err) == "" {
		t.Errorf("a missing file gave %v", err)
	}
}

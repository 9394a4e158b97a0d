package seal_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"filippo.io/age/armor"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
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
	opened, err := seal.Open(sealed, []secret.Value{token}, "gamma", "init.age")
	if err != nil {
		t.Fatal(err)
	}
	if opened.GossipKey.Reveal() != material.GossipKey.Reveal() || opened.CAKeyPEM.Reveal() != material.CAKeyPEM.Reveal() {
		t.Error("opened material differs from what was sealed")
	}
	if _, err := seal.Open(sealed, []secret.Value{other}, "gamma", "init.age"); err == nil || plan.HintOf(err) == "" {
		t.Errorf("another token opened it, or the error has no hint: %v", err)
	}
	if _, err := seal.Open(sealed, []secret.Value{token}, "delta", "init.age"); err == nil {
		t.Error("material of gamma was taken for delta's")
	}
	sealed[len(sealed)/2] ^= 1
	if _, err := seal.Open(sealed, []secret.Value{token}, "gamma", "init.age"); err == nil {
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

func TestAnyOfTwoRootTokensOpensWhatIsSealedToBoth(t *testing.T) {
	var tokens []secret.Value
	for range 3 {
		token, _, err := seal.NewRootToken()
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, token)
	}
	first, second, stranger := tokens[0], tokens[1], tokens[2]
	material, err := seal.New("gamma", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name         string
		to, by       []secret.Value
		wantToBeOpen bool
	}{
		{"the first of two", []secret.Value{first, second}, []secret.Value{first}, true},
		{"the second of two", []secret.Value{first, second}, []secret.Value{second}, true},
		{"neither", []secret.Value{first, second}, []secret.Value{stranger}, false},
		{"one of several at hand", []secret.Value{second}, []secret.Value{first, second}, true},
		{"what was sealed to the second alone", []secret.Value{second}, []secret.Value{first}, false},
		{"no token at all", []secret.Value{first}, nil, false},
	} {
		sealed, err := seal.Seal(material, test.to...)
		if err != nil {
			t.Fatal(err)
		}
		if opened, err := seal.Open(sealed, test.by, "gamma", "init.age"); (err == nil) != test.wantToBeOpen {
			t.Errorf("%s: %v", test.name, err)
		} else if err == nil && !opened.SameSite(material) {
			t.Errorf("%s: it is another material", test.name)
		}
	}
	if _, err := seal.Seal(material); err == nil {
		t.Error("it was sealed to nobody")
	}
	if _, err := seal.Seal(material, first, secret.New("planted-token")); err == nil || strings.Contains(err.Error(), "planted") {
		t.Errorf("sealed to what is no token: %v", err)
	}
}

func TestAllThatRotatesSurvivesSealing(t *testing.T) {
	token, _, err := seal.NewRootToken()
	if err != nil {
		t.Fatal(err)
	}
	material, err := seal.New("gamma", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if material, err = material.WithNewCA(time.Now()); err != nil {
		t.Fatal(err)
	}
	material.NextGossipKey, material.NextUnsealKey, material.OpenBaoUnsealKey = seal.NewGossipKey(), secret.New("next"), secret.New("current")
	material.OpenBaoReady, material.Generation = true, 7
	sealed, err := seal.Seal(material, token)
	if err != nil {
		t.Fatal(err)
	}
	if opened, err := seal.Open(sealed, []secret.Value{token}, "gamma", "init.age"); err != nil || !reflect.DeepEqual(reveal(opened), reveal(material)) {
		t.Errorf("what was opened differs from what was sealed: %v", err)
	}
}

// reveal makes all of a material comparable.
func reveal(m seal.Material) []any {
	return []any{
		m.Site, m.ID, m.CAKeyPEM.Reveal(), m.CACertPEM, m.PreviousCACertPEM, m.NomadManagementToken.Reveal(), m.GossipKey.Reveal(),
		m.NextGossipKey.Reveal(), m.OpenBaoUnsealKey.Reveal(), m.NextUnsealKey.Reveal(), m.OpenBaoReady, m.Generation,
	}
}

// sealedBefore is material as it was sealed before it had an ID.
func sealedBefore(t *testing.T, token secret.Value, managementToken string, generation int) []byte {
	t.Helper()
	identity, err := age.ParseX25519Identity(token.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	var sealed bytes.Buffer
	armored := armor.NewWriter(&sealed)
	writer, err := age.Encrypt(armored, identity.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(writer, `{"version":1,"site":"gamma","nomad_management_token":%q,"generation":%d}`, managementToken, generation)
	if err := errors.Join(err, writer.Close(), armored.Close()); err != nil {
		t.Fatal(err)
	}
	return sealed.Bytes()
}

func TestMaterialKeepsItsIdentityWhenAllElseOfItRotates(t *testing.T) {
	token, _, err := seal.NewRootToken()
	if err != nil {
		t.Fatal(err)
	}
	open := func(sealed []byte) seal.Material {
		t.Helper()
		material, err := seal.Open(sealed, []secret.Value{token}, "gamma", "init.age")
		if err != nil {
			t.Fatal(err)
		}
		return material
	}
	first, later := open(sealedBefore(t, token, "one", 3)), open(sealedBefore(t, token, "one", 4))
	other := open(sealedBefore(t, token, "two", 4))
	if !first.SameSite(later) || first.SameSite(other) {
		t.Error("copies from before there were IDs are not told apart by their token")
	}
	later.NomadManagementToken = secret.New("rotated")
	sealed, err := seal.Seal(later, token)
	if err != nil {
		t.Fatal(err)
	}
	if rotated := open(sealed); !rotated.SameSite(first) || rotated.NomadManagementToken.Reveal() != "rotated" {
		t.Error("with its token rotated it is taken for another site's")
	}
}

func TestANewCAIsTrustedBesideTheOldAndSignsAlone(t *testing.T) {
	before, err := seal.New("gamma", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	after, err := before.WithNewCA(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := after.WithNewCA(time.Now()); err == nil {
		t.Error("a third CA was begun before the first was dropped")
	}
	alone := after
	alone.PreviousCACertPEM = ""
	for _, test := range []struct {
		name           string
		signer, trusts seal.Material
		want           bool
	}{
		{"the old by the old", before, before, true},
		{"the old by both", before, after, true},
		{"the new by both", after, after, true},
		{"the new by the old", after, before, false},
		{"the new by itself", after, alone, true},
		{"the old by the new alone", before, alone, false},
	} {
		certPEM, _, err := test.signer.AgentCertificate("gamma-1", "global", true, nil, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode([]byte(certPEM))
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM([]byte(test.trusts.TrustBundle()))
		if _, err := certificate.Verify(x509.VerifyOptions{Roots: roots, DNSName: "server.global.nomad"}); (err == nil) != test.want {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

func TestARootTokenIsWrittenOnceAndForNobodyElse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "folder", "token")
	if err := seal.WriteNewRootToken(path); err != nil {
		t.Fatal(err)
	}
	token, err := seal.ReadRootToken(path) // which insists on the mode
	if err != nil {
		t.Fatal(err)
	}
	if err := seal.WriteNewRootToken(path); err == nil || plan.HintOf(err) == "" {
		t.Errorf("a second one was written over it: %v", err)
	}
	if again, err := seal.ReadRootToken(path); err != nil || again.Reveal() != token.Reveal() {
		t.Errorf("the file holds another token, %v", err)
	}
}

package e2e

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"
)

func TestOperatorsWhoAreLockedOutOfOpenBaoComeBackWithTheRootToken(t *testing.T) {
	s := newSite(t, platform)
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	b := s.bao()
	b.must("POST", "auth/operators/config", map[string]any{
		"jwt_validation_pubkeys": []string{string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))},
		"bound_issuer":           "site-operator", "default_role": "operator",
	}, nil)

	refused := s.run("deploy")
	if refused.code != 1 || !strings.Contains(refused.stderr, "log in to OpenBao as operator") || !strings.Contains(refused.stderr, "hint: ") {
		t.Fatalf("a deploy should say that the login is refused, and what to do\n%v", refused)
	}
	code, changes := s.planCheck("--root-token-file=" + s.tokenFile)
	if code != 2 || len(changes) == 0 || changes[0].Target != "operators" {
		t.Fatalf("the plan ends with %d and names %v", code, changes)
	}
	s.must("bootstrap-deploy", "--root-token-file="+s.tokenFile)
	if got := s.must("plan", "--check"); !strings.Contains(got.stdout, "nothing to do") {
		t.Errorf("something is left\n%v", got)
	}
	s.onlyJobsAreIn()
}

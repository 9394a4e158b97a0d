package nomad

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
	"golang.org/x/crypto/ssh"
	sshagent "golang.org/x/crypto/ssh/agent"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

type testKey struct {
	private crypto.PrivateKey
	signer  ssh.Signer
	pem     string
}

func newKey(t *testing.T, private crypto.PrivateKey, err error) testKey {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := PublicKeyPEM(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
	if err != nil {
		t.Fatal(err)
	}
	return testKey{private, signer, pem}
}

func ed25519Key(t *testing.T) testKey {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	return newKey(t, private, err)
}

func ecdsaKey(t *testing.T, curve elliptic.Curve) testKey {
	t.Helper()
	private, err := ecdsa.GenerateKey(curve, rand.Reader)
	return newKey(t, private, err)
}

func rsaKey(t *testing.T) testKey {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	return newKey(t, private, err)
}

// agentSigner is the same key, held by an SSH agent.
func agentSigner(t *testing.T, key testKey) ssh.Signer {
	t.Helper()
	keyring := sshagent.NewKeyring()
	if err := keyring.Add(sshagent.AddedKey{PrivateKey: key.private}); err != nil {
		t.Fatal(err)
	}
	signers, err := keyring.Signers()
	if err != nil {
		t.Fatal(err)
	}
	return signers[0]
}

func login(t *testing.T, c *Client, signer ssh.Signer, name string) (secret.Value, error) {
	t.Helper()
	jwt, err := SignJWT(signer, name, Audience, 2*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	token, expiry, err := c.Login(context.Background(), jwt)
	if err == nil && (time.Until(expiry) > 31*time.Minute || time.Until(expiry) < 20*time.Minute) {
		t.Errorf("token expires in %s, want half an hour", time.Until(expiry))
	}
	return token, err
}

func TestBootstrapIsRepeatableWithTheSameTokenOnly(t *testing.T) {
	c := client(t)
	ctx := context.Background()
	wrote, err := c.BootstrapACL(ctx, secret.New(bootstrapToken), 10*time.Second)
	if err != nil || wrote {
		t.Fatalf("second bootstrap with the same token: wrote %t, %v", wrote, err)
	}
	_, err = c.BootstrapACL(ctx, secret.New("9c0b3f0e-3c5e-4f5b-9a5e-0a4a6a1f7d12"), 10*time.Second)
	var other *BootstrapError
	if !errors.As(err, &other) || plan.HintOf(err) == "" {
		t.Fatalf("bootstrap with another token: %v, want a BootstrapError with a hint", err)
	}
}

func TestStaticKeysLetRSAAndECDSAIn(t *testing.T) {
	c := client(t)
	ctx := context.Background()
	keys := map[string]testKey{
		"rsa": rsaKey(t), "p256": ecdsaKey(t, elliptic.P256()), "p384": ecdsaKey(t, elliptic.P384()), "p521": ecdsaKey(t, elliptic.P521()),
	}
	var operators []Operator
	for name, key := range keys {
		operators = append(operators, Operator{Name: name, PublicKeyPEM: key.pem})
	}
	if _, err := c.EnsureOperators(ctx, operators, ""); err != nil {
		t.Fatal(err)
	}
	if again, err := c.EnsureOperators(ctx, operators, ""); err != nil || len(again) > 0 {
		t.Fatalf("second run: %v, %v, want no changes", again, err)
	}
	for name, key := range keys {
		if _, err := login(t, c, key.signer, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := c.EnsureOperators(ctx, append(operators, Operator{Name: "ed", PublicKeyPEM: ed25519Key(t).pem}), "")
	if err == nil || plan.HintOf(err) == "" {
		t.Errorf("got %v: an ed25519 key among static ones would lock everybody out", err)
	}
	changes, err := c.EnsureOperators(ctx, operators[:3], "")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(changes)
	if _, err := login(t, c, keys[operators[3].Name].signer, operators[0].Name); err == nil {
		t.Error("the removed key can log in under another name")
	}
}

func TestOperatorsLogInWithTheirSSHKeys(t *testing.T) {
	c := client(t)
	ctx := context.Background()
	keys := map[string]testKey{
		"ed": ed25519Key(t), "rsa": rsaKey(t),
		"p256": ecdsaKey(t, elliptic.P256()), "p384": ecdsaKey(t, elliptic.P384()), "p521": ecdsaKey(t, elliptic.P521()),
	}
	var operators []Operator
	for name, key := range keys {
		operators = append(operators, Operator{Name: name, PublicKeyPEM: key.pem})
	}
	var served atomic.Pointer[[]byte]
	serve := func(operators []Operator) {
		document, err := JWKS(operators)
		if err != nil {
			t.Fatal(err)
		}
		served.Store(&document)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(*served.Load()) }))
	defer server.Close()
	serve(operators)
	if _, err := c.EnsureOperators(ctx, operators, server.URL); err != nil {
		t.Fatal(err)
	}
	before, err := c.ObserveOperators(ctx)
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.EnsureOperators(ctx, operators, server.URL)
	if err != nil || len(again) > 0 {
		t.Fatalf("second run: %v, %v, want no changes", again, err)
	}
	after, err := c.ObserveOperators(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if before.authMethod.ModifyIndex != after.authMethod.ModifyIndex || before.policy.ModifyIndex != after.policy.ModifyIndex || len(after.rules) != len(keys) {
		t.Error("the second run wrote something")
	}

	for name, key := range keys {
		for how, signer := range map[string]ssh.Signer{"a key file": key.signer, "an agent": agentSigner(t, key)} {
			t.Run(name+" from "+how, func(t *testing.T) {
				// ECDSA halves with a leading zero are rare: several tries meet them.
				for range 3 {
					if _, err := login(t, c, signer, name); err != nil {
						t.Fatal(err)
					}
				}
			})
		}
	}

	t.Run("an operator's token runs jobs and writes no ACLs", func(t *testing.T) {
		token, err := login(t, c, keys["ed"].signer, "ed")
		if err != nil {
			t.Fatal(err)
		}
		operator, err := c.WithToken(token)
		if err != nil {
			t.Fatal(err)
		}
		defer operator.Close()
		prepared := prepare(t, operator, batchSpec("operator-job", "exit 0"), "abc")
		if err := deploy(t, operator, prepared, quick); err != nil {
			t.Fatal(err)
		}
		if err := operator.Ready(ctx, ReadyOptions{Driver: "raw_exec", Limit: 5 * time.Second}, nil); err != nil {
			t.Error(err)
		}
		if err := operator.PutReleaseVariable(ctx, "site/lab/release", []byte(`{"a":1}`)); err != nil {
			t.Error(err)
		}
		if err := operator.PutReleaseVariable(ctx, "other/release", []byte(`{}`)); statusOf(err) != 403 {
			t.Errorf("wrote a variable of others: %v", err)
		}
		if _, err := operator.EnsureOperators(ctx, operators, server.URL); statusOf(err) != 403 || plan.HintOf(err) == "" {
			t.Errorf("an operator may change operators: %v", err)
		}
		if _, err := operator.api.Raw().Write("/v1/acl/token", &api.ACLToken{Name: "x", Type: "management"}, nil, operator.write(ctx)); err == nil {
			t.Error("an operator may make management tokens")
		}
	})

	t.Run("a token of someone else, for someone else, or expired is refused", func(t *testing.T) {
		bad := map[string]func() (secret.Value, error){
			"unknown key":      func() (secret.Value, error) { return SignJWT(ed25519Key(t).signer, "ed", Audience, time.Minute) },
			"unknown operator": func() (secret.Value, error) { return SignJWT(keys["ed"].signer, "mallory", Audience, time.Minute) },
			"other audience":   func() (secret.Value, error) { return SignJWT(keys["ed"].signer, "ed", "other", time.Minute) },
			"expired": func() (secret.Value, error) {
				return signJWT(keys["ed"].signer, "ed", Audience, "", time.Minute, time.Now().Add(-time.Hour))
			},
		}
		for name, sign := range bad {
			jwt, err := sign()
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = c.Login(ctx, jwt)
			var refused *LoginError
			if !errors.As(err, &refused) || plan.HintOf(err) == "" {
				t.Errorf("%s: %v, want a LoginError with a hint", name, err)
			}
			if strings.Contains(err.Error(), jwt.Reveal()) {
				t.Errorf("%s: the error shows the token", name)
			}
		}
	})

	t.Run("a removed operator is refused, and loses the token held", func(t *testing.T) {
		token, err := login(t, c, keys["rsa"].signer, "rsa")
		if err != nil {
			t.Fatal(err)
		}
		var left []Operator
		for _, operator := range operators {
			if operator.Name != "rsa" {
				left = append(left, operator)
			}
		}
		changes, err := c.EnsureOperators(ctx, left, server.URL)
		serve(left)
		if err != nil || len(changes) < 2 {
			t.Fatalf("changes %v, %v", changes, err)
		}
		if _, err := login(t, c, keys["rsa"].signer, "rsa"); err == nil {
			t.Error("the removed operator can log in")
		}
		// The old key must not open another operator's name either.
		if _, err := login(t, c, keys["rsa"].signer, "ed"); err == nil {
			t.Error("the removed key can log in under another name")
		}
		removed, err := c.WithToken(token)
		if err != nil {
			t.Fatal(err)
		}
		defer removed.Close()
		if _, _, err := removed.api.Jobs().List(removed.query(ctx)); err == nil {
			t.Error("the removed operator's token still works")
		}
		if _, err := login(t, c, keys["ed"].signer, "ed"); err != nil {
			t.Errorf("another operator: %v", err)
		}
	})
}

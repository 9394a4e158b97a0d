package access_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession/server"
	"github.com/nomad-site/site/internal/writesession/server/access"
)

// engine answers lookup-self as OpenBao does.
func engine(t *testing.T, tokens map[string]any) *httptest.Server {
	t.Helper()
	made := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := r.Header.Get("X-Vault-Token")
		if r.URL.Path != "/v1/auth/token/lookup-self" || r.Method != http.MethodGet {
			t.Errorf("asked for %s %s", r.Method, r.URL.Path)
		}
		found, known := tokens[token]
		status, isStatus := found.(int)
		switch {
		case isStatus:
			w.WriteHeader(status)
			_, _ = w.Write([]byte(`{"errors":["about ` + token + `"]}`))
		case known:
			_ = json.NewEncoder(w).Encode(map[string]any{"data": found})
		default:
			w.WriteHeader(http.StatusForbidden)
			_, _ = w.Write([]byte(`{"errors":["permission denied"]}`))
		}
	}))
	t.Cleanup(made.Close)
	return made
}

// statusOf is 200, or what a denial says, or 503 where nobody can tell.
func statusOf(err error) int {
	var denied *server.DeniedError
	switch {
	case err == nil:
		return http.StatusOK
	case errors.As(err, &denied):
		return denied.Status
	default:
		return http.StatusServiceUnavailable
	}
}

func TestAnOperatorIsWhoHoldsAPolicyOfOperators(t *testing.T) {
	bao := engine(t, map[string]any{
		"s.deploys":  map[string]any{"display_name": "operators-x", "meta": map[string]any{"operator": "anna"}, "policies": []string{"default", "site-operator"}},
		"s.identity": map[string]any{"display_name": "operators-bela", "identity_policies": []string{"site-operator"}, "policies": []string{"default"}},
		"s.uploads":  map[string]any{"meta": map[string]any{"operator": "anna"}, "policies": []string{"site-uploader"}},
		"s.rotates":  map[string]any{"display_name": "rotators-cleo", "policies": []string{"default", "site-rotator"}},
		"s.like":     map[string]any{"display_name": "x", "policies": []string{"site-operators", "Site-Operator"}},
		"s.root":     map[string]any{"display_name": "root", "policies": []string{"root"}},
		"s.nameless": map[string]any{"policies": []string{"site-operator"}},
		"s.sealed":   http.StatusServiceUnavailable,
		"s.broken":   http.StatusInternalServerError,
		"s.strange":  http.StatusBadRequest,
	})
	t.Setenv("VAULT_TOKEN", "s.deploys") // which must speak for nobody
	operators, err := access.NewOperators(bao.URL, "site-operator", "site-uploader")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, token, subject string
		status               int
	}{
		{"an operator", "s.deploys", "anna", 200},
		{"an operator by a policy of their entity", "s.identity", "operators-bela", 200},
		{"an operator's token for uploads", "s.uploads", "anna", 200},
		{"a rotator", "s.rotates", "", 403},
		{"a policy with a similar name", "s.like", "", 403},
		{"the root token, which is in no daily use", "s.root", "", 403},
		{"a token without a name", "s.nameless", "", 403},
		{"a token that nobody knows", "s.unknown", "", 401},
		{"a token that is none", "s.strange", "", 401},
		{"a sealed engine", "s.sealed", "", 503},
		{"a broken engine", "s.broken", "", 503},
	} {
		t.Run(test.name, func(t *testing.T) {
			who, err := operators.Authorize(t.Context(), secret.New(test.token))
			if statusOf(err) != test.status || who.Subject != test.subject {
				t.Errorf("%+v, %v", who, err)
			}
			if err == nil && who.Kind != server.KindOperator {
				t.Errorf("it is a %s", who.Kind)
			}
			if err != nil && strings.Contains(err.Error(), test.token) {
				t.Errorf("the token is in %q", err)
			}
		})
	}
	bao.Close()
	if _, err := operators.Authorize(t.Context(), secret.New("s.deploys")); statusOf(err) != http.StatusServiceUnavailable {
		t.Errorf("without an engine: %v", err)
	}
}

// nomad publishes keys, and signs identities.
type nomad struct {
	*httptest.Server
	asked atomic.Int32

	mutex sync.Mutex
	keys  jose.JSONWebKeySet
}

func startNomad(t *testing.T) *nomad {
	t.Helper()
	n := &nomad{}
	n.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n.asked.Add(1)
		n.mutex.Lock()
		defer n.mutex.Unlock()
		_ = json.NewEncoder(w).Encode(n.keys)
	}))
	t.Cleanup(n.Close)
	return n
}

func (n *nomad) publish(id string, public any, algorithm jose.SignatureAlgorithm) {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	n.keys.Keys = append(n.keys.Keys, jose.JSONWebKey{Key: public, KeyID: id, Algorithm: string(algorithm), Use: "sig"})
}

func sign(t *testing.T, id string, key any, algorithm jose.SignatureAlgorithm, claims map[string]any) secret.Value {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: jose.JSONWebKey{Key: key, KeyID: id}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return secret.New(token)
}

func TestAJobIsWhomNomadSaysItIs(t *testing.T) {
	now := time.Now()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cluster := startNomad(t)
	cluster.publish("first", rsaKey.Public(), jose.RS256)
	jobs := access.NewJobs(access.JobOptions{KeysURL: cluster.URL, Allowed: []string{"deploy-engine"}, Now: func() time.Time { return now }})
	claims := func(change func(map[string]any)) map[string]any {
		out := map[string]any{
			"aud": access.Audience, "exp": now.Add(time.Hour).Unix(), "nbf": now.Unix(), "iat": now.Unix(),
			"nomad_namespace": "default", "nomad_job_id": "deploy-engine", "nomad_task": "server",
		}
		change(out)
		return out
	}
	for _, test := range []struct {
		name   string
		status int
		change func(map[string]any)
	}{
		{"the job that may", 200, func(map[string]any) {}},
		{"one of several audiences", 200, func(c map[string]any) { c["aud"] = []string{"vault.io", access.Audience} }},
		{"another audience", 401, func(c map[string]any) { c["aud"] = "vault.io" }},
		{"no audience", 401, func(c map[string]any) { delete(c, "aud") }},
		{"expired", 401, func(c map[string]any) { c["exp"] = now.Add(-time.Minute).Unix() }},
		{"one that never expires", 401, func(c map[string]any) { delete(c, "exp") }},
		{"of tomorrow", 401, func(c map[string]any) { c["nbf"] = now.Add(time.Hour).Unix() }},
		{"another job", 403, func(c map[string]any) { c["nomad_job_id"] = "shop" }},
		{"another namespace", 403, func(c map[string]any) { c["nomad_namespace"] = "other" }},
		{"no job", 403, func(c map[string]any) { delete(c, "nomad_job_id") }},
	} {
		t.Run(test.name, func(t *testing.T) {
			who, err := jobs.Authorize(t.Context(), sign(t, "first", rsaKey, jose.RS256, claims(test.change)))
			if statusOf(err) != test.status {
				t.Errorf("%+v, %v", who, err)
			}
			if err == nil && (who != server.Identity{Subject: "deploy-engine", Kind: server.KindJob}) {
				t.Errorf("it is %+v", who)
			}
		})
	}
	good := claims(func(map[string]any) {})
	forged := map[string]secret.Value{
		"signed by another key":           sign(t, "first", other, jose.EdDSA, good),
		"signed by the public key's text": sign(t, "first", []byte(strings.Repeat("k", 64)), jose.HS512, good),
		"of a key that nobody knows":      sign(t, "second", other, jose.EdDSA, good),
		"of no key":                       sign(t, "", other, jose.EdDSA, good),
		"unsigned":                        secret.New("eyJhbGciOiJub25lIn0.e30."),
		"nothing":                         secret.New("eyJ.."),
	}
	for name, token := range forged {
		if _, err := jobs.Authorize(t.Context(), token); statusOf(err) != http.StatusUnauthorized {
			t.Errorf("%s: %v", name, err)
		}
	}
	if asked := cluster.asked.Load(); asked != 1 {
		t.Errorf("Nomad was asked %d times for its keys", asked)
	}
	// Nomad has a new key: it is found, when the pause is over.
	cluster.publish("second", other.Public(), jose.EdDSA)
	now = now.Add(6 * time.Second)
	if _, err := jobs.Authorize(t.Context(), sign(t, "second", other, jose.EdDSA, good)); err != nil {
		t.Errorf("the new key: %v", err)
	}
	// Nomad is away: what is known still counts.
	cluster.Close()
	now = now.Add(10 * time.Minute)
	if _, err := jobs.Authorize(t.Context(), sign(t, "second", other, jose.EdDSA, good)); err != nil {
		t.Errorf("without Nomad: %v", err)
	}
	fresh := access.NewJobs(access.JobOptions{KeysURL: cluster.URL, Allowed: []string{"deploy-engine"}})
	if _, err := fresh.Authorize(t.Context(), sign(t, "second", other, jose.EdDSA, good)); statusOf(err) != http.StatusServiceUnavailable {
		t.Errorf("a new process without Nomad: %v", err)
	}
}

// named is an authorizer that says that it was asked.
type named string

func (n named) Authorize(context.Context, secret.Value) (server.Identity, error) {
	return server.Identity{Subject: string(n)}, nil
}

func TestATokenGoesToWhomItIsFor(t *testing.T) {
	either := access.Either{Operators: named("engine"), Jobs: named("nomad")}
	for token, want := range map[string]string{
		"s.AAAAAAAAAAAAAAAAAAAAAAAA": "engine", "hvs.CAESIJ": "engine", "b.AAAAAQ": "engine", "eyJhbGciOiJSUzI1NiJ9.e30.c2ln": "nomad", "eyJ": "engine",
	} {
		if who, err := either.Authorize(t.Context(), secret.New(token)); err != nil || who.Subject != want {
			t.Errorf("%s is asked of %q, %v", token, who.Subject, err)
		}
	}
	for _, token := range []string{"a b", "a\nX-Vault-Namespace: x", "\x7f", "ä"} {
		if _, err := either.Authorize(t.Context(), secret.New(token)); statusOf(err) != http.StatusUnauthorized {
			t.Errorf("%q: %v", token, err)
		}
	}
}

package deploy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// sealedSession has material that is sealed to some of its tokens.
func sealedSession(t *testing.T, tokens []secret.Value, sealedTo ...secret.Value) *session {
	t.Helper()
	s := testSession(Options{Site: "gamma"})
	s.rootToken = tokens[0]
	if len(tokens) > 1 {
		s.newRootToken = tokens[1]
	}
	material, err := seal.New("gamma", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := seal.Seal(material, sealedTo...)
	if err != nil {
		t.Fatal(err)
	}
	s.material = &materialState{Material: material, sealed: sealed}
	return s
}

func rootTokens(t *testing.T, count int) []secret.Value {
	t.Helper()
	var tokens []secret.Value
	for range count {
		token, _, err := seal.NewRootToken()
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, token)
	}
	return tokens
}

func TestMaterialIsSealedAnewToThoseWhoOpenItNow(t *testing.T) {
	tokens := rootTokens(t, 2)
	old, next := tokens[0], tokens[1]
	for _, test := range []struct {
		name     string
		given    []secret.Value
		sealedTo []secret.Value
		want     []secret.Value
	}{
		{"with one token, to that", tokens[:1], tokens[:1], tokens[:1]},
		{"before its root token rotates, to the old alone", tokens, []secret.Value{old}, []secret.Value{old}},
		{"in the middle, to both", tokens, tokens, tokens},
		{"afterwards, to the new alone, though the old is given too", tokens, []secret.Value{next}, []secret.Value{next}},
	} {
		s := sealedSession(t, test.given, test.sealedTo...)
		got := s.recipients()
		if !slices.EqualFunc(got, test.want, func(a, b secret.Value) bool { return a.Reveal() == b.Reveal() }) {
			t.Errorf("%s: %d tokens, or others", test.name, len(got))
		}
	}
	bare := testSession(Options{})
	bare.rootToken = old
	if got := bare.recipients(); len(got) != 1 || got[0].Reveal() != old.Reveal() {
		t.Error("the first material is not sealed to the token that was given")
	}
}

func TestTheNextRootTokenIsMadeOnceInAPrivateFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "next")
	read := func(dryRun bool) (*session, error) {
		s := testSession(Options{NewRootTokenFile: path, DryRun: dryRun})
		return s, s.readNewRootToken()
	}
	if _, err := read(true); err == nil {
		t.Error("a dry run goes on without it")
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a dry run made it: %v", err)
	}
	made, err := read(false)
	if err != nil || made.newRootToken.IsZero() {
		t.Fatalf("it was not made: %v", err)
	}
	again, err := read(false)
	if err != nil || again.newRootToken.Reveal() != made.newRootToken.Reveal() {
		t.Errorf("it was made anew: %v", err)
	}
	same := testSession(Options{NewRootTokenFile: path})
	same.rootToken = made.newRootToken
	if err := same.readNewRootToken(); err == nil || plan.HintOf(err) == "" || strings.Contains(err.Error(), made.newRootToken.Reveal()) {
		t.Errorf("the token in use is taken for the next: %v", err)
	}
	if err := testSession(Options{}).readNewRootToken(); err != nil {
		t.Errorf("without such a file: %v", err)
	}
}

func TestACertificateIsMadeAnewWhereTheRotationWantsIt(t *testing.T) {
	now := time.Now()
	s := testSession(Options{})
	s.material = &materialState{Material: seal.Material{CACertPEM: "new", PreviousCACertPEM: "old"}}
	newCA, oldCA := hexSum([]byte("new")), hexSum([]byte("old"))
	made := func(issuer string, at time.Time) *remoteHost {
		h := &remoteHost{applied: &host.Document{CredentialsExpire: seal.AgentExpiry(at), CredentialsIssuer: issuer}}
		for _, path := range host.CredentialPaths() {
			h.applied.Files = append(h.applied.Files, host.File{Path: path, SHA256: hexSum([]byte(path))})
		}
		return h
	}
	alone := credentialRules{issuers: []string{newCA}}
	since := credentialRules{issuers: []string{newCA, oldCA}, since: now}
	for _, test := range []struct {
		name  string
		host  *remoteHost
		rules credentialRules
		want  bool
	}{
		{"by the old CA, while both are trusted", made(oldCA, now), s.usualRules(), true},
		{"by the new CA, while both are trusted", made(newCA, now), s.usualRules(), true},
		{"by the old CA, when only the new one signs", made(oldCA, now), alone, false},
		{"by the new CA, when only that one signs", made(newCA, now), alone, true},
		{"from before the rotation of certificates", made(newCA, now.Add(-time.Hour)), since, false},
		{"from this rotation of certificates", made(newCA, now.Add(2*time.Second)), since, true},
		{"that ends soon", made(newCA, now.AddDate(-1, 0, 10)), s.usualRules(), false},
	} {
		if got := s.certificateHolds(test.host, test.rules); got != test.want {
			t.Errorf("a certificate %s holds: %t", test.name, got)
		}
	}
}

func TestInTheMiddleOfItsRotationEitherUnsealKeyMayBeTheOne(t *testing.T) {
	broken := errors.New("no answer")
	for _, test := range []struct {
		name, inForce, next string
		fails               error
		want                string
		tried               int
	}{
		{"there is one, and it fits", "current", "", nil, "current", 1},
		{"there is one, and it does not fit", "other", "", nil, "", 1},
		{"the next one is not in force yet", "current", "next", nil, "current", 1},
		{"the next one is in force", "next", "next", nil, "next", 2},
		{"neither fits", "other", "next", nil, "", 2},
		{"what failed was not the key", "next", "next", broken, "", 1},
	} {
		s := testSession(Options{})
		s.material = &materialState{Material: seal.Material{OpenBaoUnsealKey: secret.New("current"), NextUnsealKey: secret.New(test.next)}}
		tried := 0
		key, err := s.withUnsealKey(func(key secret.Value) error {
			tried++
			if test.fails != nil || key.Reveal() == test.inForce {
				return test.fails
			}
			return &openbao.WrongKeyError{Err: errors.New("refused")}
		})
		if tried != test.tried || (err == nil) != (test.want != "") || err == nil && key.Reveal() != test.want {
			t.Errorf("%s: %d tried, %v", test.name, tried, err)
		}
		if want := strings.TrimSpace("current\n" + test.next); string(s.unsealKeys()) != want {
			t.Errorf("%s: the host holds %d bytes, want %d", test.name, len(s.unsealKeys()), len(want))
		}
	}
}

func TestARootIsNotRotatedWithoutAllThatItNeeds(t *testing.T) {
	s := testSession(Options{Site: "gamma"})
	if err := s.rotateRoot(context.Background(), "sprocket", nil); err == nil || !strings.Contains(plan.HintOf(err), "unseal-key") {
		t.Errorf("an unknown root: %v", err)
	}
	for _, name := range Roots() {
		if err := s.rotateRoot(context.Background(), name, nil); err == nil || !strings.Contains(plan.HintOf(err), "--root-token-file") {
			t.Errorf("%s without the site root token: %v, hint %q", name, err, plan.HintOf(err))
		}
	}
	s.site.Hosts = append(s.site.Hosts, site.Host{Name: "gamma-1"})
	if err := s.rotateRoot(context.Background(), rootCA, nil); err == nil || !strings.Contains(err.Error(), "0 of the 1 hosts") {
		t.Errorf("with a host away: %v", err)
	}
}

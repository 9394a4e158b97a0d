package openbao

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

// restart seals the engine, which forgets whatever it had not stored.
func restart(t *testing.T, s *server) *Client {
	t.Helper()
	root := s.client(t, s.rootToken)
	if err := root.api.Sys().SealWithContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return root
}

func TestTheUnsealKeyIsChangedInTwoSteps(t *testing.T) {
	s := ownServer(t)
	ctx := t.Context()
	if err := s.bootstrap(ctx); err != nil {
		t.Fatal(err)
	}
	operator := s.operator(t, "deploy")
	health, err := operator.Health(ctx)
	if err != nil {
		t.Fatal(err)
	}
	// Where it takes a token, an operator's is one; the root key is not theirs to change without a key.
	if _, err := operator.read(ctx, "sys/rotate/root/init"); statusOf(err) == http.StatusForbidden {
		t.Errorf("an operator looks at a change of the key: %v", err)
	}
	if _, err := operator.write(ctx, "sys/rotate/root", nil); statusOf(err) != http.StatusForbidden {
		t.Errorf("an operator changes the root key: %v", err)
	}
	rekeyer := operator.Rekeyer(health)
	if err := rekeyer.Cancel(ctx); err != nil {
		t.Errorf("cancelling when nothing was begun: %v", err)
	}

	other := "A" + s.unsealKey.Reveal()[1:]
	if other == s.unsealKey.Reveal() {
		other = "B" + other[1:]
	}
	for name, key := range map[string]string{"another key": other, "half a key": s.unsealKey.Reveal()[:20], "no key at all": "not base64!"} {
		var wrong *WrongKeyError
		if _, _, err := rekeyer.Begin(ctx, secret.New(key)); !errors.As(err, &wrong) || plan.HintOf(err) == "" || strings.Contains(err.Error(), key) {
			t.Errorf("%s: %v", name, err)
		}
	}

	// Begun and not confirmed: the old key stays in force, in another process too.
	if _, _, err := rekeyer.Begin(ctx, s.unsealKey); err != nil {
		t.Fatalf("a wrong key before leaves something begun: %v", err)
	}
	if _, _, err := operator.Rekeyer(health).Begin(ctx, s.unsealKey); err == nil || !strings.Contains(err.Error(), "in progress") {
		t.Errorf("a second one is begun: %v", err)
	}
	if err := operator.Rekeyer(health).Cancel(ctx); err != nil {
		t.Fatal(err)
	}
	lost, _, err := rekeyer.Begin(ctx, s.unsealKey)
	if err != nil || lost.IsZero() || lost.Reveal() == s.unsealKey.Reveal() {
		t.Fatalf("begin again: %v", err)
	}
	client := restart(t, s)
	var wrong *WrongKeyError
	if err := client.Unseal(ctx, lost); !errors.As(err, &wrong) {
		t.Errorf("a key that was never confirmed unseals: %v", err)
	}
	if err := client.Unseal(ctx, s.unsealKey); err != nil {
		t.Fatal(err)
	}

	newKey, nonce, err := rekeyer.Begin(ctx, s.unsealKey)
	if err != nil || nonce == "" {
		t.Fatalf("begin after a restart: %v", err)
	}
	if err := rekeyer.Confirm(ctx, newKey, "another nonce"); err == nil || strings.Contains(err.Error(), newKey.Reveal()) {
		t.Errorf("confirmed with another nonce: %v", err)
	}
	if err := rekeyer.Confirm(ctx, newKey, nonce); err != nil {
		t.Fatal(err)
	}
	if err := rekeyer.Confirm(ctx, newKey, nonce); err == nil {
		t.Error("confirmed twice")
	}
	client = restart(t, s)
	if err := client.Unseal(ctx, s.unsealKey); !errors.As(err, &wrong) {
		t.Errorf("the old key still unseals: %v", err)
	}
	if err := client.Unseal(ctx, newKey); err != nil {
		t.Fatal(err)
	}
	if _, left := s.diff(t, client); len(left) > 0 {
		t.Errorf("after the change:\n%s", strings.Join(left, "\n"))
	}
	if _, _, err := rekeyer.Begin(ctx, s.unsealKey); !errors.As(err, &wrong) {
		t.Errorf("the old key begins another change: %v", err)
	}
	if _, _, err := rekeyer.Begin(ctx, newKey); err != nil {
		t.Errorf("the new key begins no other change: %v", err)
	}
	if err := rekeyer.Cancel(ctx); err != nil {
		t.Error(err)
	}
}

func TestAWrongKeyToConfirmLeavesTheOldOneInForce(t *testing.T) {
	s := ownServer(t)
	ctx := t.Context()
	if err := s.bootstrap(ctx); err != nil {
		t.Fatal(err)
	}
	client := s.client(t, s.rootToken)
	health, err := client.Health(ctx)
	if err != nil {
		t.Fatal(err)
	}
	rekeyer := client.Rekeyer(health)
	_, nonce, err := rekeyer.Begin(ctx, s.unsealKey)
	if err != nil {
		t.Fatal(err)
	}
	var wrong *WrongKeyError
	if err := rekeyer.Confirm(ctx, s.unsealKey, nonce); !errors.As(err, &wrong) {
		t.Errorf("confirmed with the old key: %v", err)
	}
	cut, stop := context.WithCancel(ctx)
	stop()
	if err := rekeyer.Cancel(cut); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled without a connection: %v", err)
	}
	if err := rekeyer.Cancel(ctx); err != nil {
		t.Fatal(err)
	}
	client = restart(t, s)
	if err := client.Unseal(ctx, s.unsealKey); err != nil {
		t.Error(err)
	}
}

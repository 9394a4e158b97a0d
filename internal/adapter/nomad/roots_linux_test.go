package nomad

import (
	"context"
	"maps"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/secret"
)

func TestGossipKeysAreReplacedOneAfterTheOther(t *testing.T) {
	c := client(t)
	ctx := context.Background()
	first, next := secret.New(firstGossipKey), secret.New("HxwdGxoZGBcWFRQTEhEQDw4NDAsKCQgHBgUEAwIBAAA=")
	wantKeys := func(want ...secret.Value) {
		t.Helper()
		keys, _, members, err := c.Gossip(ctx)
		if err != nil || members != 1 {
			t.Fatalf("%d members, %v, want one", members, err)
		}
		wanted := map[string]int{}
		for _, key := range want {
			wanted[key.Reveal()] = 1
		}
		if !maps.Equal(keys, wanted) {
			t.Fatalf("%d keys, want %d", len(keys), len(want))
		}
	}
	wantKeys(first)
	if err := c.UseGossipKey(ctx, next); err == nil || strings.Contains(err.Error(), next.Reveal()) {
		t.Errorf("used a key that nobody has, or the error shows it: %t", err == nil)
	}
	for range 2 { // a second run changes nothing
		if err := c.InstallGossipKey(ctx, next); err != nil {
			t.Fatal(err)
		}
	}
	wantKeys(first, next)
	if err := c.RemoveGossipKey(ctx, first); err == nil || strings.Contains(err.Error(), first.Reveal()) {
		t.Errorf("removed the key in use, or the error shows it: %t", err == nil)
	}
	if err := c.UseGossipKey(ctx, next); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.RemoveGossipKey(ctx, first); err != nil {
			t.Fatal(err)
		}
	}
	wantKeys(next)
	bad := secret.New("not a key of gossip")
	if err := c.InstallGossipKey(ctx, bad); err == nil || strings.Contains(err.Error(), bad.Reveal()) {
		t.Errorf("installed what is no key, or the error shows it: %t", err == nil)
	}
}

func TestTheManagementTokenIsReplaced(t *testing.T) {
	c := client(t)
	ctx := context.Background()
	works := func(token secret.Value) bool {
		one, err := c.WithToken(token)
		if err != nil {
			t.Fatal(err)
		}
		defer one.Close()
		_, _, err = one.api.ACLTokens().List(one.query(ctx))
		return err == nil
	}
	const prefix = "site management "
	forgotten, err := c.NewManagementToken(ctx, prefix+"2") // of a run that was cut
	if err != nil {
		t.Fatal(err)
	}
	kept, err := c.NewManagementToken(ctx, prefix+"3")
	if err != nil {
		t.Fatal(err)
	}
	if !works(forgotten) || !works(kept) {
		t.Fatal("a new management token does not work")
	}
	for _, wrong := range []secret.Value{secret.New("9c0b3f0e-3c5e-4f5b-9a5e-0a4a6a1f7d12"), {}} {
		if swept, err := c.SweepManagementTokens(ctx, wrong, prefix); err == nil || swept > 0 {
			t.Errorf("swept %d for a token that does not exist: %v", swept, err)
		}
	}
	// The other tests go on with the first token: only its name is looked for here.
	if swept, err := c.sweepTokens(ctx, kept, prefix, "Another Name"); err != nil || swept != 1 {
		t.Fatalf("swept %d, %v, want the one", swept, err)
	}
	if works(forgotten) || !works(kept) {
		t.Error("the wrong token was swept")
	}
	if swept, err := c.sweepTokens(ctx, kept, prefix, "Another Name"); err != nil || swept != 0 {
		t.Errorf("swept %d, %v the second time", swept, err)
	}
	tokens, _, err := c.api.ACLTokens().List(c.query(ctx))
	if err != nil {
		t.Fatal(err)
	}
	bootstrap := 0
	for _, token := range tokens {
		if token.Name == bootstrapTokenName && token.Type == managementType {
			bootstrap++
		}
	}
	if bootstrap != 1 {
		t.Errorf("%d tokens are called %q, want the one of the bootstrap", bootstrap, bootstrapTokenName)
	}
}

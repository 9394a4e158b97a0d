package nomad

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

func TestARotatorMayRotateAndNoMore(t *testing.T) {
	c := client(t)
	ctx := context.Background()
	ada, cron := ed25519Key(t), ed25519Key(t)
	operators := []Operator{{Name: "ada", PublicKeyPEM: ada.pem}, {Name: "cron", PublicKeyPEM: cron.pem, Rights: RightsRotate}}
	served := serveKeys(t, operators)
	url := served.url
	ensure := func(want []Operator) []plan.Change {
		t.Helper()
		served.keys.Store(&want)
		changes, err := c.EnsureOperators(ctx, want, url)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := c.EnsureOperators(ctx, want, url); err != nil || len(again) > 0 {
			t.Fatalf("second run: %v, %v, want no changes", again, err)
		}
		return changes
	}
	ensure(operators)
	rotate := func(key testKey, name string) (secret.Value, error) {
		jwt, err := SignJWT(key.signer, name, Audience, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		token, _, err := c.LoginRotator(ctx, jwt)
		return token, err
	}
	token, err := rotate(cron, "cron")
	if err != nil {
		t.Fatal(err)
	}
	var refused *LoginError
	for _, name := range []string{"ada", "cron"} {
		if _, err := login(t, c, cron.signer, name); !errors.As(err, &refused) {
			t.Errorf("the rotator's key deploys as %s: %v", name, err)
		}
	}
	if _, err := rotate(cron, "ada"); !errors.As(err, &refused) {
		t.Errorf("the rotator's key rotates as somebody else: %v", err)
	}

	rotator, err := c.WithToken(token)
	if err != nil {
		t.Fatal(err)
	}
	defer rotator.Close()
	t.Run("it registers jobs, tries and promotes them, and sets generations", func(t *testing.T) {
		old := generation(t, rotator, serveSpec("rotated", "ok", "update {\nmin_healthy_time = \"1s\"\n}"), 6)
		if err := deploy(t, rotator, old, quick); err != nil {
			t.Fatal(err)
		}
		wanted := generation(t, rotator, serveSpec("rotated", "ok", "update {\nmin_healthy_time = \"1s\"\n}"), 7)
		trial, err := try(t, rotator, wanted)
		if err != nil {
			t.Fatal(err)
		}
		if err := rotator.Promote(ctx, trial, wanted, quick, nil); err != nil {
			t.Fatal(err)
		}
		wantInUse(t, rotator, "rotated", 7)
		if err := rotator.PutLive(ctx, []LiveGenerations{{Path: "nomad/jobs/rotated/web/hello", Items: map[string]string{"site_generation:shop.key": "7"}}}); err != nil {
			t.Error(err)
		}
		if away, err := rotator.NodesNotReady(ctx); err != nil || len(away) > 0 {
			t.Errorf("nodes away %v, %v", away, err)
		}
	})
	t.Run("it does nothing else", func(t *testing.T) {
		shot, err := rotator.snapshot(ctx, "rotated")
		if err != nil || len(shot.allocations) == 0 {
			t.Fatalf("%d allocations, %v", len(shot.allocations), err)
		}
		refusals := map[string]func() error{
			"read logs": func() error {
				_, err := rotator.api.Raw().Query("/v1/client/fs/logs/"+shot.allocations[0].ID+"?task=hello&type=stderr&plain=true", nil, rotator.query(ctx))
				return err
			},
			"dispatch": func() error {
				_, _, err := rotator.api.Jobs().Dispatch("rotated", nil, nil, "", rotator.write(ctx))
				return err
			},
			"stop allocations": func() error {
				_, err := rotator.api.Allocations().Stop(&api.Allocation{ID: shot.allocations[0].ID}, rotator.query(ctx))
				return err
			},
			"list tokens": func() error {
				_, _, err := rotator.api.ACLTokens().List(rotator.query(ctx))
				return err
			},
			"read gossip keys": func() error { _, _, _, err := rotator.Gossip(ctx); return err },
			"write variables of others": func() error {
				return rotator.PutReleaseVariable(ctx, "other/release", []byte(`{}`))
			},
		}
		for name, do := range refusals {
			if err := do(); statusOf(err) != http.StatusForbidden {
				t.Errorf("%s: %v, want a refusal", name, err)
			}
		}
	})
	t.Run("who deploys instead loses the rotator's token", func(t *testing.T) {
		promoted := slices.Clone(operators)
		promoted[1].Rights = RightsDeploy
		changes := ensure(promoted)
		t.Log(changes)
		if _, _, err := rotator.api.Jobs().List(rotator.query(ctx)); err == nil {
			t.Error("the rotator's token still works")
		}
		if _, err := login(t, c, cron.signer, "cron"); err != nil {
			t.Error(err)
		}
		have, err := c.ObserveOperators(ctx)
		if err != nil || have.rotators.policy != nil || have.rotators.authMethod != nil || len(have.rotators.rules) > 0 {
			t.Errorf("something is left for rotators: %+v, %v", have.rotators, err)
		}
		for _, token := range have.tokens {
			if rights, name := cutPrefix(token.Name); rights == RightsRotate {
				t.Errorf("a token of rotator %s is left", name)
			}
		}
	})
	if _, err := c.EnsureOperators(ctx, operators[1:], url); err == nil || plan.HintOf(err) == "" {
		t.Errorf("got %v: nobody would be left to deploy", err)
	}
}

type servedKeys struct {
	url  string
	keys *atomic.Pointer[[]Operator]
}

// serveKeys does what site-host does on each server.
func serveKeys(t *testing.T, operators []Operator) servedKeys {
	t.Helper()
	served := servedKeys{keys: &atomic.Pointer[[]Operator]{}}
	served.keys.Store(&operators)
	documents := map[string]func([]Operator) ([]byte, error){"/operators.jwks": JWKS, "/rotators.jwks": RotatorsJWKS}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		document, known := documents[r.URL.Path]
		if !known {
			http.NotFound(w, r)
			return
		}
		keys, err := document(*served.keys.Load())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = w.Write(keys)
	}))
	t.Cleanup(server.Close)
	served.url = server.URL + "/operators.jwks"
	return served
}

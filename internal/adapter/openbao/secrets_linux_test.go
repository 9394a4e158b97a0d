package openbao

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

const planted = "planted-value-7c1f"

func TestEntriesAreWrittenOnceAndSeenWithoutTheirValue(t *testing.T) {
	s := sharedServer(t)
	operator := s.operator(t, "deploy")
	ctx := t.Context()
	entry := site.Secret{Component: "shop", Name: "password"}
	gone := site.Secret{Component: "shop", Name: "gone"}
	absent := site.Secret{Component: "shop", Name: "absent"}
	elsewhere := site.Secret{Component: "nowhere", Name: "absent"}
	other := site.Secret{Component: "shop", Name: "undeclared"}
	catalogue := []site.Secret{entry, gone, absent, elsewhere}

	var none *NoValueError
	if _, _, err := operator.Read(ctx, entry); !errors.As(err, &none) || none.Deleted {
		t.Errorf("reading what never was: %v", err)
	}
	version, err := operator.Write(ctx, entry, secret.New(planted), 0, map[string]string{"source": "generated"})
	if err != nil || version != 1 {
		t.Fatalf("first write: version %d, %v", version, err)
	}
	for cas, said := range map[int]string{
		0: "secret shop.password exists already, its value is kept",
		7: "secret shop.password is no longer at version 7: somebody else wrote it, their value is kept",
	} {
		var conflict *ConflictError
		_, err := operator.Write(ctx, entry, secret.New("check"), cas, nil) // a word of the engine's refusal
		if !errors.As(err, &conflict) || err.Error() != said || plan.HintOf(err) == "" {
			t.Errorf("write at version %d: %v", cas, err)
		}
	}
	value, version, err := operator.Read(ctx, entry)
	if err != nil || version != 1 || value.Reveal() != planted {
		t.Errorf("read version %d: %v", version, err)
	}

	for _, write := range []site.Secret{gone, other} {
		if _, err := operator.Write(ctx, write, secret.New(planted), 0, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := operator.remove(ctx, dataPath(gone)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := operator.Read(ctx, gone); !errors.As(err, &none) || !none.Deleted {
		t.Errorf("reading a deleted value: %v", err)
	}
	states, err := operator.ObserveEntries(ctx, catalogue)
	if err != nil {
		t.Fatal(err)
	}
	seen := states["shop.password"]
	if !seen.HasValue() || seen.Version != 1 || seen.CustomMetadata["source"] != "generated" || time.Since(seen.Created) > 5*time.Minute {
		t.Errorf("shop.password is seen as %+v", seen)
	}
	if state := states["shop.gone"]; !state.Exists || !state.Deleted || state.Version != 1 {
		t.Errorf("shop.gone is seen as %+v", state)
	}
	if states["shop.absent"].Exists || states["nowhere.absent"].Exists {
		t.Errorf("what never was is seen: %+v", states)
	}
	if undeclared := reconcile.Undeclared(catalogue, states); !slices.Equal(undeclared, []string{"shop.undeclared"}) {
		t.Errorf("undeclared: %q", undeclared)
	}

	// Undeleted by hand: the value is there again. Destroyed: it is not.
	if _, err := operator.write(ctx, "site/undelete/shop/gone", map[string]any{"versions": []int{1}}); err != nil {
		t.Fatal(err)
	}
	if states, err := operator.ObserveEntries(ctx, catalogue); err != nil || !states["shop.gone"].HasValue() {
		t.Errorf("after undelete: %+v, %v", states["shop.gone"], err)
	}
	root := s.client(t, s.rootToken)
	if _, err := root.write(ctx, "site/destroy/shop/gone", map[string]any{"versions": []int{1}}); err != nil {
		t.Fatal(err)
	}
	if states, err := operator.ObserveEntries(ctx, catalogue); err != nil || !states["shop.gone"].Deleted {
		t.Errorf("after destroy: %+v, %v", states["shop.gone"], err)
	}
	if version, err := operator.Write(ctx, gone, secret.New(planted), 1, nil); err != nil || version != 2 {
		t.Errorf("made anew at the seen version: %d, %v", version, err)
	}
	if _, err := root.write(ctx, dataPath(other), map[string]any{"data": map[string]any{"password": planted}}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := operator.Read(ctx, other); err == nil || strings.Contains(err.Error(), planted) || plan.HintOf(err) == "" {
		t.Errorf("an entry of another shape: %v", err)
	}
	end(t, operator)
}

func TestValuesThatWouldNotBeKeptAsTheyAreAreRefused(t *testing.T) {
	s := sharedServer(t)
	operator := s.operator(t, "secrets")
	entry := site.Secret{Component: "shop", Name: "large"}
	for name, content := range map[string]string{
		"empty": "", "one byte too many": strings.Repeat("x", MaxValue+1), "not text": planted + "\xff\xfe",
		"too large as JSON": strings.Repeat("<", MaxValue),
	} {
		var refused *ValueError
		_, err := operator.Write(t.Context(), entry, secret.New(content), 0, nil)
		if !errors.As(err, &refused) || plan.HintOf(err) == "" || strings.Contains(err.Error(), planted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	whole := strings.Repeat("<ä\n-----", MaxValue/9)
	if _, err := operator.Write(t.Context(), entry, secret.New(whole), 0, nil); err != nil {
		t.Fatal(err)
	}
	if back, _, err := operator.Read(t.Context(), entry); err != nil || back.Reveal() != whole {
		t.Errorf("the largest value comes back changed: %v", err)
	}
	end(t, operator)
}

func TestAJobReachesItsOwnSecretsAndNothingElse(t *testing.T) {
	s := sharedServer(t)
	ctx := t.Context()
	operator := s.operator(t, "deploy")
	own := site.Secret{Component: "a", Name: "password"}
	produced := site.Secret{Component: "b", Name: "token"}
	foreign := site.Secret{Component: "b", Name: "password"}
	for _, entry := range []site.Secret{own, foreign} {
		if _, err := operator.Write(ctx, entry, secret.New(planted), 0, nil); err != nil {
			t.Fatal(err)
		}
	}
	a, b := s.job(t, "a"), s.job(t, "b")

	if got, err := a.ReadGeneration(ctx, own, 0); err != nil || got.Value.Reveal() != planted {
		t.Errorf("a reads its own: %v", err)
	}
	if _, err := a.Write(ctx, produced, secret.New(planted), 0, nil); err != nil {
		t.Errorf("a writes what it produces: %v", err)
	}
	if _, err := a.Write(ctx, produced, secret.New(planted+"2"), 1, nil); err != nil {
		t.Errorf("a writes it again: %v", err)
	}
	if data, err := a.read(ctx, metadataPath(produced)); err != nil || number(data, "current_version") != 2 {
		t.Errorf("a sees how old it is: %v", err)
	}
	if got, err := b.ReadGeneration(ctx, produced, 0); err != nil || got.Value.Reveal() != planted+"2" {
		t.Errorf("b reads what a produced: %v", err)
	}
	for name, attempt := range map[string]func() error{
		"reads another job's":         func() error { _, err := a.ReadGeneration(ctx, foreign, 0); return err },
		"reads what it only produces": func() error { _, err := a.ReadGeneration(ctx, produced, 1); return err },
		"writes its own":              func() error { _, err := a.Write(ctx, own, secret.New(planted), 1, nil); return err },
		"writes another job's":        func() error { _, err := a.Write(ctx, foreign, secret.New(planted), 1, nil); return err },
		"deletes what it produces":    func() error { return a.remove(ctx, dataPath(produced)) },
		"lists the catalogue":         func() error { _, err := a.ObserveEntries(ctx, nil); return err },
		"looks at the engine":         func() error { _, err := a.ObserveEngine(ctx, s.want); return err },
		"changes its policy": func() error {
			_, err := a.write(ctx, "sys/policies/acl/job-a", map[string]any{"policy": `path "*" { capabilities = ["sudo"] }`})
			return err
		},
		"sweeps": func() error { _, err := a.Sweep(ctx, SweepOptions{Purpose: "deploy", Thorough: true}); return err },
	} {
		err := attempt()
		if statusOf(err) != http.StatusForbidden || plan.HintOf(err) == "" {
			t.Errorf("a %s: %v", name, err)
		} else if strings.Contains(err.Error(), planted) || strings.Contains(err.Error(), a.token.Reveal()) {
			t.Errorf("a %s: the error shows a secret", name)
		}
	}
	data, err := a.read(ctx, "auth/token/lookup-self")
	if err != nil || number(data, "period") != 1800 {
		t.Errorf("a's token has a period of %d s: %v", number(data, "period"), err)
	}
	if _, err := a.write(ctx, "auth/token/renew-self", nil); err != nil {
		t.Errorf("a's token is renewed: %v", err)
	}
	end(t, a, b, operator)
}

func TestARemovedOperatorIsRefusedAndLosesLiveTokens(t *testing.T) {
	s := sharedServer(t)
	ctx, made := t.Context(), signers(t)
	ada := s.operator(t, "deploy")
	token, err := s.login(t, made.rsa, "grace", "secrets")
	if err != nil {
		t.Fatal(err)
	}
	grace := s.client(t, token)
	if count, err := ada.RevokeOperators(ctx, []string{"ada", "grace", "joan"}); err != nil || count != 0 {
		t.Errorf("revoked %d tokens of declared operators, %v", count, err)
	}

	whole := s.want
	defer func() { s.want = whole }()
	s.want = reconcile.DesiredEngine(testSite(), []reconcile.Operator{
		{Name: "ada", PublicKeyPEM: publicPEM(made.ed25519)}, {Name: "joan", PublicKeyPEM: publicPEM(made.ecdsa)},
	}, []string{publicPEM(made.host)})
	s.want.Audit = whole.Audit
	for i := range s.want.Auth {
		if s.want.Auth[i].Path == reconcile.JobsMount {
			s.want.Auth[i] = whole.Auth[i]
		}
	}
	have, found := s.diff(t, ada)
	if want := []string{
		"update auth method operators (jwt_validation_pubkeys differs)",
		"update identity role operators/operator (bound_claims differs)",
	}; !slices.Equal(found, want) {
		t.Errorf("found %q", found)
	}
	if err := ada.ApplyEngine(ctx, s.want, have, reconcile.DiffEngine(s.want, have), nil); err != nil {
		t.Fatal(err)
	}
	if count, err := ada.RevokeOperators(ctx, []string{"ada", "joan"}); err != nil || count != 1 {
		t.Errorf("revoked %d tokens, %v", count, err)
	}
	if revoked, err := grace.Revoked(ctx); err != nil || !revoked {
		t.Errorf("grace's token lives: %v", err)
	}
	var refused *LoginError
	if _, err := s.login(t, made.rsa, "grace", "deploy"); !errors.As(err, &refused) {
		t.Errorf("grace logs in: %v", err)
	}
	if _, err := s.login(t, made.rsa, "ada", "deploy"); !errors.As(err, &refused) {
		t.Errorf("grace logs in as ada: %v", err)
	}
	if revoked, err := ada.Revoked(ctx); err != nil || revoked {
		t.Errorf("ada's own token is gone: %v", err)
	}
	s.want = whole
	have, _ = s.diff(t, ada)
	if err := ada.ApplyEngine(ctx, s.want, have, reconcile.DiffEngine(s.want, have), nil); err != nil {
		t.Fatal(err)
	}
	end(t, ada)
}

func TestSweepRevokesWhatWasLeftBehindAndNothingElse(t *testing.T) {
	s := ownServer(t)
	if err := s.bootstrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	minted, err := s.client(t, s.rootToken).write(ctx, "auth/token/create", map[string]any{"policies": []string{"root"}, "no_parent": true})
	if err != nil {
		t.Fatal(err)
	}
	roots := []*Client{s.client(t, s.rootToken), s.client(t, secret.New(minted.Auth.ClientToken))}
	alive := func(what string, client *Client, want bool) {
		t.Helper()
		if revoked, err := client.Revoked(ctx); err != nil || revoked == want {
			t.Errorf("%s: revoked is %v, %v", what, revoked, err)
		}
	}

	me := s.operator(t, "deploy")
	job := s.job(t, "a")
	_, offset := s.requests(t, 0)
	if count, err := me.Sweep(ctx, SweepOptions{Purpose: "deploy"}); err != nil || count != 0 {
		t.Errorf("the quick sweep with nobody else logged in revoked %d, %v", count, err)
	}
	if requests, _ := s.requests(t, offset); len(requests) != 2 {
		t.Errorf("the quick sweep asked:\n%s", strings.Join(requests, "\n"))
	}
	alive("a root token that the quick sweep cannot see", roots[0], true)

	if count, err := me.Sweep(ctx, SweepOptions{Purpose: "deploy", Thorough: true}); err != nil || count != 2 {
		t.Errorf("the thorough sweep revoked %d, %v", count, err)
	}
	for _, root := range roots {
		alive("a lost root token", root, false)
	}
	leftover, theirs := s.operator(t, "deploy"), s.operator(t, "secrets")
	if count, err := me.Sweep(ctx, SweepOptions{Purpose: "deploy"}); err != nil || count != 1 {
		t.Errorf("the quick sweep revoked %d, %v", count, err)
	}
	alive("the token of a deploy that was killed", leftover, false)
	alive("the token of somebody at `site secrets`", theirs, true)
	alive("a job's token", job, true)
	alive("our own token", me, true)
}

func TestTheEnvironmentChangesNothing(t *testing.T) {
	s := sharedServer(t)
	for name, value := range map[string]string{
		"VAULT_ADDR": "http://192.0.2.1:1", "VAULT_TOKEN": "from-the-environment", "VAULT_NAMESPACE": "team",
		"VAULT_WRAP_TTL": "60s", "VAULT_HEADERS": `{"X-From":"environment"}`, "VAULT_HTTP_PROXY": "http://192.0.2.1:1",
		"VAULT_CLIENT_TIMEOUT": "1", "VAULT_MAX_RETRIES": "9", "HTTP_PROXY": "http://192.0.2.1:1", "VAULT_AGENT_ADDR": "http://192.0.2.1:1",
	} {
		t.Setenv(name, value)
	}
	anonymous := s.client(t, secret.Value{})
	if token := anonymous.api.Token(); token != "" {
		t.Error("the token of the environment is sent")
	}
	if headers := anonymous.api.Headers(); len(headers) != 1 {
		t.Errorf("headers of the environment are sent: %v", slices.Collect(maps.Keys(headers)))
	}
	operator := s.operator(t, "deploy")
	entry := site.Secret{Component: "shop", Name: "environment"}
	if _, err := operator.Write(t.Context(), entry, secret.New(planted), 0, nil); err != nil {
		t.Fatal(err)
	}
	if value, _, err := operator.Read(t.Context(), entry); err != nil || value.Reveal() != planted {
		t.Errorf("read: %v", err)
	}
	end(t, operator)
}

func TestNothingShowsASecret(t *testing.T) {
	s := sharedServer(t)
	operator := s.operator(t, "deploy")
	token := operator.token.Reveal()
	for _, printed := range []string{fmt.Sprintf("%v %+v %#v", operator, operator, operator), fmt.Sprintf("%+v", *operator)} {
		if strings.Contains(printed, token) {
			t.Error("a printed client shows its token")
		}
	}
	end(t, operator)
	// Dead now: every call fails, and none says with what.
	entry := site.Secret{Component: "shop", Name: "password"}
	_, written := operator.Write(t.Context(), entry, secret.New(planted), 0, nil)
	_, _, read := operator.Read(t.Context(), entry)
	_, observed := operator.ObserveEntries(t.Context(), []site.Secret{entry})
	_, swept := operator.Sweep(t.Context(), SweepOptions{Purpose: "deploy"})
	_, engine := operator.ObserveEngine(t.Context(), s.want)
	closed, err := New(Options{Token: secret.New(token), Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("the tunnel is down")
	}})
	if err != nil {
		t.Fatal(err)
	}
	_, unreachable := closed.Write(t.Context(), entry, secret.New(planted), 0, nil)
	for name, err := range map[string]error{
		"write": written, "read": read, "observe": observed, "sweep": swept, "engine": engine, "unreachable": unreachable,
	} {
		if err == nil || strings.Contains(err.Error(), planted) || strings.Contains(err.Error(), token) {
			t.Errorf("%s: %v", name, err)
		}
	}
	log, err := os.ReadFile(s.audit)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(log), planted) || strings.Contains(string(log), token) {
		t.Error("the audit log shows a secret")
	}
}

// end logs the clients out.
func end(t *testing.T, clients ...*Client) {
	t.Helper()
	for _, client := range clients {
		if err := client.RevokeSelf(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

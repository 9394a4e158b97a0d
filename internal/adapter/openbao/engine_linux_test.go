package openbao

import (
	"crypto"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
)

func TestAFreshEngineConvergesAndTheSecondLookFindsNothing(t *testing.T) {
	s := ownServer(t)
	anonymous := s.client(t, secret.Value{})
	ctx := t.Context()

	health, err := anonymous.Health(ctx)
	if err != nil || health.Initialized || !health.Sealed || health.Product == "" || health.Version == "" {
		t.Fatalf("health of a fresh engine: %+v, %v", health, err)
	}
	var notYet *NotInitializedError
	if err := anonymous.Unseal(ctx, secret.New("AAAA")); !errors.As(err, &notYet) {
		t.Fatalf("unseal before init: %v", err)
	}
	if err := s.bootstrap(ctx); err != nil {
		t.Fatal(err)
	}
	var again *InitializedError
	if _, _, err := anonymous.Initialize(ctx); !errors.As(err, &again) {
		t.Fatalf("second init: %v", err)
	}
	if health, err := anonymous.Health(ctx); err != nil || !health.Active {
		t.Fatalf("health after unseal: %+v, %v", health, err)
	}

	root := s.client(t, s.rootToken)
	if err := root.RevokeSelf(ctx); err != nil {
		t.Fatal(err)
	}
	if revoked, err := root.Revoked(ctx); err != nil || !revoked {
		t.Fatalf("the root token lives: %v, %v", revoked, err)
	}
	if err := root.RevokeSelf(ctx); err != nil {
		t.Fatalf("revoking a dead token: %v", err)
	}

	first, offset := s.mutations(t, 0)
	if !slices.Contains(first, "update sys/policies/acl/job-a") {
		t.Fatalf("the audit log does not tell what the first run wrote:\n%s", strings.Join(first, "\n"))
	}
	operator := s.operator(t, "deploy")
	if revoked, err := operator.Revoked(ctx); err != nil || revoked {
		t.Fatalf("a live token counts as revoked: %v, %v", revoked, err)
	}
	_, left := s.diff(t, operator)
	if len(left) > 0 {
		t.Errorf("the second look finds:\n%s", strings.Join(left, "\n"))
	}
	if err := operator.RevokeSelf(ctx); err != nil {
		t.Fatal(err)
	}
	if written, _ := s.mutations(t, offset); len(written) > 0 {
		t.Errorf("the second run wrote:\n%s", strings.Join(written, "\n"))
	}
}

func TestASealedEngineOpensWithItsKeyOnly(t *testing.T) {
	s := ownServer(t)
	if err := s.bootstrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	client := s.client(t, s.rootToken)
	if err := client.api.Sys().SealWithContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.ObserveEngine(t.Context(), s.want); statusOf(err) != 503 || plan.HintOf(err) == "" {
		t.Errorf("observing a sealed engine: %v (hint %q)", err, plan.HintOf(err))
	}
	wrong := strings.Map(func(r rune) rune {
		if r == 'A' {
			return 'B'
		}
		if r >= 'B' && r <= 'Z' {
			return 'A'
		}
		return r
	}, s.unsealKey.Reveal())
	for name, key := range map[string]string{"another key": wrong, "half a key": s.unsealKey.Reveal()[:20], "no key at all": "not base64!"} {
		var wrongKey *WrongKeyError
		err := client.Unseal(t.Context(), secret.New(key))
		if !errors.As(err, &wrongKey) || strings.Contains(err.Error(), key) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := client.Unseal(t.Context(), s.unsealKey); err != nil {
		t.Fatal(err)
	}
	if err := client.Unseal(t.Context(), s.unsealKey); err != nil {
		t.Errorf("unsealing twice: %v", err)
	}
	if _, left := s.diff(t, client); len(left) > 0 {
		t.Errorf("after unsealing:\n%s", strings.Join(left, "\n"))
	}

	// What was unmounted is mounted again by an operator.
	if err := client.remove(t.Context(), "sys/mounts/site"); err != nil {
		t.Fatal(err)
	}
	operator := s.operator(t, "deploy")
	have, found := s.diff(t, operator)
	if !slices.Equal(found, []string{"create mount site (missing)"}) {
		t.Errorf("found %q", found)
	}
	if entries, err := operator.ObserveEntries(t.Context(), testSite().Secrets()); err != nil || len(entries) > 0 {
		t.Errorf("entries without a mount: %v, %v", entries, err)
	}
	if err := operator.ApplyEngine(t.Context(), s.want, have, reconcile.DiffEngine(s.want, have), nil); err != nil {
		t.Error(err)
	}
	if _, left := s.diff(t, operator); len(left) > 0 {
		t.Errorf("after mounting again:\n%s", strings.Join(left, "\n"))
	}
	if _, err := operator.Write(t.Context(), testSite().Secrets()[0], secret.New(planted), 0, nil); err != nil {
		t.Error(err)
	}
	end(t, operator)

	health, err := client.Health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var off *NoRootError
	var wrongKey *WrongKeyError
	_, err = client.GenerateRoot(t.Context(), secret.New(wrong))
	if errors.As(err, &off) && health.Product == OpenBao {
		t.Logf("%s %s: %v", health.Product, health.Version, err)
		return
	}
	if !errors.As(err, &wrongKey) {
		t.Errorf("root token with a wrong key: %v", err)
	}
	if attempt, err := client.api.Sys().GenerateRootStatusWithContext(t.Context()); err != nil || attempt.Started {
		t.Errorf("the failed attempt is still open: %v", err)
	}
	// One that was cut short stands in nobody's way.
	if _, err := client.api.Sys().GenerateRootInitWithContext(t.Context(), "", ""); err != nil {
		t.Error(err)
	}
	token, err := client.GenerateRoot(t.Context(), s.unsealKey)
	if err != nil {
		t.Fatal(err)
	}
	minted := s.client(t, token)
	if _, left := s.diff(t, minted); len(left) > 0 {
		t.Errorf("seen by a minted root token:\n%s", strings.Join(left, "\n"))
	}
	if err := minted.RevokeSelf(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestOperatorsLogInWithAnyKindOfKey(t *testing.T) {
	s, made := sharedServer(t), signers(t)
	for _, test := range []struct {
		kind, operator string
		key            crypto.Signer
	}{
		{"ed25519", "ada", made.ed25519}, {"rsa", "grace", made.rsa}, {"ecdsa", "joan", made.ecdsa},
	} {
		token, err := s.login(t, test.key, test.operator, "deploy")
		if err != nil {
			t.Errorf("%s: %v", test.kind, err)
			continue
		}
		client := s.client(t, token)
		data, err := client.read(t.Context(), "auth/token/lookup-self")
		if err != nil {
			t.Errorf("%s: %v", test.kind, err)
		}
		metadata := texts(data, "meta")
		if metadata["operator"] != test.operator || metadata["purpose"] != "deploy" || number(data, "creation_ttl") != 600 {
			t.Errorf("%s: token has metadata %v and a life of %d s", test.kind, metadata, number(data, "creation_ttl"))
		}
		if expiry, err := client.Renew(t.Context()); err != nil || time.Until(expiry) < 9*time.Minute || time.Until(expiry) > 11*time.Minute {
			t.Errorf("%s: renewed until %s, %v", test.kind, expiry, err)
		}
		if err := client.RevokeSelf(t.Context()); err != nil {
			t.Errorf("%s: %v", test.kind, err)
		}
		if _, err := client.Renew(t.Context()); statusOf(err) != 403 {
			t.Errorf("%s: renewing a dead token: %v", test.kind, err)
		}
	}
}

func TestLoginsAreRefusedWithAHintAndWithoutTheJWT(t *testing.T) {
	s, made := sharedServer(t), signers(t)
	claims := func(change map[string]any) map[string]any {
		whole := map[string]any{"iss": reconcile.OperatorIssuer, "aud": []string{reconcile.Audience}, "operator": "ada", "purpose": "deploy"}
		for name, value := range change {
			whole[name] = value
		}
		return whole
	}
	for name, test := range map[string]struct {
		mount, role string
		jwt         secret.Value
	}{
		"a key that nobody declared":     {"operators", "operator", sign(t, made.host, claims(nil))},
		"a name that nobody declared":    {"operators", "operator", sign(t, made.ed25519, claims(map[string]any{"operator": "mallory"}))},
		"another issuer":                 {"operators", "operator", sign(t, made.ed25519, claims(map[string]any{"iss": "site-host"}))},
		"another audience":               {"operators", "operator", sign(t, made.ed25519, claims(map[string]any{"aud": "vault.io"}))},
		"an unknown role":                {"operators", "nobody", sign(t, made.ed25519, claims(nil))},
		"an unknown mount":               {"nowhere", "operator", sign(t, made.ed25519, claims(nil))},
		"no JWT at all":                  {"operators", "operator", secret.New("garbage-that-is-no-jwt")},
		"a job's identity as another's":  {"jwt-nomad", "b", sign(t, made.workload, map[string]any{"aud": "vault.io", "nomad_job_id": "a", "nomad_namespace": "default"})},
		"a job that needs no secrets":    {"jwt-nomad", "c", sign(t, made.workload, map[string]any{"aud": "vault.io", "nomad_job_id": "c", "nomad_namespace": "default"})},
		"a job of another namespace":     {"jwt-nomad", "a", sign(t, made.workload, map[string]any{"aud": "vault.io", "nomad_job_id": "a", "nomad_namespace": "other"})},
		"an operator's key as a host's":  {"hosts", "host", sign(t, made.ed25519, map[string]any{"iss": "site-host", "aud": "site", "host": "one"})},
		"a workload's key as operator's": {"operators", "operator", sign(t, made.workload, claims(nil))},
	} {
		_, _, err := s.client(t, secret.Value{}).Login(t.Context(), test.mount, test.role, test.jwt)
		var refused *LoginError
		if !errors.As(err, &refused) || plan.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if strings.Contains(err.Error(), test.jwt.Reveal()) {
			t.Errorf("%s: the error shows the JWT", name)
		}
	}
	host := sign(t, made.host, map[string]any{"iss": "site-host", "aud": "site", "host": "one"})
	token, expiry, err := s.client(t, secret.Value{}).Login(t.Context(), "hosts", "host", host)
	if err != nil || time.Until(expiry) < 50*time.Minute {
		t.Fatalf("a host's login: until %s, %v", expiry, err)
	}
	if err := s.client(t, token).RevokeSelf(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestEveryBreakByHandIsFoundAndRepaired(t *testing.T) {
	s := sharedServer(t)
	root := s.client(t, s.rootToken)
	made := signers(t)
	write := func(path string, document map[string]any) {
		t.Helper()
		if _, err := root.write(t.Context(), path, document); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(path string) {
		t.Helper()
		if err := root.remove(t.Context(), path); err != nil {
			t.Fatal(err)
		}
	}
	type harm struct {
		name   string
		doHarm func()
		found  []string
	}
	tests := []harm{
		{"a policy was widened", func() {
			write("sys/policies/acl/job-a", map[string]any{"policy": `path "site/*" { capabilities = ["read"] }`})
		}, []string{"update policy job-a (text differs)"}},
		{"a policy was deleted", func() { remove("sys/policies/acl/job-b") }, []string{"create policy job-b (missing)"}},
		{"the operators' policy was cut", func() {
			write("sys/policies/acl/site-operator", map[string]any{"policy": s.want.Policies["site-operator"] + "\n# by hand"})
		}, []string{"update policy site-operator (text differs)"}},
		{"a role was deleted", func() { remove("auth/jwt-nomad/role/a") }, []string{"create identity role jwt-nomad/a (missing)"}},
		{"a role got another policy and no end", func() {
			write("auth/jwt-nomad/role/a", map[string]any{
				"role_type": "jwt", "token_policies": "root", "token_period": "0", "token_ttl": "720h", "bound_claims_type": "glob",
			})
		}, []string{"update identity role jwt-nomad/a (bound_claims_type, token_period, token_policies, token_ttl differ)"}},
		{"a role lost its binding", func() {
			write("auth/jwt-nomad/role/b", map[string]any{"role_type": "jwt", "bound_claims": map[string]any{}})
		}, []string{"update identity role jwt-nomad/b (bound_claims differs)"}},
		{"operators' tokens became batch tokens", func() {
			write("auth/operators/role/operator", map[string]any{"role_type": "jwt", "token_type": "batch"})
		}, []string{"update identity role operators/operator (token_type differs)"}},
		{"another key was let in", func() {
			write("auth/operators/config", map[string]any{
				"jwt_validation_pubkeys": []string{publicPEM(made.workload)}, "bound_issuer": "site-operator", "default_role": "operator",
				"jwt_supported_algs": []string{"RS256"},
			})
		}, []string{"update auth method operators (jwt_supported_algs, jwt_validation_pubkeys differ)"}},
		{"the issuer was forgotten", func() {
			write("auth/hosts/config", map[string]any{"jwt_validation_pubkeys": []string{publicPEM(made.host)}, "jwt_supported_algs": "EdDSA", "default_role": "host"})
		}, []string{"update auth method hosts (bound_issuer differs)"}},
		{"an auth method was tuned", func() {
			write("sys/auth/operators/tune", map[string]any{"default_lease_ttl": "24h", "description": "mine"})
		}, []string{"update auth method operators (default_lease_ttl, description differ)"}},
		{"an auth method was taken away", func() { remove("sys/auth/hosts") },
			[]string{"create auth method hosts (missing)", "create identity role hosts/host (missing)"}},
		{"values show up in the audit log", func() {
			write("sys/mounts/site/tune", map[string]any{"audit_non_hmac_response_keys": []string{"value"}, "max_lease_ttl": "1h"})
		}, []string{"update mount site (audit_non_hmac_response_keys, max_lease_ttl differ)"}},
		{"the catalogue's configuration was changed", func() {
			write("site/config", map[string]any{"max_versions": 2, "cas_required": true, "delete_version_after": "1h"})
		}, []string{"update mount site (cas_required, delete_version_after, max_versions differ)"}},
	}
	// By configuration where the product wants it so: then nobody can break it.
	if root.remove(t.Context(), "sys/audit/file") == nil {
		audit := []harm{
			{"the audit device was disabled", func() {}, []string{"create audit device file (missing)"}},
			{"the audit device writes values in the clear", func() {
				remove("sys/audit/file")
				write("sys/audit/file", map[string]any{"type": "file", "options": map[string]any{"file_path": s.audit, "log_raw": "true"}})
			}, []string{"update audit device file (log_raw differs)"}},
		}
		tests = append(audit, tests...) // it is missing now
	}
	for _, test := range tests {
		test.doHarm()
		have, found := s.diff(t, root)
		if !slices.Equal(found, test.found) {
			t.Errorf("%s:\nfound %q\nwant  %q", test.name, found, test.found)
		}
		// The repair is an operator's, where one can still log in.
		repairer := root
		if token, err := s.login(t, made.ed25519, "ada", "deploy"); err == nil {
			repairer = s.client(t, token)
		} else if !strings.Contains(test.name, "key was let in") {
			t.Errorf("%s: %v", test.name, err)
		}
		if strings.Contains(test.name, "batch") {
			repairer = root // a batch token may do it too, but not revoke itself
		}
		if err := repairer.ApplyEngine(t.Context(), s.want, have, reconcile.DiffEngine(s.want, have), nil); err != nil {
			t.Fatalf("%s: repair: %v", test.name, err)
		}
		if repairer != root {
			if err := repairer.RevokeSelf(t.Context()); err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
		}
		if _, left := s.diff(t, root); len(left) > 0 {
			t.Fatalf("%s: after the repair: %q", test.name, left)
		}
	}
}

func TestStraysAreDeletedOnlyWhenAsked(t *testing.T) {
	s := sharedServer(t)
	operator := s.operator(t, "deploy")
	root := s.client(t, s.rootToken)
	for path, document := range map[string]map[string]any{
		"sys/policies/acl/job-old":     {"policy": `path "site/data/old/*" { capabilities = ["read"] }`},
		"sys/policies/acl/team":        {"policy": `path "team/*" { capabilities = ["read"] }`},
		"auth/jwt-nomad/role/old":      {"role_type": "jwt", "user_claim": "nomad_job_id", "bound_audiences": "vault.io", "token_policies": "job-old"},
		"auth/operators/role/backdoor": {"role_type": "jwt", "user_claim": "operator", "bound_audiences": "site", "token_policies": "root"},
		"sys/mounts/scratch":           {"type": "kv"},
	} {
		if _, err := root.write(t.Context(), path, document); err != nil {
			t.Fatal(err)
		}
	}
	have, left := s.diff(t, operator)
	if len(left) > 0 {
		t.Errorf("a stray is no difference, and yet: %q", left)
	}
	var strays []string
	for _, change := range reconcile.StrayEngine(s.want, have) {
		strays = append(strays, change.String())
	}
	want := []string{
		"delete identity role jwt-nomad/old (no component declares it)",
		"delete identity role operators/backdoor (the site does not declare it)",
		"delete policy job-old (no component declares it)",
	}
	if !slices.Equal(strays, want) {
		t.Errorf("strays %q", strays)
	}
	if foreign := reconcile.Foreign(s.want, have); !slices.Equal(foreign, []string{"mount scratch", "policy team"}) {
		t.Errorf("foreign %q", foreign)
	}
	if err := operator.ApplyEngine(t.Context(), s.want, have, reconcile.StrayEngine(s.want, have), nil); err != nil {
		t.Fatal(err)
	}
	have, _ = s.diff(t, operator)
	if strays := reconcile.StrayEngine(s.want, have); len(strays) > 0 {
		t.Errorf("left over: %v", strays)
	}
	if foreign := reconcile.Foreign(s.want, have); len(foreign) != 2 {
		t.Errorf("what others made is gone: %v", foreign)
	}
	if err := operator.RevokeSelf(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestAMountOfAnotherTypeIsLeftAlone(t *testing.T) {
	s := sharedServer(t)
	root := s.client(t, s.rootToken)
	want := reconcile.Engine{Mounts: []reconcile.Mount{{Path: "taken", Type: "other"}}}
	if _, err := root.write(t.Context(), "sys/mounts/taken", map[string]any{"type": "kv"}); err != nil {
		t.Fatal(err)
	}
	have, err := root.ObserveEngine(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	changes := reconcile.DiffEngine(want, have)
	if len(changes) != 1 || changes[0].String() != "update mount taken (type differs)" {
		t.Errorf("changes %v", changes)
	}
	if err := root.ApplyEngine(t.Context(), want, have, changes, nil); plan.HintOf(err) == "" {
		t.Errorf("apply: %v", err)
	}
	if err := root.remove(t.Context(), "sys/mounts/taken"); err != nil {
		t.Fatal(err)
	}
}

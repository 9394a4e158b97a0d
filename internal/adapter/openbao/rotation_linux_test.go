package openbao

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// observeOne is what the catalogue's step sees of one secret.
func observeOne(t *testing.T, client *Client, entry site.Secret) reconcile.EntryState {
	t.Helper()
	states, err := client.ObserveEntries(t.Context(), []site.Secret{entry})
	if err != nil {
		t.Fatal(err)
	}
	return states[entry.FullName()]
}

// forgotten makes the test leave nothing of the secret on the shared server.
func (s *server) forgotten(t *testing.T, component, name string) site.Secret {
	t.Helper()
	entry := site.Secret{Component: component, Name: name}
	root := s.client(t, s.rootToken)
	t.Cleanup(func() {
		if err := root.remove(context.Background(), metadataPath(entry)); err != nil {
			t.Error(err)
		}
	})
	return entry
}

func TestACandidateDisturbsNobodyUntilItIsActive(t *testing.T) {
	s := sharedServer(t)
	ctx := t.Context()
	operator := s.operator(t, "deploy")
	entry := s.forgotten(t, "rotation", "password")
	expires := map[string]string{"expires": "2030-01-01T00:00:00Z"}
	if _, err := operator.WriteFields(ctx, entry, Fields{Value: secret.New(planted + "-1"), Username: "shop_a"}, 0, expires); err != nil {
		t.Fatal(err)
	}
	before := observeOne(t, operator, entry)
	if rotation := before.Rotation(); rotation.Active != 1 || rotation.Login != "shop_a" || before.CustomMetadata["expires"] == "" || before.NamesActive() {
		t.Errorf("after the first write: %+v", before)
	}
	reads := func(what string, want string, username string, generation int) {
		t.Helper()
		fields, active, err := operator.ReadActive(ctx, entry)
		if err != nil || fields.Value.Reveal() != planted+want || fields.Username != username || active != generation {
			t.Errorf("%s: %s at generation %d, %v", what, fields.Username, active, err)
		}
		if value, again, err := operator.Read(ctx, entry); err != nil || value.Reveal() != planted+want || again != generation {
			t.Errorf("%s: read generation %d, %v", what, again, err)
		}
	}

	// The candidate is noted before it is written: a run that is cut short in between leaves a trace.
	since := time.Now().Truncate(time.Second).UTC()
	rotation := before.Rotation()
	rotation.Candidate, rotation.Since, rotation.By = 2, since, "ada"
	if err := operator.SetRotation(ctx, entry, rotation); err != nil {
		t.Fatal(err)
	}
	reads("a candidate is noted", "-1", "shop_a", 1)
	version, err := operator.WriteGeneration(ctx, entry, Fields{Value: secret.New(planted + "-2"), Username: "shop_b"}, 1)
	if err != nil || version != 2 {
		t.Fatalf("the candidate is version %d: %v", version, err)
	}
	reads("a candidate is written", "-1", "shop_a", 1)
	during := observeOne(t, operator, entry)
	if during.Version != 2 || during.Rotation() != rotation || !during.Created.Equal(before.Created) || len(during.Versions) != 2 || !during.HasValue() {
		t.Errorf("during the rotation: %+v", during)
	}
	if fields, err := operator.ReadGeneration(ctx, entry, 2); err != nil || fields.Value.Reveal() != planted+"-2" || fields.Username != "shop_b" {
		t.Errorf("the candidate: %s, %v", fields.Username, err)
	}

	rotation = reconcile.Rotation{Active: 2, Retiring: 1, Login: "shop_b", Rotated: since, RetireAfter: since.Add(time.Minute)}
	if err := operator.SetRotation(ctx, entry, rotation); err != nil {
		t.Fatal(err)
	}
	reads("it was promoted", "-2", "shop_b", 2)
	after := observeOne(t, operator, entry)
	if after.Rotation() != rotation || !maps.Equal(reconcile.WithoutRotation(after.CustomMetadata), expires) || !after.Created.After(before.Created) {
		t.Errorf("after the promotion: %+v", after)
	}
	if fields, err := operator.ReadGeneration(ctx, entry, 1); err != nil || fields.Value.Reveal() != planted+"-1" {
		t.Errorf("the old one is gone before it is retired: %v", err)
	}

	var active *ActiveError
	if err := operator.Destroy(ctx, entry, []int{1, 2}); !errors.As(err, &active) || active.Generation != 2 || plan.HintOf(err) == "" {
		t.Errorf("destroying the active one: %v", err)
	}
	if err := operator.Destroy(ctx, entry, []int{1}); err != nil {
		t.Fatal(err)
	}
	var none *NoValueError
	if _, err := operator.ReadGeneration(ctx, entry, 1); !errors.As(err, &none) || none.Generation != 1 || plan.HintOf(err) == "" {
		t.Errorf("the retired one: %v", err)
	}
	if err := operator.remove(ctx, dataPath(entry)); err != nil { // deletes the newest
		t.Fatal(err)
	}
	if _, err := operator.write(ctx, site.SecretMount+"/undelete/"+entry.KVPath(), map[string]any{"versions": []int{1, 2}}); err != nil {
		t.Fatal(err)
	}
	if _, err := operator.ReadGeneration(ctx, entry, 1); !errors.As(err, &none) {
		t.Errorf("the retired one came back: %v", err)
	}
	if state := observeOne(t, operator, entry); !state.Versions[1].Gone || state.Versions[2].Gone {
		t.Errorf("versions %+v", state.Versions)
	}
	reads("the old one was retired", "-2", "shop_b", 2)
	end(t, operator)
}

func TestAPlainWriteIsActiveAtOnce(t *testing.T) {
	s := sharedServer(t)
	ctx := t.Context()
	operator := s.operator(t, "deploy")
	entry := s.forgotten(t, "rotation", "set")
	write := func(value string, cas int, custom map[string]string) reconcile.EntryState {
		t.Helper()
		if _, err := operator.Write(ctx, entry, secret.New(value), cas, custom); err != nil {
			t.Fatal(err)
		}
		return observeOne(t, operator, entry)
	}
	write(planted, 0, nil)
	if state := write(planted+"-2", 1, nil); len(state.CustomMetadata) != 0 || state.Rotation().Active != 2 {
		t.Errorf("without any rotation: %+v", state)
	}
	if err := operator.SetRotation(ctx, entry, reconcile.Rotation{Active: 2, Candidate: 3, Since: time.Now(), By: "ada", Failed: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := operator.WriteGeneration(ctx, entry, Fields{Value: secret.New(planted + "-3")}, 2); err != nil {
		t.Fatal(err)
	}
	// Set by hand in the middle of a rotation: the hand wins, and no resumed rotation undoes it.
	state := write(planted+"-4", 3, map[string]string{"expires": "2030-01-01T00:00:00Z"})
	if want := (reconcile.Rotation{Active: 4, Failed: 1}); state.Rotation() != want || state.CustomMetadata["expires"] == "" {
		t.Errorf("after a write over a candidate: %+v", state)
	}
	if value, generation, err := operator.Read(ctx, entry); err != nil || value.Reveal() != planted+"-4" || generation != 4 {
		t.Errorf("read generation %d: %v", generation, err)
	}
	if state := write(planted+"-5", 4, nil); state.Rotation().Active != 5 || state.CustomMetadata["expires"] == "" {
		t.Errorf("after another: %+v", state)
	}
	// A job that produces cannot say what is active: what it wrote last is.
	produced := entry
	produced.ProducedBy = &site.Producer{Component: "a"}
	if _, err := operator.WriteGeneration(ctx, entry, Fields{Value: secret.New(planted + "-6")}, 5); err != nil {
		t.Fatal(err)
	}
	if value, generation, err := operator.Read(ctx, produced); err != nil || generation != 6 || value.Reveal() != planted+"-6" {
		t.Errorf("a produced one is read at generation %d: %v", generation, err)
	}
	end(t, operator)
}

func TestARotationThatFailsManyTimesLosesNothing(t *testing.T) {
	s := sharedServer(t)
	ctx := t.Context()
	operator := s.operator(t, "deploy")
	entry := s.forgotten(t, "rotation", "unlucky")
	if _, err := operator.Write(ctx, entry, secret.New(planted), 0, nil); err != nil {
		t.Fatal(err)
	}
	for attempt := range reconcile.MaxVersions {
		state := observeOne(t, operator, entry)
		rotation := state.Rotation()
		rotation.Candidate = state.Version + 1
		if err := operator.SetRotation(ctx, entry, rotation); err != nil {
			t.Fatal(err)
		}
		candidate, err := operator.WriteGeneration(ctx, entry, Fields{Value: secret.New(planted + "-bad")}, state.Version)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := operator.WriteGeneration(ctx, entry, Fields{Value: secret.New(planted)}, candidate); err != nil {
			t.Fatal(err)
		}
		if err := operator.Destroy(ctx, entry, []int{candidate}); err != nil {
			t.Fatal(err)
		}
		rotation.Candidate, rotation.Failed = 0, candidate
		if err := operator.SetRotation(ctx, entry, rotation); err != nil {
			t.Fatal(err)
		}
		if fields, active, err := operator.ReadActive(ctx, entry); err != nil || active != 1 || fields.Value.Reveal() != planted {
			t.Fatalf("after attempt %d: generation %d, %v", attempt+1, active, err)
		}
	}
	end(t, operator)
}

func TestWhatOthersKeepInMetadataLeavesTheRotationAsItIs(t *testing.T) {
	s := ownServer(t)
	if err := s.bootstrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	operator := s.operator(t, "deploy")
	entry := site.Secret{Component: "rotation", Name: "noted"}
	if _, err := operator.Write(t.Context(), entry, secret.New(planted), 0, nil); err != nil {
		t.Fatal(err)
	}
	want := func(what, active string) {
		t.Helper()
		if err := operator.SetMetadata(t.Context(), entry, map[string]string{"noted": what}); err != nil {
			t.Fatal(err)
		}
		states, err := operator.ObserveDeclared(t.Context(), []site.Secret{entry})
		have := states[entry.FullName()].CustomMetadata
		if err != nil || have["noted"] != what || have["active"] != active {
			t.Errorf("metadata %q, %v", have, err)
		}
	}
	want("before any rotation", "")
	if err := operator.SetRotation(t.Context(), entry, reconcile.Rotation{Active: 1, Candidate: 2}); err != nil {
		t.Fatal(err)
	}
	want("while one runs", "1")
	states, err := operator.ObserveDeclared(t.Context(), []site.Secret{entry})
	if rotation := states[entry.FullName()].Rotation(); err != nil || rotation.Candidate != 2 {
		t.Errorf("%+v, %v", rotation, err)
	}
}

func TestAnUnchangedRotationIsNotWrittenAgain(t *testing.T) {
	s := ownServer(t)
	if err := s.bootstrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	operator := s.operator(t, "deploy")
	entry := site.Secret{Component: "rotation", Name: "same"}
	if _, err := operator.Write(t.Context(), entry, secret.New(planted), 0, nil); err != nil {
		t.Fatal(err)
	}
	rotation := reconcile.Rotation{Active: 1, Retiring: 2, RetireAfter: time.Now()}
	if err := operator.SetRotation(t.Context(), entry, rotation); err != nil {
		t.Fatal(err)
	}
	_, offset := s.mutations(t, 0)
	absent := site.Secret{Component: "rotation", Name: "absent"}
	states, err := operator.ObserveDeclared(t.Context(), []site.Secret{entry, absent})
	if err != nil || states["rotation.same"].Rotation().Retiring != 2 || states["rotation.absent"].Exists {
		t.Errorf("declared: %+v, %v", states, err)
	}
	if asked, end := s.requests(t, offset); len(asked) != 2 {
		t.Errorf("looking at two secrets asked %q", asked)
	} else {
		offset = end
	}
	if err := errors.Join(operator.SetRotation(t.Context(), entry, rotation), operator.Destroy(t.Context(), entry, nil)); err != nil {
		t.Fatal(err)
	}
	if written, _ := s.mutations(t, offset); len(written) > 0 {
		t.Errorf("wrote %q", written)
	}
	if _, _, err := operator.Read(t.Context(), entry); err != nil {
		t.Error(err)
	}
	if asked, _ := s.requests(t, offset); len(asked) != 3 {
		t.Errorf("asked %q", asked)
	}
}

// rotatorServer is one whose operators are ada and a machine that only rotates.
func rotatorServer(t *testing.T) *server {
	t.Helper()
	s, made := ownServer(t), signers(t)
	rotating := reconcile.DesiredEngine(testSite(), []reconcile.Operator{
		{Name: "ada", PublicKeyPEM: publicPEM(made.ed25519)},
		{Name: "cron", PublicKeyPEM: publicPEM(made.rsa), Rights: site.RightsRotate},
	}, []string{publicPEM(made.host)})
	rotating.Audit = s.want.Audit
	for i := range rotating.Auth {
		if rotating.Auth[i].Path == reconcile.JobsMount {
			rotating.Auth[i].Config["jwks_url"] = s.nomad.URL
		}
	}
	s.want = rotating
	if err := s.bootstrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) rotatorLogin(t *testing.T, mount, role, operator string) (*Client, error) {
	t.Helper()
	jwt := sign(t, signers(t).rsa, map[string]any{
		"iss": reconcile.OperatorIssuer, "aud": []string{reconcile.Audience}, "sub": operator,
		reconcile.OperatorClaim: operator, reconcile.PurposeClaim: "rotate",
	})
	token, _, err := s.client(t, secret.Value{}).Login(t.Context(), mount, role, jwt)
	return s.client(t, token), err
}

func (s *server) cronLogin(t *testing.T) (*Client, error) {
	t.Helper()
	mount, role := reconcile.OperatorLogin(site.RightsRotate)
	return s.rotatorLogin(t, mount, role, "cron")
}

func TestAMachineThatOnlyRotatesDoesThatAndNothingElse(t *testing.T) {
	s := rotatorServer(t)
	ctx := t.Context()
	ada := s.operator(t, "deploy")
	entry := site.Secret{Component: "a", Name: "password", Generated: &site.Generated{}}
	if _, err := ada.Write(ctx, entry, secret.New(planted), 0, nil); err != nil {
		t.Fatal(err)
	}
	// Its key opens no other door, whatever name it gives itself.
	for _, door := range [][3]string{
		{"operators", "operator", "cron"}, {"operators", "operator", "ada"}, {"operators", "rotator", "cron"}, {"rotators", "operator", "cron"}, {"rotators", "rotator", "ada"},
	} {
		var refused *LoginError
		if _, err := s.rotatorLogin(t, door[0], door[1], door[2]); !errors.As(err, &refused) || plan.HintOf(err) == "" {
			t.Errorf("%v: %v", door, err)
		}
	}
	cron, err := s.cronLogin(t)
	if err != nil {
		t.Fatal(err)
	}
	state := observeOne(t, cron, entry)
	rotation := state.Rotation()
	rotation.Candidate = 2
	steps := []func() error{
		func() error { _, _, err := cron.ReadActive(ctx, entry); return err },
		func() error { return cron.SetRotation(ctx, entry, rotation) },
		func() error {
			_, err := cron.WriteGeneration(ctx, entry, Fields{Value: secret.New(planted + "-2")}, 1)
			return err
		},
		func() error { return cron.SetRotation(ctx, entry, reconcile.Rotation{Active: 2, Retiring: 1}) },
		func() error { return cron.Destroy(ctx, entry, []int{1}) },
		func() error { return cron.SetRotation(ctx, entry, reconcile.Rotation{Active: 2}) },
		func() error { _, err := cron.Renew(ctx); return err },
	}
	for i, step := range steps {
		if err := step(); err != nil {
			t.Errorf("step %d of a rotation: %v", i+1, err)
		}
	}
	if count, err := cron.Sweep(ctx, SweepOptions{Purpose: "rotate"}); err != nil || count != 0 {
		t.Errorf("its sweep: %d, %v", count, err)
	}
	for name, attempt := range map[string]func() error{
		"looks at the engine": func() error { _, err := cron.ObserveEngine(ctx, s.want); return err },
		"reads a policy":      func() error { _, err := cron.read(ctx, "sys/policies/acl/site-rotator"); return err },
		"widens its policy": func() error {
			_, err := cron.write(ctx, "sys/policies/acl/site-rotator", map[string]any{"policy": `path "*" { capabilities = ["sudo"] }`})
			return err
		},
		"lets somebody in":        func() error { return cron.remove(ctx, "auth/rotators/role/rotator") },
		"looks at tokens":         func() error { _, err := cron.list(ctx, "auth/token/accessors"); return err },
		"forgets a secret wholly": func() error { return cron.remove(ctx, metadataPath(entry)) },
		"changes the catalogue":   func() error { _, err := cron.write(ctx, "site/config", map[string]any{"max_versions": 1}); return err },
		"changes the unseal key":  func() error { _, err := cron.read(ctx, "sys/rotate/root/init"); return err },
		"revokes others' accessor": func() error {
			_, err := cron.write(ctx, "auth/token/revoke-accessor", map[string]any{"accessor": "x"})
			return err
		},
	} {
		if err := attempt(); statusOf(err) != http.StatusForbidden {
			t.Errorf("a rotator %s: %v", name, err)
		}
	}
	if _, left := s.diff(t, ada); len(left) > 0 {
		t.Errorf("the second look finds:\n%s", strings.Join(left, "\n"))
	}
	end(t, cron, ada)
}

func TestTheLastMachineThatRotatedIsShutOutAndLosesItsToken(t *testing.T) {
	s := rotatorServer(t)
	ctx, made := t.Context(), signers(t)
	cron, err := s.cronLogin(t)
	if err != nil {
		t.Fatal(err)
	}
	ada := s.operator(t, "deploy")
	with := s.want
	s.want = reconcile.DesiredEngine(testSite(), []reconcile.Operator{{Name: "ada", PublicKeyPEM: publicPEM(made.ed25519)}}, []string{publicPEM(made.host)})
	s.want.Audit = with.Audit
	for i := range s.want.Auth {
		if s.want.Auth[i].Path == reconcile.JobsMount {
			s.want.Auth[i].Config["jwks_url"] = s.nomad.URL
		}
	}
	have, found := s.diff(t, ada)
	if want := []string{
		"delete identity role rotators/rotator (no operator only rotates any more)", "delete policy site-rotator (no operator only rotates any more)",
	}; !slices.Equal(found, want) {
		t.Errorf("found %q", found)
	}
	if err := ada.ApplyEngine(ctx, s.want, have, reconcile.DiffEngine(s.want, have), nil); err != nil {
		t.Fatal(err)
	}
	if count, err := ada.RevokeOperators(ctx, []string{"ada"}); err != nil || count != 1 {
		t.Errorf("revoked %d tokens, %v", count, err)
	}
	if revoked, err := cron.Revoked(ctx); err != nil || !revoked {
		t.Errorf("its token lives: %v", err)
	}
	if _, err := s.cronLogin(t); err == nil {
		t.Error("it logs in again")
	}
	if _, left := s.diff(t, ada); len(left) > 0 {
		t.Errorf("the second look finds:\n%s", strings.Join(left, "\n"))
	}
	// And let in again, by an operator.
	s.want = with
	have, found = s.diff(t, ada)
	if want := []string{"create policy site-rotator (missing)", "create identity role rotators/rotator (missing)"}; !slices.Equal(found, want) {
		t.Errorf("found %q", found)
	}
	if err := ada.ApplyEngine(ctx, s.want, have, reconcile.DiffEngine(s.want, have), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.cronLogin(t); err != nil {
		t.Error(err)
	}
}

func TestAnOperatorUnderAnOlderPolicyBringsTheNewOneInOneRun(t *testing.T) {
	s := ownServer(t)
	ctx, made := t.Context(), signers(t)
	if err := s.bootstrap(ctx); err != nil {
		t.Fatal(err)
	}
	var older strings.Builder // as it was before anybody only rotated
	for line := range strings.Lines(s.want.Policies[reconcile.OperatorPolicy]) {
		if !strings.Contains(line, "rotator") && !strings.Contains(line, "sys/rotate") {
			older.WriteString(line)
		}
	}
	if _, err := s.client(t, s.rootToken).write(ctx, "sys/policies/acl/site-operator", map[string]any{"policy": older.String()}); err != nil {
		t.Fatal(err)
	}
	people := []reconcile.Operator{
		{Name: "ada", PublicKeyPEM: publicPEM(made.ed25519)}, {Name: "grace", PublicKeyPEM: publicPEM(made.ecdsa)},
		{Name: "cron", PublicKeyPEM: publicPEM(made.rsa), Rights: site.RightsRotate},
	}
	wanted := reconcile.DesiredEngine(testSite(), people, []string{publicPEM(made.host)})
	wanted.Audit, s.want.Policies = s.want.Audit, wanted.Policies
	for i := range wanted.Auth {
		if wanted.Auth[i].Path == reconcile.JobsMount {
			wanted.Auth[i].Config["jwks_url"] = s.nomad.URL
		}
	}
	s.want = wanted
	ada := s.operator(t, "deploy")
	have, found := s.diff(t, ada)
	if len(found) < 4 || !strings.HasPrefix(found[0], "update policy site-operator") {
		t.Errorf("found %q", found)
	}
	if err := ada.ApplyEngine(ctx, s.want, have, reconcile.DiffEngine(s.want, have), nil); err != nil {
		t.Fatal(err)
	}
	if _, left := s.diff(t, ada); len(left) > 0 {
		t.Errorf("the second look finds:\n%s", strings.Join(left, "\n"))
	}
	end(t, ada)
}

func TestErrorsOfARotationShowNoValue(t *testing.T) {
	s := sharedServer(t)
	operator := s.operator(t, "deploy")
	end(t, operator)
	entry := site.Secret{Component: "rotation", Name: "refused"}
	fields := Fields{Value: secret.New(planted), Username: "shop_a"}
	_, generation := operator.WriteGeneration(t.Context(), entry, fields, 0)
	_, written := operator.WriteFields(t.Context(), entry, fields, 0, nil)
	_, read := operator.ReadGeneration(t.Context(), entry, 1)
	for _, err := range []error{
		generation, written, read, operator.SetRotation(t.Context(), entry, reconcile.Rotation{Active: 1}), operator.Destroy(t.Context(), entry, []int{1}),
	} {
		if err == nil || strings.Contains(err.Error(), planted) || strings.Contains(err.Error(), operator.token.Reveal()) {
			t.Errorf("%v", err)
		}
	}
	if printed := fmt.Sprintf("%v %+v %#v", fields, fields, fields); strings.Contains(printed, planted) {
		t.Error("printed fields show the value")
	}
}

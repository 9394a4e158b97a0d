package secret_test

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/site"
)

const key = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n"

func shopSite() *site.Site {
	return &site.Site{Components: []site.Component{
		{Name: "broker", Secrets: []site.Secret{{Component: "broker", Name: "admin", Generated: &site.Generated{}}}},
		{Name: "shop", Secrets: []site.Secret{generated, byNeighbor}, Reads: []site.SecretRead{
			{Secret: "broker.admin"}, {Secret: "shop.password"}, {Secret: "shop.token"},
		}},
		{Name: "plain"},
	}}
}

func desired() secret.Engine {
	return secret.DesiredEngine(shopSite(), []secret.Operator{{Name: "ada", PublicKeyPEM: key}}, nil)
}

func TestJobsGetWhatTheyReadAndProduceAndNothingElse(t *testing.T) {
	engine := desired()
	want := map[string]string{
		"job-shop": `# What job shop reads and produces; made by site, changes are undone.
path "site/data/broker/admin" { capabilities = ["read"] }
path "site/data/shop/password" { capabilities = ["read"] }
path "site/data/shop/token" { capabilities = ["read"] }
`,
		"job-broker": `# What job broker reads and produces; made by site, changes are undone.
path "site/data/shop/token" { capabilities = ["create", "update"] }
path "site/metadata/shop/token" { capabilities = ["read"] }
`,
	}
	for name, text := range want {
		if engine.Policies[name] != text {
			t.Errorf("policy %s:\n%s", name, engine.Policies[name])
		}
	}
	if names := slices.Sorted(maps.Keys(engine.Policies)); !slices.Equal(names, []string{"job-broker", "job-shop", "site-operator"}) {
		t.Errorf("policies %q", names)
	}
	var roles []string
	for _, role := range engine.Roles {
		roles = append(roles, role.Target())
	}
	if !slices.Equal(roles, []string{"operators/operator", "jwt-nomad/broker", "jwt-nomad/shop"}) {
		t.Errorf("roles %q", roles)
	}
}

func TestHostsLogInOnceTheirKeysAreKnown(t *testing.T) {
	engine := secret.DesiredEngine(shopSite(), nil, []string{key})
	if len(engine.Auth) != 3 || engine.Policies["site-host"] == "" {
		t.Errorf("auth methods %v", engine.Auth)
	}
	if len(desired().Auth) != 2 {
		t.Error("a mount for hosts without any key would be refused by the engine")
	}
}

func TestHostsReadTheKeysWithWhichTheyPullAndNothingElse(t *testing.T) {
	s := shopSite()
	const without = `# What hosts of the site may do; made by site, changes are undone.
path "auth/token/lookup-self" { capabilities = ["read"] }
`
	if got := secret.DesiredEngine(s, nil, []string{key}).Policies["site-host"]; got != without {
		t.Errorf("without an object store:\n%s", got)
	}
	before := secret.DesiredEngine(s, nil, []string{key}).Policies["site-operator"]
	s.ObjectStore = &site.ObjectStore{}
	const with = without + `path "site/data/object-storage-service/r2.proxy_access_key_id" { capabilities = ["read"] }
path "site/data/object-storage-service/r2.proxy_secret_access_key" { capabilities = ["read"] }
path "site/metadata/object-storage-service/r2.proxy_access_key_id" { capabilities = ["read"] }
path "site/metadata/object-storage-service/r2.proxy_secret_access_key" { capabilities = ["read"] }
`
	engine := secret.DesiredEngine(s, nil, []string{key})
	if got := engine.Policies["site-host"]; got != with {
		t.Errorf("with one:\n%s", got)
	}
	if engine.Policies["site-operator"] != before {
		t.Error("operators may do something else with an object store")
	}
}

func TestTheOperatorsPolicyUnmountsNothing(t *testing.T) {
	for line := range strings.Lines(desired().Policies["site-operator"]) {
		if strings.Contains(line, `"sys/mounts`) && strings.Contains(line, `"delete"`) || strings.Contains(line, `"sys/auth`) && strings.Contains(line, `"delete"`) {
			t.Error(line)
		}
		if strings.Contains(line, `path "*"`) || strings.Contains(line, `path "sys/*"`) {
			t.Error(line)
		}
	}
}

// observed is the engine as its JSON answers have it once all was applied.
func observed(t *testing.T, engine secret.Engine) secret.EngineState {
	t.Helper()
	again := func(settings secret.Settings) secret.Settings {
		raw, err := json.Marshal(settings)
		if err != nil {
			t.Fatal(err)
		}
		decoder := json.NewDecoder(strings.NewReader(string(raw)))
		decoder.UseNumber()
		var back secret.Settings
		if err := decoder.Decode(&back); err != nil {
			t.Fatal(err)
		}
		back["unknown_to_us"] = "newer"
		return back
	}
	state := secret.EngineState{
		Audit: map[string]secret.AuditDevice{}, Mounts: map[string]secret.Mount{}, Auth: map[string]secret.Mount{},
		Policies: map[string]string{}, Roles: map[string]secret.Role{},
	}
	for _, device := range engine.Audit {
		device.Options = again(device.Options)
		state.Audit[device.Path] = device
	}
	for _, mounts := range []struct {
		from []secret.Mount
		to   map[string]secret.Mount
	}{{engine.Mounts, state.Mounts}, {engine.Auth, state.Auth}} {
		for _, mount := range mounts.from {
			mount.Tune, mount.Config = again(mount.Tune), again(mount.Config)
			mounts.to[mount.Path] = mount
		}
	}
	for name, text := range engine.Policies {
		state.Policies[name] = text + "\n"
	}
	for _, role := range engine.Roles {
		role.Settings = again(role.Settings)
		state.Roles[role.Target()] = role
	}
	return state
}

func TestDiffEngine(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*secret.EngineState)
		want   []string
	}{
		"what was applied is no difference": {func(*secret.EngineState) {}, nil},
		"nor are zeroes that are left out, orders and whitespace": {func(state *secret.EngineState) {
			role := state.Roles["operators/operator"]
			delete(role.Settings, "token_num_uses")
			role.Settings["bound_subject"] = nil
			mount := state.Auth["operators"]
			mount.Config["jwt_validation_pubkeys"] = []any{"  " + strings.ReplaceAll(key, "\n", "\r\n") + "\n"}
			mount.Config["jwt_supported_algs"] = []any{"ES512", "ES384", "ES256", "RS256", "EdDSA"}
			state.Audit["file"].Options["log_raw"] = "false"
		}, nil},
		"raw values in the audit log": {func(state *secret.EngineState) {
			state.Audit["file"].Options["log_raw"] = "true"
		}, []string{"update audit device file (log_raw differs)"}},
		"an engine that is empty": {func(state *secret.EngineState) { *state = secret.EngineState{} }, []string{
			"create audit device file (missing)", "create mount site (missing)",
			"create policy site-operator (missing)", "create policy job-broker (missing)", "create policy job-shop (missing)",
			"create auth method operators (missing)", "create auth method jwt-nomad (missing)",
			"create identity role operators/operator (missing)", "create identity role jwt-nomad/broker (missing)", "create identity role jwt-nomad/shop (missing)",
		}},
		"an edited policy": {func(state *secret.EngineState) { state.Policies["job-shop"] += "# mine" },
			[]string{"update policy job-shop (text differs)"}},
		"a role that lives longer and for anybody": {func(state *secret.EngineState) {
			state.Roles["operators/operator"].Settings["token_ttl"] = json.Number("86400")
			state.Roles["operators/operator"].Settings["bound_claims"] = map[string]any{}
		}, []string{"update identity role operators/operator (bound_claims, token_ttl differ)"}},
		"a mount of another type": {func(state *secret.EngineState) {
			mount := state.Mounts["site"]
			mount.Type = "cubbyhole"
			state.Mounts["site"] = mount
		}, []string{"update mount site (type differs)"}},
	} {
		t.Run(name, func(t *testing.T) {
			state := observed(t, desired())
			test.change(&state)
			var said []string
			for _, change := range secret.DiffEngine(desired(), state) {
				said = append(said, change.String())
			}
			if !slices.Equal(said, test.want) {
				t.Errorf("changes:\n%s", strings.Join(said, "\n"))
			}
		})
	}
}

func TestStraysAreOursAndForeignThingsAreNot(t *testing.T) {
	state := observed(t, desired())
	state.Policies["job-old"], state.Policies["team"], state.Policies["default"], state.Policies["root"] = "", "", "", ""
	for _, role := range []secret.Role{{Mount: "jwt-nomad", Name: "old"}, {Mount: "elsewhere", Name: "theirs"}} {
		state.Roles[role.Target()] = role
	}
	state.Mounts["scratch"], state.Mounts["sys"], state.Auth["token"], state.Auth["oidc"] = secret.Mount{}, secret.Mount{}, secret.Mount{}, secret.Mount{}
	var said []string
	for _, change := range secret.StrayEngine(desired(), state) {
		if change.Action != plan.Delete {
			t.Errorf("a stray is only ever deleted: %s", change)
		}
		said = append(said, change.String())
	}
	if !slices.Equal(said, []string{
		"delete identity role jwt-nomad/old (no component declares it)", "delete policy job-old (no component declares it)",
	}) {
		t.Errorf("strays %q", said)
	}
	if foreign := secret.Foreign(desired(), state); !slices.Equal(foreign, []string{"mount scratch", "auth method oidc", "policy team"}) {
		t.Errorf("foreign %q", foreign)
	}
	if changes := secret.DiffEngine(desired(), state); len(changes) > 0 {
		t.Errorf("changes %v", changes)
	}
}

func TestOperatorsUploadWithATokenThatCanDoNothingElse(t *testing.T) {
	operators := []secret.Operator{{Name: "alice", PublicKeyPEM: "a"}, {Name: "cron", PublicKeyPEM: "c", Rights: site.RightsRotate}}
	uploader := func(engine secret.Engine) secret.Settings {
		for _, role := range engine.Roles {
			if role.Target() == secret.OperatorsMount+"/"+secret.UploaderRole {
				return role.Settings
			}
		}
		return nil
	}
	without := secret.DesiredEngine(&site.Site{Name: "gamma"}, operators, nil)
	if _, there := without.Policies[secret.UploaderPolicy]; there || uploader(without) != nil {
		t.Error("a site without an object store lets uploaders in")
	}
	engine := secret.DesiredEngine(&site.Site{Name: "gamma", ObjectStore: &site.ObjectStore{}}, operators, nil)
	found := uploader(engine)
	if policies := found["token_policies"]; !reflect.DeepEqual(policies, []string{secret.UploaderPolicy}) {
		t.Errorf("uploaders have policies %v", policies)
	}
	if claims := found["bound_claims"]; !reflect.DeepEqual(claims, map[string]any{secret.OperatorClaim: []string{"alice"}}) {
		t.Errorf("uploaders are %v", claims)
	}
	if policy := engine.Policies[secret.UploaderPolicy]; strings.Contains(policy, site.SecretMount+"/") || strings.Contains(policy, "sys/") {
		t.Errorf("uploaders may do more than be somebody:\n%s", policy)
	}
}

package secret_test

import (
	"maps"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/site"
)

func TestARotationComesBackFromItsMetadata(t *testing.T) {
	at := func(hour int) time.Time { return time.Date(2026, 3, 1, hour, 0, 0, 0, time.UTC) }
	whole := secret.Rotation{
		Active: 6, Candidate: 7, Retiring: 5, Failed: 4, Login: "shop_a", By: "ada", FailedBecause: "the check of shop failed",
		Since: at(1), RetireAfter: at(2), Rotated: at(3),
	}
	for name, rotation := range map[string]secret.Rotation{"nothing": {Active: 9}, "everything": whole} {
		keep := map[string]string{"expires": "2027-01-01T00:00:00Z", "candidate": "3", "by": "grace"}
		metadata := rotation.Metadata(keep)
		if metadata["expires"] != keep["expires"] || len(keep) != 3 {
			t.Errorf("%s: what others keep is gone: %v, %v", name, metadata, keep)
		}
		state := secret.EntryState{Exists: true, Version: 9, CustomMetadata: metadata}
		if got := state.Rotation(); got != rotation {
			t.Errorf("%s: got  %+v\nwant %+v", name, got, rotation)
		}
		if left := secret.WithoutRotation(metadata); !maps.Equal(left, map[string]string{"expires": keep["expires"]}) {
			t.Errorf("%s: without the rotation: %v", name, left)
		}
	}
	if metadata := (secret.Rotation{}).Metadata(nil); len(metadata) != 0 {
		t.Errorf("no rotation at all leaves %v", metadata)
	}
}

func TestTheNewestVersionIsActiveWhereNothingElseIsSaid(t *testing.T) {
	for name, test := range map[string]struct {
		metadata map[string]string
		active   int
		names    bool
	}{
		"no metadata":         {nil, 4, false},
		"metadata of others":  {map[string]string{"expires": "x"}, 4, false},
		"an older one":        {map[string]string{"active": "2"}, 2, true},
		"what is no number":   {map[string]string{"active": "two"}, 4, true},
		"a number below zero": {map[string]string{"active": "-1"}, 4, true},
	} {
		state := secret.EntryState{Exists: true, Version: 4, CustomMetadata: test.metadata}
		if got := state.Rotation().Active; got != test.active || state.NamesActive() != test.names {
			t.Errorf("%s: active %d, named %v", name, got, state.NamesActive())
		}
	}
}

func TestMetadataIsWhatTheEngineTakes(t *testing.T) {
	because := (secret.Rotation{FailedBecause: "line one\nline\ttwo\x00\x1b[31m " + strings.Repeat("ä", 600)}).Metadata(nil)["failed_because"]
	if len(because) > 512 || !utf8.ValidString(because) || !strings.HasPrefix(because, "line one line two[31m ä") || !strings.HasSuffix(because, "ä…") {
		t.Errorf("%d bytes: %q", len(because), because)
	}
	if metadata := (secret.Rotation{By: "\n\t"}).Metadata(nil); len(metadata) != 0 {
		t.Errorf("an empty text is refused by the engine, and yet: %v", metadata)
	}
}

func TestARotationRunsUntilTheOldGenerationIsRetired(t *testing.T) {
	for want, rotations := range map[bool][]secret.Rotation{
		true:  {{Active: 1, Candidate: 2}, {Active: 2, Retiring: 1}},
		false: {{}, {Active: 2, Failed: 3}},
	} {
		for _, rotation := range rotations {
			if rotation.Running() != want {
				t.Errorf("%+v runs: %v", rotation, !want)
			}
		}
	}
}

func TestSecretsBecomeDue(t *testing.T) {
	now := time.Date(2026, 3, 31, 12, 0, 0, 0, time.UTC)
	ago := func(days int) time.Time { return now.AddDate(0, 0, -days) }
	state := func(created time.Time, rotation secret.Rotation) secret.EntryState {
		return secret.EntryState{Exists: true, Version: 9, Created: created, CustomMetadata: rotation.Metadata(nil)}
	}
	monthly := &site.Rotation{Every: 30 * 24 * time.Hour}
	for name, test := range map[string]struct {
		policy *site.Rotation
		state  secret.EntryState
		reason secret.DueReason
		since  time.Time
	}{
		"one that never was":                        {monthly, secret.EntryState{}, "", time.Time{}},
		"one without a policy":                      {nil, state(ago(900), secret.Rotation{}), "", time.Time{}},
		"one that is rotated only when asked":       {&site.Rotation{Drain: time.Hour}, state(ago(900), secret.Rotation{}), "", time.Time{}},
		"one that is young":                         {monthly, state(ago(29), secret.Rotation{}), "", time.Time{}},
		"one that is as old as it may become":       {monthly, state(ago(30), secret.Rotation{}), secret.DueByAge, now},
		"one that is older":                         {monthly, state(ago(33), secret.Rotation{}), secret.DueByAge, ago(3)},
		"one that was rotated since":                {monthly, state(ago(90), secret.Rotation{Active: 9, Rotated: ago(2)}), "", time.Time{}},
		"one whose last rotation is long ago":       {monthly, state(ago(90), secret.Rotation{Active: 9, Rotated: ago(31)}), secret.DueByAge, ago(1)},
		"one that was set by hand since":            {monthly, state(ago(2), secret.Rotation{Active: 9, Rotated: ago(90)}), "", time.Time{}},
		"one whose last attempt failed":             {monthly, state(ago(31), secret.Rotation{Active: 8, Failed: 9}), secret.DueByAge, ago(1)},
		"one whose value was deleted":               {monthly, secret.EntryState{Exists: true, Deleted: true, Version: 9, Created: ago(90)}, "", time.Time{}},
		"one whose rotation was cut short":          {nil, state(ago(2), secret.Rotation{Active: 8, Candidate: 9, Since: ago(1)}), secret.DueUnfinished, ago(1)},
		"one cut short before anything was written": {monthly, state(ago(90), secret.Rotation{Active: 9, Candidate: 10, Since: ago(1)}), secret.DueUnfinished, ago(1)},
		"an old one that has drained":               {nil, state(ago(2), secret.Rotation{Active: 9, Retiring: 8, RetireAfter: ago(1)}), secret.DueRetirement, ago(1)},
		"an old one that drains":                    {monthly, state(ago(90), secret.Rotation{Active: 9, Retiring: 8, RetireAfter: now.Add(time.Minute)}), "", time.Time{}},
	} {
		t.Run(name, func(t *testing.T) {
			one := site.Secret{Component: "shop", Name: "key", Generated: &site.Generated{}, Rotation: test.policy}
			due := secret.DueSecrets([]site.Secret{one}, map[string]secret.EntryState{"shop.key": test.state}, now)
			switch {
			case test.reason == "" && len(due) == 0:
			case len(due) != 1 || due[0].Name != "shop.key" || due[0].Reason != test.reason || !due[0].Since.Equal(test.since):
				t.Errorf("due: %+v", due)
			}
		})
	}
	states := map[string]secret.EntryState{}
	var all []site.Secret
	for _, name := range []string{"c", "a", "b"} {
		all = append(all, site.Secret{Component: "shop", Name: name, Rotation: monthly})
		states["shop."+name] = state(ago(40), secret.Rotation{})
	}
	if due := secret.DueSecrets(all, states, now); len(due) != 3 || due[0].Name != "shop.a" || due[2].Name != "shop.c" {
		t.Errorf("not by name: %+v", due)
	}
}

func TestWhatCannotBeRotatedSaysWhyAndWhatToDo(t *testing.T) {
	password := func(name string, source site.Secret) site.Secret {
		source.Component, source.Name = "shop", name
		return source
	}
	ordinary := password("ordinary", site.Secret{Generated: &site.Generated{}})
	alternating := password("alternating", site.Secret{Generated: &site.Generated{}})
	imported := password("imported", site.Secret{External: &site.External{}})
	s := &site.Site{Components: []site.Component{{
		Name: "shop", Secrets: []site.Secret{generated, external, printed, byNeighbor, ordinary, alternating, imported},
		Roles: []site.Role{
			{Name: "one", Login: true, Password: "shop.ordinary"}, {Name: "two", Login: true, Password: "shop.alternating", Alternating: true},
			{Name: "three", Login: true, Password: "shop.imported"},
		},
	}}}
	for name, test := range map[string]struct {
		entry      site.Secret
		said, hint string
	}{
		"a generated one":                       {generated, "", ""},
		"an external one":                       {external, "", ""},
		"what a command prints":                 {printed, "", ""},
		"the password of an alternating role":   {alternating, "", ""},
		"what a job produces":                   {byNeighbor, "secret shop.token is produced by component broker", "let its job write"},
		"the password of an ordinary role":      {ordinary, `secret shop.ordinary is the password of role "one"`, "`alternating = true` in role \"one\""},
		"an imported password of one":           {imported, `password of role "three"`, "alternating = true"},
		"a key that the provider makes":         {byProvider, "", ""},
		"a token of the provider's pair":        {optional, "one of a pair of tokens", "site provider rotate-admin-pair;"},
		"a secret that comes from nowhere else": {site.Secret{Component: "shop", Name: "odd"}, "has no source", "declare"},
	} {
		err := secret.CannotRotate(s, test.entry)
		if test.said == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), test.said) || !strings.Contains(plan.HintOf(err), test.hint) {
			t.Errorf("%s: %v (hint %q)", name, err, plan.HintOf(err))
		}
	}
}

func TestOperatorsThatOnlyRotateLogInElsewhereWithLess(t *testing.T) {
	other := strings.Replace(key, "MCow", "MCox", 1)
	people := []secret.Operator{{Name: "ada", PublicKeyPEM: key}, {Name: "cron", PublicKeyPEM: other, Rights: site.RightsRotate}}
	engine := secret.DesiredEngine(shopSite(), people, nil)
	keys := map[string]string{}
	for _, mount := range engine.Auth {
		for _, one := range asStrings(mount.Config["jwt_validation_pubkeys"]) {
			keys[mount.Path] += one
		}
	}
	if !strings.Contains(keys["operators"], "MCow") || strings.Contains(keys["operators"], "MCox") {
		t.Errorf("the operators' mount takes %q", keys["operators"])
	}
	if !strings.Contains(keys["rotators"], "MCox") || strings.Contains(keys["rotators"], "MCow") {
		t.Errorf("the rotators' mount takes %q", keys["rotators"])
	}
	for _, role := range engine.Roles {
		names, _ := role.Settings["bound_claims"].(map[string]any)
		switch role.Target() {
		case "operators/operator":
			if got := asStrings(names["operator"]); len(got) != 1 || got[0] != "ada" {
				t.Errorf("%s takes %q", role.Target(), got)
			}
		case "rotators/rotator":
			if got := asStrings(names["operator"]); len(got) != 1 || got[0] != "cron" || asStrings(role.Settings["token_policies"])[0] != secret.RotatorPolicy {
				t.Errorf("%s takes %q and gives %q", role.Target(), got, role.Settings["token_policies"])
			}
		}
	}
	policy := engine.Policies[secret.RotatorPolicy]
	for line := range strings.Lines(policy) {
		if strings.Contains(line, `"sys/`) || strings.Contains(line, `"auth/`) && !strings.Contains(line, "-self") || strings.Contains(line, `path "*"`) {
			t.Error(line)
		}
	}
	if !strings.Contains(policy, `path "site/data/*" { capabilities = ["create", "read", "update"] }`) {
		t.Errorf("policy:\n%s", policy)
	}
	if without := desired(); without.Policies[secret.RotatorPolicy] != "" || len(without.Auth) != 2 {
		t.Error("there is something for rotators where nobody is one")
	}
}

func TestTheLastOneThatOnlyRotatedIsShutOutAtOnce(t *testing.T) {
	people := []secret.Operator{{Name: "ada", PublicKeyPEM: key}, {Name: "cron", PublicKeyPEM: key, Rights: site.RightsRotate}}
	with := secret.DesiredEngine(shopSite(), people, nil)
	state := observed(t, with)
	if changes := secret.DiffEngine(with, state); len(changes) > 0 {
		t.Errorf("what was applied differs: %v", changes)
	}
	said := []string{}
	for _, change := range secret.DiffEngine(desired(), state) {
		said = append(said, change.String())
	}
	if strings.Join(said, "\n") != "delete identity role rotators/rotator (no operator only rotates any more)\ndelete policy site-rotator (no operator only rotates any more)" {
		t.Errorf("changes:\n%s", strings.Join(said, "\n"))
	}
	if foreign := secret.Foreign(desired(), state); len(foreign) > 0 {
		t.Errorf("ours counts as foreign: %q", foreign)
	}
}

func asStrings(value any) []string {
	words, _ := value.([]string)
	return words
}

package secret_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/site"
)

var (
	generated  = site.Secret{Component: "shop", Name: "password", Generated: &site.Generated{}}
	external   = site.Secret{Component: "shop", Name: "stripe_key", Description: "payments", External: &site.External{}}
	printed    = site.Secret{Component: "shop", Name: "certificate", ProducedBy: &site.Producer{Command: []string{"./scripts/mint", "x"}}}
	byProvider = site.Secret{Component: "store", Name: "r2.key", Description: "of the bucket", ProducedBy: &site.Producer{Provider: "cloudflare"}}
	optional   = site.Secret{Component: "store", Name: "provider.token", External: &site.External{Optional: true}}
	byNeighbor = site.Secret{Component: "shop", Name: "token", ProducedBy: &site.Producer{Component: "broker"}}
)

func TestDiff(t *testing.T) {
	there := secret.EntryState{Exists: true, Version: 3}
	deleted := secret.EntryState{Exists: true, Deleted: true, Version: 3}
	inUse := func(string) []string { return []string{"shop", "admin", "shop"} }
	for name, test := range map[string]struct {
		entry   site.Secret
		state   secret.EntryState
		options secret.DiffOptions
		change  string
		version string
		lost    string
		awaited bool
	}{
		"one that was never there is generated": {entry: generated, change: "create secret shop.password (generated, made once)", version: "version 0"},
		"one that is there is left alone":       {entry: generated, state: there, options: secret.DiffOptions{Remake: map[string]bool{"shop.password": true}}},
		"one that nobody runs on any more is made again": {
			entry: generated, state: deleted, version: "version 3",
			change: "create secret shop.password (generated, the value was deleted and no job runs on it)",
		},
		"a deleted one is not made again behind the back of a job": {
			entry: generated, state: deleted, options: secret.DiffOptions{InUse: inUse},
			lost: "the value of generated secret shop.password was deleted while admin, shop run on it",
		},
		"nor is one without any trace": {
			entry: generated, options: secret.DiffOptions{InUse: func(string) []string { return []string{"shop"} }},
			lost: "the value of generated secret shop.password is gone while shop runs on it",
		},
		"unless that is asked for": {
			entry: generated, state: deleted, options: secret.DiffOptions{InUse: inUse, Remake: map[string]bool{"shop.password": true}},
			change: "create secret shop.password (generated anew as asked, the value was lost)", version: "version 3",
		},
		"what a command prints is made":             {entry: printed, change: "create secret shop.certificate (missing, printed by ./scripts/mint)", version: "version 0"},
		"and made again":                            {entry: printed, state: deleted, options: secret.DiffOptions{InUse: inUse}, change: "create secret shop.certificate (missing, printed by ./scripts/mint)", version: "version 3"},
		"what a job produces is waited for":         {entry: byNeighbor, awaited: true},
		"what a job produced is there":              {entry: byNeighbor, state: there},
		"what comes from outside is asked for":      {entry: external, change: "import secret shop.stripe_key (missing, needed by shop)", version: "version 0"},
		"and asked for again when it was deleted":   {entry: external, state: deleted, change: "import secret shop.stripe_key (missing, needed by shop)", version: "version 3"},
		"what a provider makes is asked for":        {entry: byProvider, change: "import secret store.r2.key (missing, made by cloudflare, needed by store)", version: "version 0"},
		"what a provider made is there":             {entry: byProvider, state: there},
		"what nobody needs is not asked for":        {entry: optional},
		"nor when it was deleted":                   {entry: optional, state: deleted},
		"an entry without a source is none of ours": {entry: site.Secret{Component: "shop", Name: "odd"}},
	} {
		t.Run(name, func(t *testing.T) {
			changes, findings := secret.Diff([]site.Secret{test.entry}, map[string]secret.EntryState{test.entry.FullName(): test.state}, test.options)
			var said, version string
			for _, change := range changes {
				said, version = change.String(), change.Precondition
			}
			if len(changes) > 1 || said != test.change || version != test.version {
				t.Errorf("changes %v at %q", changes, version)
			}
			lost := ""
			if err := findings.LostError(); err != nil {
				lost = err.Error()
				var typed *secret.LostError
				if !errors.As(err, &typed) || !strings.Contains(plan.HintOf(err), "--remake-secret=shop.password") || !strings.Contains(plan.HintOf(err), "site secrets set shop.password") {
					t.Errorf("hint %q", plan.HintOf(err))
				}
			}
			if lost != test.lost {
				t.Errorf("lost %q", lost)
			}
			if (len(findings.Awaited) == 1) != test.awaited {
				t.Errorf("awaited %v", findings.Awaited)
			}
		})
	}
}

func TestMissingSecretsAreOneSortedError(t *testing.T) {
	smtp := site.Secret{Component: "mail", Name: "smtp_password", External: &site.External{}}
	changes, findings := secret.Diff([]site.Secret{external, generated, smtp}, nil, secret.DiffOptions{
		Waiting: map[string][]string{"mail.smtp_password": {"shop", "mail"}},
	})
	if len(changes) != 3 {
		t.Errorf("changes %v", changes)
	}
	err := findings.MissingError()
	want := `2 secrets from outside are missing:
  mail.smtp_password, needed by mail, shop: site secrets import mail.smtp_password --from-file=FILE
  shop.stripe_key (payments), needed by shop: site secrets import shop.stripe_key --from-file=FILE`
	var missing *secret.MissingError
	if !errors.As(err, &missing) || err.Error() != want || plan.HintOf(err) == "" {
		t.Errorf("got:\n%v", err)
	}
	if _, none := secret.Diff([]site.Secret{generated}, nil, secret.DiffOptions{}); none.MissingError() != nil || none.LostError() != nil {
		t.Errorf("findings without anything found: %+v", none)
	}
}

func TestMissingKeysOfAProviderNameItsCommands(t *testing.T) {
	other := byProvider
	other.Name = "r2.id"
	for name, test := range map[string]struct {
		entries    []site.Secret
		site       string
		want, hint string
	}{
		"alone": {
			[]site.Secret{byProvider, optional}, "gamma",
			"1 secret from outside is missing:\n  store.r2.key (of the bucket), needed by store: site provider rotate-object-storage --site=gamma",
			"have the object store's keys made: site provider import-admin-pair --site=gamma --token-a-file=A --token-b-file=B, once; then: site provider rotate-object-storage --site=gamma\nthen deploy again",
		},
		"beside what is imported": {
			[]site.Secret{external, byProvider, other}, "",
			`3 secrets from outside are missing:
  shop.stripe_key (payments), needed by shop: site secrets import shop.stripe_key --from-file=FILE
  store.r2.id (of the bucket), needed by store: site provider rotate-object-storage
  store.r2.key (of the bucket), needed by store: site provider rotate-object-storage`,
			`import what is imported as its line says
have the object store's keys made: site provider import-admin-pair --token-a-file=A --token-b-file=B, once; then: site provider rotate-object-storage
then deploy again`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, findings := secret.Diff(test.entries, nil, secret.DiffOptions{Site: test.site})
			err := findings.MissingError()
			if err == nil || err.Error() != test.want {
				t.Errorf("got:\n%v", err)
			}
			if hint := plan.HintOf(err); hint != test.hint {
				t.Errorf("hint:\n%s", hint)
			}
		})
	}
}

func TestReadersAreJobsAndOwnersOfDatabaseRoles(t *testing.T) {
	readers := secret.Readers(&site.Site{Components: []site.Component{
		{Name: "shop", Secrets: []site.Secret{generated, external, printed}, Reads: []site.SecretRead{{Secret: "shop.password"}}},
		{Name: "admin", Reads: []site.SecretRead{{Secret: "shop.password"}}, Roles: []site.Role{{Name: "admin", Password: "shop.certificate"}}},
	}})
	for name, want := range map[string][]string{
		"shop.password": {"admin", "shop"}, "shop.certificate": {"admin"}, "shop.stripe_key": {"shop"},
	} {
		if !slices.Equal(readers[name], want) {
			t.Errorf("%s is needed by %q, want %q", name, readers[name], want)
		}
	}
}

func TestUndeclaredEntriesAreNamed(t *testing.T) {
	names := secret.Undeclared([]site.Secret{generated}, map[string]secret.EntryState{
		"shop.password": {Exists: true}, "shop.old": {Exists: true}, "admin.old": {Exists: true}, "shop.never": {},
	})
	if !slices.Equal(names, []string{"admin.old", "shop.old"}) {
		t.Errorf("undeclared %q", names)
	}
}

func TestGenerate(t *testing.T) {
	bytes := strings.Repeat("\xff", 1024)
	for name, test := range map[string]struct {
		generated site.Generated
		length    int
		begins    string
		err       string
	}{
		"32 bytes in base64url when nobody says": {site.Generated{}, 43, "____", ""},
		"base64 with padding":                    {site.Generated{Length: 16, Encoding: "base64"}, 24, "////", ""},
		"hex":                                    {site.Generated{Length: 20, Encoding: "hex"}, 40, "ffff", ""},
		"too short":                              {site.Generated{Length: 8}, 0, "", "16 to 1024"},
		"too long":                               {site.Generated{Length: 1025}, 0, "", "16 to 1024"},
		"an unknown encoding":                    {site.Generated{Encoding: "rot13"}, 0, "", "rot13"},
	} {
		value, err := secret.Generate(test.generated, strings.NewReader(bytes))
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || len(value.Reveal()) != test.length || !strings.HasPrefix(value.Reveal(), test.begins) {
			t.Errorf("%s: %d characters, %v", name, len(value.Reveal()), err)
		}
	}
	if _, err := secret.Generate(site.Generated{}, strings.NewReader("short")); err == nil {
		t.Error("a source of randomness that ends early goes unnoticed")
	}
}

package deploy

import (
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/adapter/openbao"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/release"
)

func TestAValueIsHeldAgainstTheCatalogue(t *testing.T) {
	external := site.Secret{Component: "shop", Name: "key", External: &site.External{}}
	keeping := site.Secret{Component: "shop", Name: "key", External: &site.External{KeepNewline: true}}
	tests := map[string]struct {
		secret     site.Secret
		value      string
		want       string
		newlineCut bool
		problem    string
	}{
		"a plain value stays as it is":                 {secret: external, value: "abc", want: "abc"},
		"a newline at the end is cut off, and said":    {secret: external, value: "abc\n", want: "abc", newlineCut: true},
		"only one newline is cut off":                  {secret: external, value: "abc\n\n", want: "abc\n", newlineCut: true},
		"that of a file from Windows too":              {secret: external, value: "abc\r\n", want: "abc", newlineCut: true},
		"a newline is kept where that is declared":     {secret: keeping, value: "abc\n", want: "abc\n"},
		"an empty value is refused":                    {secret: external, value: "", problem: "the value is empty"},
		"a newline alone is an empty value":            {secret: external, value: "\n", problem: "the value is empty"},
		"a value beyond the limit is refused":          {secret: external, value: strings.Repeat("x", 2<<20), problem: "the value has 2097152 bytes"},
		"what is not text is refused with a way out":   {secret: external, value: "\xff\xfe", problem: "is not UTF-8 text"},
		"a value of exactly the limit is still stored": {secret: external, value: strings.Repeat("x", openbao.MaxValue), want: strings.Repeat("x", openbao.MaxValue)},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			value, stored := NewValue{Name: "shop.key", Value: secret.New(test.value)}, Stored{}
			err := normalise(test.secret, &value, &stored)
			if test.problem != "" {
				if err == nil || !strings.Contains(err.Error(), test.problem) {
					t.Fatalf("got %v, want %q", err, test.problem)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if value.Value.Reveal() != test.want || stored.NewlineCut != test.newlineCut {
				t.Errorf("got %q, cut %v", value.Value.Reveal(), stored.NewlineCut)
			}
		})
	}
}

func TestTheStateOfASecretIsSaid(t *testing.T) {
	now := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	expires := func(in time.Duration) map[string]string {
		return map[string]string{expiresField: now.Add(in).Format(time.RFC3339)}
	}
	there := catalogue.EntryState{Exists: true, Version: 2, Created: now.Add(-time.Hour)}
	tests := map[string]struct {
		state catalogue.EntryState
		want  string
	}{
		"one that was never there is missing": {catalogue.EntryState{}, SecretMissing},
		"one with a value is ok":              {there, SecretOK},
		"a deleted one is deleted":            {catalogue.EntryState{Exists: true, Deleted: true, Version: 3}, SecretDeleted},
		"one that ends in a year is ok":       {catalogue.EntryState{Exists: true, Version: 1, CustomMetadata: expires(365 * 24 * time.Hour)}, SecretOK},
		"one that ends in a week is warned of": {
			catalogue.EntryState{Exists: true, Version: 1, CustomMetadata: expires(7 * 24 * time.Hour)}, SecretExpires,
		},
		"one that ended is expired": {catalogue.EntryState{Exists: true, Version: 1, CustomMetadata: expires(-time.Second)}, SecretExpired},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			row := secretRow(site.Secret{Component: "shop", Name: "key", External: &site.External{}}, test.state, nil, now)
			if row.State != test.want {
				t.Errorf("got %q, want %q", row.State, test.want)
			}
			if row.Consumers == nil {
				t.Error("consumers are null in JSON")
			}
		})
	}
}

func TestASecretIsInUseWhereADeployedJobReadsIt(t *testing.T) {
	secrets := []site.Secret{{Component: "shop", Name: "key"}, {Component: "shop", Name: "key_two"}}
	latest := &release.Record{Components: map[string]release.Component{
		"shop":  {Jobspec: `{"EmbeddedTmpl":"{{ with secret \"site/data/shop/key\" }}{{ end }}"}`},
		"other": {Jobspec: `{"EmbeddedTmpl":"nothing"}`},
	}}
	used := inUse(secrets, latest)
	if len(used["shop.key"]) != 1 || used["shop.key"][0] != "shop" {
		t.Errorf("shop.key is used by %v, want shop", used["shop.key"])
	}
	if len(used["shop.key_two"]) != 0 {
		t.Errorf("shop.key_two is used by %v, want nobody", used["shop.key_two"])
	}
	if len(inUse(secrets, nil)) != 0 {
		t.Error("something is in use on a site without a release")
	}
}

func TestWhatWaitsForAMissingSecretIsKeptBack(t *testing.T) {
	s := newSession(Options{})
	s.site = &site.Site{Components: []site.Component{
		{Name: "shop", Reads: []site.SecretRead{{Secret: "shop.key"}}},
		{Name: "front", After: []string{"shop"}},
		{Name: "mail", After: []string{"front"}},
		{Name: "other"},
	}}
	s.blockOn(catalogue.Findings{Missing: []catalogue.MissingSecret{{Name: "shop.key", Components: []string{"shop"}}}})
	for name, want := range map[string]string{
		"shop": "secret shop.key is missing", "front": "it waits for shop", "mail": "it waits for front", "other": "",
	} {
		if s.blocked[name] != want {
			t.Errorf("%s: got %q, want %q", name, s.blocked[name], want)
		}
	}
	if s.missingSecrets == nil {
		t.Error("nothing asks for the secret")
	}
	s.blockOn(catalogue.Findings{})
	if len(s.blocked) > 0 || s.missingSecrets != nil {
		t.Errorf("still blocked: %v, %v", s.blocked, s.missingSecrets)
	}
}

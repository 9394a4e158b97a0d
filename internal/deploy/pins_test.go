package deploy

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/adapter/nomad"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/site"
)

func rotatingSite() *site.Site {
	return &site.Site{Components: []site.Component{{Name: "shop", Secrets: []site.Secret{
		{Component: "shop", Name: "key", Generated: &site.Generated{}, Rotation: &site.Rotation{Every: 24 * time.Hour}},
		{Component: "shop", Name: "token", External: &site.External{}},
		{Component: "shop", Name: "joined", ProducedBy: &site.Producer{Component: "broker"}},
	}}}}
}

func entry(version int, metadata map[string]string) catalogue.EntryState {
	return catalogue.EntryState{Exists: version > 0, Version: version, CustomMetadata: metadata}
}

func TestJobsReadTheActiveGenerationUnlessTheyTryTheCandidate(t *testing.T) {
	entries := map[string]catalogue.EntryState{
		"shop.key":    entry(4, map[string]string{"active": "3", "candidate": "4"}),
		"shop.token":  entry(7, map[string]string{"active": "7", "retiring": "5"}),
		"shop.joined": entry(2, nil),
	}
	for name, test := range map[string]struct {
		candidates       bool
		recorded         map[string]int
		entries          map[string]catalogue.EntryState
		active, previous map[string]int
	}{
		"a deploy": {entries: entries,
			active: map[string]int{"shop.key": 3, "shop.token": 7}, previous: map[string]int{"shop.key": 3, "shop.token": 5}},
		"a canary": {entries: entries, candidates: true,
			active: map[string]int{"shop.key": 4, "shop.token": 7}, previous: map[string]int{"shop.key": 3, "shop.token": 5}},
		"a value that is lost with all that was known of it": {recorded: map[string]int{"shop.key": 3},
			active: map[string]int{"shop.key": 3}, previous: map[string]int{"shop.key": 3}},
		"nothing was made yet": {active: map[string]int{}, previous: map[string]int{}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &session{site: rotatingSite(), recorded: test.recorded}
			got := s.pins(test.entries, test.candidates)
			if !maps.Equal(got.Active, test.active) || !maps.Equal(got.Previous, test.previous) {
				t.Errorf("pins %v, not %v and %v", got, test.active, test.previous)
			}
		})
	}
}

func TestTheStatusSaysHowFarARotationIs(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	one := rotatingSite().Components[0].Secrets[0]
	at := func(state catalogue.EntryState, age time.Duration) catalogue.EntryState {
		state.Created = now.Add(-age)
		return state
	}
	for name, test := range map[string]struct {
		state catalogue.EntryState
		want  string
	}{
		"never made":             {catalogue.EntryState{}, SecretMissing},
		"young":                  {at(entry(1, nil), time.Hour), SecretOK},
		"older than its policy":  {at(entry(1, nil), 25*time.Hour), SecretDue},
		"being tried":            {at(entry(2, map[string]string{"active": "1", "candidate": "2"}), 25*time.Hour), SecretRotating},
		"draining":               {at(entry(2, map[string]string{"active": "2", "retiring": "1"}), time.Hour), SecretRetiring},
		"its value ends soon":    {at(entry(1, map[string]string{"expires": "2026-03-05T00:00:00Z"}), time.Hour), SecretExpires},
		"its value has ended":    {at(entry(1, map[string]string{"expires": "2026-02-05T00:00:00Z"}), time.Hour), SecretExpired},
		"rotated a moment after": {at(entry(2, map[string]string{"active": "2", "rotated": "2026-03-01T11:00:00Z"}), 25*time.Hour), SecretOK},
	} {
		t.Run(name, func(t *testing.T) {
			if row := secretRow(one, test.state, nil, now); row.State != test.want {
				t.Errorf("the state is %q, not %q", row.State, test.want)
			}
			warnings := ageWarnings([]site.Secret{one}, map[string]catalogue.EntryState{one.FullName(): test.state}, now)
			quiet := slices.Contains([]string{SecretMissing, SecretOK, SecretRetiring}, test.want)
			// One that drains is warned of once it could be retired; without a time, it could be.
			if test.want != SecretRetiring && (len(warnings) == 0) != quiet {
				t.Errorf("warnings %q", warnings)
			}
			for _, warning := range warnings {
				if !strings.Contains(warning, "site secrets rotate") {
					t.Errorf("it does not say what to run: %s", warning)
				}
			}
		})
	}
}

func TestTheRootTokenIsRotatedOnlyWhereToIsSaid(t *testing.T) {
	for name, test := range map[string]struct {
		options Options
		choice  RotateOptions
		want    []string
	}{
		"all roots":                    {Options{}, RotateOptions{Roots: true}, Roots()[1:]},
		"all roots and where to":       {Options{NewRootTokenFile: "new"}, RotateOptions{Roots: true}, Roots()},
		"by name, in the usual order":  {Options{}, RotateOptions{Names: []string{"gossip", "unseal-key", "shop.key"}}, []string{"unseal-key", "gossip"}},
		"secrets alone touch no roots": {Options{}, RotateOptions{All: true}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got := rootsOf(test.options, test.choice); !slices.Equal(got, test.want) {
				t.Errorf("roots %v, not %v", got, test.want)
			}
		})
	}
}

func TestTheSameGenerationOfAnotherEngineIsAnotherJob(t *testing.T) {
	read := `{{ with secret "site/data/shop/key" }}{{ .Data.data.value }}{{ end }}`
	id, group, mode := "shop", "web", "restart"
	parsed := &api.Job{ID: &id, TaskGroups: []*api.TaskGroup{{Name: &group, Tasks: []*api.Task{{
		Name: "serve", Templates: []*api.Template{{ChangeMode: &mode, EmbeddedTmpl: &read}},
	}}}}}
	digest := func(pins nomad.Pins) string {
		t.Helper()
		job, err := pin(parsed, nomad.Brief{Site: "lab", Component: "shop"}, pins)
		if err != nil {
			t.Fatal(err)
		}
		return job.Desired.SpecDigest
	}
	active := map[string]int{"shop.key": 1}
	before := digest(nomad.Pins{Engine: "a", Active: active})
	if digest(nomad.Pins{Engine: "a", Active: active}) != before {
		t.Error("the same pins gave another job")
	}
	if digest(nomad.Pins{Engine: "b", Active: active}) == before {
		t.Error("a job that holds the value of an engine that was wiped looks up to date")
	}
	if digest(nomad.Pins{Engine: "a"}) != digest(nomad.Pins{Engine: "b"}) {
		t.Error("a job that is pinned to nothing differs by the engine")
	}
}

func TestAPairOfTheStoresKeysThatIsSwitchedByHalvesIsReadAsItWas(t *testing.T) {
	made := &site.Producer{Provider: "cloudflare"}
	s := &session{site: &site.Site{Components: []site.Component{{Name: site.ObjectStorageComponent, Secrets: []site.Secret{
		{Component: site.ObjectStorageComponent, Name: site.StoreAdminID, ProducedBy: made},
		{Component: site.ObjectStorageComponent, Name: site.StoreAdminSecret, ProducedBy: made},
	}}}}}
	id, key := s.site.Secrets()[0].FullName(), s.site.Secrets()[1].FullName()
	before := entry(2, map[string]string{"active": "1", "candidate": "2"})
	after := entry(2, map[string]string{"active": "2", "retiring": "1"})
	for name, test := range map[string]struct {
		entries map[string]catalogue.EntryState
		want    int
	}{
		"neither":     {map[string]catalogue.EntryState{id: before, key: before}, 1},
		"the id only": {map[string]catalogue.EntryState{id: after, key: before}, 1},
		"both":        {map[string]catalogue.EntryState{id: after, key: after}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			pins := s.pins(test.entries, false)
			if pins.Active[id] != test.want || pins.Active[key] != test.want {
				t.Errorf("pinned to %v, want %d", pins.Active, test.want)
			}
			if next := s.pins(test.entries, true); next.Active[id] != 2 || next.Active[key] != 2 {
				t.Errorf("what is tried is %v", next.Active)
			}
		})
	}
}

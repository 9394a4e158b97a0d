package deploy

import (
	"maps"
	"slices"
	"strings"
	"testing"

	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/site"
)

func storeKeySite() *site.Site {
	component := site.Component{Name: site.ObjectStorageComponent}
	for _, name := range storeKeys() {
		component.Secrets = append(component.Secrets, site.Secret{
			Component: site.ObjectStorageComponent, Name: strings.TrimPrefix(name, site.ObjectStorageComponent+"."),
			ProducedBy: &site.Producer{Provider: site.CloudflareProvider},
		})
	}
	return &site.Site{Components: []site.Component{component}}
}

// Metadata of the four keys at points where a run may have been cut short.
func TestTheKeysOfTheStoreBeginAGenerationTogether(t *testing.T) {
	settled := map[string]string{"active": "1"}
	candidate := map[string]string{"active": "1", "candidate": "2"}
	retiring := map[string]string{"active": "2", "retiring": "1"}
	for name, test := range map[string]struct {
		states      [4]map[string]string
		asked, want bool
	}{
		"nobody asks":                    {[4]map[string]string{settled, settled, settled, settled}, false, false},
		"asked for":                      {[4]map[string]string{settled, settled, settled, settled}, true, true},
		"cut short between two halves":   {[4]map[string]string{candidate, settled, settled, settled}, false, true},
		"all are candidates":             {[4]map[string]string{candidate, candidate, candidate, candidate}, false, true},
		"one is active already":          {[4]map[string]string{retiring, candidate, candidate, candidate}, true, true},
		"the old ones drain":             {[4]map[string]string{retiring, retiring, retiring, retiring}, true, false},
		"one of the old ones is retired": {[4]map[string]string{settled, retiring, retiring, retiring}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := &session{site: storeKeySite(), entries: map[string]catalogue.EntryState{}}
			for i, one := range storeKeys() {
				s.entries[one] = entry(2, test.states[i])
			}
			r := &rotation{session: s}
			if got := r.movesKeys(s.site.Secrets(), func(site.Secret) bool { return test.asked }); got != test.want {
				t.Errorf("got %t", got)
			}
		})
	}
}

func TestHostsReportTheOlderHalfOfAKey(t *testing.T) {
	entries := map[string]catalogue.EntryState{}
	for _, name := range storeKeys() {
		entries[name] = entry(3, map[string]string{"active": "3"})
	}
	r := &rotation{session: &session{entries: entries}}
	if got := r.proxyGeneration(); got != 3 {
		t.Errorf("got %d", got)
	}
	// A run that was cut short between both wrote the first once more.
	moved := maps.Clone(entries)
	moved[site.ObjectStorageComponent+"."+site.StoreProxyID] = entry(4, nil)
	r.entries = moved
	if got := r.proxyGeneration(); got != 3 {
		t.Errorf("got %d", got)
	}
}

func TestTheAliasStandsForAllKeysOfTheStore(t *testing.T) {
	want := slices.Sorted(slices.Values(append(storeKeys(), "shop.key")))
	if got := withStoreKeys([]string{"shop.key", StoreKeysAlias, storeKeys()[2]}); !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}

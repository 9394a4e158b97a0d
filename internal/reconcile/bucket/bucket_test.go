package bucket_test

import (
	"slices"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/reconcile/bucket"
)

func TestATokensNameSaysWhoseItIs(t *testing.T) {
	name := bucket.TokenName("gamma", "proxy", 7)
	if name != "site/gamma/proxy/7" {
		t.Errorf("name: %q", name)
	}
	site, role, generation, ok := bucket.ParseTokenName(name)
	if site != "gamma" || role != "proxy" || generation != 7 || !ok {
		t.Errorf("parsed: %q %q %d %v", site, role, generation, ok)
	}
}

func TestOnlyOurOwnNamesAreParsed(t *testing.T) {
	for _, test := range []struct {
		what, name string
		ok         bool
	}{
		{"ours", "site/gamma/admin/1", true},
		{"a long generation", "site/gamma/admin/1234567", true},
		{"a site with dashes", "site/gamma-eu-2/proxy/3", true},
		{"nothing", "", false},
		{"a person's", "laptop of the office", false},
		{"another program's", "sites/gamma/admin/1", false},
		{"no site", "site//admin/1", false},
		{"no role", "site/gamma//1", false},
		{"no generation", "site/gamma/admin/", false},
		{"generation zero", "site/gamma/admin/0", false},
		{"a negative generation", "site/gamma/admin/-1", false},
		{"a sign", "site/gamma/admin/+1", false},
		{"a leading zero", "site/gamma/admin/01", false},
		{"something behind it", "site/gamma/admin/1/old", false},
		{"something before it", " site/gamma/admin/1", false},
		{"too few parts", "site/gamma/1", false},
		{"more than an int", "site/gamma/admin/99999999999999999999", false},
	} {
		t.Run(test.what, func(t *testing.T) {
			site, role, generation, ok := bucket.ParseTokenName(test.name)
			if ok != test.ok {
				t.Fatalf("%q: ok is %v", test.name, ok)
			}
			if ok && bucket.TokenName(site, role, generation) != test.name {
				t.Errorf("%q does not come back: %q", test.name, bucket.TokenName(site, role, generation))
			}
		})
	}
}

func FuzzParseTokenNameComesBack(f *testing.F) {
	for _, name := range []string{"site/gamma/proxy/7", "site/gamma/proxy/07", "site///", "", "site/a/b/\u0663"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		site, role, generation, ok := bucket.ParseTokenName(name)
		if ok && bucket.TokenName(site, role, generation) != name {
			t.Errorf("%q is parsed, but comes back as %q", name, bucket.TokenName(site, role, generation))
		}
	})
}

func TestOrphansAreOursByNameAndInNobodysUse(t *testing.T) {
	day := func(n int) time.Time { return time.Date(2026, 3, n, 0, 0, 0, 0, time.UTC) }
	tokens := []bucket.Token{
		{ID: "used", Name: "site/gamma/proxy/7", Issued: day(7)},
		{ID: "newer", Name: "site/gamma/proxy/6", Issued: day(6)},
		{ID: "twice", Name: "site/gamma/admin/7", Issued: day(8)}, // an attempt whose value got lost
		{ID: "used-too", Name: "site/gamma/admin/7", Issued: day(7)},
		{ID: "older", Name: "site/gamma/admin/5", Issued: day(5)},
		{ID: "foreign", Name: "site/gamma-2/admin/5", Issued: day(5)},
		{ID: "prefix", Name: "site/gamma", Issued: day(5)},
		{ID: "person", Name: "gamma", Issued: day(1)},
	}
	var got []string
	for _, orphan := range bucket.Orphans(tokens, map[string]bool{"used": true, "used-too": true}, "gamma") {
		got = append(got, orphan.ID)
	}
	if want := []string{"older", "newer", "twice"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestASiteWithoutANameHasNoOrphans(t *testing.T) {
	tokens := []bucket.Token{{ID: "one", Name: "site/gamma/proxy/7"}, {ID: "two", Name: "site//proxy/7"}, {ID: "three"}}
	if orphans := bucket.Orphans(tokens, nil, ""); orphans != nil {
		t.Errorf("orphans: %v", orphans)
	}
}

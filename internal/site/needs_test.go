package site

import (
	"slices"
	"strings"
	"testing"
)

func TestWhoNeedsWhat(t *testing.T) {
	s, err := Load(withStores(map[string]string{
		"sites/one/site.hcl":        strings.Replace(storesSite, "  component \"broker\"", "  component \"web\" {}\n  component \"broker\"", 1),
		"jobs/web/component.hcl":    "after = [\"shop\", \"postgresql\"]\nreads = [\"shop.token\", \"broker.admin_token\"]\nrole \"web\" {\n login = true\n password = \"shop.password\"\n}\n",
		"jobs/web/web.nomad.hcl":    "job \"web\" {}\n",
		"jobs/broker/component.hcl": "reads = [\"shop.token\"]\n" + brokerFile,
		"jobs/shop/shop.nomad.hcl":  jobWith(`{{ with secret "site/data/shop/token" }}{{ end }}{{ with secret "site/data/shop/password" }}{{ end }}`),
	}), "one", LoadOptions{Platform: stores()})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name      string
		got, want []string
	}{
		{"after and a producer", s.WaitsFor("web"), []string{"broker", "postgresql", "shop"}},
		{"a producer alone", s.WaitsFor("shop"), []string{"broker"}},
		{"a producer does not wait for itself", s.WaitsFor("broker"), nil},
		{"nobody knows the component", s.WaitsFor("nothing"), nil},
		{"readers", s.Consumers("shop.token"), []string{"broker", "shop", "web"}},
		{"a reader and a role", s.Consumers("shop.password"), []string{"shop", "web"}},
		{"no consumer", s.Consumers("shop.nothing"), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if !slices.Equal(tt.got, tt.want) {
				t.Errorf("got %v, want %v", tt.got, tt.want)
			}
		})
	}
	if made := s.Produces("broker"); len(made) != 1 || made[0].FullName() != "shop.token" {
		t.Errorf("broker produces %+v", made)
	}
	if made := s.Produces("shop"); len(made) != 0 {
		t.Errorf("shop produces %+v", made)
	}
}

func TestTheFirstServer(t *testing.T) {
	for _, tt := range []struct {
		name  string
		hosts []Host
		want  string
	}{
		{"is not just the first host", []Host{{Name: "a"}, {Name: "b", Server: true}, {Name: "c", Server: true}}, "b"},
		{"is nobody where there is none", []Host{{Name: "a"}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := (&Site{Hosts: tt.hosts}).FirstServer(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestTheServerIsGivenToJobspecs(t *testing.T) {
	files := plain(map[string]string{"jobs/web/web.nomad.hcl": "variable \"server\" {}\n" + plainJob})
	if _, err := Load(files, "one", LoadOptions{}); err != nil {
		t.Errorf("a declared variable without a value: %v", err)
	}
	files = plain(map[string]string{
		"jobs/web/web.nomad.hcl": "variable \"server\" {}\n" + plainJob,
		"jobs/web/component.hcl": "variables = { server = \"x\" }\n" + plainComponent,
	})
	_, err := Load(files, "one", LoadOptions{})
	if got := problemsOf(t, err); len(got) != 1 || !strings.Contains(got[0], "Reserved variable") {
		t.Errorf("got %v", got)
	}
}

func TestACycleOfSecretsAlone(t *testing.T) {
	_, err := Load(withStores(map[string]string{
		"jobs/shop/component.hcl":   strings.Replace(shopFile, "broker.admin_token", "token", 1),
		"jobs/broker/component.hcl": "reads = [\"key\"]\nsecret \"key\" {\n produced_by {\n  component = \"shop\"\n }\n}\n",
	}), "one", LoadOptions{Platform: stores()})
	want := "jobs/shop/component.hcl:1,10: Components wait for each other; shop waits for broker (which produces shop.token) waits for shop (which produces broker.key)"
	if got := problemsOf(t, err); len(got) != 1 || got[0] != want {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), want)
	}
}

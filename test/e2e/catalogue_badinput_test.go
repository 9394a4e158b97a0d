package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// planted is the faults of a repository: its files, and where each fault is said.
type planted struct {
	files map[string]string
	want  []string
}

// fault adds a place: the line and column of the marker in a file, and what is
// said there with the way out.
func (p *planted) fault(t *testing.T, file, marker, says string) {
	t.Helper()
	before, _, found := strings.Cut(p.files[file], marker)
	if !found || strings.Contains(p.files[file][len(before)+1:], marker) {
		t.Fatalf("%s has %q not exactly once", file, marker)
	}
	p.want = append(p.want, fmt.Sprintf("%s:%d,%d: %s", file, strings.Count(before, "\n")+1, len(before)-strings.LastIndex(before, "\n"), says))
}

// templateJob is a job whose task has a template for each text, one a line.
func templateJob(name, vault string, templates ...string) string {
	var out strings.Builder
	for _, text := range templates {
		fmt.Fprintf(&out, "      template {\n        destination = \"local/x\"\n        data        = <<-EOT\n%s\n        EOT\n      }\n", text)
	}
	job := strings.ReplaceAll(plainJob, `"hello"`, fmt.Sprintf("%q", name))
	return strings.Replace(job, "      driver = \"podman\"\n", "      driver = \"podman\"\n"+vault+out.String(), 1)
}

const vaultLine = "      vault {}\n"

// faultyCatalogue has every fault that a catalogue of two components can have,
// each of them once.
func faultyCatalogue(t *testing.T, port int) *planted {
	const site, shop, shopJob, mail, mailJob = "sites/" + name + "/site.hcl",
		"jobs/shop/component.hcl", "jobs/shop/shop.nomad.hcl", "jobs/mail/component.hcl", "jobs/mail/mail.nomad.hcl"
	p := &planted{files: map[string]string{
		site: trappedSiteWith(port, "hello", "openbao", "postgresql", "shop", "mail"),
		shop: `reads = ["mail.pasword"]

secret "two_sources" {
  generated {}
  external {}
}

secret "no_source" {}

secret "database_password" {
  generated {}
}

secret "waited_for" {
  produced_by {
    component = "broker"
  }
}

database "shop" {
  owner = "shop"
}

role "shop" {
  login    = true
  password = "database_pasword"
}

role "readers" {}

grant "reeders" {
  database   = "shop"
  privileges = ["CONNECT"]
}

grant "readers" {
  database   = "shopp"
  privileges = ["CONNECT"]
}
`,
		shopJob: templateJob("shop", vaultLine,
			`{{ with secret "site/data/shop/database_passwort" }}{{ .Data.data.value }}{{ end }}`,
			`{{ with secret "site/data/mail/password" }}{{ .Data.data.value }}{{ end }}`,
			`{{ with secret (printf "site/data/shop/%s" (env "WHICH")) }}{{ .Data.data.value }}{{ end }}`,
			`{{ with secret "kv/data/shop/database_password" }}{{ .Data.data.value }}{{ end }}`),
		mail: `secret "password" {
  generated {}
}

role "readers" {}
`,
		mailJob: templateJob("mail", "", `{{ with secret "site/data/mail/password" }}{{ .Data.data.value }}{{ end }}`),
	}}
	p.fault(t, shop, `"mail.pasword"`, `Unknown secret in reads; No active component declares a secret "mail.pasword". Did you mean "mail.password"?`)
	p.fault(t, shop, `secret "two_sources"`, `Secret with several sources; Secret "shop.two_sources" has generated and external; exactly one is allowed`)
	p.fault(t, shop, `secret "no_source"`, `Secret without a source; Secret "shop.no_source" must have one of the blocks generated, external, produced_by`)
	p.fault(t, shop, `"broker"`, `Missing producer; shop waits for broker: shop.waited_for is produced by broker, which is not active`)
	p.fault(t, shop, `"database_pasword"`, `Unknown secret; No active component declares a secret "shop.database_pasword". Did you mean "shop.database_password"?`)
	p.fault(t, shop, `"reeders"`, `Unknown role; No active component declares a role "reeders". Did you mean "readers"?`)
	p.fault(t, shop, `"shopp"`, `Unknown database; No active component declares a database "shopp". Did you mean "shop"?`)
	p.fault(t, shopJob, `site/data/shop/database_passwort"`, `Unknown secret; No active component declares a secret "shop.database_passwort". Did you mean "site/data/shop/database_password"?`)
	p.fault(t, shopJob, `site/data/mail/password"`, `Undeclared read; mail.password belongs to component "mail": add "mail.password" to reads at jobs/shop/component.hcl:1`)
	p.fault(t, shopJob, `secret (printf`, `Computed path of a secret; The path must be a literal`)
	p.fault(t, shopJob, `kv/data/shop/database_password"`, `Secret outside of the catalogue; No policy lets a job read "kv/data/shop/database_password": the secrets of a site are at site/data/COMPONENT/NAME`)
	p.fault(t, mailJob, `task "mail"`, `Task without a vault block; A template of task "mail" reads a secret, for which it needs an identity: add vault {} to the task`)
	// Components are read in the order of their names: this one is first.
	p.fault(t, shop, `"readers" {}`, `Duplicate role; A role named "readers" is already declared at jobs/mail/component.hcl:5`)
	return p
}

func (s *testSite) wantExactly(got result, want []string) {
	s.t.Helper()
	s.wantRefusal(got, want, []string{fmt.Sprintf("%d places", len(want))})
	places := regexp.MustCompile(`(?m)^(?:error: (?:check inputs: )?)?(\S+\.hcl:\d+,\d+: .*)$`).FindAllStringSubmatch(got.stderr, -1)
	for _, place := range places {
		known := false
		for _, start := range want {
			known = known || strings.HasPrefix(place[1], start)
		}
		if !known {
			s.t.Errorf("not planted: %s", place[1])
		}
	}
	if len(places) != len(want) {
		s.t.Errorf("%d places, want %d\n%v", len(places), len(want), got)
	}
}

func TestEveryFaultOfACatalogueIsSaidInOneReport(t *testing.T) {
	s, it := newLocalSite(t)
	p := faultyCatalogue(t, it.port)
	s.commit("many faults", p.files)
	for _, args := range [][]string{s.bootstrapArgs(), {"deploy"}, {"plan"}, {"secrets", "status"}} {
		s.wantExactly(s.wantUntouched(it, args, nil, nil), p.want)
	}
	// A bootstrap without the site root token is told that first, as ever.
	s.wantUntouched(it, []string{"bootstrap-deploy"}, []string{"--openbao-site-root-token-file"}, []string{"site root-token new"})
}

func TestACatalogueWithoutItsStoresIsSaidWithTheLineThatIsMissing(t *testing.T) {
	s, it := newLocalSite(t)
	const site, shop, mail = "sites/" + name + "/site.hcl", "jobs/shop/component.hcl", "jobs/mail/component.hcl"
	p := &planted{files: map[string]string{
		site:                       trappedSiteWith(it.port, "hello", "shop", "mail"),
		shop:                       "secret \"password\" {\n  generated {}\n}\n\nsecret \"other\" {\n  external {}\n}\n",
		"jobs/shop/shop.nomad.hcl": templateJob("shop", ""),
		mail:                       "role \"mail\" {\n  login    = true\n  password = \"shop.password\"\n}\n\ndatabase \"mail\" {\n  owner = \"mail\"\n}\n",
		"jobs/mail/mail.nomad.hcl": templateJob("mail", ""),
	}}
	// Once a component, however much it declares.
	p.fault(t, shop, `"password"`, `Secrets without OpenBao; Component "shop" declares secrets: add component "openbao" {} to `+site)
	p.fault(t, mail, `"shop.password"`, `Password without OpenBao; Component "mail" has roles with passwords, which OpenBao holds: add component "openbao" {} to `+site)
	p.fault(t, mail, `"mail" {
  owner`, `Databases without Postgres; Component "mail" declares databases, roles or grants: add component "postgresql" {} to `+site)
	s.commit("no stores", p.files)
	s.wantExactly(s.wantUntouched(it, s.bootstrapArgs(), nil, nil), p.want)

	// The lines that it asks for are the way out: then only the host is missing.
	s.commit("with stores", map[string]string{site: trappedSiteWith(it.port, "hello", "shop", "mail", "openbao", "postgresql")})
	s.wantRefusal(s.run("secrets", "status"), []string{fmt.Sprintf("127.0.0.1:%d", it.port)}, []string{"SSH server"})
	if it.calls.Load() == 0 {
		t.Error("a trap that nobody reached proves nothing")
	}
}

func TestNamesOfSecretsAreCheckedBeforeAnyHostIsTouched(t *testing.T) {
	s, it := newLocalSite(t)
	s.commit("a catalogue", map[string]string{
		"sites/" + name + "/site.hcl": trappedSiteWith(it.port, "hello", "openbao", "shop"),
		"jobs/shop/component.hcl":     "secret \"payment_key\" {\n  external {}\n}\n",
		"jobs/shop/shop.nomad.hcl":    templateJob("shop", ""),
	})
	near := []string{`"shop.payment_kye"`, `"shop.payment_key"`}
	for _, args := range [][]string{
		{"secrets", "get", "shop.payment_kye"}, {"secrets", "verify", "shop.payment_kye"},
		{"secrets", "import", "shop.payment_kye", "--from-command", "--", "echo", plantedSecret},
	} {
		got := s.wantUntouched(it, args, near[:1], nil)
		if !strings.Contains(got.stderr, near[1]) && !strings.Contains(got.stderr, "shop.payment_key") {
			t.Errorf("it does not say what there is: %v", got)
		}
	}
}

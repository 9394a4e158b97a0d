package site

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/hashicorp/hcl/v2"
)

// stores is a platform with what secrets and databases need.
func stores() fstest.MapFS {
	return repository(map[string]string{
		"jobs/openbao/component.hcl":                                   "",
		"jobs/openbao/openbao.nomad.hcl":                               "job \"openbao\" {}\n",
		"jobs/postgresql/component.hcl":                                "",
		"jobs/object-storage-service/component.hcl":                    "",
		"jobs/object-storage-service/object-storage-service.nomad.hcl": "job \"object-storage-service\" {}\n",
		"jobs/postgresql/postgresql.nomad.hcl":                         "job \"postgresql\" {}\n",
	})
}

const (
	storesSite = "site \"one\" {\n  host \"h-1\" {\n    address = \"10.0.0.1\"\n  }\n  component \"openbao\" {}\n  component \"postgresql\" {}\n  component \"shop\" {}\n  component \"broker\" {}\n}\n"
	brokerFile = "secret \"admin_token\" {\n  generated {}\n}\n"
	shopFile   = "reads = [\"broker.admin_token\"]\nsecret \"password\" {\n  generated {}\n}\nsecret \"token\" {\n  produced_by {\n    component = \"broker\"\n  }\n}\n"
	// The template's text begins on line 7.
	shopJob = "job \"shop\" {\n  group \"g\" {\n    task \"t\" {\n      driver = \"podman\"\n      vault {}\n      template {\n        data = <<-EOT\nTEXT\n        EOT\n      }\n    }\n  }\n}\n"
	// The template's first line.
	textLine = "8"
)

// jobWith is the job of shop with the text of a template.
func jobWith(text string) string { return strings.Replace(shopJob, "TEXT", text, 1) }

// withStores is a site of two components with their stores, with some files replaced.
func withStores(replace map[string]string) fstest.MapFS {
	files := map[string]string{
		"sites/one/site.hcl":           storesSite,
		"jobs/shop/component.hcl":      shopFile,
		"jobs/shop/shop.nomad.hcl":     jobWith(`{{ with secret "site/data/shop/password" }}{{ .Data.data.value }}{{ end }}`),
		"jobs/broker/component.hcl":    brokerFile,
		"jobs/broker/broker.nomad.hcl": "job \"broker\" {}\n",
	}
	for name, content := range replace {
		files[name] = content
	}
	return repository(files)
}

func namesOfReads(c *Component) []string {
	var names []string
	for _, read := range c.Reads {
		names = append(names, read.Secret)
	}
	return names
}

// TestFaultsOfTheCatalogue plants one fault at a time and expects that one line alone.
func TestFaultsOfTheCatalogue(t *testing.T) {
	inShop := func(text string) map[string]string {
		return map[string]string{"jobs/shop/component.hcl": shopFile + text}
	}
	// The secret's own lines are 10 and following.
	secret := func(lines string) map[string]string {
		return inShop("secret \"x\" {\n" + lines + "\n}\n")
	}
	inTemplate := func(text string) map[string]string {
		return map[string]string{"jobs/shop/shop.nomad.hcl": jobWith(text)}
	}
	inSite := func(old, replacement string) map[string]string {
		return map[string]string{"sites/one/site.hcl": strings.Replace(storesSite, old, replacement, 1)}
	}
	merge := func(sets ...map[string]string) map[string]string {
		all := map[string]string{}
		for _, set := range sets {
			for name, content := range set {
				all[name] = content
			}
		}
		return all
	}
	const component, jobspec = "jobs/shop/component.hcl:", "jobs/shop/shop.nomad.hcl:"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string // start of the line
	}{
		{"secret named badly", inShop("secret \"X-1\" {\n generated {}\n}"), component + "10,8: Invalid secret name"},
		{"secret with a long name", inShop("secret \"" + strings.Repeat("x", 64) + "\" {\n generated {}\n}"), component + "10,8: Invalid secret name"},
		{"secret declared twice", inShop("secret \"password\" {\n external {}\n}"), component + "10,8: Duplicate secret; A secret named \"password\" is already declared at jobs/shop/component.hcl:2,8; a name has one source"},
		{"secret without a source", secret(""), component + "10,1: Secret without a source; Secret \"shop.x\" must have one of the blocks generated, external, produced_by"},
		{"secret with two sources", secret("generated {}\nexternal {}"), component + "10,1: Secret with several sources; Secret \"shop.x\" has generated and external; exactly one is allowed"},
		{"the same source twice", secret("generated {}\ngenerated {}"), component + "12,1: Duplicate generated block"},
		{"unknown field of a secret", secret("generated {\n lengthh = 32\n}"), component + "12,2: Unsupported argument; An argument named \"lengthh\" is not expected here. Did you mean \"length\"?"},
		{"generated too short", secret("generated {\n length = 15\n}"), component + "12,11: Invalid length; 15 random bytes are not between 16 and 1024"},
		{"generated too long", secret("generated {\n length = 1025\n}"), component + "12,11: Invalid length"},
		{"generated in an encoding that is none", secret("generated {\n encoding = \"rot13\"\n}"), component + "12,13: Invalid encoding; \"rot13\" is none of base64url, base64, hex"},
		{"external with an empty check", secret("external {\n check = []\n}"), component + "12,10: Empty command"},
		{"external with a check without a program", secret("external {\n check = [\"\"]\n}"), component + "12,11: Empty command"},
		{"external with a check that is not in the commit", secret("external {\n check = [\"./scripts/check\"]\n}"), component + "12,11: Missing program; There is no file scripts/check in the commit"},
		{"external with a check outside", secret("external {\n check = [\"../check\"]\n}"), component + "12,11: Invalid path"},
		{"newline neither cut nor kept", secret("external {\n trailing_newline = \"maybe\"\n}"), component + "12,21: Invalid trailing_newline; \"maybe\" is neither \"trim\" nor \"keep\""},
		{"produced by nobody", secret("produced_by {}"), component + "11,1: Secret needs one producer"},
		{"produced by two", secret("produced_by {\n component = \"broker\"\n command = [\"x\"]\n}"), component + "11,1: Secret needs one producer"},
		{"produced by an empty command", secret("produced_by {\n command = []\n}"), component + "12,12: Empty command"},
		{"produced by its own component", secret("produced_by {\n component = \"shop\"\n}"), component + "12,14: Secret produced by its own component"},
		{"produced by a component that is nowhere", secret("produced_by {\n component = \"brokr\"\n}"), component + "12,14: Missing producer; shop waits for brokr: shop.x is produced by brokr, which is not active. Did you mean \"broker\"?"},
		{
			"produced by a component that is not active",
			merge(inSite("  component \"broker\" {}\n", ""), map[string]string{"jobs/shop/component.hcl": strings.Replace(shopFile, "reads = [\"broker.admin_token\"]\n", "\n", 1)}),
			component + "7,17: Missing producer; shop waits for broker: shop.token is produced by broker, which is not active. Add component \"broker\" {} to sites/one/site.hcl",
		},
		{"secrets without OpenBao, said once", merge(inSite("  component \"openbao\" {}\n", ""), map[string]string{"jobs/broker/component.hcl": "", "jobs/shop/component.hcl": "secret \"password\" {\n  generated {}\n}\nsecret \"b\" {\n  generated {}\n}\n"}), component + "1,8: Secrets without OpenBao; Component \"shop\" declares secrets: add component \"openbao\" {} to sites/one/site.hcl"},
		{"two rotations", secret("generated {}\nrotation {}\nrotation {}"), component + "13,1: Duplicate rotation block"},
		{"rotation with an unknown field", secret("generated {}\nrotation {\n evry = \"1d\"\n}"), component + "13,2: Unsupported argument; An argument named \"evry\" is not expected here. Did you mean \"every\"?"},
		{"rotated too often", secret("generated {}\nrotation {\n every = \"59m\"\n}"), component + "13,10: Invalid duration; \"59m\" is not a duration between 1h and 3650d such as \"30d\" or \"12h\""},
		{"rotated too rarely", secret("generated {}\nrotation {\n every = \"3651d\"\n}"), component + "13,10: Invalid duration"},
		{"rotated in something that is no duration", secret("generated {}\nrotation {\n every = \"monthly\"\n}"), component + "13,10: Invalid duration; \"monthly\" is not"},
		{"rotated never", secret("generated {}\nrotation {\n every = null\n}"), component + "13,10: Unsuitable value type"},
		{"drained for less than nothing", secret("generated {}\nrotation {\n drain = \"-1s\"\n}"), component + "13,10: Invalid duration; \"-1s\" is not a duration between 0s and 24h such as \"10m\""},
		{"drained for too long", secret("generated {}\nrotation {\n drain = \"25h\"\n}"), component + "13,10: Invalid duration"},
		{"rotation of what a job produces", secret("produced_by {\n component = \"broker\"\n}\nrotation {}"), component + "14,1: Rotation by somebody else; shop.x is produced by the job \"broker\", which also replaces it: leave rotation out"},
		{"rotation of what nobody can make", secret("external {}\nrotation {\n every = \"30d\"\n}"), component + "13,10: Rotation without a source; shop.x comes from outside, so that nobody can make it when it is due: leave every out, and rotate it by hand with `site secrets rotate shop.x --from-file`"},

		{"reads names nothing", map[string]string{"jobs/shop/component.hcl": strings.Replace(shopFile, "admin_token", "amin_token", 1)}, component + "1,10: Unknown secret in reads; No active component declares a secret \"broker.amin_token\". Did you mean \"broker.admin_token\"?"},
		{"reads names a secret twice", map[string]string{"jobs/shop/component.hcl": strings.Replace(shopFile, "[", "[\"broker.admin_token\", ", 1)}, component + "1,32: Duplicate reference"},
		{"a template reads what nobody declares", inTemplate("x\n  {{ with secret \"site/data/shop/pasword\" }}{{ end }}"), jobspec + "9,19: Unknown secret; No active component declares a secret \"shop.pasword\". Did you mean \"site/data/shop/password\"?"},
		{"a template reads what nothing resembles", inTemplate(`{{ with secret "site/data/shop/certificate_of_the_gateway" }}{{ end }}`), jobspec + textLine + ",17: Unknown secret; No active component declares a secret \"shop.certificate_of_the_gateway\". Component \"shop\" declares: shop.password, shop.token. Declare it in jobs/shop/component.hcl: secret \"certificate_of_the_gateway\" { … }"},
		{"a template reads of a component that is not active", inTemplate(`{{ with secret "site/data/warehouse/password_of_root" }}{{ end }}`), jobspec + textLine + ",17: Unknown secret; No active component declares a secret \"warehouse.password_of_root\". Component \"warehouse\" is not active on this site"},
		{"a template reads what reads does not list", merge(inTemplate(`{{ with secret "site/data/broker/admin_token" }}{{ end }}`), map[string]string{"jobs/shop/component.hcl": strings.Replace(shopFile, "reads = [\"broker.admin_token\"]\n", "\n", 1)}), jobspec + textLine + ",17: Undeclared read; broker.admin_token belongs to component \"broker\": add reads = [\"broker.admin_token\"] to jobs/shop/component.hcl"},
		{"a template reads what a longer list lacks", merge(inTemplate(`{{ with secret "site/data/broker/admin_token" }}{{ end }}`), map[string]string{"jobs/shop/component.hcl": strings.Replace(shopFile, "broker.admin_token", "password", 1)}), jobspec + textLine + ",17: Undeclared read; broker.admin_token belongs to component \"broker\": add \"broker.admin_token\" to reads at jobs/shop/component.hcl:1,9"},
		{"a computed path", inTemplate(`{{ with secret (printf "site/data/shop/%s" "password") }}{{ end }}`), jobspec + textLine + ",9: Computed path of a secret; The path must be a literal, so that the policy can be derived from it"},
		{"a path in a variable of the template", inTemplate(`{{ $p := "site/data/shop/password" }}{{ with secret $p }}{{ end }}`), jobspec + textLine + ",46: Computed path"},
		{"a path with an interpolation", map[string]string{"jobs/shop/shop.nomad.hcl": "locals {\n who = \"shop\"\n}\n" + jobWith(`{{ with secret "site/data/${local.who}/password" }}{{ end }}`)}, jobspec + "11,9: Computed path"},
		{"a secret without a path", inTemplate(`{{ secret }}`), jobspec + textLine + ",4: Computed path"},
		{"a template that writes", inTemplate(`{{ with secret "site/data/shop/password" "value=x" }}{{ end }}`), jobspec + textLine + ",17: Secret written by a template"},
		{"a template that writes through a pipe", inTemplate(`{{ with "value=x" | secret "site/data/shop/password" }}{{ end }}`), jobspec + textLine + ",29: Secret written by a template"},
		{"a template that lists", inTemplate(`{{ range secrets "site/metadata/shop" }}{{ end }}`), jobspec + textLine + ",19: Secret outside of the catalogue; No policy lets a job use secrets"},
		{"another mount", inTemplate(`{{ with secret "kv/data/shop/password" }}{{ end }}`), jobspec + textLine + ",17: Secret outside of the catalogue; No policy lets a job read \"kv/data/shop/password\": the secrets of a site are at site/data/COMPONENT/NAME"},
		{"a path without data", inTemplate(`{{ with secret "site/shop/password" }}{{ end }}`), jobspec + textLine + ",17: Secret outside of the catalogue; \"site/shop/password\" lacks data/ behind the mount: write \"site/data/shop/password\""},
		{"a path that is too long", inTemplate(`{{ with secret "site/data/shop/password/value" }}{{ end }}`), jobspec + textLine + ",17: Secret outside of the catalogue; \"site/data/shop/password/value\" is not site/data/COMPONENT/NAME"},
		{"a path with a version", inTemplate(`{{ with secret "site/data/shop/password?version=1" }}{{ end }}`), jobspec + textLine + ",17: Secret outside of the catalogue; \"site/data/shop/password?version=1\" asks for \"?version=1\": the generation is chosen by each deploy. Write \"site/data/shop/password\", or \"site/data/shop/password?version=previous\" for the one before it"},
		{"a path with an empty query", inTemplate(`{{ with secret "site/data/shop/password?" }}{{ end }}`), jobspec + textLine + ",17: Secret outside of the catalogue; \"site/data/shop/password?\" asks for \"?\""},
		{"a path with more than the previous version", inTemplate(`{{ with secret "site/data/shop/password?version=previous&x=1" }}{{ end }}`), jobspec + textLine + ",17: Secret outside of the catalogue"},
		{"the previous version of what nobody declares", inTemplate(`{{ with secret "site/data/shop/pasword?version=previous" }}{{ end }}`), jobspec + textLine + ",17: Unknown secret; No active component declares a secret \"shop.pasword\""},
		{"a path with a dot", inTemplate(`{{ with secret "site/data/shop/../broker" }}{{ end }}`), jobspec + textLine + ",17: Secret outside of the catalogue"},
		{"a template with an error", inTemplate("x\n{{ with secret }}"), jobspec + "10,1: Invalid template; unexpected EOF"},
		{"a template torn by a directive", inTemplate("%{ if true }{{ with secret \"site/data/shop/password\" }}%{ else }{{ if 1 }}%{ endif }x"), jobspec + "9,1: Unreadable template"},
		{"no vault block", map[string]string{"jobs/shop/shop.nomad.hcl": strings.Replace(jobWith(`{{ with secret "site/data/shop/password" }}{{ end }}`), "vault {}", "", 1)}, jobspec + "3,5: Task without a vault block; A template of task \"t\" reads a secret, for which it needs an identity: add vault {} to the task, its group or the job"},
		{"a cycle through a secret", merge(inTemplate(`{{ with secret "site/data/shop/token" }}{{ end }}`), map[string]string{"jobs/broker/component.hcl": "after = [\"shop\"]\n" + brokerFile}), jobspec + textLine + ",17: Components wait for each other; shop waits for broker (which produces shop.token) waits for shop"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(withStores(tt.files), "one", LoadOptions{Platform: stores()})
			got := problemsOf(t, err)
			if len(got) != 1 || !strings.HasPrefix(got[0], tt.want) {
				t.Errorf("got:\n%s\nwant the one line:\n%s", strings.Join(got, "\n"), tt.want)
			}
		})
	}
}

func TestPlatformJobsHaveNoIdentity(t *testing.T) {
	platform := stores()
	platform["jobs/openbao/openbao.nomad.hcl"] = &fstest.MapFile{Data: []byte("job \"openbao\" {\n  group \"g\" {\n    vault {}\n  }\n}\n")}
	platform["jobs/postgresql/component.hcl"] = &fstest.MapFile{Data: []byte("secret \"x\" {\n generated {}\n}\n")}
	platform["jobs/postgresql/postgresql.nomad.hcl"] = &fstest.MapFile{Data: []byte("job \"postgresql\" {\n  task \"t\" {\n    template {\n      data = \"{{ with secret \\\"site/data/postgresql/x\\\" }}{{ end }}\"\n    }\n  }\n}\n")}
	_, err := Load(withStores(nil), "one", LoadOptions{Platform: platform})
	got := problemsOf(t, err)
	want := []string{"jobs/openbao/openbao.nomad.hcl:3,5: Platform job with a vault block", "jobs/postgresql/postgresql.nomad.hcl:2,3: Platform job that reads a secret"}
	if len(got) != 2 || !strings.HasPrefix(got[0], want[0]) || !strings.HasPrefix(got[1], want[1]) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestReadsAreFoundWhereverTemplatesHaveThem(t *testing.T) {
	job := func(lines string) string { return "job \"shop\" {\n  vault {}\n  " + lines + "\n}\n" }
	task := func(lines string) string { return job("group \"g\" {\n task \"t\" {\n" + lines + "\n}\n}") }
	template := func(text string) string { return task("template {\n data = <<EOT\n" + text + "\nEOT\n}") }
	password := []string{"broker.admin_token", "shop.password"}
	for _, tt := range []struct {
		name, job string
		want      []string
	}{
		{"none", job(""), []string{"broker.admin_token"}},
		{"with", template(`{{ with secret "site/data/shop/password" }}{{ end }}`), password},
		{"in parentheses, with a field", template(`{{ (secret ("site/data/shop/password")).Data.data.value }}`), password},
		{"from a pipe", template(`{{ with "site/data/shop/password" | secret }}{{ end }}`), password},
		{"raw string and slash", template("{{ with secret `/site/data/shop/password` }}{{ end }}"), password},
		{"of the previous generation", template(`{{ with secret "/site/data/shop/password?version=previous" }}{{ end }}`), password},
		{"kept in a variable", template(`{{ $s := secret "site/data/shop/password" }}{{ $s.Data }}`), password},
		{"in an else", template(`{{ if env "A" }}{{ else if eq 1 2 }}{{ else }}{{ with secret "site/data/shop/password" }}{{ end }}{{ end }}`), password},
		{"in a range with break", template(`{{ range $i, $v := loop 3 }}{{ with secret "site/data/shop/password" }}{{ break }}{{ end }}{{ end }}`), password},
		{"as an argument", template(`{{ toJSON (secret "site/data/shop/password").Data | indent 2 }}`), password},
		{"in a defined template", template(`{{ define "x" }}{{ with secret "site/data/shop/password" }}{{ end }}{{ end }}{{ template "x" }}`), password},
		{"given to a defined template", template(`{{ define "x" }}{{ . }}{{ end }}{{ template "x" (secret "site/data/shop/password") }}`), password},
		{"in a comment: none", template(`{{/* secret "site/data/shop/pasword" */}}`), []string{"broker.admin_token"}},
		{"in plain text: none", template(`secret "site/data/shop/pasword"`), []string{"broker.admin_token"}},
		{"with other delimiters", task("template {\n left_delimiter = \"[[\"\n right_delimiter = \"]]\"\n data = \"[[ with secret \\\"site/data/shop/password\\\" ]][[ end ]] {{ if }}\"\n}"), password},
		{"between interpolations", template(`${var.x} {{ with secret "site/data/shop/password" }}{{ .Data.data.value }}:${NOMAD_PORT_http}{{ end }}`), password},
		{"within a directive", template("%{ if true }{{ with secret \"site/data/shop/password\" }}{{ end }}%{ endif }"), password},
		{"in an argument of a function", task("template {\n data = trimspace(\"{{ with secret \\\"site/data/shop/password\\\" }}{{ end }}\")\n}"), password},
		{"in a local", "locals {\n  t = \"{{ with secret \\\"site/data/shop/password\\\" }}{{ end }}\"\n}\n" + task("template {\n data = local.t\n}"), password},
		{"in an inserted local", "locals {\n  t = \"{{ with secret \\\"site/data/shop/password\\\" }}{{ end }}\"\n}\n" + template("x ${local.t}"), password},
		{"in a variable's default", "variable \"t\" {\n  default = \"{{ with secret \\\"site/data/shop/password\\\" }}{{ end }}\"\n}\n" + task("template {\n data = var.t\n}"), password},
		{"in both branches of a condition", task("template {\n data = true ? \"{{ with secret \\\"site/data/shop/password\\\" }}{{ end }}\" : \"{{ with secret \\\"site/data/shop/token\\\" }}{{ end }}\"\n}"), []string{"broker.admin_token", "shop.password", "shop.token"}},
		{"in a loop", template("%{ for x in [1] }{{ with secret \"site/data/shop/password\" }}{{ end }}%{ endfor }"), password},
		{"in a list and an object", task("template {\n data = join(\"\", [\"{{ with secret \\\"site/data/shop/password\\\" }}{{ end }}\", jsonencode({ a = \"{{ with secret \\\"site/data/shop/token\\\" }}{{ end }}\" })])\n}"), []string{"broker.admin_token", "shop.password", "shop.token"}},
		{"in a variable that the configuration sets", "variable \"t\" {}\n" + task("template {\n data = var.t\n}"), password},
		{"in a local that goes round: none", "locals {\n  a = \"${local.b} x\"\n  b = \"${local.a} x\"\n}\n" + task("template {\n data = local.a\n}"), []string{"broker.admin_token"}},
		{"in a dynamic block", task("dynamic \"template\" {\n for_each = [1]\n content {\n  data = \"{{ with secret \\\"site/data/shop/password\\\" }}{{ end }}\"\n }\n}"), password},
		{"twice and more", template("{{ with secret \"site/data/shop/password\" }}{{ end }}\n{{ with secret \"site/data/shop/password\" }}{{ end }}{{ with secret \"site/data/shop/token\" }}{{ end }}"), []string{"broker.admin_token", "shop.password", "shop.token"}},
		{"a list that allows is no second read", template(`{{ with secret "site/data/broker/admin_token" }}{{ end }}`), []string{"broker.admin_token"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := tt.job
			if strings.Contains(text, "${var.x}") {
				text = "variable \"x\" {\n  default = 1\n}\n" + text
			}
			component := shopFile
			if strings.Contains(text, `variable "t" {}`) {
				component += "variables = {\n  t = \"{{ with secret \\\"site/data/shop/password\\\" }}{{ end }}\"\n}\n"
			}
			s, err := Load(withStores(map[string]string{"jobs/shop/shop.nomad.hcl": text, "jobs/shop/component.hcl": component}), "one", LoadOptions{Platform: stores()})
			if err != nil {
				t.Fatal(err)
			}
			if got := namesOfReads(s.Component("shop")); !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestAReadHasItsPlace(t *testing.T) {
	s, err := Load(withStores(map[string]string{
		"jobs/shop/shop.nomad.hcl": jobWith("\n\n   {{ with secret \"site/data/shop/password\" }}{{ end }}\n{{ with secret \"site/data/broker/admin_token\" }}{{ end }}"),
	}), "one", LoadOptions{Platform: stores()})
	if err != nil {
		t.Fatal(err)
	}
	var places []string
	for _, read := range s.Component("shop").Reads {
		places = append(places, place(read.Range))
		if size := read.Range.End.Byte - read.Range.Start.Byte; size != len("site/data/")+len(read.Secret) {
			t.Errorf("%s: %d bytes", read.Secret, size)
		}
	}
	if want := []string{"jobs/shop/shop.nomad.hcl:11,17", "jobs/shop/shop.nomad.hcl:10,20"}; !slices.Equal(places, want) {
		t.Errorf("got %v, want %v", places, want)
	}
}

func TestSecretsOfAComponentWithErrorsMayBeRight(t *testing.T) {
	_, err := Load(withStores(map[string]string{
		"jobs/broker/component.hcl": "secrt \"admin_token\" {}\n",
		"jobs/shop/shop.nomad.hcl":  jobWith(`{{ with secret "site/data/broker/admin_token" }}{{ end }}`),
	}), "one", LoadOptions{Platform: stores()})
	if got := problemsOf(t, err); len(got) != 1 || !strings.HasPrefix(got[0], "jobs/broker/component.hcl:1,1: Unsupported block type") {
		t.Errorf("got:\n%s", strings.Join(got, "\n"))
	}
}

func TestTheModelOfSecrets(t *testing.T) {
	fsys := withStores(map[string]string{
		"scripts/check": "",
		"jobs/shop/component.hcl": shopFile + `secret "a" {
  description = "text"
  generated {
    length   = 16
    encoding = "hex"
  }
}
secret "b" {
  external {
    check            = ["./scripts/check", "-q"]
    trailing_newline = "keep"
  }
}
secret "c" {
  external {}
}
secret "d" {
  produced_by {
    command = ["mint", "--now"]
  }
  rotation {
    every = "1d12h"
    drain = "0s"
  }
}
secret "e" {
  external {}
  rotation {
    drain = "2h"
  }
}
secret "f" {
  generated {}
  rotation {}
}
`,
	})
	s, err := Load(fsys, "one", LoadOptions{Platform: stores()})
	if err != nil {
		t.Fatal(err)
	}
	secrets := map[string]Secret{}
	for _, secret := range s.Secrets() {
		secret.Range = hcl.Range{}
		if secret.Rotation != nil {
			secret.Rotation.Range = hcl.Range{}
		}
		secrets[secret.FullName()] = secret
	}
	want := map[string]Secret{
		"broker.admin_token": {Component: "broker", Name: "admin_token", Generated: &Generated{Length: 32, Encoding: "base64url"}},
		"shop.password":      {Component: "shop", Name: "password", Generated: &Generated{Length: 32, Encoding: "base64url"}},
		"shop.token":         {Component: "shop", Name: "token", ProducedBy: &Producer{Component: "broker"}},
		"shop.a":             {Component: "shop", Name: "a", Description: "text", Generated: &Generated{Length: 16, Encoding: "hex"}},
		"shop.b":             {Component: "shop", Name: "b", External: &External{Check: []string{"./scripts/check", "-q"}, KeepNewline: true}},
		"shop.c":             {Component: "shop", Name: "c", External: &External{}},
		"shop.d":             {Component: "shop", Name: "d", ProducedBy: &Producer{Command: []string{"mint", "--now"}}, Rotation: &Rotation{Every: 36 * time.Hour}},
		"shop.e":             {Component: "shop", Name: "e", External: &External{}, Rotation: &Rotation{Drain: 2 * time.Hour}},
		"shop.f":             {Component: "shop", Name: "f", Generated: &Generated{Length: 32, Encoding: "base64url"}, Rotation: &Rotation{Drain: time.Minute}},
	}
	if !reflect.DeepEqual(secrets, want) {
		t.Errorf("got %+v, want %+v", secrets, want)
	}
}

package site

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
)

// databaseFile declares one of each; what is added begins on line 16.
const databaseFile = `secret "password" {
  generated {}
}
database "shop" {
  owner = "shop"
}
role "shop" {
  login    = true
  password = "password"
}
role "readers" {}
grant "readers" {
  database   = "shop"
  privileges = ["CONNECT"]
}
`

// alternating is an alternating role with a secret of its own, and one line more, the eighth.
func alternating(name, line string) string {
	return "secret \"p\" {\n generated {}\n}\nrole \"" + name + "\" {\n login = true\n password = \"p\"\n alternating = true\n" + line + "\n}\n"
}

// userName is a job that logs in as an alternating role.
func userName(template string) map[string]string {
	return map[string]string{
		"jobs/shop/component.hcl":  strings.Replace(databaseFile, "login    = true", "login    = true\n  alternating = true", 1),
		"jobs/shop/shop.nomad.hcl": jobWith(template),
	}
}

func TestTheUserNameOfAnAlternatingRoleMayComeInOtherWays(t *testing.T) {
	for name, template := range map[string]string{
		"beside the password":       `{{ with secret "site/data/shop/password" }}{{ .Data.data.username }}:{{ .Data.data.value }}{{ end }}`,
		"by a read of its own":      `{{ with secret "site/data/shop/password" }}{{ .Data.data.value }}{{ end }}{{ with secret "site/data/shop/password" }}{{ index .Data.data "username" }}{{ end }}`,
		"with all that there is":    `{{ with secret "site/data/shop/password" }}{{ .Data.data | toJSON }}{{ end }}`,
		"not where nobody reads it": "plain .Data.data.value",
	} {
		t.Run(name, func(t *testing.T) {
			files := userName(template)
			files["jobs/broker/component.hcl"] = ""
			if _, err := Load(withStores(files), "one", LoadOptions{Platform: stores()}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestFaultsOfDatabases(t *testing.T) {
	inShop := func(text string) map[string]string {
		return map[string]string{"jobs/shop/component.hcl": databaseFile + text}
	}
	role := func(lines string) map[string]string { return inShop("role \"x\" {\n" + lines + "\n}\n") }
	database := func(lines string) map[string]string {
		return inShop("database \"x\" {\n" + lines + "\n}\n")
	}
	grant := func(lines string) map[string]string {
		return inShop("grant \"readers\" {\n database = \"shop\"\n" + lines + "\n}\n")
	}
	const component = "jobs/shop/component.hcl:"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string // start of the line
	}{
		{"database named badly", inShop("database \"Shop-1\" {\n owner = \"shop\"\n}"), component + "16,10: Invalid database name; \"Shop-1\" must be 1 to 63 lower-case letters"},
		{"database of Postgres", inShop("database \"template1\" {\n owner = \"shop\"\n}"), component + "16,10: Reserved database name; \"template1\" belongs to Postgres itself"},
		{"database without an owner", database(""), component + "16,14: Missing required argument"},
		{"database with an owner that is nobody", database("owner = \"shpo\""), component + "17,9: Unknown role; No active component declares a role \"shpo\". Did you mean \"shop\"?"},
		{"database with a limit out of range", database("owner = \"shop\"\nconnection_limit = -2"), component + "18,20: Invalid connection limit; -2 is not between 0 and 10000, or -1 for none"},
		{"database declared twice by one component", inShop("database \"shop\" {\n owner = \"shop\"\n}"), component + "16,10: Duplicate database; A database named \"shop\" is already declared at jobs/shop/component.hcl:4,10"},
		{"database declared by two components", map[string]string{"jobs/broker/component.hcl": "database \"shop\" {\n owner = \"shop\"\n}"}, "jobs/broker/component.hcl:1,10: Duplicate database; A database named \"shop\" is already declared at jobs/shop/component.hcl:4,10; a site has one Postgres"},
		{"role declared by two components", map[string]string{"jobs/broker/component.hcl": "role \"readers\" {}"}, "jobs/broker/component.hcl:1,6: Duplicate role; A role named \"readers\" is already declared at jobs/shop/component.hcl:11,6"},
		{"role named badly", inShop("role \"1x\" {}"), component + "16,6: Invalid role name"},
		{"superuser as a role", inShop("role \"postgres\" {}"), component + "16,6: Reserved role name"},
		{"role of Postgres", inShop("role \"pg_monitor\" {}"), component + "16,6: Reserved role name"},
		{"everybody as a role", inShop("role \"public\" {}"), component + "16,6: Reserved role name"},
		{"role with a limit out of range", role("connection_limit = 10001"), component + "17,20: Invalid connection limit"},
		{"password without login", role("password = \"password\""), component + "17,12: Password of a role without login; Add login = true to role \"x\""},
		{"peers without login", role("peers = [\"root\"]"), component + "17,9: Peers of a role without login"},
		{"login for nobody", role("login = true"), component + "16,1: Nobody can log in"},
		{"password that is no secret", role("login = true\npassword = \"pasword\""), component + "18,12: Unknown secret; No active component declares a secret \"shop.pasword\". Did you mean \"shop.password\"?"},
		{"password that nothing resembles", role("login = true\npassword = \"certificate_of_the_gateway\""), component + "18,12: Unknown secret; No active component declares a secret \"shop.certificate_of_the_gateway\". Declare it in jobs/shop/component.hcl: secret \"certificate_of_the_gateway\" { generated {} }"},
		{"password that a job produces", inShop("secret \"p\" {\n produced_by {\n component = \"broker\"\n }\n}\nrole \"x\" {\nlogin = true\npassword = \"p\"\n}"), component + "23,12: Password produced by a job"},
		{"peer that is no user", role("login = true\npeers = [\"a b\"]"), component + "18,10: Invalid peer"},
		{"peer twice", role("login = true\npeers = [\"root\", \"root\"]"), component + "18,18: Duplicate peer"},
		{"member of nothing", role("member_of = [\"reader\"]"), component + "17,14: Unknown role; No active component declares a role \"reader\". Did you mean \"readers\"?"},
		{"member twice", role("member_of = [\"readers\", \"readers\"]"), component + "17,25: Duplicate reference"},
		{"member of itself", role("member_of = [\"x\"]"), component + "17,14: Member of itself"},
		{"members of each other", inShop("role \"x\" {\n member_of = [\"y\"]\n}\nrole \"y\" {\n member_of = [\"x\"]\n}"), component + "17,15: Roles are members of each other; x is a member of y is a member of x"},
		{"alternating without login", role("alternating = true"), component + "17,15: Unsuitable alternating role; Two logins take turns for role \"x\": add login = true to it, or leave alternating out"},
		{"alternating without login, with a password", inShop("secret \"p\" {\n generated {}\n}\nrole \"x\" {\npassword = \"p\"\nalternating = true\n}"), component + "21,15: Unsuitable alternating role"},
		{"alternating without a password", role("login = true\nalternating = true"), component + "18,15: Unsuitable alternating role; Two logins take turns for role \"x\", each with its password: add password = \"SECRET\" to it"},
		{"alternating with peers", inShop(alternating("x", "peers = [\"root\"]")), component + "23,9: Unsuitable alternating role; Role \"x\" itself cannot log in, by a peer neither: declare another role for the peers"},
		{"alternating with replication", inShop(alternating("x", "replication = true")), component + "23,15: Unsuitable alternating role"},
		{"alternating with a long name", inShop(alternating(strings.Repeat("x", 62), "")), component + "19,6: Invalid role name; The name of an alternating role has at most 61 characters, since its logins are named with _a and _b behind it"},
		{"a role named as a login", inShop(alternating("x", "") + "role \"x_b\" {}"), component + "25,6: Duplicate role; \"x_b\" is a login of the alternating role \"x\" at jobs/shop/component.hcl:19,6; choose another name"},
		{"a role of another component named as a login", map[string]string{"jobs/shop/component.hcl": databaseFile + alternating("x", ""), "jobs/broker/component.hcl": "role \"x_a\" {}"}, "jobs/broker/component.hcl:1,6: Duplicate role; \"x_a\" is a login of the alternating role \"x\""},
		{"a login of an alternating role as an owner", inShop(alternating("x", "") + "database \"x\" {\n owner = \"x_a\"\n}"), component + "26,10: Unknown role; No active component declares a role \"x_a\". Did you mean \"x\"?"},
		{"a password of an alternating role and of another", inShop("role \"y\" {\n login = true\n password = \"p\"\n}\n" + alternating("x", "")), component + "25,13: Shared password of an alternating role; shop.p is the password of role \"y\" too, at jobs/shop/component.hcl:18,13, and one of the two is alternating"},
		{"a password of an alternating role and of another component's", map[string]string{"jobs/shop/component.hcl": databaseFile + alternating("x", ""), "jobs/broker/component.hcl": "role \"y\" {\n login = true\n password = \"shop.p\"\n}"}, "jobs/broker/component.hcl:3,13: Shared password of an alternating role; shop.p is the password of role \"x\" too"},
		{"a password that is rotated and has one login", map[string]string{"jobs/shop/component.hcl": strings.Replace(databaseFile, "generated {}", "generated {}\n  rotation {\n    every = \"30d\"\n  }", 1)}, component + "12,14: Password that cannot be rotated; shop.password has rotation.every at jobs/shop/component.hcl:3,3, and role \"shop\" has one login, which a new password would lock out of running tasks: add alternating = true to the role, and let its templates read the user name as .Data.data.username"},
		{"a password from outside that is rotated, said once", map[string]string{"jobs/shop/component.hcl": strings.Replace(databaseFile, "generated {}", "external {}\n  rotation {\n    every = \"30d\"\n  }", 1)}, component + "4,13: Rotation without a source; shop.password comes from outside"},
		{"a template that reads a password of two logins alone", userName(`{{ with secret "site/data/shop/password" }}{{ .Data.data.value }}{{ end }}`), "jobs/shop/shop.nomad.hcl:8,17: Password without its user name; shop.password is the password of the alternating role \"shop\", for which the logins shop_a and shop_b take turns: read the user name beside it, as .Data.data.username"},
		{"grant to nobody", inShop("grant \"writers\" {\n database = \"shop\"\n privileges = [\"CONNECT\"]\n}"), component + "16,7: Unknown role; No active component declares a role \"writers\""},
		{"grant on a database that is not there", inShop("grant \"readers\" {\n database = \"shp\"\n privileges = [\"CONNECT\"]\n}"), component + "17,13: Unknown database; No active component declares a database \"shp\". Did you mean \"shop\"?"},
		{"grant without privileges", grant("privileges = []"), component + "18,14: Empty list; Name at least one privilege: CONNECT, CREATE, TEMPORARY, or ALL"},
		{"privilege of another kind", grant("privileges = [\"CONNECT\", \"SELECT\"]"), component + "18,26: Unknown privilege; A database has no privilege \"SELECT\"; it has CONNECT, CREATE, TEMPORARY, or ALL"},
		{"privilege of tables on a schema", grant("schema = \"public\"\nprivileges = [\"SELECT\"]"), component + "19,15: Unknown privilege; A schema has no privilege \"SELECT\"; it has CREATE, USAGE, or ALL"},
		{"usage of a table", grant("schema = \"public\"\ntables = [\"*\"]\nprivileges = [\"USAGE\"]"), component + "20,15: Unknown privilege; A table has no"},
		{"insert into a sequence", grant("schema = \"public\"\nsequences = [\"*\"]\nprivileges = [\"INSERT\"]"), component + "20,15: Unknown privilege; A sequence has no"},
		{"select of a function", grant("schema = \"public\"\nfunctions = [\"*\"]\nprivileges = [\"SELECT\"]"), component + "20,15: Unknown privilege; A function has no privilege \"SELECT\"; it has EXECUTE, or ALL"},
		{"privilege of a later Postgres", grant("schema = \"public\"\ntables = [\"*\"]\nprivileges = [\"MAINTAIN\"]"), component + "20,15: Unknown privilege"},
		{"privilege in lower case", grant("privileges = [\"connect\"]"), component + "18,15: Privilege in lower case; Write \"CONNECT\""},
		{"privilege abbreviated", grant("privileges = [\"TEMP\"]"), component + "18,15: Abbreviated privilege; Write TEMPORARY"},
		{"privilege twice", grant("privileges = [\"CONNECT\", \"CONNECT\"]"), component + "18,26: Duplicate privilege"},
		{"all and more", grant("privileges = [\"ALL\", \"CONNECT\"]"), component + "18,15: Needless privilege"},
		{"two kinds", grant("schema = \"public\"\ntables = [\"*\"]\nsequences = [\"*\"]\nprivileges = [\"SELECT\"]"), component + "16,1: Grant on several kinds; The grant has tables and sequences; write one block for each"},
		{"tables without a schema", grant("tables = [\"*\"]\nprivileges = [\"SELECT\"]"), component + "18,10: Grant without a schema"},
		{"no tables", grant("schema = \"public\"\ntables = []\nprivileges = [\"SELECT\"]"), component + "19,10: Empty list"},
		{"all tables and more", grant("schema = \"public\"\ntables = [\"*\", \"x\"]\nprivileges = [\"SELECT\"]"), component + "19,11: Needless name"},
		{"a table twice", grant("schema = \"public\"\ntables = [\"x\", \"x\"]\nprivileges = [\"SELECT\"]"), component + "19,16: Duplicate name"},
		{"a table with its schema", grant("schema = \"public\"\ntables = [\"public.x\"]\nprivileges = [\"SELECT\"]"), component + "19,11: Invalid name"},
		{"a function without arguments", grant("schema = \"public\"\nfunctions = [\"refresh\"]\nprivileges = [\"EXECUTE\"]"), component + "19,14: Invalid function"},
		{"a function with a statement behind it", grant("schema = \"public\"\nfunctions = [\"f() TO x; --\"]\nprivileges = [\"EXECUTE\"]"), component + "19,14: Invalid function"},
		{"a schema with a quote", grant("schema = \"a\\\"b\"\nprivileges = [\"USAGE\"]"), component + "18,10: Invalid schema"},
		{"defaults for a schema", grant("schema = \"public\"\nprivileges = [\"USAGE\"]\ndefault_for = \"shop\""), component + "20,15: Unexpected default_for"},
		{"defaults for nobody", grant("schema = \"public\"\ntables = [\"*\"]\nprivileges = [\"SELECT\"]\ndefault_for = \"shpo\""), component + "21,15: Unknown role"},
		{"databases without Postgres, said once", map[string]string{"sites/one/site.hcl": strings.Replace(storesSite, "  component \"postgresql\" {}\n", "", 1)}, component + "4,10: Databases without Postgres; Component \"shop\" declares databases, roles or grants: add component \"postgresql\" {} to sites/one/site.hcl"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := map[string]string{"jobs/shop/component.hcl": databaseFile, "jobs/broker/component.hcl": ""}
			for name, content := range tt.files {
				files[name] = content
			}
			_, err := Load(withStores(files), "one", LoadOptions{Platform: stores()})
			got := problemsOf(t, err)
			if len(got) != 1 || !strings.HasPrefix(got[0], tt.want) {
				t.Errorf("got:\n%s\nwant the one line:\n%s", strings.Join(got, "\n"), tt.want)
			}
		})
	}
}

func TestAPasswordOfOneLoginMayBeRotatedByHand(t *testing.T) {
	for name, source := range map[string]string{
		"with a drain alone": "generated {}\n  rotation {\n    drain = \"1h\"\n  }",
		"as a default":       "generated {}\n  rotation {}",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(withStores(map[string]string{
				"jobs/broker/component.hcl": "", "jobs/shop/component.hcl": strings.Replace(databaseFile, "generated {}", source, 1),
			}), "one", LoadOptions{Platform: stores()})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPasswordsNeedOpenBaoToo(t *testing.T) {
	_, err := Load(withStores(map[string]string{
		"sites/one/site.hcl":        strings.Replace(storesSite, "  component \"openbao\" {}\n", "", 1),
		"jobs/shop/component.hcl":   databaseFile,
		"jobs/broker/component.hcl": "role \"a\" {\n  login    = true\n  password = \"shop.password\"\n}\nrole \"b\" {\n  login    = true\n  password = \"shop.password\"\n}\n",
	}), "one", LoadOptions{Platform: stores()})
	got := problemsOf(t, err)
	if len(got) != 2 || !strings.HasPrefix(got[0], `jobs/broker/component.hcl:3,14: Password without OpenBao; Component "broker" has roles with passwords, which OpenBao holds: add component "openbao" {} to sites/one/site.hcl`) ||
		!strings.HasPrefix(got[1], "jobs/shop/component.hcl:1,8: Secrets without OpenBao") {
		t.Errorf("got:\n%s", strings.Join(got, "\n"))
	}
}

func TestRolesOfAComponentWithErrorsMayBeRight(t *testing.T) {
	_, err := Load(withStores(map[string]string{
		"jobs/broker/component.hcl": "rol \"writers\" {}\n",
		"jobs/shop/component.hcl":   strings.Replace(databaseFile, `grant "readers"`, `grant "writers"`, 1),
	}), "one", LoadOptions{Platform: stores()})
	if got := problemsOf(t, err); len(got) != 1 || !strings.HasPrefix(got[0], "jobs/broker/component.hcl:1,1: Unsupported block type") {
		t.Errorf("got:\n%s", strings.Join(got, "\n"))
	}
}

func TestTheModelOfDatabases(t *testing.T) {
	s, err := Load(withStores(map[string]string{
		"jobs/broker/component.hcl": "role \"backup\" {\n login = true\n replication = true\n peers = [\"root\", \"backup\"]\n}\nrole \"other\" {\n login = true\n password = \"shop.password\"\n connection_limit = 5\n member_of = [\"readers\"]\n}\ndatabase \"other\" {\n owner = \"shop\"\n connection_limit = 0\n}\n",
		"jobs/shop/component.hcl": databaseFile + `
grant "readers" {
  database    = "shop"
  schema      = "public"
  tables      = ["*"]
  privileges  = ["SELECT", "INSERT"]
  default_for = "shop"
}
grant "readers" {
  database   = "shop"
  schema     = "public"
  sequences  = ["a_seq", "b_seq"]
  privileges = ["ALL"]
}
grant "readers" {
  database   = "shop"
  schema     = "public"
  functions  = ["f(timestamp with time zone, integer[])"]
  privileges = ["ALL"]
}
grant "readers" {
  database   = "shop"
  schema     = "public"
  tables     = ["Order"]
  privileges = ["ALL"]
}
grant "readers" {
  database   = "shop"
  schema     = "public"
  privileges = ["ALL"]
}
`,
	}), "one", LoadOptions{Platform: stores()})
	if err != nil {
		t.Fatal(err)
	}
	shop, broker := s.Component("shop"), s.Component("broker")
	roles := slices.Concat(shop.Roles, broker.Roles)
	databases := slices.Concat(shop.Databases, broker.Databases)
	for i := range roles {
		roles[i].Range = hcl.Range{}
	}
	for i := range databases {
		databases[i].Range = hcl.Range{}
	}
	for i := range shop.Grants {
		shop.Grants[i].Range = hcl.Range{}
	}
	if want := []Role{
		{Name: "shop", Login: true, Password: "shop.password", ConnectionLimit: -1},
		{Name: "readers", ConnectionLimit: -1},
		{Name: "backup", Login: true, Replication: true, Peers: []string{"root", "backup"}, ConnectionLimit: -1},
		{Name: "other", Login: true, Password: "shop.password", ConnectionLimit: 5, MemberOf: []string{"readers"}},
	}; !reflect.DeepEqual(roles, want) {
		t.Errorf("got %+v, want %+v", roles, want)
	}
	if want := []Database{{Name: "shop", Owner: "shop", ConnectionLimit: -1}, {Name: "other", Owner: "shop"}}; !reflect.DeepEqual(databases, want) {
		t.Errorf("got %+v, want %+v", databases, want)
	}
	if want := []Grant{
		{Role: "readers", Database: "shop", Object: OnDatabase, Privileges: []string{"CONNECT"}},
		{Role: "readers", Database: "shop", Schema: "public", Object: OnTables, Names: []string{"*"}, Privileges: []string{"INSERT", "SELECT"}, DefaultFor: "shop"},
		{Role: "readers", Database: "shop", Schema: "public", Object: OnSequences, Names: []string{"a_seq", "b_seq"}, Privileges: []string{"SELECT", "UPDATE", "USAGE"}},
		{Role: "readers", Database: "shop", Schema: "public", Object: OnFunctions, Names: []string{"f(timestamp with time zone, integer[])"}, Privileges: []string{"EXECUTE"}},
		{Role: "readers", Database: "shop", Schema: "public", Object: OnTables, Names: []string{"Order"}, Privileges: []string{"DELETE", "INSERT", "REFERENCES", "SELECT", "TRIGGER", "TRUNCATE", "UPDATE"}},
		{Role: "readers", Database: "shop", Schema: "public", Object: OnSchema, Privileges: []string{"CREATE", "USAGE"}},
	}; !reflect.DeepEqual(shop.Grants, want) {
		t.Errorf("got %+v, want %+v", shop.Grants, want)
	}
}

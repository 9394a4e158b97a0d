package host_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/site"
)

func withDatabases(roles ...site.Role) host.Input {
	in := input()
	in.Site.Components = append(in.Site.Components,
		site.Component{Name: site.PostgresComponent}, site.Component{Name: "shop", Roles: roles})
	return in
}

func TestWhoMayLogInIsGolden(t *testing.T) {
	for name, roles := range map[string][]site.Role{
		"no-roles": nil,
		"roles": {
			{Name: "shop", Login: true, Password: "shop.database_password"},
			{Name: "standby", Login: true, Replication: true, Password: "shop.standby_password"},
			// Words that mean something else in these files.
			{Name: "all", Login: true, Replication: true, Peers: []string{"all"}},
			{Name: "dumper", Login: true, Peers: []string{"root", "backup"}},
			{Name: "readers", Replication: true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			document := render(t, withDatabases(roles...))
			for _, kind := range []string{"pg_hba.conf", "pg_ident.conf"} {
				got := file(t, document, host.PostgresConfigPath+"/"+kind)
				if got.Mode != "0644" || got.Owner != "root" || got.Secret {
					t.Errorf("%+v", got)
				}
				golden(t, name+"."+kind, got.Content)
			}
		})
	}
}

func TestTheOrderOfComponentsIsNotThatOfLogins(t *testing.T) {
	roles := []site.Role{{Name: "b", Login: true, Peers: []string{"z", "a"}, Replication: true}, {Name: "a", Login: true, Peers: []string{"a"}, Replication: true}}
	first := render(t, withDatabases(roles...))
	slices.Reverse(roles)
	second := render(t, withDatabases(roles...))
	for _, kind := range []string{"pg_hba.conf", "pg_ident.conf"} {
		if path := host.PostgresConfigPath + "/" + kind; first.FileSHA256(path) != second.FileSHA256(path) {
			t.Errorf("%s differs", path)
		}
	}
}

func TestEveryKindOfHostKnowsTheActivePlatformComponents(t *testing.T) {
	kinds := map[string]site.Host{
		"a server and client": {Name: "gamma-1", Server: true, Client: true},
		"a server":            {Name: "gamma-1", Server: true},
		"a client":            {Name: "gamma-1", Client: true},
	}
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			in := input()
			in.Host = kind
			plain := render(t, in)
			if strings.Contains(file(t, plain, nomadConfig).Content, "vault {") || len(plain.Users)+len(plain.Groups) > 0 || plain.FileSHA256(host.PostgresConfigPath+"/pg_hba.conf") != "" {
				t.Errorf("something of a component that is not active: %+v", plain)
			}
			in.Site.Components = append(in.Site.Components, site.Component{Name: site.OpenBaoComponent}, site.Component{Name: site.PostgresComponent})
			both := render(t, in)
			if !strings.Contains(file(t, both, nomadConfig).Content, `jwt_auth_backend_path = "jwt-nomad"`) {
				t.Error("the agent does not know OpenBao")
			}
			if want := []host.User{{Name: "site-postgresql", UID: 5432, Group: "site-postgresql", Home: "/var/lib/postgresql"}}; !reflect.DeepEqual(both.Users, want) {
				t.Errorf("users %+v", both.Users)
			}
			if want := []host.Group{{Name: "site-postgresql", GID: 5432}}; !reflect.DeepEqual(both.Groups, want) {
				t.Errorf("groups %+v", both.Groups)
			}
			folder := host.Directory{Path: "/etc/site-postgresql", Owner: "root", Group: "root", Mode: "0755"}
			if !slices.Contains(both.Directories, folder) {
				t.Errorf("directories %+v", both.Directories)
			}
		})
	}
}

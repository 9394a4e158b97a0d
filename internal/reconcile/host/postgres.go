package host

import (
	"slices"
	"strings"
)

// What the database's container finds on its host.
const (
	// PostgresConfigPath is the folder of who may log in, and how.
	PostgresConfigPath = "/etc/site-postgresql"
	// PostgresUser is who the container runs as. It has a name on the host,
	// whose users the container sees: peer authentication looks names up.
	PostgresUser = "site-postgresql"
	// PostgresUID is also the group's id.
	PostgresUID  = 5432
	postgresHome = "/var/lib/postgresql"
)

// peer is a line of pg_ident.conf.
type peer struct{ User, Role string }

// postgresFiles names the server's user in the document, and makes the files of
// who may log in.
func postgresFiles(in Input, document *Document) ([]File, error) {
	document.Groups = append(document.Groups, Group{Name: PostgresUser, GID: PostgresUID})
	document.Users = append(document.Users, User{Name: PostgresUser, UID: PostgresUID, Group: PostgresUser, Home: postgresHome})

	var peers []peer
	var replication []string
	for _, component := range in.Site.Components {
		for _, role := range component.Roles {
			if role.Replication && role.Login {
				replication = append(replication, quote(role.Name))
			}
			for _, user := range role.Peers {
				peers = append(peers, peer{User: quote(user), Role: quote(role.Name)})
			}
		}
	}
	// The order of components is not that of logins.
	slices.Sort(replication)
	slices.SortFunc(peers, func(a, b peer) int {
		return strings.Compare(a.User+" "+a.Role, b.User+" "+b.Role)
	})
	values := map[string]any{
		"Host": in.Host.Name, "Replication": slices.Compact(replication), "Peers": slices.Compact(peers),
	}
	var files []File
	for _, name := range []string{"pg_hba.conf", "pg_ident.conf"} {
		content, err := render(in.Templates, "postgresql/"+name+".tmpl", values)
		if err != nil {
			return nil, err
		}
		files = append(files, newFile(PostgresConfigPath+"/"+name, "0644", content))
	}
	return files, nil
}

// quote makes a name one that has no special meaning in these files, such as
// "all" or "replication".
func quote(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

package host_test

import (
	"slices"
	"testing"

	"github.com/nomad-site/site/internal/reconcile/host"
)

// desired has one of each thing; observed is a machine on which all are as they should be.
func desired() host.Document {
	return host.Document{
		Version:     host.DocumentVersion,
		Packages:    []host.Package{{Name: "podman", Version: "4.3.1"}},
		Groups:      []host.Group{{Name: "orders", GID: 3000}},
		Users:       []host.User{{Name: "orders", UID: 3000, Group: "orders"}},
		Directories: []host.Directory{{Path: "/srv/orders", Owner: "3000", Group: "orders", Mode: "0750"}},
		Binaries:    []host.Binary{{Path: "/opt/site/bin/nomad", SHA256: "aa", Mode: "0755"}},
		Files: []host.File{
			{Path: "/etc/nomad.d/nomad.hcl", Owner: "root", Group: "root", Mode: "0600", SHA256: "bb"},
			{Path: "/etc/nomad.d/ca.crt", Owner: "root", Group: "root", Mode: "0600", SHA256: "dd"},
		},
		Units: []host.Unit{{Name: "nomad.service", RestartOn: []string{"/etc/nomad.d/nomad.hcl", "/opt/site/bin/nomad"}, ReloadOn: []string{"/etc/nomad.d/ca.crt"}}},
	}
}

func observed() host.Observation {
	return host.Observation{
		Packages:    map[string]string{"podman": "4.3.1"},
		Groups:      map[string]host.Group{"orders": {Name: "orders", GID: 3000}},
		Users:       map[string]host.User{"orders": {Name: "orders", UID: 3000, Group: "orders"}},
		Directories: map[string]host.ObservedPath{"/srv/orders": {Exists: true, Kind: "directory", Owner: "orders", OwnerID: "3000", Group: "orders", GroupID: "3000", Mode: "0750"}},
		Binaries:    map[string]host.ObservedPath{"/opt/site/bin/nomad": {Exists: true, Kind: "file", Owner: "root", Group: "root", Mode: "0755", SHA256: "aa"}},
		Files: map[string]host.ObservedPath{
			"/etc/nomad.d/nomad.hcl": {Exists: true, Kind: "file", Owner: "root", Group: "root", Mode: "0600", SHA256: "bb"},
			"/etc/nomad.d/ca.crt":    {Exists: true, Kind: "file", Owner: "root", Group: "root", Mode: "0600", SHA256: "dd"},
		},
		Units: map[string]host.ObservedUnit{"nomad.service": {Loaded: true, Active: "active", Enabled: "enabled"}},
	}
}

func TestDiffNamesExactlyWhatDiffers(t *testing.T) {
	const config, binary, folder, unit = "/etc/nomad.d/nomad.hcl", "/opt/site/bin/nomad", "/srv/orders", "nomad.service"
	const authority = "/etc/nomad.d/ca.crt"
	path := func(paths map[string]host.ObservedPath, name string, change func(*host.ObservedPath)) {
		it := paths[name]
		change(&it)
		paths[name] = it
	}
	service := func(o *host.Observation, change func(*host.ObservedUnit)) {
		it := o.Units[unit]
		change(&it)
		o.Units[unit] = it
	}
	for _, test := range []struct {
		name    string
		breakIt func(*host.Observation)
		want    []string
	}{
		{"nothing", func(*host.Observation) {}, nil},
		{"a newer package is fine", func(o *host.Observation) { o.Packages["podman"] = "5.0" }, nil},
		{"a package is missing", func(o *host.Observation) { delete(o.Packages, "podman") },
			[]string{"create package alpha-1: podman (not installed, want 4.3.1)"}},
		{"a package is old", func(o *host.Observation) { o.Packages["podman"] = "3.0"; o.OldPackages = []string{"podman"} },
			[]string{"update package alpha-1: podman (installed 3.0, want 4.3.1 or newer)"}},
		{"a group is missing", func(o *host.Observation) { delete(o.Groups, "orders") },
			[]string{"create group alpha-1: orders (missing)"}},
		{"a group has another gid", func(o *host.Observation) { o.Groups["orders"] = host.Group{GID: 17} },
			[]string{"update group alpha-1: orders (gid 17, want 3000)"}},
		{"a user is missing", func(o *host.Observation) { delete(o.Users, "orders") },
			[]string{"create user alpha-1: orders (missing)"}},
		{"a user has another uid", func(o *host.Observation) { o.Users["orders"] = host.User{UID: 17} },
			[]string{"update user alpha-1: orders (uid 17, want 3000)"}},
		{"a user has another group", func(o *host.Observation) { o.Users["orders"] = host.User{UID: 3000, Group: "users"} },
			[]string{"update user alpha-1: orders (group users, want orders)"}},
		{"a folder is missing", func(o *host.Observation) { delete(o.Directories, folder) },
			[]string{"create directory alpha-1: /srv/orders (missing)"}},
		{"a file stands where a folder should", func(o *host.Observation) {
			path(o.Directories, folder, func(p *host.ObservedPath) { p.Kind = "file" })
		}, []string{"update directory alpha-1: /srv/orders (is a file)"}},
		{"an owner without a name is compared by number", func(o *host.Observation) {
			path(o.Directories, folder, func(p *host.ObservedPath) { p.Owner = "3000" })
		}, nil},
		{"a folder has another owner", func(o *host.Observation) {
			path(o.Directories, folder, func(p *host.ObservedPath) { p.Owner, p.OwnerID = "root", "0" })
		}, []string{"update directory alpha-1: /srv/orders (owner root, want 3000)"}},
		{"a folder has another group", func(o *host.Observation) {
			path(o.Directories, folder, func(p *host.ObservedPath) { p.Group, p.GroupID = "root", "0" })
		}, []string{"update directory alpha-1: /srv/orders (group root, want orders)"}},
		{"a folder has another mode", func(o *host.Observation) {
			path(o.Directories, folder, func(p *host.ObservedPath) { p.Mode = "0777" })
		}, []string{"update directory alpha-1: /srv/orders (mode 0777, want 0750)"}},
		{"a file that a unit reads was edited: the unit restarts", func(o *host.Observation) {
			path(o.Files, config, func(p *host.ObservedPath) { p.SHA256 = "cc" })
		}, []string{
			"update file alpha-1: /etc/nomad.d/nomad.hcl (content differs)",
			"restart unit alpha-1: nomad.service (/etc/nomad.d/nomad.hcl changes)",
		}},
		{"an executable is missing: its unit restarts", func(o *host.Observation) { delete(o.Binaries, binary) }, []string{
			"create binary alpha-1: /opt/site/bin/nomad (missing)",
			"restart unit alpha-1: nomad.service (/opt/site/bin/nomad changes)",
		}},
		{"a symbolic link is no file", func(o *host.Observation) {
			path(o.Files, config, func(p *host.ObservedPath) { p.Kind = "symlink" })
		}, []string{
			"update file alpha-1: /etc/nomad.d/nomad.hcl (is a symlink)",
			"restart unit alpha-1: nomad.service (/etc/nomad.d/nomad.hcl changes)",
		}},
		{"a unit is not there", func(o *host.Observation) { delete(o.Units, unit) },
			[]string{"start unit alpha-1: nomad.service (not there)"}},
		{"a unit was stopped", func(o *host.Observation) { service(o, func(u *host.ObservedUnit) { u.Active = "inactive" }) },
			[]string{"start unit alpha-1: nomad.service (inactive)"}},
		{"a stopped unit is started once, whatever changed", func(o *host.Observation) {
			service(o, func(u *host.ObservedUnit) { u.Active = "failed" })
			path(o.Files, config, func(p *host.ObservedPath) { p.SHA256 = "cc" })
		}, []string{
			"update file alpha-1: /etc/nomad.d/nomad.hcl (content differs)",
			"start unit alpha-1: nomad.service (failed)",
		}},
		{"a unit runs with an old file", func(o *host.Observation) { service(o, func(u *host.ObservedUnit) { u.Stale = config }) },
			[]string{"restart unit alpha-1: nomad.service (started before /etc/nomad.d/nomad.hcl changed)"}},
		{"a file that a unit takes anew was edited: the unit reloads", func(o *host.Observation) {
			path(o.Files, authority, func(p *host.ObservedPath) { p.SHA256 = "cc" })
		}, []string{
			"update file alpha-1: /etc/nomad.d/ca.crt (content differs)",
			"reload unit alpha-1: nomad.service (/etc/nomad.d/ca.crt changes)",
		}},
		{"a unit that restarts need not reload", func(o *host.Observation) {
			path(o.Files, authority, func(p *host.ObservedPath) { p.SHA256 = "cc" })
			service(o, func(u *host.ObservedUnit) { u.Stale = config })
		}, []string{
			"update file alpha-1: /etc/nomad.d/ca.crt (content differs)",
			"restart unit alpha-1: nomad.service (started before /etc/nomad.d/nomad.hcl changed)",
		}},
		{"a unit was not told of a file", func(o *host.Observation) { service(o, func(u *host.ObservedUnit) { u.Outdated = authority }) },
			[]string{"reload unit alpha-1: nomad.service (has not read /etc/nomad.d/ca.crt since it changed)"}},
		{"systemd has not read a unit file", func(o *host.Observation) { service(o, func(u *host.ObservedUnit) { u.NeedsReload = true }) },
			[]string{"restart unit alpha-1: nomad.service (its unit file changed on disk)"}},
		{"a unit does not start at boot", func(o *host.Observation) { service(o, func(u *host.ObservedUnit) { u.Enabled = "disabled" }) },
			[]string{"update unit alpha-1: nomad.service (disabled, want enabled)"}},
		{"a static unit is fine", func(o *host.Observation) { service(o, func(u *host.ObservedUnit) { u.Enabled = "static" }) }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			actual := observed()
			test.breakIt(&actual)
			var got []string
			for _, change := range host.Diff("alpha-1", desired(), actual) {
				got = append(got, change.String())
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got  %q\nwant %q", got, test.want)
			}
		})
	}
}

func TestABareHostLacksEverythingInTheOrderOfRepair(t *testing.T) {
	var kinds []string
	for _, change := range host.Diff("alpha-1", desired(), host.Observation{}) {
		kinds = append(kinds, change.Kind)
	}
	if want := []string{"package", "group", "user", "directory", "binary", "file", "file", "unit"}; !slices.Equal(kinds, want) {
		t.Errorf("got %v, want %v", kinds, want)
	}
}

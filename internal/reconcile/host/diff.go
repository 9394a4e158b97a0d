package host

import (
	"fmt"
	"slices"

	"github.com/nomad-site/site/internal/plan"
)

// Diff names every difference between what host should be and what was
// observed, in the order in which they are repaired.
func Diff(host string, desired Document, actual Observation) []plan.Change {
	d := differ{host: host}
	for _, p := range desired.Packages {
		if installed, ok := actual.Packages[p.Name]; !ok {
			d.add(plan.Create, "package", p.Name, "not installed, want %s", p.Version)
		} else if slices.Contains(actual.OldPackages, p.Name) {
			d.add(plan.Update, "package", p.Name, "installed %s, want %s or newer", installed, p.Version)
		}
	}
	for _, group := range desired.Groups {
		if got, ok := actual.Groups[group.Name]; !ok {
			d.add(plan.Create, "group", group.Name, "missing")
		} else if got.GID != group.GID {
			d.add(plan.Update, "group", group.Name, "gid %d, want %d", got.GID, group.GID)
		}
	}
	for _, user := range desired.Users {
		if got, ok := actual.Users[user.Name]; !ok {
			d.add(plan.Create, "user", user.Name, "missing")
		} else if got.UID != user.UID {
			d.add(plan.Update, "user", user.Name, "uid %d, want %d", got.UID, user.UID)
		} else if got.Group != user.Group {
			d.add(plan.Update, "user", user.Name, "group %s, want %s", got.Group, user.Group)
		}
	}
	for _, directory := range desired.Directories {
		d.path("directory", directory.Path, wanted{"directory", directory.Owner, directory.Group, directory.Mode, ""}, actual.Directories[directory.Path])
	}
	for _, binary := range desired.Binaries {
		d.path("binary", binary.Path, wanted{"file", "root", "root", binary.Mode, binary.SHA256}, actual.Binaries[binary.Path])
	}
	for _, file := range desired.Files {
		d.path("file", file.Path, wanted{"file", file.Owner, file.Group, file.Mode, file.SHA256}, actual.Files[file.Path])
	}
	changed := map[string]bool{}
	for _, change := range d.changes {
		changed[change.Target] = true
	}
	for _, unit := range desired.Units {
		d.unit(unit, actual.Units[unit.Name], changed)
	}
	return d.changes
}

type differ struct {
	host    string
	changes []plan.Change
}

func (d *differ) add(action plan.Action, kind, target, reason string, args ...any) {
	d.changes = append(d.changes, plan.Change{
		Action: action, Kind: kind, Host: d.host, Target: target, Reason: fmt.Sprintf(reason, args...),
	})
}

type wanted struct{ kind, owner, group, mode, sha256 string }

func (d *differ) path(kind, path string, want wanted, got ObservedPath) {
	switch {
	case !got.Exists:
		d.add(plan.Create, kind, path, "missing")
	case got.Kind != want.kind:
		d.add(plan.Update, kind, path, "is a %s", got.Kind)
	case want.sha256 != "" && got.SHA256 != want.sha256:
		d.add(plan.Update, kind, path, "content differs")
	case want.owner != got.Owner && want.owner != got.OwnerID:
		d.add(plan.Update, kind, path, "owner %s, want %s", got.Owner, want.owner)
	case want.group != got.Group && want.group != got.GroupID:
		d.add(plan.Update, kind, path, "group %s, want %s", got.Group, want.group)
	case got.Mode != want.mode:
		d.add(plan.Update, kind, path, "mode %s, want %s", got.Mode, want.mode)
	}
}

func (d *differ) unit(unit Unit, got ObservedUnit, changed map[string]bool) {
	switch {
	case got.Active != "active" && got.Active != "":
		d.add(plan.Start, "unit", unit.Name, "%s", got.Active)
		return
	case !got.Loaded || got.Active == "":
		d.add(plan.Start, "unit", unit.Name, "not there")
		return
	}
	switch {
	case firstOf(unit.RestartOn, changed) != "":
		d.add(plan.Restart, "unit", unit.Name, "%s changes", firstOf(unit.RestartOn, changed))
	case got.Stale != "":
		d.add(plan.Restart, "unit", unit.Name, "started before %s changed", got.Stale)
	case got.NeedsReload:
		d.add(plan.Restart, "unit", unit.Name, "its unit file changed on disk")
	case firstOf(unit.ReloadOn, changed) != "":
		d.add(plan.Reload, "unit", unit.Name, "%s changes", firstOf(unit.ReloadOn, changed))
	case got.Outdated != "":
		d.add(plan.Reload, "unit", unit.Name, "has not read %s since it changed", got.Outdated)
	case got.Enabled != "enabled" && got.Enabled != "static":
		d.add(plan.Update, "unit", unit.Name, "%s, want enabled", got.Enabled)
	}
}

// firstOf is the first of the paths that changes, or empty.
func firstOf(paths []string, changed map[string]bool) string {
	at := slices.IndexFunc(paths, func(path string) bool { return changed[path] })
	if at < 0 {
		return ""
	}
	return paths[at]
}

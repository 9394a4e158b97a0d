// Package host is the desired and actual state of one machine. The same
// Document is what the Ansible role applies and what `site-host observe`
// compares with reality.
package host

import "time"

// DocumentVersion is raised when the meaning of a field changes.
const DocumentVersion = 1

// Document is what a host must be.
type Document struct {
	Version     int         `json:"version"`
	Packages    []Package   `json:"packages"`
	Groups      []Group     `json:"groups,omitempty"`
	Users       []User      `json:"users,omitempty"`
	Directories []Directory `json:"directories"`
	Files       []File      `json:"files"`
	Binaries    []Binary    `json:"binaries"`
	Units       []Unit      `json:"units"`
	// CredentialsExpire is when the agent's certificate among the secret files does.
	CredentialsExpire time.Time `json:"credentials_expire,omitzero"`
	// CredentialsIssuer is the sha256 of the CA certificate that it was signed with.
	CredentialsIssuer string `json:"credentials_issuer,omitempty"`
}

// Package is a Debian package, satisfied by this version or a newer one.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Group is a system group.
type Group struct {
	Name string `json:"name"`
	GID  int    `json:"gid"`
}

// User is a system user.
type User struct {
	Name  string `json:"name"`
	UID   int    `json:"uid"`
	Group string `json:"group"`
	Home  string `json:"home"`
}

// Directory is a folder with its owner and mode ("0755").
type Directory struct {
	Path  string `json:"path"`
	Owner string `json:"owner"`
	Group string `json:"group"`
	Mode  string `json:"mode"`
}

// File is a file of the host. Content is empty for secret files in every copy
// that leaves memory; SHA256 is always set.
type File struct {
	Path   string `json:"path"`
	Owner  string `json:"owner"`
	Group  string `json:"group"`
	Mode   string `json:"mode"`
	SHA256 string `json:"sha256"`
	Secret bool   `json:"secret,omitempty"`
	// Content is text; left out of what observe needs.
	Content string `json:"content,omitempty"`
}

// Binary is an executable copied out of the artifact store.
type Binary struct {
	Path string `json:"path"`
	// SHA256 is the digest of the executable, and its name in the store.
	SHA256 string `json:"sha256"`
	Mode   string `json:"mode"`
}

// Unit is a systemd unit that must be enabled and active.
type Unit struct {
	Name string `json:"name"`
	// RestartOn lists files, binaries and drop-ins; a unit that became active
	// before one of them was last modified must be restarted.
	RestartOn []string `json:"restart_on,omitempty"`
	// ReloadOn lists files that it takes anew when it is told to reload: no restart.
	ReloadOn []string `json:"reload_on,omitempty"`
}

// Observation is what `site-host observe` found. It lists only differences'
// raw material: the actual state of everything that the document names.
type Observation struct {
	Version      int    `json:"version"`
	Hostname     string `json:"hostname"`
	OS           string `json:"os"`           // ID of os-release, such as "debian"
	OSVersion    string `json:"os_version"`   // VERSION_ID
	Architecture string `json:"architecture"` // as dpkg says it: amd64, arm64
	CPUs         int    `json:"cpus"`
	MemoryBytes  int64  `json:"memory_bytes"`
	// FreeBytes is the room left where the store lies.
	FreeBytes int64 `json:"free_bytes"`
	// Addresses are the host's global unicast addresses, that of the default route first.
	Addresses   []string                `json:"addresses"`
	Packages    map[string]string       `json:"packages"`     // name → installed version; absent: not installed
	OldPackages []string                `json:"old_packages"` // installed, older than the document asks (dpkg --compare-versions)
	Groups      map[string]Group        `json:"groups"`
	Users       map[string]User         `json:"users"`
	Directories map[string]ObservedPath `json:"directories"`
	Files       map[string]ObservedPath `json:"files"`
	Binaries    map[string]ObservedPath `json:"binaries"`
	Units       map[string]ObservedUnit `json:"units"`
}

// ObservedPath is a path as it is.
type ObservedPath struct {
	Exists bool `json:"exists"`
	// OwnerID and GroupID are the numeric ids, Owner and Group their names where they have one.
	OwnerID string `json:"owner_id,omitempty"`
	GroupID string `json:"group_id,omitempty"`
	Kind    string `json:"kind"` // file, directory, symlink, other
	Owner   string `json:"owner"`
	Group   string `json:"group"`
	Mode    string `json:"mode"`
	SHA256  string `json:"sha256,omitempty"`
}

// ObservedUnit is a unit as it is.
type ObservedUnit struct {
	Loaded  bool   `json:"loaded"`
	Active  string `json:"active"`  // active, inactive, failed, …
	Enabled string `json:"enabled"` // enabled, disabled, static, …
	// Stale names the first RestartOn path that changed after the unit started.
	Stale string `json:"stale,omitempty"`
	// Outdated names the first ReloadOn path that changed after the unit last read it.
	Outdated string `json:"outdated,omitempty"`
	// NeedsReload is systemd's own NeedDaemonReload.
	NeedsReload bool `json:"needs_reload,omitempty"`
}

// Package site is the configuration model: what a site's directory in git says.
package site

import (
	"time"

	"github.com/hashicorp/hcl/v2"
)

// Site is the desired-state document of one site.
type Site struct {
	Name string
	// Deadline bounds one whole rollout. Default 15 min.
	Deadline time.Duration
	// SSHConfigFile is an OpenSSH client configuration relative to the
	// repository's work tree; empty for the user's own ~/.ssh/config.
	SSHConfigFile string
	// KeepReleases is how many releases stay available to a rollback. Default 5.
	KeepReleases int
	Datacenter   string // default "dc1"
	Region       string // default "global"
	Hosts        []Host
	Operators    []Operator
	Components   []Component
	// NomadSettings are extra agent settings by dotted key, for labs and odd clouds
	// (such as fingerprint.denylist).
	FingerprintDenylist []string
	// PodmanDriver and Nomad pins can be overridden by tool name → catalogue entry name.
	Range hcl.Range
}

// Host is a machine of the site.
type Host struct {
	Name string
	// Address is what SSH dials: a name of the ssh config, a DNS name or an IP.
	Address string
	Port    int    // 0: from the ssh config, else 22
	User    string // empty: from the ssh config, else the current user
	// HostKeys are pinned public keys in authorized_keys form ("ssh-ed25519 AAAA…").
	// sites/<name>/known_hosts and the ssh config's UserKnownHostsFile count too.
	HostKeys []string
	// PrivateAddress is what agents advertise to each other. Empty: the
	// address of the interface with the default route or, failing that, the first global one.
	PrivateAddress string
	Server         bool
	Client         bool
	IdentityFile   string
	Range          hcl.Range
}

// Operator may log in with an SSH key.
type Operator struct {
	Name string
	// PublicKey is in authorized_keys form.
	PublicKey string
	Range     hcl.Range
}

// Component is a folder under jobs/: one Nomad job and what it needs.
type Component struct {
	Name string
	// Folder is slash-separated, relative to the repository root ("jobs/hello").
	Folder string
	// Jobspec is the content of <name>.nomad.hcl, JobspecPath its place.
	Jobspec     []byte
	JobspecPath string
	Platform    bool
	Artifacts   []Artifact
	Directories []Directory
	// After names components that must be healthy first.
	After []string
	// Variables are the values for the jobspec's own HCL variables, as JSON
	// expressions by name (component defaults merged with the site's overrides).
	Variables map[string]string
	Range     hcl.Range
}

// ArtifactKind says in which dialect an artifact is served.
type ArtifactKind string

// The kinds.
const (
	Image ArtifactKind = "image"
	File  ArtifactKind = "file"
)

// Artifact is bytes with a digest. Exactly one source is set.
type Artifact struct {
	Name string
	Kind ArtifactKind

	GoPackage     string   // import path or ./path of a main package, relative to the repository root
	DockerArchive string   // path of a `docker save` tar
	OCILayout     string   // path of an OCI image layout (folder or tar)
	Path          string   // path of a plain file
	URL           string   // with SHA256
	Tool          string   // name of a pinned tool; Executable below names the file in it
	DebPackages   []string // image of .deb packages from the lock (Debian image)

	SHA256     string // required with URL, optional proof for path sources
	Executable string
	Entrypoint []string // optional override for images
	User       string   // numeric uid[:gid] for assembled images; default 65532:65532
	Range      hcl.Range
}

// Directory is a host folder for bind mounts; it exists before the job and
// after a reboot, also below /run.
type Directory struct {
	Path  string
	Owner string // numeric or name; default "root"
	Group string
	Mode  string // octal text such as "0750"; default "0755"
	Range hcl.Range
}

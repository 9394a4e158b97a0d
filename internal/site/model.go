// Package site is the configuration model: what a site's directory in git says.
package site

import (
	"slices"
	"strings"
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
	// ObjectStore is nil where artifacts travel by SSH alone.
	ObjectStore *ObjectStore
	// NomadSettings are extra agent settings by dotted key, for labs and odd clouds
	// (such as fingerprint.denylist).
	FingerprintDenylist []string
	// PodmanDriver and Nomad pins can be overridden by tool name → catalogue entry name.
	Range hcl.Range
}

// ObjectStore is the bucket from which hosts pull what they lack.
type ObjectStore struct {
	// Endpoint is the URL of the S3 API, without the bucket.
	Endpoint string
	// Region is what requests are signed for. Default "auto" with a provider, else "us-east-1".
	Region string
	Bucket string
	// PathStyle has the bucket in the path instead of the host name. Default true.
	PathStyle bool
	// ServiceURL is the HTTPS address at which workstations reach the site's
	// object-storage-service. Empty: through SSH.
	ServiceURL string
	// Cloudflare is nil where the keys are brought by hand.
	Cloudflare *Cloudflare
	Range      hcl.Range
}

// Cloudflare is the provider whose API makes the store's keys.
type Cloudflare struct {
	AccountID string
	// Jurisdiction is empty, "eu" or "fedramp".
	Jurisdiction string
	// API is the URL of the provider's API. Default: the provider's own.
	API string
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
	// Rights is RightsDeploy (default), or RightsRotate for a machine that only
	// rotates secrets.
	Rights string
	Range  hcl.Range
}

// What an operator may do.
const (
	// RightsDeploy is everything that site does.
	RightsDeploy = "deploy"
	// RightsRotate is to rotate secrets, and nothing else.
	RightsRotate = "rotate"
)

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
	// Secrets are the component's part of the catalogue.
	Secrets []Secret
	// Reads are all secrets that the job may read, by its templates and by
	// `reads` of component.hcl, each once, sorted by name.
	Reads []SecretRead
	// Databases, Roles and Grants are what it needs of Postgres.
	Databases []Database
	Roles     []Role
	Grants    []Grant
	// Variables are the values for the jobspec's own HCL variables, as JSON
	// expressions by name (component defaults merged with the site's overrides).
	Variables map[string]string
	Range     hcl.Range
}

// BySSH reports whether the component's artifacts reach the hosts by SSH on every
// path: those of the platform, and of what the object store itself needs, so that
// a broken store can be repaired.
func (c Component) BySSH() bool { return c.Platform || c.Name == ObjectStorageComponent }

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
	Embedded      string   // name of an executable that site itself carries, for its own components

	SHA256     string // required with URL, optional proof for path sources
	Executable string
	Entrypoint []string // optional override for images
	StopSignal string   // what ends a container of an image; empty: the image's own, or SIGTERM
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

// Secret is an entry of a component's catalogue: a name, and where its value
// comes from. Values are never in git. Exactly one source is set.
type Secret struct {
	// Component owns the secret; Name is unique in it. See FullName.
	Component   string
	Name        string
	Description string
	Generated   *Generated
	External    *External
	ProducedBy  *Producer
	// Rotation is nil where none is declared.
	Rotation *Rotation
	Range    hcl.Range
}

// FullName is how users and errors call a secret: "shop.database_password".
func (s Secret) FullName() string { return s.Component + "." + s.Name }

// Generated values are made once by a deploy and never again by one.
type Generated struct {
	// Length is the number of random bytes, 16 to 1024. Default 32.
	Length int
	// Encoding is how they are written: "base64url" (default, without padding), "base64" or "hex".
	Encoding string
}

// Rotation is when a secret gets its next generation, and how long the one before
// it stays good.
type Rotation struct {
	// Every is how old a generation gets; 0: it is rotated only when asked.
	Every time.Duration
	// Drain is how long the old generation works after all have the new one. Default 1 min.
	Drain time.Duration
	Range hcl.Range
}

// External values come from outside: `site secrets import` or `set`.
type External struct {
	// Check is a command that proves that a value works: it reads the value on
	// standard input and ends with 0. It runs where site does, in the commit's tree.
	Check []string
	// KeepNewline keeps a newline at the end of a value. Default: it is cut off,
	// and the import says so.
	KeepNewline bool
	// Optional values are asked for by nobody: no job reads them, and a deploy does
	// not miss them. Only the provider's own tokens are.
	Optional bool
}

// Producer makes a value. Exactly one of the three is set.
type Producer struct {
	// Component is one whose job writes the value by its own identity.
	Component string
	// Command prints the value; it runs where site does, in the commit's tree,
	// when the value is missing.
	Command []string
	// Provider is whose API makes the value, when `site provider` asks it to: that
	// of the object store. No file says this; it follows from site.hcl.
	Provider string
}

// SecretRead is one place that reads a secret.
type SecretRead struct {
	// Secret is a full name.
	Secret string
	Range  hcl.Range
}

// Database is a Postgres database.
type Database struct {
	Name  string
	Owner string
	// ConnectionLimit is -1 for none.
	ConnectionLimit int
	Range           hcl.Range
}

// Role is a Postgres role.
type Role struct {
	Name  string
	Login bool
	// Password is the full name of the secret that holds it; empty for none.
	Password        string
	ConnectionLimit int // -1 for none
	MemberOf        []string
	Replication     bool
	// Peers are system users who may log in as this role over the Unix socket.
	Peers []string
	// Alternating: the role owns things and does not log in; two logins that are
	// members of it take turns, so that a password can change without a gap.
	Alternating bool
	Range       hcl.Range
}

// GrantObject is what a grant is on.
type GrantObject string

// The objects of grants.
const (
	OnDatabase  GrantObject = "database"
	OnSchema    GrantObject = "schema"
	OnTables    GrantObject = "table"
	OnSequences GrantObject = "sequence"
	OnFunctions GrantObject = "function"
)

// Grant gives privileges to a role.
type Grant struct {
	Role     string
	Database string
	// Schema is empty for a grant on the database itself.
	Schema string
	Object GrantObject
	// Names are tables, sequences or functions (with argument types) of the
	// schema; "*" is all that there are.
	Names []string
	// Privileges are upper case, as in SQL; "ALL" is spelled out by the loader.
	Privileges []string
	// DefaultFor is a role: what it creates later in the schema gets the same
	// privileges. Empty for none.
	DefaultFor string
	Range      hcl.Range
}

// Secrets are those of all active components, sorted by full name.
func (s *Site) Secrets() []Secret {
	var secrets []Secret
	for _, component := range s.Components {
		secrets = append(secrets, component.Secrets...)
	}
	slices.SortFunc(secrets, func(a, b Secret) int { return strings.Compare(a.FullName(), b.FullName()) })
	return secrets
}

// Component gives an active component; nil for one that is not.
func (s *Site) Component(name string) *Component {
	for i := range s.Components {
		if s.Components[i].Name == name {
			return &s.Components[i]
		}
	}
	return nil
}

// The platform's own components that other parts of site know by name.
const (
	// OpenBaoComponent holds the site's secrets.
	OpenBaoComponent = "openbao"
	// PostgresComponent holds the site's databases.
	PostgresComponent = "postgresql"
	// ObjectStorageComponent hands out uploads into the object store. It is no part
	// of the platform step, for it reads secrets; its artifact travels by SSH always.
	ObjectStorageComponent = "object-storage-service"
)

// ObjectStoragePort is where the object-storage-service listens, on loopback of
// the first server.
const ObjectStoragePort = 7390

// CloudflareProvider is Producer.Provider of keys that Cloudflare's API makes.
const CloudflareProvider = "cloudflare"

// The secrets of the object store, of ObjectStorageComponent. The admin pair is the
// service's; the proxy pair can only read, and is all that hosts get.
const (
	StoreAdminID     = "r2.admin_access_key_id"
	StoreAdminSecret = "r2.admin_secret_access_key"
	StoreProxyID     = "r2.proxy_access_key_id"
	StoreProxySecret = "r2.proxy_secret_access_key"
	// ProviderTokenA and ProviderTokenB are the two API tokens that make the above,
	// each of which rotates the other. No job reads them.
	ProviderTokenA = "provider.admin_token_a"
	ProviderTokenB = "provider.admin_token_b"
)

// SecretMount is the mount of the KV version 2 engine that holds the catalogue.
const SecretMount = "site"

// SecretField is the field of an entry that holds the value.
const SecretField = "value"

// UsernameField is the field of an entry that holds the login to which the value
// belongs, where that is the password of an alternating role.
const UsernameField = "username"

// KVPath is where a secret lies below SecretMount: "shop/database_password".
// A template reads it as `secret "site/data/shop/database_password"`.
func (s Secret) KVPath() string { return s.Component + "/" + s.Name }

package host

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"slices"
	"sort"
	"strings"
	"text/template"

	"github.com/nomad-site/site/internal/site"
)

// Where things lie on a host.
const (
	SiteHostPath = "/opt/site/bin/site-host"
	NomadPath    = "/opt/site/bin/nomad"
	DriverPath   = "/opt/site/nomad/plugins/nomad-driver-podman"
	AppliedPath  = "/etc/site/host.json"
	InitPath     = "/etc/site/init.age"
	// UnsealKeyPath is what site-host unseals OpenBao with, and HostKeyPath what
	// it proves itself with; neither is part of the document.
	UnsealKeyPath = "/etc/site/openbao-unseal.key"
	HostKeyPath   = "/etc/site/host.key"
	// OperatorsJWKSPath holds the operators' public keys (RFC 7517), which
	// site-host serves to Nomad at OperatorsJWKSURL.
	OperatorsJWKSPath = "/etc/site/operators.jwks"
	OperatorsJWKSURL  = "http://127.0.0.1:7380/operators.jwks"
	// RotatorsJWKSPath is the same for operators who only rotate secrets, and is served beside it.
	RotatorsJWKSPath = "/etc/site/rotators.jwks"
	StorePath        = "/var/lib/site/store"
	ReleasesPath     = "/var/lib/site/releases"
	LockPath         = "/var/lib/site/lock.json"
	GossipPath       = "/etc/nomad.d/gossip.hcl"
	CACertPath       = "/etc/nomad.d/tls/ca.crt"
	AgentCertPath    = "/etc/nomad.d/tls/agent.crt"
	AgentKeyPath     = "/etc/nomad.d/tls/agent.key"
	nomadConfigPath  = "/etc/nomad.d/nomad.hcl"
	siteHostUnitPath = "/etc/systemd/system/" + SiteHostUnit
)

// Input is all that a host's document is made of.
type Input struct {
	Site *site.Site
	Host site.Host
	// Address is what agents of this host advertise; ServerAddresses are those of all servers.
	Address         string
	ServerAddresses []string
	Packages        []Package
	// OperatorsJWKS are the public keys of those who may log in.
	OperatorsJWKS string
	// RotatorsJWKS are those of operators who may do no more than rotate secrets.
	RotatorsJWKS string
	// Digests are plain hex sha256 of the executables that run on the host.
	SiteHostSHA256, NomadSHA256, DriverSHA256 string
	// Applied is what was applied last, nil on a bare host.
	Applied *Document
	// Credentials are the files made from the site's init material; nil when
	// the site root token was not given. Then what was applied stays.
	Credentials *Credentials
	// Templates holds agent/, postgresql/ and units/ of the bootstrap folder.
	Templates fs.FS
}

// NeedsCredentialsError says that a host's secret files can only be written
// with the site root token.
type NeedsCredentialsError struct{ Host, Path string }

func (e *NeedsCredentialsError) Error() string {
	return fmt.Sprintf("host %s: %s can only be written with the site root token", e.Host, e.Path)
}

// Hint implements plan.Hinter.
func (e *NeedsCredentialsError) Hint() string {
	return "run `site bootstrap-deploy --root-token-file=FILE`"
}

// Render makes the document of one host. It is pure: the same input gives the
// same document. The content of secret files is in the result; see Public.
func Render(in Input) (Document, error) {
	document := Document{Version: DocumentVersion, Packages: slices.Clone(in.Packages)}
	sort.Slice(document.Packages, func(i, j int) bool { return document.Packages[i].Name < document.Packages[j].Name })
	values := map[string]any{
		"Host": in.Host.Name, "Region": in.Site.Region, "Datacenter": in.Site.Datacenter,
		"Address": in.Address, "AddressPattern": addressPattern(in.Address), "ServerAddresses": in.ServerAddresses, "Servers": len(in.ServerAddresses),
		"Server": in.Host.Server, "Client": in.Host.Client,
		"FingerprintDenylist": strings.Join(in.Site.FingerprintDenylist, ","),
		"OpenBao":             in.Site.Component(site.OpenBaoComponent) != nil,
		"StorePath":           StorePath,
	}
	siteHost, err := in.addObjectStore(&document, values)
	if err != nil {
		return Document{}, err
	}
	directories := []Directory{
		{Path: "/etc/site", Owner: "root", Group: "root", Mode: "0700"},
		{Path: "/etc/nomad.d", Owner: "root", Group: "root", Mode: "0700"},
		{Path: "/etc/nomad.d/tls", Owner: "root", Group: "root", Mode: "0700"},
		{Path: "/opt/site/bin", Owner: "root", Group: "root", Mode: "0755"},
		{Path: "/opt/site/nomad/plugins", Owner: "root", Group: "root", Mode: "0755"},
		{Path: "/var/lib/nomad", Owner: "root", Group: "root", Mode: "0700"},
		{Path: "/var/lib/site", Owner: "root", Group: "root", Mode: "0700"},
		{Path: ReleasesPath, Owner: "root", Group: "root", Mode: "0700"},
	}
	for _, component := range in.Site.Components {
		for _, directory := range component.Directories {
			directories = append(directories, Directory{Path: directory.Path, Owner: directory.Owner, Group: directory.Group, Mode: directory.Mode})
		}
	}
	if in.Site.Component(site.PostgresComponent) != nil {
		files, err := postgresFiles(in, &document)
		if err != nil {
			return Document{}, err
		}
		directories = append(directories, Directory{Path: PostgresConfigPath, Owner: "root", Group: "root", Mode: "0755"})
		document.Files = append(document.Files, files...)
	}
	document.Directories = directories

	for _, file := range []struct{ path, template, mode string }{
		{"/etc/containers/registries.conf.d/10-site.conf", "agent/registries.conf", "0644"},
		{nomadConfigPath, "agent/nomad.hcl.tmpl", "0600"},
		{siteHostUnitPath, "units/site-host.service.tmpl", "0644"},
		{"/etc/systemd/system/nomad.service", "units/nomad.service", "0644"},
	} {
		content, err := render(in.Templates, file.template, values)
		if err != nil {
			return Document{}, err
		}
		document.Files = append(document.Files, newFile(file.path, file.mode, content))
	}
	relay, err := relayFile(in)
	if err != nil {
		return Document{}, err
	}
	if relay != nil {
		document.Files = append(document.Files, *relay)
	}
	document.Files = append(document.Files,
		newFile("/etc/tmpfiles.d/site.conf", "0644", tmpfiles(directories)),
		newFile(OperatorsJWKSPath, "0644", in.OperatorsJWKS),
		newFile(RotatorsJWKSPath, "0644", in.RotatorsJWKS))

	if err := in.addCredentials(&document); err != nil {
		return Document{}, err
	}

	document.Binaries = []Binary{
		{Path: NomadPath, SHA256: in.NomadSHA256, Mode: "0755"},
		{Path: DriverPath, SHA256: in.DriverSHA256, Mode: "0755"},
	}
	document.Units = []Unit{
		{Name: "podman.socket"},
		siteHost,
	}
	if relay != nil {
		document.Units = append(document.Units, Unit{Name: relayUnit, RestartOn: []string{SiteHostPath, relayUnitPath}})
	}
	document.Units = append(document.Units, nomadUnit())
	return document, nil
}

// addressPattern is a regular expression without backslashes, which would have
// to be escaped twice on their way through HCL and a template.
func addressPattern(address string) string {
	return "^" + strings.ReplaceAll(address, ".", "[.]") + "(/[0-9]+)?$"
}

// Public is the document without any content: what observe needs, and what may
// be kept on the host or shown.
func (d Document) Public() Document {
	d.Files = slices.Clone(d.Files)
	for i := range d.Files {
		d.Files[i].Content = ""
	}
	return d
}

// file gives a copy of the file at path, nil when there is none or no document.
func (d *Document) file(path string) *File {
	if d == nil {
		return nil
	}
	for _, file := range d.Files {
		if file.Path == path {
			return &file
		}
	}
	return nil
}

// FileSHA256 is the digest of the file that the document has at path, or empty.
func (d *Document) FileSHA256(path string) string {
	if file := d.file(path); file != nil {
		return file.SHA256
	}
	return ""
}

func newFile(path, mode, content string) File {
	sum := sha256.Sum256([]byte(content))
	return File{Path: path, Owner: "root", Group: "root", Mode: mode, SHA256: hex.EncodeToString(sum[:]), Content: content}
}

func render(templates fs.FS, name string, values map[string]any) (string, error) {
	content, err := fs.ReadFile(templates, name)
	if err != nil {
		return "", fmt.Errorf("host template: %w", err)
	}
	if !strings.HasSuffix(name, ".tmpl") {
		return string(content), nil
	}
	parsed, err := template.New(name).Option("missingkey=error").Parse(string(content))
	if err != nil {
		return "", fmt.Errorf("host template %s: %w", name, err)
	}
	var out bytes.Buffer
	if err := parsed.Execute(&out, values); err != nil {
		return "", fmt.Errorf("host template %s: %w", name, err)
	}
	return out.String(), nil
}

// tmpfiles lists the folders for systemd-tmpfiles, which makes them again at
// boot where they lie on a tmpfs (tmpfiles.d(5)). Paths need no quotes: site.Load
// refuses those that would.
func tmpfiles(directories []Directory) string {
	var out strings.Builder
	out.WriteString("# Written by site: folders that jobs and agents need.\n")
	for _, d := range directories {
		fmt.Fprintf(&out, "d %s %s %s %s -\n", d.Path, d.Mode, d.Owner, d.Group)
	}
	return out.String()
}

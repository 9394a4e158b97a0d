package host

import (
	"io/fs"
	"slices"
	"time"

	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// Credentials are the secret files of one host. Without a certificate, that which
// was applied stays.
type Credentials struct {
	GossipKey secret.Value
	// CACertPEM is all that agents trust: more than one while the CA rotates.
	CACertPEM    string
	AgentCertPEM string
	AgentKeyPEM  secret.Value
	Expire       time.Time
	// Issuer is the sha256 of the CA certificate that AgentCertPEM was signed with.
	Issuer string
}

// SiteHostUnit is the unit of the artifact server, which unseals OpenBao too.
const SiteHostUnit = "site-host.service"

// NomadUnit is the unit of the agent, which reads its certificates anew without a
// restart.
const NomadUnit = "nomad.service"

// nomadUnit restarts for what its agent reads once. The gossip key is not among
// that: the agent keeps a keyring of its own, and looks at the file only where
// there is none.
func nomadUnit() Unit {
	return Unit{
		Name:      NomadUnit,
		RestartOn: []string{nomadConfigPath, "/etc/systemd/system/" + NomadUnit, NomadPath, DriverPath},
		ReloadOn:  []string{CACertPath, AgentCertPath, AgentKeyPath},
	}
}

// CredentialPaths are the files that only the site root token can write.
func CredentialPaths() []string { return []string{GossipPath, CACertPath, AgentCertPath, AgentKeyPath} }

// WithCredentials is what was applied last with other secret files: it differs
// from the host in nothing else that was not changed by hand.
func WithCredentials(applied Document, of site.Host, credentials Credentials, templates fs.FS) (Document, error) {
	document := applied
	in := Input{Host: of, Applied: &applied, Credentials: &credentials, Templates: templates}
	document.Files = slices.DeleteFunc(slices.Clone(applied.Files), func(file File) bool {
		return slices.Contains(CredentialPaths(), file.Path)
	})
	document.Units = slices.Clone(applied.Units)
	for i := range document.Units {
		if document.Units[i].Name == NomadUnit {
			document.Units[i] = nomadUnit()
		}
	}
	return document, in.addCredentials(&document)
}

// Issuer is the sha256 of the CA certificate that the agent's certificate was
// signed with. Documents that do not say so are from before a CA could rotate.
func (d *Document) Issuer() string {
	if d == nil {
		return ""
	}
	if d.CredentialsIssuer == "" {
		return d.FileSHA256(CACertPath)
	}
	return d.CredentialsIssuer
}

// addCredentials adds the secret files, from the credentials or as they are.
func (in Input) addCredentials(document *Document) error {
	contents, err := in.credentialContents()
	if err != nil {
		return err
	}
	for _, path := range CredentialPaths() {
		content, given := contents[path]
		if given {
			file := newFile(path, "0600", content)
			file.Secret = true
			document.Files = append(document.Files, file)
			continue
		}
		applied := in.Applied.file(path)
		if applied == nil {
			return &NeedsCredentialsError{Host: in.Host.Name, Path: path}
		}
		applied.Content = ""
		document.Files = append(document.Files, *applied)
	}
	if _, given := contents[AgentCertPath]; given {
		document.CredentialsExpire, document.CredentialsIssuer = in.Credentials.Expire, in.Credentials.Issuer
	} else {
		document.CredentialsExpire, document.CredentialsIssuer = in.Applied.CredentialsExpire, in.Applied.Issuer()
	}
	return nil
}

// credentialContents are those of the secret files that are written anew, by path.
func (in Input) credentialContents() (map[string]string, error) {
	contents := map[string]string{}
	if in.Credentials == nil {
		return contents, nil
	}
	gossip, err := render(in.Templates, "agent/gossip.hcl.tmpl", map[string]any{"GossipKey": in.Credentials.GossipKey.Reveal()})
	if err != nil {
		return nil, err
	}
	if !in.Host.Server {
		// A client has no serf member; the file stays so that the list of files is one for all.
		gossip = "# Written by site. Only servers gossip.\n"
	}
	contents[GossipPath], contents[CACertPath] = gossip, in.Credentials.CACertPEM
	if in.Credentials.AgentCertPEM != "" {
		contents[AgentCertPath], contents[AgentKeyPath] = in.Credentials.AgentCertPEM, in.Credentials.AgentKeyPEM.Reveal()
	}
	return contents, nil
}

package seal

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"
	"filippo.io/age/armor"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

// Seal encrypts material to the recipients of the root tokens, armored: each of
// them opens it.
func Seal(m Material, rootTokens ...secret.Value) ([]byte, error) {
	identities, err := identitiesOf(rootTokens)
	if err != nil {
		return nil, err
	}
	recipients := make([]age.Recipient, 0, len(identities))
	for _, identity := range identities {
		recipients = append(recipients, identity.Recipient())
	}
	plain, err := json.Marshal(material{
		Version: materialVersion, Site: m.Site, ID: m.ID,
		CAKeyPEM: m.CAKeyPEM.Reveal(), CACertPEM: m.CACertPEM, PreviousCACertPEM: m.PreviousCACertPEM,
		NomadManagementToken: m.NomadManagementToken.Reveal(),
		GossipKey:            m.GossipKey.Reveal(), NextGossipKey: m.NextGossipKey.Reveal(),
		OpenBaoUnsealKey: m.OpenBaoUnsealKey.Reveal(), NextUnsealKey: m.NextUnsealKey.Reveal(),
		OpenBaoReady: m.OpenBaoReady, Generation: m.Generation,
	})
	if err != nil {
		return nil, errors.New("encode init material")
	}
	var sealed bytes.Buffer
	armored := armor.NewWriter(&sealed)
	writer, err := age.Encrypt(armored, recipients...)
	if err != nil {
		return nil, fmt.Errorf("seal init material: %w", err)
	}
	if _, err := writer.Write(plain); err != nil {
		return nil, fmt.Errorf("seal init material: %w", err)
	}
	if err := writer.Close(); err != nil {
		return nil, fmt.Errorf("seal init material: %w", err)
	}
	if err := armored.Close(); err != nil {
		return nil, fmt.Errorf("seal init material: %w", err)
	}
	return sealed.Bytes(), nil
}

// identitiesOf reads root tokens. Errors of age could repeat them, and are left out.
func identitiesOf(rootTokens []secret.Value) ([]*age.X25519Identity, error) {
	if len(rootTokens) == 0 {
		return nil, errors.New("no site root token is given")
	}
	identities := make([]*age.X25519Identity, 0, len(rootTokens))
	for _, token := range rootTokens {
		identity, err := age.ParseX25519Identity(token.Reveal())
		if err != nil {
			return nil, errors.New("the site root token is not an age X25519 identity")
		}
		identities = append(identities, identity)
	}
	return identities, nil
}

// Open decrypts what Seal made, with any of the root tokens that is a recipient's.
// place names the file for errors.
func Open(sealed []byte, rootTokens []secret.Value, site, place string) (Material, error) {
	parsed, err := identitiesOf(rootTokens)
	if err != nil {
		return Material{}, err
	}
	identities := make([]age.Identity, 0, len(parsed))
	for _, identity := range parsed {
		identities = append(identities, identity)
	}
	reader, err := age.Decrypt(armor.NewReader(bytes.NewReader(sealed)), identities...)
	if err != nil {
		var mismatch *age.NoIdentityMatchError
		if errors.As(err, &mismatch) {
			return Material{}, plan.WithHint(fmt.Errorf("%s was not sealed to this site root token", place),
				"give the token file of site %q; if its root token was rotated since, take the newest sites/%s/init.age out of git", site, site)
		}
		return Material{}, plan.WithHint(fmt.Errorf("%s cannot be opened: %w", place, err),
			"restore it from git, or from /etc/site/init.age on a server host")
	}
	plain, err := io.ReadAll(io.LimitReader(reader, 1<<20))
	if err != nil {
		return Material{}, plan.WithHint(fmt.Errorf("%s is damaged: %w", place, err),
			"restore it from git, or from /etc/site/init.age on a server host")
	}
	var m material
	if err := json.Unmarshal(plain, &m); err != nil || m.Version != materialVersion {
		return Material{}, fmt.Errorf("%s was written by another version of site", place)
	}
	if m.Site != site {
		return Material{}, fmt.Errorf("%s belongs to site %q, not %q", place, m.Site, site)
	}
	if m.ID == "" {
		m.ID = derivedID(m.NomadManagementToken)
	}
	return Material{
		Site: m.Site, ID: m.ID,
		CAKeyPEM: secret.New(m.CAKeyPEM), CACertPEM: m.CACertPEM, PreviousCACertPEM: m.PreviousCACertPEM,
		NomadManagementToken: secret.New(m.NomadManagementToken),
		GossipKey:            secret.New(m.GossipKey), NextGossipKey: secret.New(m.NextGossipKey),
		OpenBaoUnsealKey: secret.New(m.OpenBaoUnsealKey), NextUnsealKey: secret.New(m.NextUnsealKey),
		OpenBaoReady: m.OpenBaoReady, Generation: m.Generation,
	}, nil
}

// derivedID is the ID of material from before there were any: every copy of it
// has the same token, as long as nobody could rotate that.
func derivedID(managementToken string) string {
	sum := sha256.Sum256([]byte(managementToken))
	return hex.EncodeToString(sum[:])
}

// SameSite reports whether two materials are generations of one.
func (m Material) SameSite(other Material) bool { return m.Site == other.Site && m.ID == other.ID }

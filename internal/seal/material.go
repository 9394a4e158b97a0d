// Package seal holds a site's init material: what must exist before there is a
// secrets engine to keep it. It is generated once, sealed with age to the site
// root token, and lies as sites/<name>/init.age in git and on the server hosts.
package seal

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

const materialVersion = 1

// Material is what init.age seals.
type Material struct {
	Site string
	// ID tells this site's material from that of another site of the same name; it never changes.
	ID string
	// CAKeyPEM and CACertPEM are the site's certificate authority.
	CAKeyPEM  secret.Value
	CACertPEM string
	// PreviousCACertPEM is trusted beside it while the authority rotates; empty otherwise.
	PreviousCACertPEM string
	// NomadManagementToken is a UUID that we generate before the ACL bootstrap,
	// so that the bootstrap can be run again after a crash.
	NomadManagementToken secret.Value
	// GossipKey is 32 random bytes in base64, for Nomad's serf encryption.
	GossipKey secret.Value
	// NextGossipKey is on its way to all servers while the key rotates; zero otherwise.
	NextGossipKey secret.Value
	// OpenBaoUnsealKey opens OpenBao's storage; zero before OpenBao was initialised.
	OpenBaoUnsealKey secret.Value
	// NextUnsealKey may be in force already while the key rotates; zero otherwise.
	NextUnsealKey secret.Value
	// OpenBaoReady is set once operators can log in to OpenBao: from then on its
	// storage holds what nobody could make again. Before that it may be wiped.
	OpenBaoReady bool
	// Generation counts the changes. Of several copies the highest counts.
	Generation int
}

// material is the plain text inside init.age.
type material struct {
	Version              int    `json:"version"`
	Site                 string `json:"site"`
	ID                   string `json:"id,omitempty"`
	CAKeyPEM             string `json:"ca_key_pem"`
	CACertPEM            string `json:"ca_cert_pem"`
	PreviousCACertPEM    string `json:"previous_ca_cert_pem,omitempty"`
	NomadManagementToken string `json:"nomad_management_token"`
	GossipKey            string `json:"gossip_key"`
	NextGossipKey        string `json:"next_gossip_key,omitempty"`
	OpenBaoUnsealKey     string `json:"openbao_unseal_key,omitempty"`
	NextUnsealKey        string `json:"next_unseal_key,omitempty"`
	OpenBaoReady         bool   `json:"openbao_ready,omitempty"`
	Generation           int    `json:"generation,omitempty"`
}

// New generates the material of a site.
func New(site string, now time.Time) (Material, error) {
	material, err := Material{Site: site, ID: newUUID()}.withCA(now)
	if err != nil {
		return Material{}, err
	}
	material.NomadManagementToken = secret.New(newUUID())
	material.GossipKey = NewGossipKey()
	return material, nil
}

// NewGossipKey makes a key for Nomad's serf encryption.
func NewGossipKey() secret.Value {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails, see crypto/rand
	return secret.New(base64.StdEncoding.EncodeToString(key))
}

// NewRootToken makes a site root token: an age X25519 identity.
func NewRootToken() (token secret.Value, recipient string, err error) {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return secret.Value{}, "", fmt.Errorf("generate the site root token: %w", err)
	}
	return secret.New(identity.String()), identity.Recipient().String(), nil
}

// WriteNewRootToken makes a site root token in a file that is not there yet.
func WriteNewRootToken(path string) error {
	token, recipient, err := NewRootToken()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write the site root token: %w", err)
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return plan.WithHint(fmt.Errorf("%s exists", path), "a site root token is never overwritten: name another file")
	}
	if err != nil {
		return fmt.Errorf("write the site root token: %w", err)
	}
	_, err = file.WriteString(strings.Join([]string{"# site root token, public part " + recipient, token.Reveal(), ""}, "\n"))
	if err = errors.Join(err, file.Sync(), file.Close()); err != nil {
		_ = os.Remove(path) // half a token would be in the way of the next attempt
		return fmt.Errorf("write the site root token: %w", err)
	}
	return nil
}

// ReadRootToken reads a site root token file and insists on its mode.
func ReadRootToken(path string) (secret.Value, error) {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return secret.Value{}, plan.WithHint(fmt.Errorf("site root token file %s does not exist", path),
			"make one with `site root-token new %s` (first bootstrap only), or fetch it from the operators' safe", path)
	}
	if err != nil {
		return secret.Value{}, fmt.Errorf("site root token file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return secret.Value{}, plan.WithHint(fmt.Errorf("site root token file %s is not a regular file", path),
			"give the path of the file that `site root-token new` made")
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return secret.Value{}, plan.WithHint(fmt.Errorf("site root token file %s has mode %04o: others can read it", path, mode),
			"chmod 600 %s", path)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return secret.Value{}, fmt.Errorf("site root token file: %w", err)
	}
	var lines []string
	for line := range strings.Lines(string(content)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		return secret.Value{}, plan.WithHint(fmt.Errorf("site root token file %s is empty", path),
			"it must hold one line that begins with AGE-SECRET-KEY-1")
	}
	if len(lines) > 1 {
		return secret.Value{}, plan.WithHint(fmt.Errorf("site root token file %s holds %d lines, want one", path, len(lines)),
			"it must hold one line that begins with AGE-SECRET-KEY-1")
	}
	if _, err := age.ParseX25519Identity(lines[0]); err != nil {
		// age's own error could repeat the content.
		return secret.Value{}, plan.WithHint(fmt.Errorf("site root token file %s holds no age X25519 identity", path),
			"it must hold one line that begins with AGE-SECRET-KEY-1")
	}
	return secret.New(lines[0]), nil
}

// newUUID is a version 4 UUID (RFC 9562, section 5.4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}

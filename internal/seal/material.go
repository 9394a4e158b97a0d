// Package seal holds a site's init material: what must exist before there is a
// secrets engine to keep it. It is generated once, sealed with age to the site
// root token, and lies as sites/<name>/init.age in git and on the server hosts.
package seal

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"strings"
	"time"

	"filippo.io/age"
	"filippo.io/age/armor"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

const materialVersion = 1

// Material is what init.age seals.
type Material struct {
	Site string
	// CAKeyPEM and CACertPEM are the site's certificate authority.
	CAKeyPEM  secret.Value
	CACertPEM string
	// NomadManagementToken is a UUID that we generate before the ACL bootstrap,
	// so that the bootstrap can be run again after a crash.
	NomadManagementToken secret.Value
	// GossipKey is 32 random bytes in base64, for Nomad's serf encryption.
	GossipKey secret.Value
	// OpenBaoUnsealKey opens OpenBao's storage; zero before OpenBao was initialised.
	OpenBaoUnsealKey secret.Value
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
	CAKeyPEM             string `json:"ca_key_pem"`
	CACertPEM            string `json:"ca_cert_pem"`
	NomadManagementToken string `json:"nomad_management_token"`
	GossipKey            string `json:"gossip_key"`
	OpenBaoUnsealKey     string `json:"openbao_unseal_key,omitempty"`
	OpenBaoReady         bool   `json:"openbao_ready,omitempty"`
	Generation           int    `json:"generation,omitempty"`
}

// New generates the material of a site.
func New(site string, now time.Time) (Material, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Material{}, fmt.Errorf("generate the site CA: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return Material{}, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "site " + site + " CA"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return Material{}, fmt.Errorf("sign the site CA: %w", err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return Material{}, err
	}
	gossip := make([]byte, 32)
	_, _ = rand.Read(gossip) // never fails, see crypto/rand
	return Material{
		Site: site, CAKeyPEM: keyPEM, CACertPEM: encodeCertificate(certificate),
		NomadManagementToken: secret.New(newUUID()),
		GossipKey:            secret.New(base64.StdEncoding.EncodeToString(gossip)),
	}, nil
}

// NewRootToken makes a site root token: an age X25519 identity.
func NewRootToken() (token secret.Value, recipient string, err error) {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return secret.Value{}, "", fmt.Errorf("generate the site root token: %w", err)
	}
	return secret.New(identity.String()), identity.Recipient().String(), nil
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

// Seal encrypts material to the root token's recipient, armored.
func Seal(m Material, rootToken secret.Value) ([]byte, error) {
	identity, err := age.ParseX25519Identity(rootToken.Reveal())
	if err != nil {
		return nil, errors.New("the site root token is not an age X25519 identity")
	}
	plain, err := json.Marshal(material{
		Version: materialVersion, Site: m.Site, CAKeyPEM: m.CAKeyPEM.Reveal(), CACertPEM: m.CACertPEM,
		NomadManagementToken: m.NomadManagementToken.Reveal(), GossipKey: m.GossipKey.Reveal(),
		OpenBaoUnsealKey: m.OpenBaoUnsealKey.Reveal(), OpenBaoReady: m.OpenBaoReady, Generation: m.Generation,
	})
	if err != nil {
		return nil, errors.New("encode init material")
	}
	var sealed bytes.Buffer
	armored := armor.NewWriter(&sealed)
	writer, err := age.Encrypt(armored, identity.Recipient())
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

// Open decrypts what Seal made. place names the file for errors.
func Open(sealed []byte, rootToken secret.Value, site, place string) (Material, error) {
	identity, err := age.ParseX25519Identity(rootToken.Reveal())
	if err != nil {
		return Material{}, errors.New("the site root token is not an age X25519 identity")
	}
	reader, err := age.Decrypt(armor.NewReader(bytes.NewReader(sealed)), identity)
	if err != nil {
		var mismatch *age.NoIdentityMatchError
		if errors.As(err, &mismatch) {
			return Material{}, plan.WithHint(fmt.Errorf("%s was not sealed to this site root token", place),
				"give the token file that bootstrapped site %q", site)
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
	return Material{
		Site: m.Site, CAKeyPEM: secret.New(m.CAKeyPEM), CACertPEM: m.CACertPEM,
		NomadManagementToken: secret.New(m.NomadManagementToken), GossipKey: secret.New(m.GossipKey),
		OpenBaoUnsealKey: secret.New(m.OpenBaoUnsealKey), OpenBaoReady: m.OpenBaoReady, Generation: m.Generation,
	}, nil
}

// SameSite reports whether two materials are generations of one.
func (m Material) SameSite(other Material) bool {
	return m.Site == other.Site && m.NomadManagementToken.Reveal() == other.NomadManagementToken.Reveal()
}

// AgentExpiry is when an agent's certificate made now expires: in a year.
func AgentExpiry(now time.Time) time.Time { return now.AddDate(1, 0, 0).UTC().Truncate(time.Second) }

// AgentCertificate signs a certificate for a host's Nomad agent. Nomad's
// verify_server_hostname wants the name <role>.<region>.nomad.
func (m Material) AgentCertificate(host, region string, server bool, addresses []string, now time.Time) (certPEM string, keyPEM secret.Value, err error) {
	caBlock, _ := pem.Decode([]byte(m.CACertPEM))
	keyBlock, _ := pem.Decode([]byte(m.CAKeyPEM.Reveal()))
	if caBlock == nil || keyBlock == nil {
		return "", secret.Value{}, errors.New("the site CA in init.age is damaged")
	}
	ca, err := x509.ParseCertificate(caBlock.Bytes)
	if err != nil {
		return "", secret.Value{}, errors.New("the site CA certificate in init.age is damaged")
	}
	caKey, err := x509.ParseECPrivateKey(keyBlock.Bytes)
	if err != nil {
		return "", secret.Value{}, errors.New("the site CA key in init.age is damaged")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", secret.Value{}, fmt.Errorf("generate a key for %s: %w", host, err)
	}
	serial, err := newSerial()
	if err != nil {
		return "", secret.Value{}, err
	}
	names := []string{"client." + region + ".nomad", host, "localhost"}
	if server {
		names = append(names, "server."+region+".nomad")
	}
	ips := []net.IP{net.IPv4(127, 0, 0, 1)}
	for _, address := range addresses {
		if ip := net.ParseIP(address); ip != nil {
			ips = append(ips, ip)
		}
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: host},
		NotBefore: now.Add(-time.Hour), NotAfter: AgentExpiry(now),
		DNSNames: names, IPAddresses: ips,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	if err != nil {
		return "", secret.Value{}, fmt.Errorf("sign a certificate for %s: %w", host, err)
	}
	keyPEM, err = encodeKey(key)
	return encodeCertificate(certificate), keyPEM, err
}

func encodeKey(key *ecdsa.PrivateKey) (secret.Value, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return secret.Value{}, errors.New("encode a private key")
	}
	return secret.New(string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))), nil
}

func encodeCertificate(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("generate a serial number: %w", err)
	}
	return serial, nil
}

// newUUID is a version 4 UUID (RFC 9562, section 5.4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}

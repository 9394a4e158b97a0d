package seal

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"

	"github.com/nomad-site/site/internal/secret"
)

// WithNewCA gives the site a new certificate authority. The one before stays
// trusted, and its key is forgotten: nothing is signed with it any more.
func (m Material) WithNewCA(now time.Time) (Material, error) {
	if m.PreviousCACertPEM != "" {
		return Material{}, errors.New("the site CA is being rotated already")
	}
	m.PreviousCACertPEM = m.CACertPEM
	return m.withCA(now)
}

// TrustBundle is what agents trust: the authority's certificate and, while it
// rotates, that of the one before.
func (m Material) TrustBundle() string { return m.CACertPEM + m.PreviousCACertPEM }

func (m Material) withCA(now time.Time) (Material, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Material{}, fmt.Errorf("generate the site CA: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return Material{}, err
	}
	template := &x509.Certificate{
		// Two authorities of one site must differ in their subject, or a chain
		// would be tried with the wrong one first.
		SerialNumber: serial, Subject: pkix.Name{CommonName: "site " + m.Site + " CA", SerialNumber: serial.Text(16)},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return Material{}, fmt.Errorf("sign the site CA: %w", err)
	}
	if m.CAKeyPEM, err = encodeKey(key); err != nil {
		return Material{}, err
	}
	m.CACertPEM = encodeCertificate(certificate)
	return m, nil
}

// authority is the site CA ready to sign.
func (m Material) authority() (*x509.Certificate, *ecdsa.PrivateKey, error) {
	caBlock, _ := pem.Decode([]byte(m.CACertPEM))
	keyBlock, _ := pem.Decode([]byte(m.CAKeyPEM.Reveal()))
	if caBlock == nil || keyBlock == nil {
		return nil, nil, errors.New("the site CA in init.age is damaged")
	}
	ca, err := x509.ParseCertificate(caBlock.Bytes)
	if err != nil {
		return nil, nil, errors.New("the site CA certificate in init.age is damaged")
	}
	key, err := x509.ParseECPrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, nil, errors.New("the site CA key in init.age is damaged")
	}
	return ca, key, nil
}

// AgentExpiry is when an agent's certificate made now expires: in a year.
func AgentExpiry(now time.Time) time.Time { return now.AddDate(1, 0, 0).UTC().Truncate(time.Second) }

// AgentCertificate signs a certificate for a host's Nomad agent. Nomad's
// verify_server_hostname wants the name <role>.<region>.nomad.
func (m Material) AgentCertificate(host, region string, server bool, addresses []string, now time.Time) (certPEM string, keyPEM secret.Value, err error) {
	ca, caKey, err := m.authority()
	if err != nil {
		return "", secret.Value{}, err
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

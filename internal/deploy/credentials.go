package deploy

import (
	"slices"
	"time"

	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/seal"
)

// credentialRules say what the secret files of hosts are made of.
type credentialRules struct {
	// bundle is what agents are to trust, and issuers are the sha256 of the CA
	// certificates whose signature still counts.
	bundle  string
	issuers []string
	// since: a certificate from before is made anew; zero for any.
	since time.Time
}

// usualRules hold outside of a rotation, and for what an ordinary run finds in the
// middle of one that was cut short: both CAs are trusted, and whatever either
// signed stays.
func (s *session) usualRules() credentialRules {
	rules := credentialRules{bundle: s.material.TrustBundle(), issuers: []string{hexSum([]byte(s.material.CACertPEM))}}
	if previous := s.material.PreviousCACertPEM; previous != "" {
		rules.issuers = append(rules.issuers, hexSum([]byte(previous)))
	}
	return rules
}

// credentials are the secret files of a host; its certificate is among them where
// the one that it has does not hold.
func (s *session) credentials(h *remoteHost, address string, rules credentialRules) (*host.Credentials, error) {
	credentials := &host.Credentials{GossipKey: s.material.GossipKey, CACertPEM: rules.bundle}
	if s.certificateHolds(h, rules) {
		return credentials, nil
	}
	now := time.Now()
	certificate, key, err := s.material.AgentCertificate(h.Name, s.site.Region, h.Server, []string{address}, now)
	if err != nil {
		return nil, err
	}
	credentials.AgentCertPEM, credentials.AgentKeyPEM = certificate, key
	credentials.Expire, credentials.Issuer = seal.AgentExpiry(now), hexSum([]byte(s.material.CACertPEM))
	return credentials, nil
}

// certificateHolds reports whether the host's certificate and key are what was
// applied, and what the rules allow: then they are not made anew.
func (s *session) certificateHolds(h *remoteHost, rules credentialRules) bool {
	if h.applied == nil || time.Until(h.applied.CredentialsExpire) < renewBefore {
		return false
	}
	if !rules.since.IsZero() && h.applied.CredentialsExpire.Before(seal.AgentExpiry(rules.since)) {
		return false
	}
	if !slices.Contains(rules.issuers, h.applied.Issuer()) {
		return false
	}
	for _, path := range []string{host.AgentCertPath, host.AgentKeyPath} {
		applied := h.applied.FileSHA256(path)
		if applied == "" {
			return false
		}
		if h.observed == nil {
			continue
		}
		if seen := h.observed.Files[path]; !seen.Exists || seen.SHA256 != applied {
			return false
		}
	}
	return true
}

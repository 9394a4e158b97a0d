package deploy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"slices"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/seal"
)

// rotateCA gives the site another certificate authority. All trust both before
// any certificate changes, and have one by the new before the old is dropped;
// agents take the files without a restart.
func (s *session) rotateCA(ctx context.Context, progress plan.Progress) error {
	if s.material.PreviousCACertPEM == "" {
		next, err := s.material.WithNewCA(time.Now())
		if err != nil {
			return err
		}
		err = s.changeMaterial(ctx, func(m *seal.Material) {
			m.CAKeyPEM, m.CACertPEM, m.PreviousCACertPEM = next.CAKeyPEM, next.CACertPEM, next.PreviousCACertPEM
		})
		if err != nil {
			return err
		}
		if err := s.reached(ctx, rootCA, "the new CA is sealed", progress); err != nil {
			return err
		}
	}
	both, alone := s.usualRules(), s.usualRules()
	both.issuers, alone.issuers = both.issuers[:1], alone.issuers[:1]
	alone.bundle = s.material.CACertPEM
	for _, phase := range []struct {
		point string
		rules credentialRules
	}{
		{"all hosts trust both CAs", s.usualRules()},
		{"all hosts have a certificate by the new CA", both},
		{"all hosts trust the new CA alone", alone},
	} {
		if err := s.convergeCredentials(ctx, phase.rules, progress); err != nil {
			return err
		}
		if err := s.reached(ctx, rootCA, phase.point, progress); err != nil {
			return err
		}
	}
	if err := s.changeMaterial(ctx, func(m *seal.Material) { m.PreviousCACertPEM = "" }); err != nil {
		return err
	}
	return s.reached(ctx, rootCA, "the old CA is forgotten", progress)
}

// rotateCertificates gives every agent another key, and a certificate of it.
func (s *session) rotateCertificates(ctx context.Context, progress plan.Progress) error {
	rules := s.usualRules()
	rules.since = time.Now()
	if err := s.convergeCredentials(ctx, rules, progress); err != nil {
		return err
	}
	return s.reached(ctx, rootCertificates, "all agents have new certificates", progress)
}

// convergeCredentials brings the hosts' secret files to the rules, has their agents
// take them, and leaves all else as it is.
func (s *session) convergeCredentials(ctx context.Context, rules credentialRules, progress plan.Progress) error {
	render := func(h *remoteHost) (host.Document, error) {
		if h.applied == nil {
			return host.Document{}, &host.NeedsCredentialsError{Host: h.Name, Path: host.AppliedPath}
		}
		address, err := h.address()
		if err != nil {
			return host.Document{}, err
		}
		credentials, err := s.credentials(h, address, rules)
		if err != nil {
			return host.Document{}, err
		}
		return host.WithCredentials(*h.applied, h.Host, *credentials, s.options.Platform.Bootstrap)
	}
	keep := func(change plan.Change) bool {
		return slices.Contains(host.CredentialPaths(), change.Target) || change.Target == host.NomadUnit && change.Action == plan.Reload
	}
	for _, h := range s.hosts {
		h.observed = nil
	}
	if err := runStep(ctx, s.hostStep("credentials", render, keep, s.applyDocuments), progress); err != nil {
		return err
	}
	return s.each(ctx, s.servers(), s.agentTookCredentials)
}

// agentTookCredentials waits until the agent of a server shows the certificate in
// its files, and takes one by the CA that signs now. A reload that it was told of
// says nothing about whether it happened.
func (s *session) agentTookCredentials(ctx context.Context, h *remoteHost) error {
	certificate, key, err := s.material.AgentCertificate(h.Name, s.site.Region, false, nil, time.Now())
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair([]byte(certificate), []byte(key.Reveal()))
	if err != nil {
		return err
	}
	want := h.applied.FileSHA256(host.AgentCertPath)
	err = retry.Until(ctx, "the agent to take its certificates", min(settleLimit, s.left()), func(ctx context.Context) error {
		shown, err := s.agentShows(ctx, h, pair)
		if err == nil && hexSum(shown) != want {
			err = errors.New("it shows another certificate than that in " + host.AgentCertPath)
		}
		return err
	})
	return plan.WithHint(err, "see `journalctl -u nomad` on %s", h.Name)
}

// nomadRPC is where agents of servers talk to each other, and rpcTLS is the first
// byte by which they say that TLS follows.
const (
	nomadRPC = "127.0.0.1:4647"
	rpcTLS   = 0x04
)

// agentShows is the certificate of a server's agent, as PEM, if it takes the pair.
func (s *session) agentShows(ctx context.Context, h *remoteHost, pair tls.Certificate) ([]byte, error) {
	plain, err := h.conn.DialContext(ctx, "tcp", nomadRPC)
	if err != nil {
		return nil, err
	}
	defer func() { _ = plain.Close() }()
	if _, err := plain.Write([]byte{rpcTLS}); err != nil {
		return nil, err
	}
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM([]byte(s.material.TrustBundle()))
	connection := tls.Client(plain, &tls.Config{ //nolint:gosec // TLS 1.2 on purpose, see below
		ServerName: "server." + s.site.Region + ".nomad", RootCAs: authorities,
		// Under TLS 1.3 a handshake ends before the other end has judged the certificate.
		MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12,
		// Given whatever CA it asks for.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil },
	})
	if err := connection.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	shown := connection.ConnectionState().PeerCertificates[0]
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: shown.Raw}), nil
}

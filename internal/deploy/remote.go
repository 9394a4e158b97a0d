package deploy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/site"
)

// remoteHost is a host that we are connected to.
type remoteHost struct {
	site.Host
	conn *ssh.Conn
	// platform is such as "linux/amd64".
	platform string
	// siteHostDigest is that of the site-host executable on the host, "" when there is none.
	siteHostDigest string
	// facts and applied are read once site-host is there.
	facts   *host.Observation
	applied *host.Document
	// observed is the last observation against the host's document; nil when stale.
	observed *host.Observation
}

var architectures = map[string]string{"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}

func (h *remoteHost) readFacts(ctx context.Context) error {
	facts, err := h.conn.Facts(ctx)
	if err != nil {
		return err
	}
	architecture, ok := architectures[facts.Machine]
	if !ok {
		return plan.WithHint(fmt.Errorf("host %s: machine type %q is not supported", h.Name, facts.Machine), "supported are x86_64 and aarch64")
	}
	h.platform = "linux/" + architecture
	if h.platform != hostPlatform {
		// Artifacts are built before the first remote access, for one platform.
		return plan.WithHint(fmt.Errorf("host %s is %s, and artifacts are built for %s only", h.Name, h.platform, hostPlatform),
			"use a %s host", hostPlatform)
	}
	h.siteHostDigest, err = h.conn.Digest(ctx, host.SiteHostPath)
	return err
}

// siteHost runs a site-host command and decodes its JSON answer into result,
// unless that is nil.
func (h *remoteHost) siteHost(ctx context.Context, input any, result any, args ...string) error {
	command := ssh.Command{Args: append([]string{host.SiteHostPath}, args...)}
	switch content := input.(type) {
	case nil:
	case []byte:
		command.Stdin = bytes.NewReader(content)
	default:
		encoded, err := json.Marshal(input)
		if err != nil {
			return fmt.Errorf("encode input of site-host %s: %w", args[0], err)
		}
		command.Stdin = bytes.NewReader(encoded)
	}
	output, err := h.conn.Run(ctx, command)
	if err != nil {
		return fmt.Errorf("site-host %s: %w", args[0], err)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(output, result); err != nil {
		return fmt.Errorf("site-host %s: decode its answer: %w", args[0], err)
	}
	return nil
}

// observe compares the host with document on the host itself.
func (h *remoteHost) observe(ctx context.Context, document host.Document) (*host.Observation, error) {
	var observation host.Observation
	if err := h.siteHost(ctx, document.Public(), &observation, "observe", "--document", "-"); err != nil {
		return nil, err
	}
	return &observation, nil
}

// readApplied reads what was applied last, and the facts, once.
func (h *remoteHost) readApplied(ctx context.Context) error {
	if h.facts != nil {
		return nil
	}
	content, err := h.readFile(ctx, host.AppliedPath)
	if err != nil {
		return err
	}
	if len(content) > 0 {
		var applied host.Document
		if err := json.Unmarshal(content, &applied); err == nil && applied.Version == host.DocumentVersion {
			h.applied = &applied
		}
	}
	observe := host.Document{Version: host.DocumentVersion}
	if h.facts, err = h.observe(ctx, observe); err != nil {
		return err
	}
	return nil
}

// readFile reads a root-only file; an absent one is empty.
func (h *remoteHost) readFile(ctx context.Context, path string) ([]byte, error) {
	output, err := h.conn.Run(ctx, ssh.Command{Args: []string{"sh", "-c", `if [ -e "$1" ]; then cat -- "$1"; fi`, "sh", path}})
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return output, nil
}

// address is what the host's agents advertise.
func (h *remoteHost) address() (string, error) {
	if h.PrivateAddress != "" {
		return h.PrivateAddress, nil
	}
	if h.facts == nil || len(h.facts.Addresses) == 0 {
		return "", plan.WithHint(errors.New("host "+h.Name+" has no address that other hosts could reach"), "set private_address in site.hcl")
	}
	return h.facts.Addresses[0], nil
}

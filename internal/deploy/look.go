package deploy

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/sitehost/release"
)

// HostStatus is one host in `site status`.
type HostStatus struct {
	Name         string `json:"name"`
	Bootstrapped bool   `json:"bootstrapped"`
	OS           string `json:"os,omitempty"`
	Architecture string `json:"architecture,omitempty"`
	CPUs         int    `json:"cpus,omitempty"`
	MemoryBytes  int64  `json:"memory_bytes,omitempty"`
	FreeBytes    int64  `json:"free_bytes,omitempty"`
}

// Status is what runs on a site.
type Status struct {
	Schema string       `json:"schema"`
	Site   string       `json:"site"`
	Hosts  []HostStatus `json:"hosts"`
	// Unreachable says of each host that did not answer why.
	Unreachable []string    `json:"unreachable,omitempty"`
	Jobs        []nomad.Row `json:"jobs"`
	Release     *Release    `json:"release,omitempty"`
	// Warnings are of what ends soon, or is due: secrets and certificates.
	Warnings []string `json:"warnings,omitempty"`
}

// Release is the latest one.
type Release struct {
	ID      string    `json:"id"`
	GitSHA  string    `json:"git_sha"`
	Created time.Time `json:"created"`
}

// StatusVersion names the schema of Status.
const StatusVersion = "site.status/v1"

// ReadStatus looks at hosts, jobs and the latest release; it writes nothing.
func ReadStatus(ctx context.Context, options Options) (Status, error) {
	s, err := read(ctx, options)
	if err != nil {
		return Status{}, err
	}
	defer s.close()
	status := Status{Schema: StatusVersion, Site: s.site.Name, Jobs: []nomad.Row{}}
	ready := true
	for _, problem := range s.unreachable {
		status.Unreachable = append(status.Unreachable, problem.Error())
	}
	for _, h := range s.hosts {
		row := HostStatus{Name: h.Name, Bootstrapped: h.siteHostDigest != ""}
		if row.Bootstrapped {
			if err := h.readApplied(ctx); err != nil {
				return status, err
			}
			row.OS, row.Architecture = h.facts.OS+" "+h.facts.OSVersion, h.facts.Architecture
			row.CPUs, row.MemoryBytes, row.FreeBytes = h.facts.CPUs, h.facts.MemoryBytes, h.facts.FreeBytes
		}
		ready = ready && h.applied != nil
		status.Hosts = append(status.Hosts, row)
	}
	if !ready {
		return status, nil
	}
	if err := s.openNomad(ctx); err != nil {
		return status, err
	}
	if status.Jobs, err = s.nomad.Status(ctx, s.site.Name); err != nil {
		return status, err
	}
	latest, err := s.latestRelease(ctx)
	if latest != nil {
		status.Release = releaseOf(*latest)
	}
	s.options.Warn = func(warning string) { status.Warnings = append(status.Warnings, warning) }
	s.warnOfExpiry()
	status.Warnings = append(status.Warnings, ageWarnings(s.site.Secrets(), readSummary(ctx, s.servers()[0]).states(), time.Now())...)
	return status, err
}

func releaseOf(record release.Record) *Release {
	return &Release{ID: record.ID, GitSHA: record.GitSHA, Created: record.Created}
}

// openNomad connects with the best credential at hand.
func (s *session) openNomad(ctx context.Context) error {
	if err := s.dialNomad(ctx); err != nil {
		return err
	}
	if s.material != nil {
		return s.useToken(s.material.NomadManagementToken)
	}
	return s.logIn(ctx)
}

// LogOptions choose what Logs shows.
type LogOptions = nomad.LogOptions

// Logs copies a job's log to w.
func Logs(ctx context.Context, options Options, logs LogOptions, w io.Writer) error {
	s, err := read(ctx, options)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.openNomad(ctx); err != nil {
		return err
	}
	return s.nomad.Logs(ctx, logs, w)
}

// Tunnel is one open way into a site.
type Tunnel struct {
	// Local is the address to connect to on this machine.
	Local string
	// Token is a short Nomad token, where one was asked for.
	Token  secret.Value
	Expiry time.Time
}

// TunnelRequest says what to open.
type TunnelRequest struct {
	// Remote is "host:port" as seen from the site's host; empty: its Nomad.
	Remote string
	// Host is where the tunnel ends; empty: the first server.
	Host string
	// Listen is the local address; empty: a free port on 127.0.0.1.
	Listen string
	// WithToken logs in to Nomad too.
	WithToken bool
}

// OpenTunnel forwards a local port until ctx ends; ready is called when it is open.
func OpenTunnel(ctx context.Context, options Options, request TunnelRequest, ready func(Tunnel) error) error {
	s, err := read(ctx, options)
	if err != nil {
		return err
	}
	defer s.close()
	end := s.servers()[0]
	for _, h := range s.hosts {
		if request.Host == h.Name {
			end = h
		}
	}
	if request.Host != "" && end.Name != request.Host {
		return plan.WithHint(fmt.Errorf("site %q has no host %q", s.site.Name, request.Host), "see `site status`")
	}
	tunnel := Tunnel{}
	if request.WithToken {
		if err := s.dialNomad(ctx); err != nil {
			return err
		}
		if tunnel.Token, tunnel.Expiry, err = s.shortToken(ctx); err != nil {
			return err
		}
	}
	if request.Listen == "" {
		request.Listen = "127.0.0.1:0"
	}
	if request.Remote == "" {
		request.Remote = "127.0.0.1:4646"
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", request.Listen)
	if err != nil {
		return plan.WithHint(fmt.Errorf("open the tunnel: %w", err), "choose another local address with --listen")
	}
	tunnel.Local = listener.Addr().String()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var group errgroup.Group
	group.Go(func() error { return end.conn.Forward(ctx, listener, request.Remote) })
	if err := ready(tunnel); err != nil {
		cancel()
		_ = group.Wait()
		return err
	}
	return group.Wait()
}

// JobAddress finds the port that a job's service answers on, for a tunnel to it.
func JobAddress(ctx context.Context, options Options, name string) (hostName, remote string, err error) {
	s, err := read(ctx, options)
	if err != nil {
		return "", "", err
	}
	defer s.close()
	if err := s.openNomad(ctx); err != nil {
		return "", "", err
	}
	return s.nomad.ServiceAddress(ctx, name)
}

package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nomad-site/site/internal/adapter/ansible"
	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/retry"
)

func (s *session) connectHosts() plan.Step {
	return check{title: "connect", run: s.connect}
}

// refuseBareHosts ends a daily deploy before it touches a host that only a
// bootstrap can finish. A plan goes on and says what it cannot know.
func (s *session) refuseBareHosts() plan.Step {
	return check{title: "hosts are bootstrapped", run: func(context.Context) error {
		var bare []string
		for _, h := range s.hosts {
			if h.siteHostDigest == "" {
				bare = append(bare, h.Name)
			}
		}
		if len(bare) == 0 || s.options.DryRun || s.material != nil {
			return nil
		}
		return plan.WithHint(fmt.Errorf("not bootstrapped yet: %s", strings.Join(bare, ", ")),
			"run `site bootstrap-deploy --site=%s --openbao-site-root-token-file=FILE`", s.site.Name)
	}}
}

// document renders what h must be.
func (s *session) document(h *remoteHost) (host.Document, error) {
	input := host.Input{
		Site: s.site, Host: h.Host, Applied: h.applied, Templates: s.options.Platform.Bootstrap,
		SiteHostSHA256: h.siteHostDigest,
		NomadSHA256:    strings.TrimPrefix(s.platform.executables[toolNomad].Digest, "sha256:"),
		DriverSHA256:   strings.TrimPrefix(s.platform.executables[toolDriver].Digest, "sha256:"),
	}
	for _, locked := range s.platform.lock.Packages {
		input.Packages = append(input.Packages, host.Package{Name: locked.Name, Version: locked.Version})
	}
	operators, err := s.operators()
	if err != nil {
		return host.Document{}, err
	}
	keys, err := nomad.JWKS(operators)
	if err != nil {
		return host.Document{}, err
	}
	input.OperatorsJWKS = string(keys)
	if keys, err = nomad.RotatorsJWKS(operators); err != nil {
		return host.Document{}, err
	}
	input.RotatorsJWKS = string(keys)
	if input.Address, err = h.address(); err != nil {
		return host.Document{}, err
	}
	for _, server := range s.servers() {
		address, err := server.address()
		if err != nil {
			return host.Document{}, err
		}
		input.ServerAddresses = append(input.ServerAddresses, address)
	}
	if s.material != nil {
		if input.Credentials, err = s.credentials(h, input.Address, s.usualRules()); err != nil {
			return host.Document{}, err
		}
	}
	return host.Render(input)
}

// renewBefore is how long before its end a certificate is made anew, by any run
// that has the site root token.
const renewBefore = 90 * 24 * time.Hour

// warnOfExpiry tells a run without the site root token of what it cannot renew.
func (s *session) warnOfExpiry() {
	for _, h := range s.hosts {
		if h.applied == nil || s.material != nil {
			continue
		}
		if expiry := h.applied.CredentialsExpire; time.Until(expiry) < renewBefore {
			s.options.Warn(fmt.Sprintf("the agent certificate of %s expires on %s: run `site bootstrap-deploy` with the site root token",
				h.Name, expiry.Format(time.DateOnly)))
		}
	}
}

// observeHosts renders each host's document and observes the host against it.
func (s *session) observeHosts(ctx context.Context, render renderer) (perHost[host.Document], error) {
	if err := s.needSiteHost(); err != nil {
		return nil, err
	}
	if err := s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error { return h.readApplied(ctx) }); err != nil {
		return nil, err
	}
	s.warnOfExpiry()
	documents := perHost[host.Document]{}
	var mutex sync.Mutex
	err := s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
		document, err := render(h)
		if err != nil {
			return err
		}
		if h.observed == nil {
			if h.observed, err = h.observe(ctx, document); err != nil {
				return err
			}
			// Whether the credentials hold is known only now.
			if document, err = render(h); err != nil {
				return err
			}
		}
		mutex.Lock()
		defer mutex.Unlock()
		documents[h.Name] = document
		return nil
	})
	return documents, err
}

// isPackage separates what installPackages does from what the role does.
func isPackage(change plan.Change) bool { return change.Kind == "package" }

func (s *session) diffHosts(documents perHost[host.Document]) []plan.Change {
	var changes []plan.Change
	for _, h := range s.hosts {
		changes = append(changes, host.Diff(h.Name, documents[h.Name], *h.observed)...)
	}
	return changes
}

// renderer makes a host's document.
type renderer func(*remoteHost) (host.Document, error)

// hostStep is a step over the hosts' documents, for the changes that it keeps.
func (s *session) hostStep(title string, render renderer, keep func(plan.Change) bool,
	converge func(context.Context, perHost[host.Document], []plan.Change, plan.Progress) error,
) plan.Step {
	return &plan.Reconciler[struct{}, perHost[host.Document]]{
		Title:  title,
		Desire: func(context.Context) (struct{}, error) { return struct{}{}, nil },
		Observe: func(ctx context.Context, _ struct{}) (perHost[host.Document], error) {
			return s.observeHosts(ctx, render)
		},
		Diff: func(_ struct{}, documents perHost[host.Document]) []plan.Change {
			return slices.DeleteFunc(s.diffHosts(documents), func(change plan.Change) bool { return !keep(change) })
		},
		Settled: func(ctx context.Context, _ struct{}) error { return s.hostsSettled(ctx, render, keep) },
		Converge: func(ctx context.Context, _ struct{}, documents perHost[host.Document], changes []plan.Change, progress plan.Progress) error {
			defer func() {
				for _, h := range s.hosts {
					h.observed = nil
				}
			}()
			return converge(ctx, documents, changes, progress)
		},
	}
}

// hostsSettled waits until nothing differs any more: units take a moment to
// start. One that does not start is explained by its journal.
func (s *session) hostsSettled(ctx context.Context, render renderer, keep func(plan.Change) bool) error {
	var left []plan.Change
	err := retry.Until(ctx, "the host to be as its document says", min(settleLimit, s.left()), func(ctx context.Context) error {
		for _, h := range s.hosts {
			h.observed = nil
		}
		documents, err := s.observeHosts(ctx, render)
		if err != nil {
			return retry.Permanent(err)
		}
		left = slices.DeleteFunc(s.diffHosts(documents), func(change plan.Change) bool { return !keep(change) })
		if len(left) == 0 {
			return nil
		}
		err = &plan.NotSettledError{Left: left}
		if !slices.ContainsFunc(left, func(change plan.Change) bool { return change.Kind == "unit" }) {
			return retry.Permanent(err)
		}
		return err
	})
	var timeout *retry.TimeoutError
	if !errors.As(err, &timeout) {
		return err
	}
	for _, change := range left {
		if change.Kind == "unit" {
			return plan.WithHint(fmt.Errorf("%w%s", err, s.journal(ctx, change)), "see `journalctl -u %s` on %s", change.Target, change.Host)
		}
	}
	return err
}

// settleLimit bounds how long units may take to be active.
const settleLimit = 30 * time.Second

// journal is the end of a unit's journal, to be put behind an error.
func (s *session) journal(ctx context.Context, change plan.Change) string {
	for _, h := range s.hosts {
		if h.Name != change.Host {
			continue
		}
		output, err := h.conn.Run(ctx, ssh.Command{Args: []string{"journalctl", "--unit", change.Target, "--lines", "8", "--no-pager", "--output", "cat"}})
		if err == nil && len(output) > 0 {
			return "; its journal ends with:\n  " + strings.ReplaceAll(strings.TrimSpace(string(output)), "\n", "\n  ")
		}
	}
	return ""
}

// installPackages installs the locked .deb closure offline: the host fetches nothing.
func (s *session) installPackages() plan.Step {
	return s.hostStep("packages", s.document, isPackage, func(ctx context.Context, _ perHost[host.Document], changes []plan.Change, progress plan.Progress) error {
		bundle := make([]packageFile, 0, len(s.platform.debs))
		for _, deb := range s.platform.debs {
			bundle = append(bundle, packageFile{deb.Name, deb.Version, deb.Architecture, deb.SHA256})
		}
		return s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
			missing := 0
			for _, change := range changes {
				if change.Host == h.Name {
					missing++
				}
			}
			if missing == 0 {
				return nil
			}
			progress.Message("%s: installing %d packages", h.Name, missing)
			return h.siteHost(ctx, bundle, nil, "packages", "install", "--store", host.StorePath, "--document", "-")
		})
	})
}

// packageFile is one entry of what `site-host packages install` reads.
type packageFile struct {
	Name         string `json:"name"`
	Version      string `json:"version"`
	Architecture string `json:"architecture"`
	SHA256       string `json:"sha256"`
}

// convergeHosts applies the documents with Ansible, on the hosts and for the
// paths that differ.
func (s *session) convergeHosts() plan.Step {
	return s.hostStep("host", s.document, func(change plan.Change) bool { return !isPackage(change) }, s.applyDocuments)
}

// applyDocuments applies the documents with Ansible, for the changes that are given.
func (s *session) applyDocuments(ctx context.Context, documents perHost[host.Document], changes []plan.Change, progress plan.Progress) error {
	folder, release, err := ansible.WorkFolder()
	if err != nil {
		return err
	}
	defer release()
	var runs []ansible.Host
	for _, h := range s.hosts {
		run := ansible.Host{Name: h.Name, Document: documents[h.Name], Sudo: h.conn.User() != "root"}
		for _, change := range changes {
			if change.Host != h.Name {
				continue
			}
			run.Targets = append(run.Targets, change.Target)
			switch change.Action { //nolint:exhaustive // the others are in the document
			case plan.Restart:
				run.Restart = append(run.Restart, change.Target)
			case plan.Reload:
				run.Reload = append(run.Reload, change.Target)
			}
		}
		if len(run.Targets) == 0 {
			continue
		}
		if err := s.haveContents(h, run); err != nil {
			return err
		}
		if run.SSHConfig, err = h.conn.WriteSSHConfig(filepath.Join(folder, h.Name)); err != nil {
			return err
		}
		runs = append(runs, run)
	}
	runner := ansible.Runner{
		Executable: s.platform.ansible, Playbook: s.options.Platform.Playbook, Agent: os.Getenv("SSH_AUTH_SOCK"),
	}
	if err := runner.Apply(ctx, runs, progress); err != nil {
		return err
	}
	// What was applied is now the base that secret files are judged by.
	for _, run := range runs {
		for _, h := range s.hosts {
			if h.Name == run.Name {
				public := run.Document.Public()
				h.applied = &public
			}
		}
	}
	return nil
}

// haveContents refuses to write a secret file whose content nobody gave.
func (s *session) haveContents(h *remoteHost, run ansible.Host) error {
	for _, file := range run.Document.Files {
		if file.Secret && file.Content == "" && slices.Contains(run.Targets, file.Path) {
			return &host.NeedsCredentialsError{Host: h.Name, Path: file.Path}
		}
	}
	return nil
}

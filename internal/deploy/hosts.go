package deploy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/user"
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
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/sitehost/lease"
)

func (s *session) connectHosts() plan.Step {
	return check{title: "connect", run: s.connect}
}

// placeSiteHost puts our static binary on every host over plain SSH: it is the
// first thing there, and all that comes later goes through it.
func (s *session) placeSiteHost() plan.Step {
	type wanted map[string][]byte // by platform
	return &plan.Reconciler[wanted, perHost[string]]{
		Title: "site-host",
		Desire: func(context.Context) (wanted, error) {
			desired := wanted{}
			for _, h := range s.hosts {
				content, err := s.options.Platform.SiteHost(h.platform)
				if err != nil {
					return nil, err
				}
				desired[h.platform] = content
			}
			return desired, nil
		},
		Observe: func(ctx context.Context, _ wanted) (perHost[string], error) {
			actual := perHost[string]{}
			for _, h := range s.hosts {
				actual[h.Name] = h.siteHostDigest
			}
			return actual, nil
		},
		Diff: func(desired wanted, actual perHost[string]) []plan.Change {
			var changes []plan.Change
			for _, h := range s.hosts {
				content := desired[h.platform]
				change := plan.Change{
					Action: plan.Upload, Kind: "binary", Host: h.Name, Target: host.SiteHostPath, Bytes: int64(len(content)),
				}
				switch digest := actual[h.Name]; {
				case digest == hexSum(content):
					continue
				case digest == "":
					change.Reason = "missing"
				default:
					change.Reason = "another version"
				}
				changes = append(changes, change)
			}
			return changes
		},
		Converge: func(ctx context.Context, desired wanted, _ perHost[string], _ []plan.Change, progress plan.Progress) error {
			return s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
				content := desired[h.platform]
				digest := hexSum(content)
				if h.siteHostDigest == digest {
					return nil
				}
				_, err := ssh.PutBinary(ctx, h.conn, bytes.NewReader(content), int64(len(content)), digest, host.SiteHostPath, 0o755,
					func(done, total int64) { progress.Bytes("site-host to "+h.Name, done, total) })
				if err == nil {
					h.siteHostDigest = digest
				}
				return err
			})
		},
	}
}

func hexSum(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// takeLock holds the site's lock on the first server host until the session
// ends. A dry run takes none: it writes nothing.
func (s *session) takeLock(reason string) plan.Step {
	return check{title: "lock", run: func(ctx context.Context) error {
		if s.options.DryRun {
			return nil
		}
		h := s.servers()[0]
		id := rand.Text()
		args := []string{
			host.SiteHostPath, "lock", "acquire", "--hold", "--file", host.LockPath, "--id", id,
			"--holder", holderName(), "--reason", reason, "--lease", "60s",
		}
		if s.options.TakeOverLock != "" {
			args = append(args, "--takeover", s.options.TakeOverLock)
		}
		// Not ctx: the lock must outlive a cancelled run until its clean-up is done.
		holding, err := h.conn.Start(context.WithoutCancel(ctx), args)
		if err != nil {
			return err
		}
		line, readErr := bufio.NewReader(holding).ReadBytes('\n')
		var current lease.Lock
		if readErr == nil {
			readErr = json.Unmarshal(line, &current)
		}
		if readErr != nil {
			_ = holding.CloseWrite()
			err := holding.Wait()
			return fmt.Errorf("take the lock on %s: %w", h.Name, errors.Join(err, readErr))
		}
		if current.ID != id { // refused: it printed the lock that is held
			_ = holding.Close()
			return &LockedError{
				Site: s.site.Name, ID: current.ID, Holder: current.Holder, Reason: current.Reason,
				Since: current.Since, Until: current.LeaseUntil,
			}
		}
		s.onClose(func() {
			_ = holding.CloseWrite() // site-host releases the lock at the end of its input
			_ = holding.Wait()
		})
		return nil
	}}
}

// holderName tells other operators who holds the lock.
func holderName() string {
	name := "unknown"
	if current, err := user.Current(); err == nil {
		name = current.Username
	}
	machine, err := os.Hostname()
	if err != nil {
		return name
	}
	return name + "@" + machine
}

// sealInitMaterial generates what must exist before there is a secrets engine,
// and keeps it in git and on the server hosts before anything uses it.
func (s *session) sealInitMaterial() plan.Step {
	type copies struct {
		local bool
		hosts perHost[[]byte]
	}
	local := func() string { return filepath.Join(s.root, filepath.FromSlash(s.initPath())) }
	return &plan.Reconciler[[]byte, copies]{
		Title: "init material",
		Desire: func(ctx context.Context) ([]byte, error) {
			if s.rootToken.IsZero() {
				return nil, plan.WithHint(errors.New("a bootstrap needs the site root token"),
					"give it with --root-token-file=FILE; make one with `site root-token new FILE`")
			}
			if s.material != nil {
				return s.material.sealed, nil
			}
			if err := s.recoverMaterial(ctx); err != nil {
				return nil, err
			}
			if s.material != nil {
				return s.material.sealed, nil
			}
			material, err := seal.New(s.site.Name, time.Now())
			if err != nil {
				return nil, err
			}
			sealed, err := seal.Seal(material, s.rootToken)
			if err != nil {
				return nil, err
			}
			s.material = &materialState{Material: material, sealed: sealed, generated: true}
			return sealed, nil
		},
		Observe: func(ctx context.Context, desired []byte) (copies, error) {
			actual := copies{hosts: perHost[[]byte]{}}
			content, err := os.ReadFile(local())
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return actual, fmt.Errorf("init material: %w", err)
			}
			actual.local = bytes.Equal(content, desired)
			var mutex sync.Mutex
			err = s.each(ctx, s.servers(), func(ctx context.Context, h *remoteHost) error {
				content, err := h.readFile(ctx, host.InitPath)
				mutex.Lock()
				defer mutex.Unlock()
				actual.hosts[h.Name] = content
				return err
			})
			return actual, err
		},
		Diff: func(desired []byte, actual copies) []plan.Change {
			var changes []plan.Change
			if !actual.local {
				changes = append(changes, plan.Change{Action: plan.Create, Kind: "file", Target: s.initPath(), Reason: "the sealed init material belongs in git"})
			}
			for _, h := range s.servers() {
				change := plan.Change{Action: plan.Create, Kind: "file", Host: h.Name, Target: host.InitPath, Reason: "missing"}
				switch have := actual.hosts[h.Name]; {
				case bytes.Equal(have, desired):
					continue
				case len(have) > 0:
					change.Action, change.Reason = plan.Update, "differs from "+s.initPath()
				}
				changes = append(changes, change)
			}
			return changes
		},
		Converge: func(ctx context.Context, desired []byte, actual copies, _ []plan.Change, _ plan.Progress) error {
			for name, have := range actual.hosts {
				if len(have) == 0 || bytes.Equal(have, desired) {
					continue
				}
				// Another material may be what the site runs on: it must open, and be the same.
				existing, err := seal.Open(have, s.rootToken, s.site.Name, name+":"+host.InitPath)
				if err != nil {
					return err
				}
				if existing.NomadManagementToken.Reveal() != s.material.NomadManagementToken.Reveal() {
					return plan.WithHint(fmt.Errorf("%s on %s and %s hold different init material", host.InitPath, name, s.initPath()),
						"the host's copy is what the site runs on: move %s away and run this again", s.initPath())
				}
			}
			if !actual.local {
				if err := writePrivate(local(), desired); err != nil {
					return err
				}
				s.warnUncommitted(ctx)
			}
			return s.each(ctx, s.servers(), func(ctx context.Context, h *remoteHost) error {
				if bytes.Equal(actual.hosts[h.Name], desired) {
					return nil
				}
				return h.siteHost(ctx, desired, nil, "file", "put", host.InitPath, "--mode", "0600")
			})
		},
	}
}

// recoverMaterial takes the host's copy where the work tree has none, as after
// a fresh clone of a commit that lacks it.
func (s *session) recoverMaterial(ctx context.Context) error {
	for _, h := range s.servers() {
		sealed, err := h.readFile(ctx, host.InitPath)
		if err != nil {
			return err
		}
		if len(sealed) > 0 {
			return s.openMaterial(sealed, h.Name+":"+host.InitPath)
		}
	}
	return nil
}

// writePrivate writes a file that is private from its first byte.
func writePrivate(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	file, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = file.Write(content)
	err = errors.Join(err, file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		_ = os.Remove(file.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
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
	if s.material != nil && !s.credentialsHold(h) {
		certificate, key, err := s.material.AgentCertificate(h.Name, s.site.Region, h.Server, []string{input.Address}, time.Now())
		if err != nil {
			return host.Document{}, err
		}
		input.Credentials = &host.Credentials{
			GossipKey: s.material.GossipKey, CACertPEM: s.material.CACertPEM, AgentCertPEM: certificate, AgentKeyPEM: key,
		}
	}
	return host.Render(input)
}

// credentialsHold reports whether the host's secret files are what was applied
// and come from this init material: then they are not made anew.
func (s *session) credentialsHold(h *remoteHost) bool {
	if h.applied == nil || h.applied.FileSHA256(host.CACertPath) != hexSum([]byte(s.material.CACertPEM)) {
		return false
	}
	if h.observed == nil {
		return true
	}
	for _, path := range host.CredentialPaths() {
		seen := h.observed.Files[path]
		if !seen.Exists || seen.SHA256 != h.applied.FileSHA256(path) {
			return false
		}
	}
	return true
}

// observeHosts renders each host's document and observes the host against it.
func (s *session) observeHosts(ctx context.Context) (perHost[host.Document], error) {
	if err := s.needSiteHost(); err != nil {
		return nil, err
	}
	if err := s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error { return h.readApplied(ctx) }); err != nil {
		return nil, err
	}
	documents := perHost[host.Document]{}
	var mutex sync.Mutex
	err := s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
		document, err := s.document(h)
		if err != nil {
			return err
		}
		if h.observed == nil {
			if h.observed, err = h.observe(ctx, document); err != nil {
				return err
			}
			// Whether the credentials hold is known only now.
			if document, err = s.document(h); err != nil {
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

// hostStep is a step over the hosts' documents, for the changes that it keeps.
func (s *session) hostStep(title string, keep func(plan.Change) bool,
	converge func(context.Context, perHost[host.Document], []plan.Change, plan.Progress) error,
) plan.Step {
	return &plan.Reconciler[struct{}, perHost[host.Document]]{
		Title:  title,
		Desire: func(context.Context) (struct{}, error) { return struct{}{}, nil },
		Observe: func(ctx context.Context, _ struct{}) (perHost[host.Document], error) {
			return s.observeHosts(ctx)
		},
		Diff: func(_ struct{}, documents perHost[host.Document]) []plan.Change {
			return slices.DeleteFunc(s.diffHosts(documents), func(change plan.Change) bool { return !keep(change) })
		},
		Settled: func(ctx context.Context, _ struct{}) error { return s.hostsSettled(ctx, keep) },
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
func (s *session) hostsSettled(ctx context.Context, keep func(plan.Change) bool) error {
	var left []plan.Change
	err := retry.Until(ctx, "the host to be as its document says", min(settleLimit, s.left()), func(ctx context.Context) error {
		for _, h := range s.hosts {
			h.observed = nil
		}
		documents, err := s.observeHosts(ctx)
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
	return s.hostStep("packages", isPackage, func(ctx context.Context, _ perHost[host.Document], changes []plan.Change, progress plan.Progress) error {
		bundle := make([]packageFile, 0, len(s.platform.debs))
		for _, deb := range s.platform.debs {
			bundle = append(bundle, packageFile{deb.Name, deb.Version, deb.Architecture, deb.SHA256})
		}
		return s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
			if !slices.ContainsFunc(changes, func(change plan.Change) bool { return change.Host == h.Name }) {
				return nil
			}
			progress.Message("%s: installing %d packages", h.Name, len(changes))
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
	return s.hostStep("host", func(change plan.Change) bool { return !isPackage(change) },
		func(ctx context.Context, documents perHost[host.Document], changes []plan.Change, progress plan.Progress) error {
			folder, err := os.MkdirTemp("", "site-ssh-")
			if err != nil {
				return fmt.Errorf("work folder: %w", err)
			}
			defer func() { _ = os.RemoveAll(folder) }()
			var runs []ansible.Host
			for _, h := range s.hosts {
				run := ansible.Host{Name: h.Name, Document: documents[h.Name], Sudo: h.conn.User() != "root"}
				for _, change := range changes {
					if change.Host != h.Name {
						continue
					}
					run.Targets = append(run.Targets, change.Target)
					if change.Action == plan.Restart {
						run.Restart = append(run.Restart, change.Target)
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
		})
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

package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/adapter/builder"
	"github.com/nomad-site/site/internal/adapter/git"
	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/adapter/postgres"
	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/writesession/client"
)

// session is one run: what was read of the repository, and the connections.
// Steps share it; each fills in what later steps need.
type session struct {
	options    Options
	repository *git.Repository
	// root is the work tree, tree the exported commit.
	root, sha, tree, treeID string
	site                    *site.Site
	rootToken               secret.Value
	// newRootToken is the one that init.age is being sealed to anew, and sealTo the
	// tokens it is sealed to then; both empty in any other run.
	newRootToken secret.Value
	sealTo       []secret.Value
	material     *materialState
	platform     platformArtifacts
	// built are the active components' artifacts, by component.
	built map[string][]builder.Built
	hosts []*remoteHost
	// unreachable says why hosts are not among them, in a session that only looks.
	unreachable []error
	nomad       *nomad.Client
	// jobs collects what this run wants of each job, for the release record.
	jobs map[string]*nomad.Prepared
	// pinned are the same with the generations of secrets that they read.
	pinned map[string]*pinnedJob
	// entries are what OpenBao knows of the catalogue, once it was asked.
	entries map[string]catalogue.EntryState
	// engine tells the OpenBao that counts the generations from one that was
	// initialised anew, and began to count again.
	engine string
	// recorded are the generations that jobs of the last release read.
	recorded map[string]int
	// renamed are passwords of roles that alternate since this run.
	renamed map[string]bool

	deadline    time.Time
	armDeadline func(time.Duration)
	// abort ends the run for a reason.
	abort context.CancelCauseFunc

	// temporary is released on every path out.
	temporary registry

	// bao is OpenBao with the operator's short token, databases Postgres' superuser.
	bao       *openbao.Client
	databases *postgres.Client
	// via is how the components' artifacts travel, once that is decided; store is
	// the service that hands out uploads, where they go that way.
	via string
	// released: this run wrote a release.
	released bool
	store    *client.Client
	// missingSecrets are the external secrets that nobody imported yet; blocked are the
	// components that wait for one, with the reason.
	missingSecrets error
	blocked        map[string]string
	// platformPending: the platform's jobs are not what they should be, so that
	// a dry run cannot ask them.
	platformPending bool
}

// materialState is the init material, open and as it is sealed.
type materialState struct {
	seal.Material
	sealed []byte
}

// newSession does nothing remote.
func newSession(options Options) *session {
	if options.Warn == nil {
		options.Warn = func(string) {}
	}
	return &session{
		options: options, built: map[string][]builder.Built{}, jobs: map[string]*nomad.Prepared{}, pinned: map[string]*pinnedJob{},
		renamed: map[string]bool{},
	}
}

// onClose registers the release of what cannot fail to be released.
func (s *session) onClose(release func()) {
	s.temporary.hold("a connection", func(context.Context) error {
		release()
		return nil
	})
}

// close releases everything temporary; it is called on every path out.
func (s *session) close() {
	s.temporary.close(func(err error) { s.options.Warn(err.Error()) })
}

// readRepository reads the commit and its configuration.
func (s *session) readRepository(ctx context.Context) error {
	repository, err := git.Open(ctx, s.options.WorkDir)
	if err != nil {
		return err
	}
	s.root = repository.Root()
	revision := s.options.Revision
	if revision == "" {
		revision = "HEAD"
	}
	if s.sha, err = repository.Resolve(ctx, revision); err != nil {
		return err
	}
	if s.treeID, err = repository.TreeID(ctx, s.sha); err != nil {
		return err
	}
	if s.tree, err = repository.Export(ctx, s.sha, s.options.CacheDir); err != nil {
		return err
	}
	if s.options.Site == "" {
		names, err := site.Names(os.DirFS(s.tree))
		if err != nil {
			return err
		}
		if len(names) != 1 {
			return plan.WithHint(fmt.Errorf("the commit has %d sites", len(names)), "say which with --site: %v", names)
		}
		s.options.Site = names[0]
	}
	s.site, err = site.Load(os.DirFS(s.tree), s.options.Site, site.LoadOptions{WorkDir: s.root, Platform: s.options.Platform.Jobs})
	if err != nil {
		return err
	}
	if s.armDeadline != nil {
		s.armDeadline(s.site.Deadline)
	}
	if err := s.checkOnly(); err != nil {
		return err
	}
	s.repository = repository
	s.warnUncommitted(ctx)
	return nil
}

// warnUncommitted names what is in the work tree and not part of this run.
func (s *session) warnUncommitted(ctx context.Context) {
	dirty, err := s.repository.Dirty(ctx)
	if err != nil {
		s.options.Warn(err.Error())
		return
	}
	var others []string
	for _, path := range dirty {
		if path == s.initPath() {
			s.options.Warn(fmt.Sprintf("commit %s: the site cannot be recovered without it", path))
		} else if path != s.knownHostsName() {
			others = append(others, path)
		}
	}
	const shown = 5
	switch {
	case len(others) > shown:
		s.options.Warn(fmt.Sprintf("uncommitted changes are not part of this run: %s and %d more", strings.Join(others[:shown], ", "), len(others)-shown))
	case len(others) > 0:
		s.options.Warn("uncommitted changes are not part of this run: " + strings.Join(others, ", "))
	}
}

func (s *session) checkOnly() error {
	for _, name := range s.options.Only {
		known := false
		for _, component := range s.site.Components {
			known = known || component.Name == name
		}
		if !known {
			var active []string
			for _, component := range s.site.Components {
				active = append(active, component.Name)
			}
			return plan.WithHint(fmt.Errorf("component %q is not active in site %q", name, s.site.Name),
				"active are: %s; another one must be added to sites/%s/site.hcl and committed", strings.Join(active, ", "), s.site.Name)
		}
	}
	return nil
}

// active reports whether this run deals with a component.
func (s *session) active(name string) bool {
	if len(s.options.Only) == 0 {
		return true
	}
	for _, only := range s.options.Only {
		if only == name {
			return true
		}
	}
	return false
}

// initPath is where the sealed init material lies, relative to the work tree.
func (s *session) initPath() string { return "sites/" + s.options.Site + "/init.age" }

// readMaterial opens the init material of the work tree with the site root token.
func (s *session) readMaterial() error {
	if s.options.RootTokenFile == "" {
		return nil
	}
	token, err := seal.ReadRootToken(s.options.RootTokenFile)
	if err != nil {
		return err
	}
	s.rootToken = token
	if err := s.readNewRootToken(); err != nil {
		return err
	}
	sealed, err := os.ReadFile(filepath.Join(s.root, s.initPath()))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("init material: %w", err)
	}
	return s.openMaterial(sealed, s.initPath())
}

func (s *session) openMaterial(sealed []byte, place string) error {
	material, err := seal.Open(sealed, s.openers(), s.site.Name, place)
	if err != nil {
		return err
	}
	s.material = &materialState{Material: material, sealed: sealed}
	return nil
}

// servers are the hosts that run a Nomad server; the first one holds the lock.
func (s *session) servers() []*remoteHost {
	var servers []*remoteHost
	for _, h := range s.hosts {
		if h.Server {
			servers = append(servers, h)
		}
	}
	return servers
}

// connect dials every host.
func (s *session) connect(ctx context.Context) error {
	hosts, problems := s.dial(ctx)
	s.hosts = hosts
	return errors.Join(problems...)
}

// dial connects to all hosts at once; an unreachable one does not keep it from
// the others.
func (s *session) dial(ctx context.Context) ([]*remoteHost, []error) {
	hosts := make([]*remoteHost, len(s.site.Hosts))
	problems := make([]error, len(s.site.Hosts))
	var group errgroup.Group
	group.SetLimit(10)
	for i, h := range s.site.Hosts {
		group.Go(func() error {
			remote, err := s.dialHost(ctx, h)
			if err == nil {
				err = remote.readFacts(ctx)
			}
			if problems[i] = err; err == nil {
				hosts[i] = remote
			}
			return nil
		})
	}
	_ = group.Wait()
	return slices.DeleteFunc(hosts, func(h *remoteHost) bool { return h == nil }),
		slices.DeleteFunc(problems, func(err error) bool { return err == nil })
}

func (s *session) dialHost(ctx context.Context, h site.Host) (*remoteHost, error) {
	conn, err := ssh.Dial(ctx, ssh.Target{
		Name: h.Name, Address: h.Address, Port: h.Port, User: h.User, IdentityFile: h.IdentityFile,
		HostKeys: h.HostKeys, KnownHostsFiles: []string{s.knownHostsPath()}, ConfigFile: s.sshConfigPath(),
	}, ssh.Options{AcceptNewHostKey: s.options.AcceptNewHostKey, RecordTo: s.knownHostsPath()})
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", h.Name, err)
	}
	s.onClose(func() { _ = conn.Close() })
	return &remoteHost{Host: h, conn: conn}, nil
}

// dialFirstServer connects to the host that keeps the site's own records, and asks it nothing.
func (s *session) dialFirstServer(ctx context.Context) (*remoteHost, error) {
	for _, h := range s.site.Hosts {
		if h.Server {
			return s.dialHost(ctx, h)
		}
	}
	return nil, fmt.Errorf("site %q has no server", s.site.Name)
}

func (s *session) knownHostsName() string { return "sites/" + s.options.Site + "/known_hosts" }

func (s *session) knownHostsPath() string {
	return filepath.Join(s.root, filepath.FromSlash(s.knownHostsName()))
}

func (s *session) sshConfigPath() string {
	if s.site.SSHConfigFile == "" {
		return ""
	}
	return filepath.Join(s.root, filepath.FromSlash(s.site.SSHConfigFile))
}

// each runs work on hosts at the same time.
func (s *session) each(ctx context.Context, hosts []*remoteHost, work func(context.Context, *remoteHost) error) error {
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(10)
	for _, h := range hosts {
		group.Go(func() error {
			if err := work(groupCtx, h); err != nil {
				return fmt.Errorf("host %s: %w", h.Name, err)
			}
			return nil
		})
	}
	return group.Wait()
}

package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"github.com/nomad-site/site/internal/adapter/builder"
	"github.com/nomad-site/site/internal/adapter/debian"
	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/adapter/toolchain"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/site"
)

func TestVerdictsAreFoundWhereverTheyAre(t *testing.T) {
	rollout := func(job string) error { return &nomad.RolloutError{Verdict: nomad.Verdict{Job: job}} }
	for _, test := range []struct {
		name, want string
		err        error
	}{
		{"no error", "", nil},
		{"another error", "", errors.New("no")},
		{"one", "a", rollout("a")},
		{"one that is wrapped", "a", plan.WithHint(fmt.Errorf("step jobs: %w", rollout("a")), "look")},
		{"several that are joined", "a b", fmt.Errorf("jobs: %w", errors.Join(rollout("a"), errors.New("no"), rollout("b")))},
	} {
		t.Run(test.name, func(t *testing.T) {
			var jobs []string
			for _, verdict := range Verdicts(test.err) {
				jobs = append(jobs, verdict.Job)
			}
			if got := strings.Join(jobs, " "); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func testSession(options Options) *session {
	s := newSession(options)
	s.site = &site.Site{Name: "gamma", Deadline: 15 * time.Minute, Components: []site.Component{{Name: "orders"}, {Name: "mail"}}}
	return s
}

func TestARunEndsAtItsDeadline(t *testing.T) {
	for name, test := range map[string]struct {
		timeout, limit time.Duration
	}{
		"that of --timeout":                    {time.Minute, time.Minute},
		"that of the site, once this is known": {0, 15 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := testSession(Options{Timeout: test.timeout})
				defer s.close()
				ctx, cancel := s.bound(t.Context())
				defer cancel()
				start := time.Now()
				time.Sleep(time.Second) //nolint:forbidigo // a fake clock; reading the configuration counts, too
				if s.armDeadline != nil {
					s.armDeadline(s.site.Deadline)
				}
				if left := s.left(); left != test.limit-time.Second {
					t.Errorf("%s are left", left)
				}
				<-ctx.Done()
				var deadline *DeadlineError
				if cause := context.Cause(ctx); !errors.As(cause, &deadline) || deadline.After != test.limit || time.Since(start) != test.limit {
					t.Errorf("after %s: %v", time.Since(start), cause)
				}
				if s.left() <= 0 {
					t.Error("the clean-up has no time at all")
				}
			})
		})
	}
}

func TestWhatWasOpenedLastIsClosedFirstAndOnce(t *testing.T) {
	s := testSession(Options{})
	var closed []string
	for _, name := range []string{"connection", "lock", "tunnel"} {
		s.onClose(func() { closed = append(closed, name) })
	}
	s.close()
	s.close()
	if got := strings.Join(closed, " "); got != "tunnel lock connection" {
		t.Errorf("closed %s", got)
	}
}

func TestOnlyRestrictsARun(t *testing.T) {
	names := func(s *session) string {
		var names []string
		for _, component := range s.activeComponents() {
			names = append(names, component.Name)
		}
		return strings.Join(names, " ")
	}
	if got := names(testSession(Options{})); got != "orders mail" {
		t.Errorf("without --only: %s", got)
	}
	s := testSession(Options{Only: []string{"mail"}})
	if got := names(s); got != "mail" || s.checkOnly() != nil || s.site.Components[0].Name != "orders" {
		t.Errorf("with --only=mail: %s", got)
	}
	err := testSession(Options{Only: []string{"mial"}}).checkOnly()
	if err == nil || !strings.Contains(err.Error(), `"mial"`) || !strings.Contains(plan.HintOf(err), "orders, mail") {
		t.Errorf("an unknown component: %v, hint %q", err, plan.HintOf(err))
	}
}

func TestAnArtifactHasOneAddress(t *testing.T) {
	s := testSession(Options{})
	for kind, want := range map[site.ArtifactKind]string{
		site.Image: "127.0.0.1:7380/gamma/app@sha256:aa",
		site.File:  "http://127.0.0.1:7380/artifacts/gamma/app@sha256:aa",
	} {
		if got := s.artifactAddress(builder.Built{Name: "app", Kind: kind, Digest: "sha256:aa"}); got != want {
			t.Errorf("%s: got %s, want %s", kind, got, want)
		}
	}
}

func TestAgentsAdvertiseTheHostsAddress(t *testing.T) {
	facts := &host.Observation{Addresses: []string{"203.0.113.5", "203.0.113.6"}}
	for name, test := range map[string]struct {
		host remoteHost
		want string
	}{
		"that of site.hcl":   {remoteHost{Host: site.Host{PrivateAddress: "10.0.0.5"}, facts: facts}, "10.0.0.5"},
		"the first observed": {remoteHost{facts: facts}, "203.0.113.5"},
	} {
		if got, err := test.host.address(); err != nil || got != test.want {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
	none := remoteHost{facts: &host.Observation{}}
	if _, err := none.address(); err == nil || !strings.Contains(plan.HintOf(err), "private_address") {
		t.Errorf("got %v", err)
	}
}

func TestCredentialsAreMadeAnewOnlyWhereTheyDoNotHold(t *testing.T) {
	const ca, previous = "the site's CA", "the one before"
	fresh := func() *remoteHost {
		h := &remoteHost{
			applied:  &host.Document{CredentialsExpire: time.Now().Add(10 * 365 * 24 * time.Hour)},
			observed: &host.Observation{Files: map[string]host.ObservedPath{}},
		}
		for _, path := range host.CredentialPaths() {
			digest := hexSum([]byte(path))
			if path == host.CACertPath {
				digest = hexSum([]byte(ca))
			}
			h.applied.Files = append(h.applied.Files, host.File{Path: path, SHA256: digest})
			h.observed.Files[path] = host.ObservedPath{Exists: true, SHA256: digest}
		}
		return h
	}
	s := testSession(Options{})
	s.material = &materialState{Material: seal.Material{CACertPEM: ca, PreviousCACertPEM: previous}}
	for _, test := range []struct {
		name   string
		change func(*remoteHost)
		want   bool
	}{
		{"all is as it was applied", func(*remoteHost) {}, true},
		{"nothing was observed yet", func(h *remoteHost) { h.observed = nil }, true},
		{"nothing was applied", func(h *remoteHost) { h.applied = nil }, false},
		{"another CA was applied", func(h *remoteHost) { h.applied.Files[1].SHA256 = "other" }, false},
		{"another CA signed it", func(h *remoteHost) { h.applied.CredentialsIssuer = "other" }, false},
		{"the CA signed it and is not trusted alone", func(h *remoteHost) {
			h.applied.Files[1].SHA256, h.applied.CredentialsIssuer = "a bundle", hexSum([]byte(ca))
		}, true},
		{"the CA before signed it, and is still trusted", func(h *remoteHost) { h.applied.CredentialsIssuer = hexSum([]byte(previous)) }, true},
		{"the certificate ends soon", func(h *remoteHost) { h.applied.CredentialsExpire = time.Now().Add(renewBefore / 2) }, false},
		{"a file is gone", func(h *remoteHost) { delete(h.observed.Files, host.AgentKeyPath) }, false},
		{"a file was edited", func(h *remoteHost) {
			h.observed.Files[host.AgentCertPath] = host.ObservedPath{Exists: true, SHA256: "edited"}
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := fresh()
			test.change(h)
			if got := s.certificateHolds(h, s.usualRules()); got != test.want {
				t.Errorf("got %t", got)
			}
		})
	}
}

func TestMissingToolsAreOneCommand(t *testing.T) {
	missing := func(name string) error {
		return &toolchain.NotInstalledError{Name: name, Platform: toolchain.Host()}
	}
	hint := plan.HintOf(hintTools(errors.Join(missing("nomad"), fmt.Errorf("x: %w", missing("ansible")), missing("nomad"))))
	if hint != "run: site tool install nomad ansible" {
		t.Errorf("hint %q", hint)
	}
}

func TestAnImageHasAllOfTheSmallestLockMadeForItsPackages(t *testing.T) {
	lock := func(architecture string, packages int, asked ...string) *fstest.MapFile {
		made := debian.Lock{
			Version: debian.LockVersion, Distribution: "debian", Release: "12", Codename: "bookworm", Architecture: architecture, Asked: asked,
		}
		for i := range packages {
			made.Packages = append(made.Packages, debian.Package{
				Name: fmt.Sprintf("package-%d", i), Version: "1", Architecture: architecture, Archive: debian.Main,
				Path: "pool/p.deb", Size: 1, SHA256: strings.Repeat("0", 64),
			})
		}
		content, err := made.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return &fstest.MapFile{Data: content}
	}
	s := testSession(Options{Platform: Platform{Bootstrap: fstest.MapFS{
		"debs/debian-12-amd64.lock.json":     lock("amd64", 1, "podman", "nginx"),
		"debs/image-all-amd64.lock.json":     lock("amd64", 4, "postgresql-15", "pgbackrest", "nginx"),
		"debs/image-backup-amd64.lock.json":  lock("amd64", 3, "postgresql-15", "pgbackrest", "dash"),
		"debs/image-foreign-arm64.lock.json": lock("arm64", 2, "postgresql-15", "pgbackrest"),
	}}})
	for _, test := range []struct {
		name     string
		packages []string
		want     int // packages of the lock, 0 for none
	}{
		{"two of one lock", []string{"pgbackrest", "postgresql-15"}, 3},
		{"one that two locks have", []string{"postgresql-15"}, 3},
		{"one that only the large lock has", []string{"nginx"}, 4},
		{"two of different locks", []string{"nginx", "dash"}, 0},
		{"one of the hosts' packages", []string{"podman"}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := s.imageLock(test.packages)
			if len(got.Packages) != test.want || (err == nil) != (test.want > 0) {
				t.Errorf("got %d packages, %v", len(got.Packages), err)
			}
			if err != nil && !strings.Contains(plan.HintOf(err), "postgresql-15, pgbackrest, dash") {
				t.Errorf("hint %q", plan.HintOf(err))
			}
		})
	}
}

func TestSealedMaterialIsWrittenWholeAndPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sites", "gamma", "init.age")
	for _, content := range []string{"first", "second"} {
		if err := writePrivate(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != content {
			t.Errorf("got %q, %v", got, err)
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 || len(left) != 1 {
		t.Errorf("mode %v, %d files", info.Mode(), len(left))
	}
}

func TestTheHolderOfALockIsNamed(t *testing.T) {
	since := time.Date(2026, 1, 2, 10, 0, 0, 0, time.Local)
	err := &LockedError{Site: "gamma", ID: "0123", Holder: "anna@desk", Reason: "deploy", Since: since, Until: since.Add(time.Minute)}
	if got, want := err.Error(), `site "gamma" is locked by anna@desk since 10:00:00 (deploy), until 10:01:00`; got != want {
		t.Errorf("got %s", got)
	}
	if !strings.Contains(err.Hint(), "--take-over-lock=0123") || !err.Locked() {
		t.Errorf("hint %q", err.Hint())
	}
}

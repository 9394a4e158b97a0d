package e2e

import (
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// withFolders activates a worker that mounts a folder of the disk and one below
// /run, which is empty after each boot.
func (s *testSite) withFolders() {
	s.t.Helper()
	s.addWorker(`artifact "worker" {
  go_package = "./jobs/hello/app"
}

directory "/srv/worker" {
  owner = "65532"
  group = "65532"
  mode  = "0750"
}

directory "/run/worker" {
  owner = "65532"
  group = "65532"
  mode  = "0700"
}
`, func(spec string) string {
		return strings.Replace(spec, "readonly_rootfs = true",
			"readonly_rootfs = true\n        volumes = [\"/srv/worker:/data\", \"/run/worker:/sockets\"]", 1)
	})
	s.commit("a worker with folders", nil)
	s.must("deploy")
	s.waitHealthy("worker")
}

const folderModes = `stat -c '%n %u %g %a' /srv/worker /run/worker`

func TestAHostStaysWhatItIsDeclaredToBe(t *testing.T) {
	s := newSite(t)
	s.withFolders()
	t.Run("it reboots and the jobs come back", func(t *testing.T) { s.in(t).comesBack() })
	t.Run("what is broken by hand is named and repaired", func(t *testing.T) { s.in(t).isRepaired() })
	t.Run("a secret file is repaired with the root token only", func(t *testing.T) { s.in(t).needsTheRootToken() })
}

func (s *testSite) comesBack() {
	t := s.t
	want := "/srv/worker 65532 65532 750\n/run/worker 65532 65532 700\n"
	if got := s.host.shell(folderModes); got != want {
		t.Fatalf("the folders are %q, not %q", got, want)
	}
	boot := s.host.exec("cat", "/proc/1/stat")
	sha := s.version()
	s.host.shell("echo kept > /srv/worker/file; echo gone > /run/worker/file")
	s.host.reboot()
	start := time.Now()
	if s.host.exec("cat", "/proc/1/stat") == boot {
		t.Fatal("the host did not reboot")
	}
	s.waitHealthy("hello") // waits two minutes at most
	s.waitHealthy("worker")
	t.Logf("both jobs were healthy %s after the boot", time.Since(start).Round(time.Millisecond))
	if got := s.version(); got != sha {
		t.Errorf("the application was %s, now it is %s", sha, got)
	}
	if got := s.host.shell(folderModes + "; cat /srv/worker/file; ls -A /run/worker"); got != want+"kept\n" {
		t.Errorf("after the boot the folders are %q", got)
	}
	s.planIs()
}

func (s *testSite) isRepaired() {
	t := s.t
	nomad := func(args string) string {
		token, err := s.managementToken()
		if err != nil {
			t.Fatal(err)
		}
		return "NOMAD_TOKEN=" + token + " /opt/site/bin/nomad " + args
	}
	for _, each := range []struct {
		name, broken string
		// want is exactly what is named and repaired. With blind, jobs cannot be
		// looked at before that.
		want  []string
		blind bool
		// repaired is a look at the host that succeeds after the repair.
		repaired string
	}{
		{
			"a declared folder is removed", "rm -r /srv/worker",
			[]string{"create directory /srv/worker"}, false, `test "$(stat -c %u:%a /srv/worker)" = 65532:750`,
		},
		{
			"a folder's owner is another", "chown root:root /run/worker",
			[]string{"update directory /run/worker"}, false, `test "$(stat -c %u:%a /run/worker)" = 65532:700`,
		},
		{
			"a file's mode is another", "chmod 0666 /etc/tmpfiles.d/site.conf",
			[]string{"update file /etc/tmpfiles.d/site.conf"}, false, `test "$(stat -c %a /etc/tmpfiles.d/site.conf)" = 644`,
		},
		{
			"site-host is stopped", "systemctl stop site-host",
			[]string{"start unit site-host.service"}, true, "systemctl is-active site-host",
		},
		{
			"Nomad is stopped", "systemctl stop nomad",
			[]string{"start unit nomad.service"}, true, "systemctl is-active nomad",
		},
		{
			"site-host is disabled", "systemctl disable site-host",
			[]string{"update unit site-host.service"}, false, "systemctl is-enabled site-host",
		},
		{
			"site-host is another program",
			"cp /opt/site/bin/site-host /root/copy; printf x >> /root/copy; mv /root/copy /opt/site/bin/site-host",
			[]string{"upload binary /opt/site/bin/site-host", "restart unit site-host.service"}, false,
			`cmp /opt/site/bin/site-host "/proc/$(systemctl show --property=MainPID --value site-host)/exe"`,
		},
		{
			"the Nomad configuration is edited", "echo '# mine' >> /etc/nomad.d/nomad.hcl",
			[]string{"update file /etc/nomad.d/nomad.hcl", "restart unit nomad.service"}, false, "! grep mine /etc/nomad.d/nomad.hcl",
		},
		{
			"the driver is removed", "rm /opt/site/nomad/plugins/nomad-driver-podman",
			[]string{"create binary /opt/site/nomad/plugins/nomad-driver-podman", "restart unit nomad.service"}, false,
			"test -x /opt/site/nomad/plugins/nomad-driver-podman",
		},
		{
			"a job is stopped", nomad("job stop hello"),
			[]string{"start job hello"}, false, nomad("job status hello | grep -w running >/dev/null"),
		},
		{
			"a job is purged", nomad("job stop -purge worker"),
			[]string{"create job worker"}, false, nomad("job status worker | grep -w running >/dev/null"),
		},
		{
			"a job is scaled", nomad("job scale worker worker 0"),
			[]string{"update job worker"}, false, nomad("job status worker | grep -w running >/dev/null"),
		},
	} {
		t.Run(each.name, func(t *testing.T) {
			s := s.in(t)
			jobs := slices.ContainsFunc(each.want, func(word string) bool { return strings.Contains(word, " job ") })
			before := s.traces("hello") + s.traces("worker")
			s.host.shell(each.broken)
			start := time.Now()
			named := each.want
			if each.blind {
				named = append(slices.Clone(each.want), "wait unknown nomad", "wait unknown jobs", "wait unknown release")
			}
			s.planIs(named...)
			planned := time.Since(start)
			got := s.must("deploy", "--json")
			var done []change
			for _, event := range s.events(got) {
				done = append(done, event.Changes...)
			}
			slices.Sort(each.want)
			if repaired := s.words(done); !slices.Equal(repaired, each.want) {
				t.Errorf("deploy changes %q, not %q", repaired, each.want)
			}
			s.host.shell(each.repaired)
			s.planIs() // health is part of it
			if jobs {
				s.waitHealthy("hello")
				s.waitHealthy("worker")
			} else if after := s.traces("hello") + s.traces("worker"); after != before {
				t.Errorf("the jobs were touched: %s, now %s", before, after)
			}
			t.Logf("plan took %s, repair %s", planned.Round(time.Millisecond), got.duration.Round(time.Millisecond))
		})
	}
}

func (s *testSite) needsTheRootToken() {
	t := s.t
	broken := "/etc/nomad.d/tls/agent.key"
	s.host.shell("echo broken > " + broken)
	s.planIs("reload unit nomad.service", "update file "+broken)
	got := s.run("deploy")
	if got.code != 1 || !regexp.MustCompile(`error: .*`+broken+` can only be written with the site root token\nhint: .*bootstrap-deploy`).MatchString(got.stderr) {
		t.Errorf("deploy without the root token: %v", got)
	}
	if content := s.host.exec("cat", broken); content != "broken\n" {
		t.Errorf("deploy without the root token wrote %s", broken)
	}
	repaired := s.bootstrap()
	if strings.Contains(repaired.stdout+repaired.stderr, "PRIVATE KEY") {
		t.Error("the run printed a private key")
	}
	if content := s.host.exec("head", "-1", broken); !strings.Contains(content, "PRIVATE KEY") {
		t.Errorf("the key file begins with %q", content)
	}
	s.planIs()
	s.waitHealthy("hello")
}

func TestALockedSiteIsLeftAlone(t *testing.T) {
	s := newSite(t)
	const holder = "site-lock-test"
	s.host.exec("systemd-run", "--unit="+holder, "sh", "-c",
		`sleep infinity | exec /opt/site/bin/site-host lock acquire --hold --id another --holder ops@elsewhere --reason "moving a disk" --lease 60s`)
	s.until("the lock to be held", 10*time.Second, func() error {
		_, err := s.host.tryExec("test", "-e", "/var/lib/site/lock.json")
		return err
	})
	s.commit("more memory", map[string]string{"jobs/hello/hello.nomad.hcl": s.replace("jobs/hello/hello.nomad.hcl", "memory = 64", "memory = 72")})
	s.unchanged("a deploy that is locked out", func() {
		for _, args := range [][]string{{"deploy"}, {"bootstrap-deploy", "--root-token-file=" + s.tokenFile}} {
			got := s.run(args...)
			if got.code != 5 || !regexp.MustCompile(`error: .*locked by ops@elsewhere since .*\(moving a disk\)`).MatchString(got.stderr) ||
				!strings.Contains(got.stderr, "--take-over-lock=another") {
				t.Errorf("the lock's holder is not named: %v", got)
			}
		}
	})
	s.planIs("update job hello") // a plan takes no lock
	if got := s.run("deploy", "--take-over-lock=yet-another"); got.code != 5 {
		t.Errorf("another lock than the one named was taken: %v", got)
	}
	sha := s.head()
	s.must("deploy", "--take-over-lock=another")
	if version := s.version(); version != sha {
		t.Errorf("the application says it is %s, deployed was %s", version, sha)
	}
	if out, err := s.host.tryExec("test", "-e", "/var/lib/site/lock.json"); err == nil {
		t.Errorf("the lock was not given back: %s", out)
	}
}

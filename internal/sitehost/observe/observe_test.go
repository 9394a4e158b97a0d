package observe

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/testneeds"
)

const emptyDigest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }
func (e exitCode) ExitCode() int { return int(e) }

// fakeHost is a root with accounts, and programs that answer from text.
func fakeHost(t *testing.T, dpkg, systemctl string) Observer {
	t.Helper()
	root := t.TempDir()
	for path, content := range map[string]string{
		"etc/passwd":     fmt.Sprintf("root:x:0:0::/root:/bin/sh\nnomad:x:%d:%d::/var/lib/nomad:/usr/sbin/nologin\nbroken\n", 991, 991),
		"etc/group":      "root:x:0:\nnomad:x:991:\n",
		"etc/os-release": "PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\nVERSION_ID=\"12\"\n",
		"proc/meminfo":   "MemTotal:        2048 kB\nMemFree: 1 kB\n",
		"proc/net/route": "Iface\tDestination\n",
	} {
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Observer{Root: root, Store: "/var/lib/site/store", Run: func(_ context.Context, name string, arguments ...string) ([]byte, error) {
		switch {
		case name == "dpkg-query":
			return []byte(dpkg), nil
		case name == "systemctl":
			return []byte(systemctl), nil
		case name == "dpkg" && arguments[2] == "lt":
			if arguments[1] < arguments[3] { // good enough for the versions below
				return nil, nil
			}
			return nil, exitCode(1)
		}
		return nil, fmt.Errorf("unexpected %s %q", name, arguments)
	}}
}

func TestPackagesAreComparedAndTheInterruptedAreNotInstalled(t *testing.T) {
	observer := fakeHost(t, strings.Join([]string{
		"dpkg\t1.21\tamd64\tinstalled", "podman\t4.3\tamd64\tinstalled", "crun\t1.8\tamd64\tinstalled", "conmon\t2.0\tamd64\thalf-configured",
		"sudo\t1.9\tamd64\tconfig-files", "libc6\t2.1\ti386\tinstalled", "libc6\t2.36\tamd64\tinstalled", "libc6\t2.2\tarmhf\tinstalled", "man\t1.0\tamd64\ttriggers-pending", "",
	}, "\n"), "")
	got, err := observer.Observe(t.Context(), host.Document{Version: 1, Packages: []host.Package{
		{Name: "podman", Version: "4.3"}, {Name: "crun", Version: "1.9"}, {Name: "conmon", Version: "2.0"}, {Name: "sudo", Version: "1.9"},
		{Name: "libc6", Version: "2.36"}, {Name: "dpkg", Version: "1.20"}, {Name: "absent", Version: "1"}, {Name: "man", Version: "1.0"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"podman": "4.3", "crun": "1.8", "libc6": "2.36", "dpkg": "1.21", "man": "1.0"}
	if !reflect.DeepEqual(got.Packages, want) || !slices.Equal(got.OldPackages, []string{"crun"}) || got.Architecture != "amd64" {
		t.Errorf("packages %v, old %v, %s", got.Packages, got.OldPackages, got.Architecture)
	}
	if got.OS != "debian" || got.OSVersion != "12" || got.MemoryBytes != 2<<20 || got.FreeBytes <= 0 || got.CPUs < 1 {
		t.Errorf("machine %+v", got)
	}
}

func TestPathsAreObservedWithoutTheirContent(t *testing.T) {
	observer := fakeHost(t, "", "")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(observer.Root, "srv"), 0o755))
	must(os.Chmod(filepath.Join(observer.Root, "srv"), 0o750|os.ModeSticky))
	must(os.WriteFile(filepath.Join(observer.Root, "secret"), []byte("hunter2"), 0o600))
	must(os.WriteFile(filepath.Join(observer.Root, "empty"), nil, 0o640))
	must(os.Symlink("secret", filepath.Join(observer.Root, "link")))
	must(unix.Mkfifo(filepath.Join(observer.Root, "fifo"), 0o600))
	got, err := observer.Observe(t.Context(), host.Document{
		Version:     1,
		Groups:      []host.Group{{Name: "nomad", GID: 991}, {Name: "absent", GID: 992}},
		Users:       []host.User{{Name: "nomad"}, {Name: "absent"}},
		Directories: []host.Directory{{Path: "/srv"}, {Path: "/absent"}, {Path: "/secret"}},
		Files:       []host.File{{Path: "/secret"}, {Path: "/link"}, {Path: "/fifo"}, {Path: "/secret/below"}},
		Binaries:    []host.Binary{{Path: "/empty"}, {Path: "/srv"}},
	})
	must(err)
	for path, want := range map[string]struct {
		got  host.ObservedPath
		kind string
		mode string
	}{
		"/srv":    {got.Directories["/srv"], "directory", "1750"},
		"/secret": {got.Files["/secret"], "file", "0600"},
		"/link":   {got.Files["/link"], "symlink", "0777"},
		"/fifo":   {got.Files["/fifo"], "other", "0600"},
		"/empty":  {got.Binaries["/empty"], "file", "0640"},
	} {
		if !want.got.Exists || want.got.Kind != want.kind || want.got.Mode != want.mode || want.got.OwnerID != strconv.Itoa(os.Getuid()) || want.got.Owner != nameOf(map[string]string{"0": "root"}, want.got.OwnerID) {
			t.Errorf("%s: %+v", path, want.got)
		}
	}
	for _, absent := range []host.ObservedPath{got.Directories["/absent"], got.Files["/secret/below"]} {
		if absent != (host.ObservedPath{}) {
			t.Errorf("absent, but %+v", absent)
		}
	}
	if len(got.Directories) != 3 || len(got.Files) != 4 {
		t.Errorf("not all are answered: %v %v", got.Directories, got.Files)
	}
	if got.Binaries["/empty"].SHA256 != emptyDigest || got.Files["/link"].SHA256 != "" || got.Directories["/secret"].SHA256 != "" {
		t.Errorf("digests: %+v", got)
	}
	if !reflect.DeepEqual(got.Groups, map[string]host.Group{"nomad": {Name: "nomad", GID: 991}}) || !reflect.DeepEqual(got.Users, map[string]host.User{"nomad": {Name: "nomad", UID: 991, Group: "nomad", Home: "/var/lib/nomad"}}) {
		t.Errorf("accounts: %v %v", got.Groups, got.Users)
	}
	encoded, err := json.Marshal(got)
	must(err)
	if strings.Contains(string(encoded), "hunter2") {
		t.Error("the content is in the answer")
	}
}

const systemctlText = `Id=site-host.service
LoadState=loaded
ActiveState=active
UnitFileState=enabled
NeedDaemonReload=no
ActiveEnterTimestamp=Sat 2026-11-21 08:22:12.500000 UTC
ExecMainStartTimestamp=Sat 2026-11-21 08:22:11.123456 UTC

ExecMainStartTimestamp=
Id=podman.socket
LoadState=loaded
ActiveState=active
UnitFileState=disabled
NeedDaemonReload=yes
ActiveEnterTimestamp=Sat 2026-11-21 08:22:11 UTC

Id=nomad.service
LoadState=not-found
ActiveState=inactive
UnitFileState=
NeedDaemonReload=no
ActiveEnterTimestamp=
`

func TestAUnitIsOutdatedWhenAFileIsNewerThanItsLastReload(t *testing.T) {
	const text = `Id=nomad.service
LoadState=loaded
ActiveState=active
UnitFileState=enabled
NeedDaemonReload=no
ActiveEnterTimestamp=Sat 2026-11-21 08:00:00.000000 UTC
ExecMainStartTimestamp=Sat 2026-11-21 08:00:00.000000 UTC
StateChangeTimestamp=%s
`
	started := time.Date(2026, 11, 21, 8, 0, 0, 0, time.UTC)
	const atStart, later = "Sat 2026-11-21 08:00:00.100000 UTC", "Sat 2026-11-21 09:00:00.000000 UTC"
	for name, test := range map[string]struct {
		changed  string
		modified time.Time
		outdated string
	}{
		"a file from before the start":                 {atStart, started.Add(-time.Hour), ""},
		"a file that changed, and no reload since":     {atStart, started.Add(time.Minute), "/a"},
		"a file that changed before the reload":        {later, started.Add(time.Minute), ""},
		"a file that changed after the reload":         {later, started.Add(2 * time.Hour), "/a"},
		"a file from before the start, with no reload": {"", started.Add(-time.Hour), ""},
		"a file that changed, where nothing was noted": {"", started.Add(time.Minute), "/a"},
	} {
		t.Run(name, func(t *testing.T) {
			observer := fakeHost(t, "", fmt.Sprintf(text, test.changed))
			if err := os.WriteFile(observer.path("/a"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(observer.path("/a"), test.modified, test.modified); err != nil {
				t.Fatal(err)
			}
			got, err := observer.Observe(t.Context(), host.Document{Version: 1, Units: []host.Unit{{Name: "nomad.service", ReloadOn: []string{"/a"}}}})
			if err != nil {
				t.Fatal(err)
			}
			want := host.ObservedUnit{Loaded: true, Active: "active", Enabled: "enabled", Outdated: test.outdated}
			if got.Units["nomad.service"] != want {
				t.Errorf("got %+v", got.Units["nomad.service"])
			}
		})
	}
}

func TestAUnitIsStaleWhenAFileIsNewerThanItsProcess(t *testing.T) {
	started := time.Date(2026, 11, 21, 8, 22, 11, 123456000, time.UTC)
	for name, test := range map[string]struct {
		modified map[string]time.Time
		stale    string
	}{
		"older files":                      {map[string]time.Time{"/a": started.Add(-time.Hour), "/b": started}, ""},
		"one microsecond newer":            {map[string]time.Time{"/a": started.Add(-time.Hour), "/b": started.Add(time.Microsecond)}, "/b"},
		"changed while it was starting":    {map[string]time.Time{"/a": started.Add(time.Second)}, "/a"},
		"the first of two is named":        {map[string]time.Time{"/a": started.Add(time.Hour), "/b": started.Add(time.Minute)}, "/a"},
		"a file that is not there is none": {nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			observer := fakeHost(t, "", systemctlText)
			for path, modified := range test.modified {
				if err := os.WriteFile(observer.path(path), nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Chtimes(observer.path(path), modified, modified); err != nil {
					t.Fatal(err)
				}
			}
			restartOn := []string{"/a", "/b"}
			got, err := observer.Observe(t.Context(), host.Document{Version: 1, Units: []host.Unit{
				{Name: "site-host.service", RestartOn: restartOn}, {Name: "podman.socket"}, {Name: "nomad.service", RestartOn: restartOn},
			}})
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]host.ObservedUnit{
				"site-host.service": {Loaded: true, Active: "active", Enabled: "enabled", Stale: test.stale},
				"podman.socket":     {Loaded: true, Active: "active", Enabled: "disabled", NeedsReload: true},
				"nomad.service":     {Active: "inactive"},
			}
			if !reflect.DeepEqual(got.Units, want) {
				t.Errorf("got %+v", got.Units)
			}
		})
	}
}

func TestAnswersThatCannotBeUnderstoodAreErrors(t *testing.T) {
	if _, err := parseUnits(systemctlText, []string{"only-one.service"}); err == nil {
		t.Error("three answers for one unit were accepted")
	}
	if _, err := parseUnits("ActiveEnterTimestamp=yesterday", []string{"a.service"}); err == nil {
		t.Error("a time that is none was accepted")
	}
	if _, err := parsePackages("podman 4.3\n"); err == nil {
		t.Error("a line without fields was accepted")
	}
	if _, err := (Observer{}).Observe(t.Context(), host.Document{Version: 99}); err == nil {
		t.Error("a document of another version was accepted")
	}
}

func TestTheDefaultRouteWithTheLowestMetricCounts(t *testing.T) {
	const header = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
	for name, test := range map[string]struct{ routes, want string }{
		"none":           {header + "eth0\t0000FEA9\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n", ""},
		"one":            {header + "eth0\t0000FEA9\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\neth1\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n", "eth1"},
		"the lower":      {header + "wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\neth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n", "eth0"},
		"not half of it": {header + "tun0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000080\t0\t0\t0\n", ""},
		"not a down one": {header + "eth0\t00000000\t0101A8C0\t0002\t0\t0\t0\t00000000\t0\t0\t0\n", ""},
	} {
		if got := defaultInterface(test.routes); got != test.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestThisMachineAnswersForItself(t *testing.T) {
	testneeds.Program(t, "dpkg-query")
	got, err := New("/var/lib/site/store").Observe(t.Context(), host.Document{Version: 1, Packages: []host.Package{{Name: "dpkg", Version: "1:999"}, {Name: "base-files", Version: "0"}}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.OldPackages, []string{"dpkg"}) || got.Packages["base-files"] == "" || got.Hostname == "" {
		t.Errorf("got %+v", got)
	}
}

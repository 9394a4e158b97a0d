package lab

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

func TestCgroupsAreDetectedFromTheMounts(t *testing.T) {
	const root = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
	tests := []struct {
		name, mounts string
		want         cgroups
		wantError    bool
	}{
		{
			name:   "version 2 alone needs nothing",
			mounts: root + "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
			want:   cgroups{roots: []string{"/sys/fs/cgroup"}},
		},
		{
			name: "version 1 with a unified hierarchy beside it hides that",
			mounts: root + "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n" +
				"32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n" +
				"41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
			want: cgroups{legacy: true, unified: []string{"/sys/fs/cgroup/unified"}, roots: []string{"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/unified"}},
		},
		{
			name:   "version 1 alone hides nothing",
			mounts: root + "32 31 0:29 / /sys/fs/cgroup/cpu\\054cpuacct rw shared:3 master:1 - cgroup cgroup rw,cpu\n",
			want:   cgroups{legacy: true, roots: []string{"/sys/fs/cgroup/cpu,cpuacct"}},
		},
		{
			name: "the mounts of a chroot do not count",
			mounts: root + "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n" +
				"32 31 0:29 / /srv/chroot/sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
			want: cgroups{roots: []string{"/sys/fs/cgroup"}},
		},
		{name: "no control groups are an error", mounts: root, wantError: true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := parseCgroups(strings.NewReader(test.mounts))
			if (err != nil) != test.wantError {
				t.Fatalf("error = %v", err)
			}
			if got.legacy != test.want.legacy || !slices.Equal(got.unified, test.want.unified) || !slices.Equal(got.roots, test.want.roots) {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
			if hasArguments := len(got.initArguments()) > 0; hasArguments != test.want.legacy {
				t.Errorf("init arguments %v", got.initArguments())
			}
		})
	}
}

func TestLimitsAreSetOnlyWhereRootMayNotRaiseThem(t *testing.T) {
	for status, limited := range map[string]bool{
		"Name:\tx\nCapEff:\t000001ffffffffff\n": false,
		"Name:\tx\nCapEff:\t000001fffeffffff\n": true,
	} {
		got, err := parseLimits(strings.NewReader(status))
		if err != nil {
			t.Fatal(err)
		}
		if (len(got.outer) > 0) != limited || strings.Contains(renderContainersConf(got), "default_ulimits") != limited {
			t.Errorf("limits for %q = %+v", status, got)
		}
	}
	if _, err := parseLimits(strings.NewReader("Name:\tx\n")); err == nil {
		t.Error("a status without capabilities was accepted")
	}
}

func TestTheNetworkAvoidsWhatIsInUse(t *testing.T) {
	first, err := chooseSubnet("seed", nil)
	if err != nil {
		t.Fatal(err)
	}
	again, _ := chooseSubnet("seed", []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("192.168.0.0/16")})
	if again != first {
		t.Errorf("networks elsewhere and the default route changed the choice from %s to %s", first, again)
	}
	for _, used := range []netip.Prefix{first, netip.PrefixFrom(addressOf(first, 7), 32)} {
		other, err := chooseSubnet("seed", []netip.Prefix{used})
		if err != nil || other.Overlaps(used) {
			t.Errorf("with %s in use: %s, %v", used, other, err)
		}
	}
	if got, err := chooseSubnet("seed", []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}); err == nil {
		t.Errorf("with all of 10/8 in use: %s", got)
	}
}

func TestTheNetworkIsInternal(t *testing.T) {
	content, err := networkDocument("12345678", "demo", "site12345678", netip.MustParsePrefix("10.230.5.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	var document struct {
		Internal  bool
		Subnets   []struct{ Subnet, Gateway string }
		Interface string `json:"network_interface"`
		Labels    map[string]string
		ID        string
	}
	if err := json.Unmarshal(content, &document); err != nil {
		t.Fatal(err)
	}
	if !document.Internal || document.Subnets[0].Gateway != "10.230.5.1" || document.Labels["site.lab"] != "demo" || len(document.ID) != 64 {
		t.Errorf("network document %s", content)
	}
}

func TestNamesOfLinksFitTheKernel(t *testing.T) {
	lab, err := Open("/some/where", "a-name-of-20-letters")
	if err != nil {
		t.Fatal(err)
	}
	if got := lab.bridge() + "a"; len(got) > 15 {
		t.Errorf("link name %q has %d characters", got, len(got))
	}
}

func TestOpenRefusesWhatALabCannotUse(t *testing.T) {
	for _, bad := range [][2]string{{"/w", ""}, {"/w", "Lab"}, {"/w", "../x"}, {"/w", "a-name-of-21-letters-"}, {"/w:x", "lab"}, {"/w,x", "lab"}, {"/run/w", "lab"}} {
		if _, err := Open(bad[0], bad[1]); err == nil {
			t.Errorf("Open(%q, %q) was accepted", bad[0], bad[1])
		}
	}
}

func TestClientFilesNameEveryHost(t *testing.T) {
	hosts := []sshHost{{"demo-1", "10.230.5.11", "ssh-ed25519 AAAA demo-1\n"}, {"demo-2", "10.230.5.12", "ssh-ed25519 BBBB demo-2\n"}}
	wantConfig := `# Written by ` + "`site lab up`" + `.

Host demo-1
    HostName 10.230.5.11
    Port 22
    User root
    IdentityFile /w/.lab/demo/id
    IdentitiesOnly yes
    UserKnownHostsFile /w/.lab/demo/known_hosts
    StrictHostKeyChecking yes
`
	if got := renderSSHConfig("/w/.lab/demo", hosts[:1]); got != wantConfig {
		t.Errorf("ssh_config:\n%s\nwant:\n%s", got, wantConfig)
	}
	if got := renderSSHConfig("/my work", hosts); !strings.Contains(got, `IdentityFile "/my work/id"`) {
		t.Errorf("a path with a space is not quoted:\n%s", got)
	}
	want := "demo-1,10.230.5.11 ssh-ed25519 AAAA\ndemo-2,10.230.5.12 ssh-ed25519 BBBB\n"
	if got := renderKnownHosts(hosts); got != want {
		t.Errorf("known_hosts %q, want %q", got, want)
	}
}

func TestKeysAreKeptUntilReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys", "id")
	read := func() string {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		key, err := ssh.ParsePrivateKey(content)
		if err != nil {
			t.Fatal(err)
		}
		public, err := os.ReadFile(path + ".pub")
		if err != nil || !strings.HasPrefix(string(public), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key.PublicKey())))) {
			t.Fatalf("the public key %q is of another key: %v", public, err)
		}
		return string(public)
	}
	for _, step := range []struct {
		replace, same bool
	}{{false, false}, {false, true}, {true, false}} {
		before := ""
		if step.same || step.replace {
			before = read()
		}
		if err := ensureKey(path, "test", step.replace); err != nil {
			t.Fatal(err)
		}
		if same := read() == before; same != step.same {
			t.Errorf("replace %v: the key is the same: %v", step.replace, same)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the key: %v, %v", info.Mode(), err)
	}
}

func TestMissingToolsAreNamedWithTheirPackage(t *testing.T) {
	tests := []struct {
		name    string
		system  string
		uid     int
		missing string
		want    []string
	}{
		{"a complete machine has no problems", "linux", 0, "", nil},
		{"another user than root is told to become root", "linux", 1000, "", []string{"run the same command with sudo"}},
		{"podman is missing", "linux", 0, "podman", []string{"apt-get install podman"}},
		{"debootstrap is missing", "linux", 0, "debootstrap", []string{"apt-get install debootstrap"}},
		{"unshare is missing", "linux", 0, "unshare", []string{"apt-get install util-linux"}},
		{"another system is no place for a lab", "darwin", 0, "", []string{"run it in a Linux virtual machine"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var fixes []string
			for _, problem := range problems(test.system, test.uid, func(name string) bool { return name != test.missing }) {
				fixes = append(fixes, problem.Fix)
			}
			if !slices.Equal(fixes, test.want) {
				t.Errorf("fixes %q, want %q", fixes, test.want)
			}
		})
	}
}

func TestTheHolderIsRecognisedByItsCommandLine(t *testing.T) {
	line := func(args ...string) []byte { return []byte(strings.Join(args, "\x00") + "\x00") }
	if !isHolder(line("/bin/sh", "-c", "script", holderMark, "/w/.lab/a", ""), "/w/.lab/a") {
		t.Error("the holder was not recognised")
	}
	for _, other := range [][]byte{nil, line("sleep", "1"), line("/bin/sh", "-c", "script", holderMark, "/w/.lab/ab", ""), line("grep", holderMark, "/w/.lab/a")} {
		if isHolder(other, "/w/.lab/a") {
			t.Errorf("%q was taken for the holder", other)
		}
	}
	if !firstOfNamespace([]byte("Pid:\t9\nNSpid:\t9\t1\n")) || firstOfNamespace([]byte("NSpid:\t1\n")) || firstOfNamespace([]byte("NSpid:\t9\t7\n")) {
		t.Error("the first process of a namespace is mistaken")
	}
}

func TestOnlyUnneededDisksAreSweptAway(t *testing.T) {
	lab, err := Open(t.TempDir(), "lab")
	if err != nil {
		t.Fatal(err)
	}
	current := &state{
		Hosts:     []*hostState{{Name: "lab-1", Disk: 5, stack: stack{Layers: []int{2}}}},
		Snapshots: map[string]*snapshot{"old": {Copies: "3", Hosts: map[string]*stack{"lab-1": {Layers: []int{4, 1}}}}},
	}
	for _, folder := range []string{"disks/1", "disks/2", "disks/4", "disks/5", "disks/6", "disks/junk", "snapshots/3", "snapshots/7"} {
		if err := os.MkdirAll(lab.path(folder, "upper"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := lab.sweep(current); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(lab.path("*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{lab.path("disks/1"), lab.path("disks/2"), lab.path("disks/4"), lab.path("disks/5"), lab.path("snapshots/3")}
	if !slices.Equal(left, want) {
		t.Errorf("left %q, want %q", left, want)
	}
}

func TestAHostReadsItsNewestLayerFirst(t *testing.T) {
	lab, err := Open("/w", "lab")
	if err != nil {
		t.Fatal(err)
	}
	lab.cache = "/c"
	host := &hostState{Name: "lab-1", Disk: 9, stack: stack{Base: "key", Layers: []int{8, 3}}}
	got, err := lab.mountOptions(host)
	want := "lowerdir=/w/.lab/lab/disks/8/upper:/w/.lab/lab/disks/3/upper:/c/lab/base/key,upperdir=/w/.lab/lab/disks/9/upper,workdir=/w/.lab/lab/disks/9/work,redirect_dir=on,"
	if err != nil || !strings.HasPrefix(got, want) {
		t.Errorf("mount options %q, %v", got, err)
	}
	for range 200 {
		host.Layers = append(host.Layers, 1000)
	}
	if _, err := lab.mountOptions(host); err == nil {
		t.Error("more layers than the kernel takes were accepted")
	}
}

func TestStateSurvivesBeingWritten(t *testing.T) {
	lab, err := Open(t.TempDir(), "lab")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lab.load(); !errors.Is(err, errNoLab) {
		t.Fatalf("load of no lab: %v", err)
	}
	current := &state{Subnet: netip.MustParsePrefix("10.230.5.0/24"), NextDisk: 3,
		Hosts: []*hostState{{Name: "lab-1", Address: netip.MustParseAddr("10.230.5.11"), Disk: 2, stack: stack{Base: "key", Layers: []int{1}}}}}
	if err := lab.save(current); err != nil {
		t.Fatal(err)
	}
	got, err := lab.load()
	if err != nil {
		t.Fatal(err)
	}
	host, err := got.host("lab-1")
	if err != nil || host.Base != "key" || host.Disk != 2 || !slices.Equal(host.Layers, []int{1}) || got.Subnet != current.Subnet {
		t.Errorf("read back %+v, %v", host, err)
	}
	if names, err := List(filepath.Dir(filepath.Dir(lab.Dir()))); err != nil || !slices.Equal(names, []string{"lab"}) {
		t.Errorf("List = %v, %v", names, err)
	}
}

package debian

import (
	"encoding/json"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/bootstrap"
)

func sampleLock() Lock {
	return Lock{
		Version: LockVersion, Distribution: "debian", Release: "12", Codename: "bookworm", Architecture: "amd64",
		Asked: []string{"podman"},
		Packages: []Package{{
			Name: "podman", Version: "4.3.1+ds1-8+deb12u1+b3", Architecture: "amd64", Archive: Main,
			Path: "pool/main/libp/libpod/podman_4.3.1_amd64.deb", Size: 4, SHA256: strings.Repeat("a", 64),
		}},
	}
}

func encoded(t *testing.T, lock Lock) string {
	t.Helper()
	content, err := lock.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func TestParseLockIsStrict(t *testing.T) {
	sound := encoded(t, sampleLock())
	if _, err := ParseLock([]byte(sound)); err != nil {
		t.Fatal(err)
	}
	with := func(change func(*Lock)) string {
		lock := sampleLock()
		change(&lock)
		return encoded(t, lock)
	}
	for name, test := range map[string]struct{ content, want string }{
		"an unknown field":            {strings.Replace(sound, `"release"`, `"extra": 1, "release"`, 1), `unknown field "extra"`},
		"more after the end":          {sound + "{}", "more after its end"},
		"another version":             {with(func(l *Lock) { l.Version = 2 }), "version is 2"},
		"no packages":                 {with(func(l *Lock) { l.Packages = nil }), "packages is empty"},
		"nothing asked":               {with(func(l *Lock) { l.Asked = nil }), "asked is empty"},
		"no codename":                 {with(func(l *Lock) { l.Codename = "" }), "codename is empty"},
		"a package twice":             {with(func(l *Lock) { l.Packages = append(l.Packages, l.Packages[0]) }), "there twice"},
		"a name that is an option":    {with(func(l *Lock) { l.Packages[0].Name = "--evil" }), "not a package name"},
		"another architecture":        {with(func(l *Lock) { l.Packages[0].Architecture = "arm64" }), `architecture is "arm64"`},
		"an unknown archive":          {with(func(l *Lock) { l.Packages[0].Archive = "ppa" }), "unknown"},
		"a path out of the pool":      {with(func(l *Lock) { l.Packages[0].Path = "pool/../../etc/x.deb" }), "not a .deb below pool/"},
		"an absolute path":            {with(func(l *Lock) { l.Packages[0].Path = "/pool/x.deb" }), "not a .deb below pool/"},
		"a digest in capital letters": {with(func(l *Lock) { l.Packages[0].SHA256 = strings.Repeat("A", 64) }), "sha256"},
		"no size":                     {with(func(l *Lock) { l.Packages[0].Size = 0 }), "size is 0"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ParseLock([]byte(test.content)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

func TestParseLockReportsAllMistakesAtOnce(t *testing.T) {
	lock := sampleLock()
	lock.Release, lock.Asked, lock.Packages[0].Size = "", nil, -1
	_, err := ParseLock([]byte(encoded(t, lock)))
	for _, want := range []string{"release is empty", "asked is empty", "size is -1"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q in %v", want, err)
		}
	}
}

func TestTheShippedLocksAreSoundAndHoldWhatWasAsked(t *testing.T) {
	names, err := fs.Glob(bootstrap.FS, "debs/*.lock.json")
	if err != nil || len(names) == 0 {
		t.Fatalf("locks: %v, %v", names, err)
	}
	for _, name := range names {
		content, err := fs.ReadFile(bootstrap.FS, name)
		if err != nil {
			t.Fatal(err)
		}
		lock, err := ParseLock(content)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if again := encoded(t, lock); again != string(content) {
			t.Errorf("%s is not as Encode writes it", name)
		}
		for _, asked := range lock.Asked {
			if !slices.ContainsFunc(lock.Packages, func(entry Package) bool { return entry.Name == asked }) {
				t.Errorf("%s asks for %s and does not have it", name, asked)
			}
		}
	}
	for _, name := range []string{"debs/debian-12-amd64.lock.json", "debs/debian-12-arm64.lock.json"} {
		content, err := fs.ReadFile(bootstrap.FS, name)
		if err != nil {
			t.Fatal(err)
		}
		var lock Lock
		if err := json.Unmarshal(content, &lock); err != nil {
			t.Fatal(err)
		}
		// A closure of Depends alone leaves these out.
		for _, helper := range []string{"aardvark-dns", "catatonit", "iptables", "netavark", "conmon", "crun", "sudo", "python3"} {
			if !slices.Contains(lock.Asked, helper) {
				t.Errorf("%s does not name %s", name, helper)
			}
		}
	}
}

func TestCompareNamesWhatChanged(t *testing.T) {
	old, fresh := sampleLock(), sampleLock()
	old.Packages = append(old.Packages, Package{Name: "gone", Version: "1"})
	fresh.Packages[0].Version = "4.3.2"
	fresh.Packages = append(fresh.Packages, Package{Name: "added", Version: "2"})
	got := Compare(old, fresh)
	want := []Difference{{"podman", "4.3.1+ds1-8+deb12u1+b3", "4.3.2"}, {"added", "", "2"}, {"gone", "1", ""}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := Compare(old, old); len(got) != 0 {
		t.Errorf("a lock differs from itself: %v", got)
	}
}

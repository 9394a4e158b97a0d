package debian

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

func TestInstalledReadsADpkgStatus(t *testing.T) {
	status := `Package: libc6
Status: install ok installed
Version: 2.36-9
Description: the library
 with a long text
 .
 and more

Package: removed
Status: deinstall ok config-files
Version: 1

Package: half
Status: install reinstreq half-installed
Version: 2


Package: last
Status: hold ok installed
Version: 1:3`
	got, err := Installed([]byte(status))
	if err != nil {
		t.Fatal(err)
	}
	if want := map[string]string{"libc6": "2.36-9", "last": "1:3"}; !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestInstalledRefusesWhatIsNoStatus(t *testing.T) {
	for name, test := range map[string]struct{ status, want string }{
		"a continuation of nothing": {" text\n", "line 1 continues no field"},
		"a line without a colon":    {"Package: a\nnonsense\n", "line 2 is not a field"},
		"a field twice":             {"Package: a\nPackage: b\n", "line 2 gives Package again"},
		"a stanza without a name":   {"Version: 1\n", "no Package"},
	} {
		if _, err := Installed([]byte(test.status)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
	}
}

func TestParseSimulationTakesAptsOrder(t *testing.T) {
	got, err := parseSimulation([]byte(`Reading package lists...
Inst libssl3 (3.0.22-1~deb12u2 Debian-Security:12/oldstable-security [amd64])
Inst libc6:arm64 [2.36-8] (2.36-9 Debian:12.15/oldstable [arm64]) []
Inst openssl [3.0.22-1] (3.0.22-1 Debian:12 [amd64])
Conf libssl3 (3.0.22-1~deb12u2 Debian-Security:12/oldstable-security [amd64])
`))
	if err != nil {
		t.Fatal(err)
	}
	if want := []chosen{{"libssl3", "3.0.22-1~deb12u2"}, {"libc6", "2.36-9"}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, output := range []string{"Remv systemd [252]\n", "Inst what is this\n"} {
		if _, err := parseSimulation([]byte(output)); err == nil {
			t.Errorf("%q is taken", output)
		}
	}
}

func TestParseMirrorsPrefersTheLocksRelease(t *testing.T) {
	for name, test := range map[string]struct {
		output string
		want   Mirrors
	}{
		"both archives": {
			"bookworm\thttp://a.test/debian/\tDebian\nbookworm-updates\thttp://a.test/debian/\tDebian\nbookworm-security\thttp://a.test/debian-security\tDebian\n",
			Mirrors{Main: "http://a.test/debian/", Security: "http://a.test/debian-security/"},
		},
		"another release before ours": {
			"trixie\thttp://b.test/debian/\tDebian\nbookworm\thttp://a.test/debian/\tDebian\n",
			Mirrors{Main: "http://a.test/debian/", Security: "http://a.test/debian-security/"},
		},
		"another release only": {
			"trixie\thttp://b.test/debian/\tDebian\n",
			Mirrors{Main: "http://b.test/debian/", Security: "http://b.test/debian-security/"},
		},
		"before the first update there is no origin": {
			"bookworm\thttp://a.test/debian/\t\nnodistro\thttp://c.test/x/\t\n",
			Mirrors{Main: "http://a.test/debian/", Security: "http://a.test/debian-security/"},
		},
		"other vendors and other schemes": {
			"bookworm\thttp://c.test/x/\tOther\nbookworm\tcdrom:/x/\tDebian\n", Mirrors{},
		},
	} {
		if got := parseMirrors(test.output, "bookworm"); !maps.Equal(got, test.want) {
			t.Errorf("%s: got %v, want %v", name, got, test.want)
		}
	}
}

package builder

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/site"
)

// elfFile is an executable that does nothing, in the fewest bytes.
func elfFile(t *testing.T, machine elf.Machine, parts ...elf.ProgType) string {
	t.Helper()
	header := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT),
		Ehsize: 64, Phoff: 64, Phentsize: 56, Phnum: uint16(len(parts)), Shentsize: 64,
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS], header.Ident[elf.EI_DATA] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB)
	header.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	var out bytes.Buffer
	values := []any{header}
	for _, part := range parts {
		values = append(values, elf.Prog64{Type: uint32(part)})
	}
	for _, value := range values {
		if err := binary.Write(&out, binary.LittleEndian, value); err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

func TestAnExecutableOfSiteIsPutAloneIntoAnImage(t *testing.T) {
	asked := ""
	one := request(t, site.Artifact{Name: "uploads", Kind: site.Image, Embedded: "service"})
	content := elfFile(t, elf.EM_X86_64, elf.PT_LOAD)
	one.Embedded = func(name, platform string) ([]byte, error) {
		asked = name + " for " + platform
		return []byte(content), nil
	}
	first := mustBuild(t, one)
	if asked != "service for linux/amd64" || first.FromWorkTree || first.Source != "executable service of site (linux/amd64)" {
		t.Errorf("asked for %s, built %+v", asked, first)
	}
	_, config := image(t, first)
	if len(config.Config.Entrypoint) != 1 || config.Config.Entrypoint[0] != "/app/uploads" || config.Config.User != DefaultUser {
		t.Errorf("config %+v", config.Config)
	}
	elsewhere := one
	elsewhere.CacheDir = t.TempDir()
	if again := mustBuild(t, elsewhere); again.Digest != first.Digest {
		t.Error("the same executable makes another image")
	}
	content += "newer"
	if newer := mustBuild(t, one); newer.Digest == first.Digest {
		t.Error("a newer executable is not in the image")
	}
}

func TestAnExecutableThatSiteDoesNotCarryIsAnError(t *testing.T) {
	one := request(t, site.Artifact{Kind: site.Image, Embedded: "service"})
	for name, test := range map[string]struct {
		change func(*Request)
		says   string
	}{
		"nobody to ask": {func(*Request) {}, `no executables are at hand for "service"`},
		"none of that platform": {func(r *Request) {
			r.Embedded = func(string, string) ([]byte, error) { return nil, errors.New("carries none") }
		}, "carries none"},
		"as a file": {func(r *Request) {
			r.Embedded, r.Artifact.Kind = func(string, string) ([]byte, error) { return []byte("x"), nil }, site.File
		}, "always is an image"},
		"beside another source": {func(r *Request) { r.Artifact.Path = "x" }, "2 sources are set"},
	} {
		t.Run(name, func(t *testing.T) {
			faulty := one
			test.change(&faulty)
			if _, err := Build(t.Context(), faulty); err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v", err)
			}
			noLeftovers(t, faulty.CacheDir)
		})
	}
}

func TestAReleasedExecutableIsPutAloneIntoAnImage(t *testing.T) {
	static := elfFile(t, elf.EM_X86_64, elf.PT_LOAD)
	dynamic := elfFile(t, elf.EM_X86_64, elf.PT_INTERP)
	file := func(name, content string) item {
		return item{name: name, content: content, kind: tar.TypeReg, mode: 0o755}
	}
	for _, test := range []struct {
		name    string
		content []byte
		says    string // empty: it works
	}{
		{"as it is", []byte(static), ""},
		{"in a plain tar", packTar(t, "", []item{file("LICENSE", "words"), file("bao", static)}), ""},
		{"in a compressed tar, in a folder", packTar(t, ".xz", []item{file("./release-2/bin/bao", static), file("./release-2/bao.md", "words")}), ""},
		{"a tar without it", packTar(t, "", []item{file("vault", static)}), `holds no file "bao"`},
		{"a tar with two", packTar(t, "", []item{file("a/bao", static), file("b/bao", static)}), "a/bao, b/bao"},
		{"a tar in which it is a script", packTar(t, "", []item{file("bao", "#!/bin/sh\n")}), "not an executable for linux"},
		{"a link to nothing", packTar(t, "", []item{{name: "bao", kind: tar.TypeSymlink, link: "bin/bao"}}), "bin/bao is not in the archive"},
		{"something else", []byte("words"), "neither an executable nor a tar"},
		{"one that needs libraries", []byte(dynamic), "shared libraries"},
		{"one for another machine", []byte(elfFile(t, elf.EM_AARCH64)), "EM_AARCH64"},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(test.content) }))
			defer server.Close()
			downloaded := request(t, site.Artifact{
				Name: "openbao", Kind: site.Image, URL: server.URL, SHA256: digestOf(test.content), Executable: "bao", User: "8200",
			})
			local := request(t, site.Artifact{Name: "openbao", Kind: site.Image, Path: "release", Executable: "bao", User: "8200"})
			write(t, local.RepoRoot, map[string]string{"release": string(test.content)})
			for _, r := range []Request{downloaded, local} {
				if test.says != "" {
					wantError(t, r, false, test.says)
					continue
				}
				built := mustBuild(t, r)
				_, config := image(t, built)
				if config.Config.User != "8200:8200" || len(config.Config.Entrypoint) != 1 || config.Config.Entrypoint[0] != "/app/openbao" {
					t.Errorf("config is %+v", config.Config)
				}
				if layer := readLayer(t, built.Blobs[0].Path); layer["app/openbao"].content != static || layer["app/openbao"].Mode != 0o755 {
					t.Errorf("layer holds %+v", layer["app/openbao"])
				}
			}
			noLeftovers(t, local.CacheDir)
		})
	}
}

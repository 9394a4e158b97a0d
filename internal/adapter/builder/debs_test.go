package builder

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/nomad-site/site/internal/site"
)

type item struct {
	name, content, link string
	kind                byte
	mode                int64
}

func makeDeb(t *testing.T, file, name, packing string, items ...item) {
	t.Helper()
	data := packTar(t, packing, items)
	control := packTar(t, packing, []item{{name: "./control", content: "Package: " + name + "\nVersion: 1\n", kind: tar.TypeReg, mode: 0o644}})
	var out bytes.Buffer
	out.WriteString("!<arch>\n")
	for _, member := range []struct {
		name    string
		content []byte
	}{{"debian-binary", []byte("2.0\n")}, {"control.tar" + packing, control}, {"data.tar" + packing, data}} {
		fmt.Fprintf(&out, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", member.name, 0, 0, 0, "100644", len(member.content))
		out.Write(member.content)
		if len(member.content)%2 == 1 {
			out.WriteByte('\n')
		}
	}
	if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

func packTar(t *testing.T, packing string, items []item) []byte {
	t.Helper()
	var plain, packed bytes.Buffer
	archive := tar.NewWriter(&plain)
	for _, item := range items {
		header := &tar.Header{Typeflag: item.kind, Name: item.name, Linkname: item.link, Mode: item.mode, Size: int64(len(item.content))}
		if err := archive.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		io.WriteString(archive, item.content)
	}
	archive.Close()
	var writer io.WriteCloser
	var err error
	switch packing {
	case ".xz":
		writer, err = xz.NewWriter(&packed)
	case ".zst":
		writer, err = zstd.NewWriter(&packed)
	default:
		return plain.Bytes()
	}
	if err != nil {
		t.Fatal(err)
	}
	writer.Write(plain.Bytes())
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	return packed.Bytes()
}

func debRequest(t *testing.T, files ...string) Request {
	r := request(t, site.Artifact{Kind: site.Image, DebPackages: []string{"two"}, Entrypoint: []string{"/usr/bin/two"}, StopSignal: "SIGINT"})
	r.Debs = func(context.Context, []string) ([]string, error) { return files, nil }
	return r
}

func TestDebPackagesBecomeOneLayer(t *testing.T) {
	dir := t.TempDir()
	one, two, three := filepath.Join(dir, "one.deb"), filepath.Join(dir, "two.deb"), filepath.Join(dir, "three.deb")
	makeDeb(t, one, "one", ".xz",
		item{name: "./", kind: tar.TypeDir, mode: 0o755},
		item{name: "./lib/", kind: tar.TypeDir, mode: 0o755},
		item{name: "./lib/libone.so", kind: tar.TypeReg, mode: 0o644, content: "old place"},
		item{name: "./var/lib/one/", kind: tar.TypeDir, mode: 0o700},
		item{name: "./etc/replaced", kind: tar.TypeReg, mode: 0o644, content: "by one"})
	makeDeb(t, two, "two", ".zst",
		item{name: "./usr/bin/zz", kind: tar.TypeReg, mode: 0o4755, content: "program"},
		item{name: "./usr/bin/two", kind: tar.TypeLink, link: "./usr/bin/zz"},
		item{name: "./usr/bin/soft", kind: tar.TypeSymlink, link: "two", mode: 0o777},
		item{name: "./var/lib/one/", kind: tar.TypeDir, mode: 0o755},
		item{name: "./opt/escape", kind: tar.TypeSymlink, link: "../../../../tmp", mode: 0o777},
		item{name: "./opt/escape/inside", kind: tar.TypeReg, mode: 0o644, content: "kept in"},
		item{name: "./etc/replaced", kind: tar.TypeReg, mode: 0o600, content: "by two"})
	makeDeb(t, three, "three", "", item{name: "./usr/share/doc/odd", kind: tar.TypeReg, mode: 0o644, content: "odd"})

	r := debRequest(t, one, two, three)
	built := mustBuild(t, r)
	_, config := image(t, built)
	if strings.Join(config.Config.Entrypoint, " ") != "/usr/bin/two" || config.Config.User != DefaultUser || config.Config.StopSignal != "SIGINT" {
		t.Errorf("config is %+v", config.Config)
	}
	layer := readLayer(t, built.Blobs[0].Path)
	for name, want := range map[string]struct {
		kind          byte
		mode          int64
		content, link string
	}{
		"usr/lib/libone.so":            {tar.TypeReg, 0o644, "old place", ""},
		"lib":                          {tar.TypeSymlink, 0o777, "", "usr/lib"},
		"usr/bin/two":                  {tar.TypeReg, 0o4755, "program", ""},
		"usr/bin/zz":                   {tar.TypeLink, 0o4755, "", "usr/bin/two"},
		"usr/bin/soft":                 {tar.TypeSymlink, 0o777, "", "two"},
		"var/lib/one/":                 {tar.TypeDir, 0o700, "", ""},
		"etc/replaced":                 {tar.TypeReg, 0o600, "by two", ""},
		"tmp/inside":                   {tar.TypeReg, 0o644, "kept in", ""},
		"usr/share/doc/odd":            {tar.TypeReg, 0o644, "odd", ""},
		"var/lib/dpkg/status.d/two":    {tar.TypeReg, 0o644, "Package: two\nVersion: 1\n", ""},
		"var/lib/dpkg/status.d/three":  {tar.TypeReg, 0o644, "Package: three\nVersion: 1\n", ""},
		"var/lib/dpkg/status.d/absent": {},
	} {
		got := layer[name]
		if got.Typeflag != want.kind || got.Mode != want.mode || got.content != want.content || got.Linkname != want.link {
			t.Errorf("%s is %q mode %o link %q content %q", name, got.Typeflag, got.Mode, got.Linkname, got.content)
		}
	}
	// Elsewhere, and without a record, it is the same image.
	if again := mustBuild(t, debRequest(t, one, two, three)); again.Digest != built.Digest {
		t.Errorf("digests are %s and %s", built.Digest, again.Digest)
	}
}

func TestDamagedDebPackagesAreRefused(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.deb")
	makeDeb(t, good, "good", ".xz", item{name: "./usr/bin/x", kind: tar.TypeReg, mode: 0o755, content: strings.Repeat("some content ", 1000)})
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for _, length := range []int{0, 4, 70, 100, len(whole) - 150, len(whole) - 60, len(whole) - 4} {
		t.Run(fmt.Sprintf("cut at %d of %d", length, len(whole)), func(t *testing.T) {
			cut := filepath.Join(t.TempDir(), "cut.deb")
			if err := os.WriteFile(cut, whole[:length], 0o644); err != nil {
				t.Fatal(err)
			}
			wantError(t, debRequest(t, cut), false, cut)
		})
	}
	t.Run("cut in the padding of a plain tar", func(t *testing.T) {
		cut := filepath.Join(t.TempDir(), "cut.deb")
		makeDeb(t, cut, "cut", "", item{name: "./usr/bin/x", kind: tar.TypeReg, mode: 0o755, content: "x"})
		info, err := os.Stat(cut)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(cut, info.Size()-512); err != nil {
			t.Fatal(err)
		}
		wantError(t, debRequest(t, cut), true, cut)
	})
	makeDeb(t, good, "good", "", item{name: "./a", kind: tar.TypeLink, link: "./nowhere"})
	wantError(t, debRequest(t, good), false, good, "nowhere")
}

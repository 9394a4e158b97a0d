package site

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestInitWritesARepositoryThatLoads(t *testing.T) {
	for _, tt := range []struct {
		name    string
		answers InitOptions
	}{
		{"with the least answers", InitOptions{Site: "one", HostAddress: "203.0.113.5"}},
		{"with all answers", InitOptions{
			Site: "lab", HostAddress: "lab-1", User: "deploy", OperatorName: "alice", OperatorPublicKey: testKey(t, 'a') + " alice@${laptop}\n",
			SSHConfigFile: ".lab/lab/ssh_config", Component: "shop",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			files, err := Init(dir, tt.answers)
			if err != nil {
				t.Fatal(err)
			}
			for _, file := range []string{"sites/" + tt.answers.Site + "/site.hcl", "README.md", ".gitignore"} {
				if !slices.Contains(files, file) {
					t.Errorf("%s is not in %v", file, files)
				}
			}
			s, err := Load(os.DirFS(dir), tt.answers.Site, LoadOptions{WorkDir: dir})
			if err != nil {
				t.Fatal(err)
			}
			if h := s.Hosts[0]; h.Address != tt.answers.HostAddress || h.User != tt.answers.User || s.SSHConfigFile != tt.answers.SSHConfigFile {
				t.Errorf("got %+v", s)
			}
			if (tt.answers.OperatorPublicKey == "") != (len(s.Operators) == 0) {
				t.Errorf("operators: %+v", s.Operators)
			}
			if c := s.Components[0]; c.Artifacts[0].DockerArchive != "images/"+c.Name+".tar" {
				t.Errorf("got %+v", c)
			}
		})
	}
}

func TestInitOverwritesOnlyByForce(t *testing.T) {
	dir, answers := t.TempDir(), InitOptions{Site: "one", HostAddress: "a.example"}
	if err := os.WriteFile(filepath.Join(dir, "README.md"), []byte("theirs"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(dir, answers); err != nil {
		t.Fatal(err)
	}
	answers.HostAddress = "b.example"
	_, err := Init(dir, answers)
	var exists *ExistsError
	if !errors.As(err, &exists) || !slices.Equal(exists.Files, []string{"sites/one/site.hcl", "jobs/app/component.hcl", "jobs/app/app.nomad.hcl"}) || exists.Hint() == "" {
		t.Fatalf("got %v", err)
	}
	if content, _ := os.ReadFile(filepath.Join(dir, "sites", "one", "site.hcl")); !strings.Contains(string(content), "a.example") {
		t.Error("it wrote although it refused")
	}
	answers.Force = true
	if _, err := Init(dir, answers); err != nil {
		t.Fatal(err)
	}
	if content, _ := os.ReadFile(filepath.Join(dir, "sites", "one", "site.hcl")); !strings.Contains(string(content), "b.example") {
		t.Error("force did not write")
	}
	if content, _ := os.ReadFile(filepath.Join(dir, "README.md")); string(content) != "theirs" {
		t.Error("the repository's own README was overwritten")
	}
}

func TestInitRefusesBadAnswersAndLeavesNothing(t *testing.T) {
	for _, tt := range []struct {
		name    string
		answers InitOptions
	}{
		{"a site that is a path", InitOptions{Site: "../x", HostAddress: "a"}},
		{"a component that is a path", InitOptions{Site: "one", HostAddress: "a", Component: "a/b"}},
		{"no address", InitOptions{Site: "one"}},
		{"an address with a line break", InitOptions{Site: "one", HostAddress: "a\"\n}\nregion = \"x"}},
		{"a key that is none", InitOptions{Site: "one", HostAddress: "a", OperatorPublicKey: "ssh-ed25519 x"}},
		{"an ssh configuration elsewhere", InitOptions{Site: "one", HostAddress: "a", SSHConfigFile: "/etc/ssh/ssh_config"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if _, err := Init(dir, tt.answers); err == nil {
				t.Error("no error")
			} else {
				t.Log(err)
			}
			if entries, _ := os.ReadDir(dir); len(entries) > 0 {
				t.Errorf("left behind: %v", entries)
			}
		})
	}
}

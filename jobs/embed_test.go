package jobs_test

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/nomad-site/site/bootstrap"
	"github.com/nomad-site/site/internal/adapter/debian"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/jobs"
)

func TestOnlyThePlatformsOwnComponentsAreCarried(t *testing.T) {
	var files []string
	err := fs.WalkDir(jobs.FS(), "jobs", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"jobs/object-storage-service/component.hcl", "jobs/object-storage-service/object-storage-service.nomad.hcl",
		"jobs/openbao/component.hcl", "jobs/openbao/openbao.nomad.hcl",
		"jobs/postgresql/component.hcl", "jobs/postgresql/postgresql.nomad.hcl",
	}
	if !slices.Equal(files, want) {
		t.Errorf("carried are %q", files)
	}
	for _, name := range []string{"openbao/component.hcl", "jobs/hello/component.hcl", ".", "job"} {
		if _, err := fs.Stat(jobs.FS(), name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"jobs/", "/jobs", "jobs/../jobs/openbao", ""} {
		if _, err := fs.Stat(jobs.FS(), name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestAnAdoptersSiteUsesThem(t *testing.T) {
	const document = `site "gamma" {
  host "gamma-1" {
    address = "gamma-1"
  }

  operator "someone" {
    public_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"
  }

  component "openbao" {}
  component "postgresql" {
    variables = { max_connections = 50 }
  }
}
`
	repository := fstest.MapFS{"sites/gamma/site.hcl": &fstest.MapFile{Data: []byte(document)}}
	loaded, err := site.Load(repository, "gamma", site.LoadOptions{WorkDir: t.TempDir(), Platform: jobs.FS()})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{site.OpenBaoComponent, site.PostgresComponent} {
		component := loaded.Component(name)
		if component == nil || !component.Platform || len(component.Artifacts) != 1 {
			t.Fatalf("component %s is %+v", name, component)
		}
		// They are what secrets and databases need, and so need neither.
		for _, artifact := range component.Artifacts {
			checkLocked(t, artifact.DebPackages)
		}
		if len(component.After) > 0 || len(component.Secrets) > 0 || len(component.Reads) > 0 || strings.Contains(string(component.Jobspec), "vault {") {
			t.Errorf("%s needs %+v", name, component)
		}
	}
}

func TestASiteWithAnObjectStoreHasItsService(t *testing.T) {
	const document = `site "gamma" {
  host "gamma-1" {
    address = "gamma-1"
  }

  component "openbao" {}
  component "object-storage-service" {
    variables = { allowed_jobs = ["deploy-engine"] }
  }

  object_store {
    endpoint = "https://s3.example.net"
    bucket   = "gamma-artifacts"
  }
}
`
	repository := fstest.MapFS{"sites/gamma/site.hcl": &fstest.MapFile{Data: []byte(document)}}
	loaded, err := site.Load(repository, "gamma", site.LoadOptions{WorkDir: t.TempDir(), Platform: jobs.FS()})
	if err != nil {
		t.Fatal(err)
	}
	component := loaded.Component(site.ObjectStorageComponent)
	var reads []string
	for _, read := range component.Reads {
		reads = append(reads, read.Secret)
	}
	// Not those of the hosts, nor the provider's.
	prefix := site.ObjectStorageComponent + "."
	if want := []string{prefix + site.StoreAdminID, prefix + site.StoreAdminSecret}; !slices.Equal(reads, want) {
		t.Errorf("it reads %q", reads)
	}
	jobspec := string(component.Jobspec)
	for _, wanted := range []string{
		fmt.Sprintf("static = %d\n", site.ObjectStoragePort), fmt.Sprintf(`"127.0.0.1:%d"`, site.ObjectStoragePort),
		"readonly_rootfs = true", `cap_drop        = ["ALL"]`, "env = false",
	} {
		if !strings.Contains(jobspec, wanted) {
			t.Errorf("the job has no %s", wanted)
		}
	}
	if strings.Count(jobspec, `change_mode = "noop"`) != 1 {
		t.Error("a new key restarts the service")
	}
}

// checkLocked looks for the packages of an image in a lock of each architecture.
func checkLocked(t *testing.T, packages []string) {
	t.Helper()
	for _, architecture := range []string{"amd64", "arm64"} {
		names, err := fs.Glob(bootstrap.FS, "debs/image-*-"+architecture+".lock.json")
		if err != nil {
			t.Fatal(err)
		}
		found := slices.ContainsFunc(names, func(name string) bool {
			content, err := fs.ReadFile(bootstrap.FS, name)
			if err != nil {
				t.Fatal(err)
			}
			lock, err := debian.ParseLock(content)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			return !slices.ContainsFunc(packages, func(name string) bool { return !slices.Contains(lock.Asked, name) })
		})
		if !found {
			t.Errorf("no lock for images on %s was made for %q", architecture, packages)
		}
	}
}

func TestAMisspeltOneIsGuessed(t *testing.T) {
	repository := fstest.MapFS{"sites/gamma/site.hcl": &fstest.MapFile{Data: []byte("site \"gamma\" {\n  component \"postgres\" {}\n}\n")}}
	_, err := site.Load(repository, "gamma", site.LoadOptions{WorkDir: t.TempDir(), Platform: jobs.FS()})
	if err == nil || !strings.Contains(err.Error(), "postgresql") {
		t.Errorf("got %v", err)
	}
}

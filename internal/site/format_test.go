package site

import (
	"bytes"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2/hclwrite"
)

var update = flag.Bool("update", false, "write the checked files anew")

// What we hand out as examples is formatted as HCL's own formatter does it.
func TestHCLFilesAreFormatted(t *testing.T) {
	found := 0
	for _, folder := range []string{"bootstrap/tools", "jobs", "sites"} {
		err := filepath.WalkDir(filepath.Join("..", "..", folder), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".hcl") {
				return err
			}
			found++
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			formatted := hclwrite.Format(content)
			switch {
			case bytes.Equal(content, formatted):
				return nil
			case *update:
				return os.WriteFile(path, formatted, 0o644)
			}
			t.Errorf("%s is not formatted; run `make generate`", path)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 5 {
		t.Errorf("only %d files found", found)
	}
}

func TestInitWritesFormattedHCL(t *testing.T) {
	folder := t.TempDir()
	files, err := Init(folder, InitOptions{Site: "gamma", HostAddress: "203.0.113.5", OperatorName: "anna",
		OperatorPublicKey: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKcMxMvkYwhxUpMrTt0ieowzFQEWFAZ9pRCnqqqKx0Ks", Component: "orders", User: "admin", SSHConfigFile: "ssh_config"})
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		content, err := os.ReadFile(filepath.Join(folder, file))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(file, ".hcl") && !bytes.Equal(content, hclwrite.Format(content)) {
			t.Errorf("%s is not formatted:\n%s", file, content)
		}
	}
}

package hostbinary_test

import (
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/hostbinary"
	"github.com/nomad-site/site/internal/plan"
)

func TestWhatIsNotCarriedIsNamed(t *testing.T) {
	for _, test := range []struct{ name, platform, says string }{
		{hostbinary.SiteHost, "linux/riscv64", "no site-host for linux/riscv64"},
		{hostbinary.ObjectStorageService, "darwin/arm64", "no object-storage-service for darwin/arm64"},
		{"other", "linux/amd64", "no other for linux/amd64"},
		{"../secret", "linux/amd64", "no ../secret for"},
	} {
		content, err := hostbinary.Executable(test.name, test.platform)
		if content != nil || err == nil || !strings.Contains(err.Error(), test.says) || !strings.Contains(plan.HintOf(err), "make build") {
			t.Errorf("got %v (hint %q)", err, plan.HintOf(err))
		}
	}
	if _, err := hostbinary.For("linux/riscv64"); err == nil || !strings.Contains(err.Error(), "site-host") {
		t.Errorf("got %v", err)
	}
}

package site

import (
	"slices"
	"strings"
	"testing"
)

const twoOperators = `# The site of the shop.
site "shop" {
  host "a" {
    address = "192.0.2.1" # the only one
  }

  operator "alice" {
    public_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIkP6UtB7xj780//mUMykuSidcHOtePSfASIZLhkzgkn"
  }

  # bob is on call
  operator "bob" {
    public_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJzvoyAmo8fLnoExV7PWx0b06MfONnqdLRjF79hhOCIM"
  }
}
`

func TestOperatorsAreAddedAndRemovedAndTheRestStays(t *testing.T) {
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJzvoyAmo8fLnoExV7PWx0b06MfONnqdLRjF79hhOCIM carol@laptop\n"
	added, err := AddOperator([]byte(twoOperators), "carol", key, RightsDeploy)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"# The site of the shop.", "# the only one", "# bob is on call", `operator "carol"`, "OCIM\""} {
		if !strings.Contains(string(added), want) {
			t.Errorf("%q is missing in\n%s", want, added)
		}
	}
	if strings.Contains(string(added), "carol@laptop") {
		t.Error("the comment of the key came along")
	}
	removed, err := RemoveOperator(added, "alice")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(removed), "alice") || !strings.Contains(string(removed), "bob") {
		t.Errorf("not exactly alice is gone:\n%s", removed)
	}
	if strings.Contains(string(removed), "\n\n\n") {
		t.Errorf("her block left a hole:\n%s", removed)
	}
}

func TestAnOperatorWhoOnlyRotatesIsAddedAndRemoved(t *testing.T) {
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKoVQVGTFEtLFiS4dE3fZc6MaHOo89MPGJIkc4jXbdDw"
	added, err := AddOperator([]byte(twoOperators), "ci", key, RightsRotate)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Load(repository(map[string]string{"sites/shop/site.hcl": string(added)}), "shop", LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var rights []string
	for _, one := range s.Operators {
		rights = append(rights, one.Name+" "+one.Rights)
	}
	if want := []string{"alice deploy", "bob deploy", "ci rotate"}; !slices.Equal(rights, want) {
		t.Errorf("got %v, want %v", rights, want)
	}
	removed, err := RemoveOperator(added, "ci")
	if err != nil || strings.Contains(string(removed), "rotate") || !strings.Contains(string(removed), `operator "bob"`) {
		t.Errorf("not exactly ci is gone (%v):\n%s", err, removed)
	}
}

func TestAnOperatorThatCannotBeAddedOrRemovedIsRefused(t *testing.T) {
	lone, err := RemoveOperator([]byte(twoOperators), "alice")
	if err != nil {
		t.Fatal(err)
	}
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKoVQVGTFEtLFiS4dE3fZc6MaHOo89MPGJIkc4jXbdDw"
	withRotator, err := AddOperator(lone, "ci", key, RightsRotate)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		edit func() ([]byte, error)
		want string
	}{
		"one that is there already": {func() ([]byte, error) {
			return AddOperator([]byte(twoOperators), "bob", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJzvoyAmo8fLnoExV7PWx0b06MfONnqdLRjF79hhOCIM", RightsDeploy)
		}, "operator bob is there already"},
		"a name that is none": {func() ([]byte, error) { return AddOperator([]byte(twoOperators), "Bob Smith", "x", RightsDeploy) }, `"Bob Smith" is not an operator's name`},
		"a private key": {func() ([]byte, error) {
			return AddOperator([]byte(twoOperators), "carol", "-----BEGIN OPENSSH PRIVATE KEY-----", RightsDeploy)
		}, "this is a private key"},
		"rights that are none": {func() ([]byte, error) {
			return AddOperator([]byte(twoOperators), "ci", key, "read")
		}, `operator ci: "read" are no rights`},
		"one who only rotates, where nobody deploys": {func() ([]byte, error) {
			return AddOperator([]byte("site \"shop\" {}\n"), "ci", key, RightsRotate)
		}, "operator ci could only rotate, and nobody could deploy"},
		"the last one who deploys": {func() ([]byte, error) { return RemoveOperator(withRotator, "bob") }, "bob is the only operator who may deploy"},
		"an unknown one":           {func() ([]byte, error) { return RemoveOperator([]byte(twoOperators), "carol") }, `there is no operator "carol"`},
		"the last one":             {func() ([]byte, error) { return RemoveOperator(lone, "bob") }, "bob is the only operator"},
		"no site at all":           {func() ([]byte, error) { return RemoveOperator([]byte("other {}\n"), "bob") }, "has no site block"},
		"a syntax error":           {func() ([]byte, error) { return RemoveOperator([]byte("site {"), "bob") }, "site.hcl:1"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			changed, err := test.edit()
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want %q", err, test.want)
			}
			if changed != nil {
				t.Error("it gave a changed file all the same")
			}
		})
	}
}

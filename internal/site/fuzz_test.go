package site

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"
)

// FuzzLoad insists that whatever is in the files ends in a site or in an error with places.
func FuzzLoad(f *testing.F) {
	f.Add(plainSite, plainComponent, plainJob)
	f.Add("site {\n", "artifact \"a\" {", "job \"web\" { group \"g\" { task \"t\" { driver = null } } }")
	f.Add("site \"one\" {\n host \"h\" {\n address = null\n host_keys = [null]\n }\n component \"web\" { variables = { (null) = 1 } }\n}", "after = [null, 1]\nvariables = null", "variable {}\njob {}")
	f.Add("site \"one\" {\n nomad {\n fingerprint_denylist = null\n }\n deadline = 1/0\n}", "directory \"\" {}\nartifact \"\" {\n deb_packages = null\n tool = \"\"\n}", "x = var[1]")
	root := filepath.Join("..", "..")
	read := func(name string) string {
		content, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
		if err != nil {
			f.Fatal(err)
		}
		return string(content)
	}
	f.Add(read("sites/example/site.hcl"), read("jobs/example/component.hcl"), read("jobs/example/example.nomad.hcl"))
	f.Fuzz(func(t *testing.T, site, component, job string) {
		fsys := fstest.MapFS{
			"sites/one/site.hcl":     {Data: []byte(site)},
			"jobs/web/component.hcl": {Data: []byte(component)},
			"jobs/web/web.nomad.hcl": {Data: []byte(job)},
		}
		_, err := Load(fsys, "one", LoadOptions{})
		var config *ConfigError
		if err != nil && (!errors.As(err, &config) || len(config.Diagnostics) == 0 || config.Error() == "") {
			t.Fatalf("an error without places: %v", err)
		}
	})
}

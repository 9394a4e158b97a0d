package site

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

func TestTheExampleLoads(t *testing.T) {
	root := projectRoot(t)
	s, err := Load(os.DirFS(root), "example", LoadOptions{WorkDir: root, Platform: stores()})
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Hosts) != 2 || len(s.Operators) != 2 || len(s.Components) != 5 || len(s.Components[0].Artifacts) != 8 {
		t.Errorf("got %+v", s)
	}
	if got := s.Components[0].Variables["settings"]; got != `{"log.level":"debug"}` {
		t.Errorf("the site's value must win: %s", got)
	}
	if c := s.Components[0]; len(c.Secrets) != 6 || len(c.Databases) != 1 || len(c.Roles) != 3 || len(c.Grants) != 5 {
		t.Errorf("got %+v", c)
	}
	if one := s.AlternatingRole("example.database_password"); one == nil || one.Name != "example" {
		t.Errorf("the example's role does not alternate: %+v", one)
	}
	if one := s.Secret("example.database_password").Rotation; one == nil || one.Every != 30*day || one.Drain != 10*time.Minute {
		t.Errorf("got %+v", one)
	}
	if s.Operators[0].Rights != RightsDeploy || s.Operators[1].Rights != RightsRotate {
		t.Errorf("got %+v", s.Operators)
	}
	var reads []string
	for _, read := range s.Components[0].Reads {
		reads = append(reads, read.Secret)
	}
	if want := []string{"example.database_password", "example.payment_key", "example.session_key", "example.signing_key"}; !slices.Equal(reads, want) {
		t.Errorf("reads %v, want %v", reads, want)
	}
}

func TestTheExampleHasEveryField(t *testing.T) {
	for _, tt := range []struct {
		file  string
		shape any
	}{
		{"sites/example/site.hcl", siteFile{}},
		{"jobs/example/component.hcl", componentFile{}},
	} {
		t.Run(tt.file, func(t *testing.T) {
			content, err := os.ReadFile(filepath.Join(projectRoot(t), filepath.FromSlash(tt.file)))
			if err != nil {
				t.Fatal(err)
			}
			parsed, diags := hclsyntax.ParseConfig(content, tt.file, hcl.InitialPos)
			if diags.HasErrors() {
				t.Fatal(diags)
			}
			written := map[string]bool{}
			namesIn(parsed.Body.(*hclsyntax.Body), "", written)
			fields := fieldsOf(reflect.TypeOf(tt.shape), "")
			if len(fields) < 10 {
				t.Fatalf("found only %d fields: %v", len(fields), fields)
			}
			for _, field := range fields {
				if !written[field] {
					t.Errorf("%s is not in the example", strings.TrimPrefix(field, "."))
				}
			}
		})
	}
}

// fieldsOf lists the attributes and blocks of a decode struct as ".block.attribute".
func fieldsOf(shape reflect.Type, prefix string) []string {
	for shape.Kind() == reflect.Pointer || shape.Kind() == reflect.Slice {
		shape = shape.Elem()
	}
	var fields []string
	for i := range shape.NumField() {
		name, kind, _ := strings.Cut(shape.Field(i).Tag.Get("hcl"), ",")
		switch {
		case name == "" || kind == "label" || strings.HasSuffix(kind, "_range"):
		case kind == "block":
			fields = append(fields, prefix+"."+name)
			fields = append(fields, fieldsOf(shape.Field(i).Type, prefix+"."+name)...)
		default:
			fields = append(fields, prefix+"."+name)
		}
	}
	return fields
}

func namesIn(body *hclsyntax.Body, prefix string, names map[string]bool) {
	for name := range body.Attributes {
		names[prefix+"."+name] = true
	}
	for _, block := range body.Blocks {
		names[prefix+"."+block.Type] = true
		namesIn(block.Body, prefix+"."+block.Type, names)
	}
}

package release

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func record(id string, created time.Time) Record {
	return Record{
		Schema: Schema, ID: id, Site: "lab", GitSHA: "abc", Created: created, Status: "done",
		Components: map[string]Component{"hello": {
			SpecDigest: "sha256:1", Jobspec: `{"ID":"hello"}`, GitSHA: "abc",
			Artifacts: map[string]string{"image": "sha256:2"},
		}},
	}
}

func TestRecordsAreListedNewestFirstAndAPutReplaces(t *testing.T) {
	dir := Dir(filepath.Join(t.TempDir(), "releases"))
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, each := range []Record{record("b", start.Add(time.Hour)), record("a", start), record("c", start.Add(time.Minute))} {
		each.Status = "running"
		if err := dir.Put(each); err != nil {
			t.Fatal(err)
		}
		each.Status = "done"
		if err := dir.Put(each); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(string(dir), ".d.json.123"), []byte("{"), 0o600); err != nil {
		t.Fatal(err) // what a kill in the middle of a write leaves
	}
	records, err := dir.List()
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, each := range records {
		order = append(order, each.ID+" "+each.Status)
	}
	if got := strings.Join(order, ","); got != "b done,c done,a done" {
		t.Errorf("order %s", got)
	}
	if got, err := dir.Show("a"); err != nil || !reflect.DeepEqual(got, record("a", start)) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestNoRecordsAtAllIsAnEmptyListAndAMissingOneIsSaidSo(t *testing.T) {
	dir := Dir(filepath.Join(t.TempDir(), "none"))
	if records, err := dir.List(); err != nil || records == nil || len(records) != 0 {
		t.Errorf("got %v, %v", records, err)
	}
	if _, err := dir.Show("a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestBadRecordsAreRefused(t *testing.T) {
	const valid = `{"schema":"site.release/v1","id":"a","site":"lab","created":"2026-01-01T00:00:00Z"}`
	if _, err := Decode(strings.NewReader(valid)); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"an id that climbs":     strings.Replace(valid, `"a"`, `"../a"`, 1),
		"an id that is hidden":  strings.Replace(valid, `"a"`, `".a"`, 1),
		"an id with a slash":    strings.Replace(valid, `"a"`, `"a/b"`, 1),
		"another schema":        strings.Replace(valid, "v1", "v9", 1),
		"an unknown field":      strings.Replace(valid, `"id"`, `"colour":1,"id"`, 1),
		"no site":               strings.Replace(valid, `"lab"`, `""`, 1),
		"no time":               strings.Replace(valid, "2026-01-01", "0001-01-01", 1),
		"half a record":         valid[:20],
		"two records":           valid + valid,
		"nothing":               "",
		"more than the maximum": valid + strings.Repeat(" ", MaxSize),
	} {
		if _, err := Decode(strings.NewReader(content)); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

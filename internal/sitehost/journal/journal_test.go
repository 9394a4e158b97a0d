package journal_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/sitehost/journal"
)

func TestEventsAreKeptInOrderAndATornLineCostsOnlyItself(t *testing.T) {
	dir := journal.Dir(filepath.Join(t.TempDir(), "journal"))
	if err := dir.Append([]journal.Event{{What: "minted", Name: "shop.key", Generation: 2}, {What: "promoted", Name: "shop.key", Generation: 2}}); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(filepath.Join(string(dir), "rotations.jsonl"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteString(`{"what":"retired","na`); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	if err := dir.Append([]journal.Event{{What: "retired", Name: "shop.key", Generation: 1}}); err != nil {
		t.Fatal(err)
	}
	all, err := dir.List(0)
	if err != nil || len(all) != 3 || all[0].What != "minted" || all[2].What != "retired" {
		t.Fatalf("events %v, %v", all, err)
	}
	last, err := dir.List(1)
	if err != nil || len(last) != 1 || last[0].What != "retired" {
		t.Fatalf("the last one %v, %v", last, err)
	}
	info, err := os.Stat(filepath.Join(string(dir), "rotations.jsonl"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestTheSummaryIsJSONOrEmpty(t *testing.T) {
	dir := journal.Dir(filepath.Join(t.TempDir(), "journal"))
	if summary, err := dir.Summary(); err != nil || string(summary) != "{}" {
		t.Fatalf("before anything: %s, %v", summary, err)
	}
	if err := dir.Keep(strings.NewReader("no json")); err == nil {
		t.Error("no JSON was kept")
	}
	if err := dir.Keep(strings.NewReader(`{"secrets":{}}`)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(string(dir), "secrets.json"), []byte("{broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if summary, err := dir.Summary(); err != nil || string(summary) != "{}" {
		t.Fatalf("a broken one: %s, %v", summary, err)
	}
}

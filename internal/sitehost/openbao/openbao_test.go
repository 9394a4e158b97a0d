package openbao

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/nomad-site/site/internal/plan"
)

func storage(t *testing.T, files ...string) Storage {
	t.Helper()
	folder := filepath.Join(t.TempDir(), "openbao")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		path := filepath.Join(folder, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("sealed"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Storage(folder)
}

func status(t *testing.T, s Storage) Status {
	t.Helper()
	got, err := s.Status()
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestStorageIsWipedUntilItIsMarked(t *testing.T) {
	s := storage(t, "vault.db", "raft/raft.db", ".hidden", ".site-wiped-1/left")
	if got := status(t, s); got != (Status{Data: true}) {
		t.Errorf("before: %+v", got)
	}
	if err := s.Wipe(); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(string(s)); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if err := s.Wipe(); err != nil || status(t, s) != (Status{}) {
		t.Errorf("an empty one: %v", err)
	}
	if err := os.WriteFile(filepath.Join(string(s), "vault.db"), []byte("sealed"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // marking again is no error
		if err := s.Mark(); err != nil {
			t.Fatal(err)
		}
	}
	if got := status(t, s); got != (Status{Ready: true, Data: true}) {
		t.Errorf("marked: %+v", got)
	}
	err := s.Wipe()
	if refused := (*ReadyError)(nil); !errors.As(err, &refused) || plan.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
	if content, err := os.ReadFile(filepath.Join(string(s), "vault.db")); err != nil || string(content) != "sealed" {
		t.Errorf("it became %q, %v", content, err)
	}
}

func TestWhatOnlyLooksLikeAMarkerProtectsToo(t *testing.T) {
	s := storage(t, "vault.db")
	if err := os.Symlink("/does/not/exist", filepath.Join(string(s), ".site-ready")); err != nil {
		t.Fatal(err)
	}
	if err := s.Wipe(); err == nil || !status(t, s).Data {
		t.Errorf("%v", err)
	}
}

func TestAMissingFolderHoldsNothingAndCannotBeMarked(t *testing.T) {
	s := Storage(filepath.Join(t.TempDir(), "none"))
	if got := status(t, s); got != (Status{}) {
		t.Errorf("%+v", got)
	}
	if err := s.Wipe(); err != nil {
		t.Error(err)
	}
	if err := s.Mark(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

package ansible

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestAWorkFolderIsSweptOnlyWhenNobodyHoldsIt(t *testing.T) {
	parent := t.TempDir()
	t.Setenv("TMPDIR", parent)
	held, release, err := WorkFolder()
	if err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(parent, folderPrefix+"left")   // of a process that was killed
	fresh := filepath.Join(parent, folderPrefix+"fresh") // not locked yet
	// Killed before it locked: no process can have this number.
	gone := filepath.Join(parent, folderPrefix+"2147483647-x")
	old := filepath.Join(parent, folderPrefix+"old")
	for _, folder := range []string{left, fresh, gone, old} {
		if err := os.Mkdir(folder, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(left, folderLock), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(left, "secret"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-2 * unlockedLimit)
	if err := os.Chtimes(old, past, past); err != nil {
		t.Fatal(err)
	}
	_, releaseOther, err := WorkFolder()
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{held: true, left: false, fresh: true, gone: false, old: false} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: there is %t, want %t", path, err == nil, want)
		}
	}
	releaseOther()
	release()
	if _, err := os.Stat(held); err == nil {
		t.Error("a released folder is still there")
	}
}

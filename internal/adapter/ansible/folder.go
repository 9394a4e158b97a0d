package ansible

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	folderPrefix = "site-ansible-"
	folderLock   = "lock"
	// unlockedLimit is the age past which a folder without a lock is a leftover.
	unlockedLimit = time.Hour
)

// WorkFolder makes a private folder for one run; release removes it. Secrets lie
// in it, so a process that was killed must not leave it behind: the next one
// removes what nobody holds any more.
func WorkFolder() (path string, release func(), err error) {
	if err := sweep(os.TempDir()); err != nil {
		return "", nil, fmt.Errorf("ansible work folder: %w", err)
	}
	path, err = os.MkdirTemp("", fmt.Sprintf("%s%d-", folderPrefix, os.Getpid())) // mode 0700
	if err != nil {
		return "", nil, fmt.Errorf("ansible work folder: %w", err)
	}
	// The kernel gives the lock back when this process ends, however it ends.
	lock, err := os.OpenFile(filepath.Join(path, folderLock), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err != nil {
		return "", nil, fmt.Errorf("ansible work folder: %w", errors.Join(err, os.RemoveAll(path)))
	}
	return path, func() {
		_ = os.RemoveAll(path)
		_ = lock.Close()
	}, nil
}

// sweep removes the folders of processes that are gone.
func sweep(parent string) error {
	left, err := filepath.Glob(filepath.Join(parent, folderPrefix+"*"))
	if err != nil {
		return err
	}
	for _, folder := range left {
		info, err := os.Lstat(folder)
		if err != nil || !info.IsDir() {
			continue
		}
		lock, err := os.OpenFile(filepath.Join(folder, folderLock), os.O_RDWR|syscall.O_NOFOLLOW, 0)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			// Its owner may be about to lock it, or was killed just before.
			if time.Since(info.ModTime()) < unlockedLimit && !ownerIsGone(folder) {
				continue
			}
		case err != nil: // another user's
			continue
		default:
			held := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil
			_ = lock.Close()
			if held {
				continue
			}
		}
		// Another user's folder stays: it is theirs to remove.
		if err := os.RemoveAll(folder); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return nil
}

// ownerIsGone reports whether the process that a folder is named for has ended.
func ownerIsGone(folder string) bool {
	number, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(folder), folderPrefix), "-")
	pid, err := strconv.Atoi(number)
	return err == nil && pid > 0 && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
}

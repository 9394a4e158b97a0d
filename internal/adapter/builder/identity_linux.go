package builder

import (
	"fmt"
	"io/fs"
	"syscall"
	"time"
)

// identity is what tells one state of a file from another. The change time is
// part of it, since builders like to fix the modification time.
func identity(info fs.FileInfo) (text string, changed time.Time, ok bool) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", time.Time{}, false
	}
	changed = time.Unix(stat.Ctim.Unix())
	return fmt.Sprintf("%d %d %d %d %d", stat.Dev, stat.Ino, info.Size(), info.ModTime().UnixNano(), changed.UnixNano()), changed, true
}

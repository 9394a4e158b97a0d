// Package jobs carries the platform's own components inside the site binary.
// This repository's other components are no part of it: the lab deploys them as
// an adopter would.
package jobs

import (
	"embed"
	"io/fs"
	"strings"
)

//go:embed object-storage-service openbao postgresql
var platform embed.FS

// folder is where a repository has its components, and FS shows these.
const folder = "jobs"

// FS holds jobs/object-storage-service, jobs/openbao and jobs/postgresql, as a
// repository would.
func FS() fs.FS { return below{platform} }

// below shows files one folder deeper than they are. Its root cannot be listed.
type below struct{ files fs.FS }

func (b below) Open(name string) (fs.File, error) {
	inside, found := strings.CutPrefix(name, folder+"/")
	switch {
	case !fs.ValidPath(name):
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	case name == folder:
		inside = "."
	case !found:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return b.files.Open(inside)
}

//go:build !embed_site_host

package hostbinary

import "embed"

// A plain `go build` carries no executables: they are built first, by `make build`.
var executables embed.FS

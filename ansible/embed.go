// Package ansible carries the host playbook inside the site binary.
package ansible

import "embed"

// FS holds host.yml and roles/.
//
//go:embed host.yml roles
var FS embed.FS

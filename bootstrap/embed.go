// Package bootstrap carries what a bare host and an operator's machine need:
// pinned tools, locked .deb closures and unit files.
package bootstrap

import "embed"

// FS holds this folder. Wrapper modules are kept as tool.mod and tool.sum,
// since embedding leaves out every folder that has a go.mod.
//
//go:embed agent debs postgresql tools units
var FS embed.FS

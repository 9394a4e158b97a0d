package toolchain

import (
	"fmt"
	"slices"
	"strings"
)

// kind says in a few words where a tool comes from.
func (s Source) kind() string {
	switch {
	case s.Debs != "":
		return fmt.Sprintf(".deb packages of `%s`", s.Debs)
	case s.URL != "":
		return "url and sha256"
	default:
		return "local path"
	}
}

// Table renders the catalogue as a Markdown table, for bootstrap/tools/README.md.
func Table(tools []Tool) string {
	var table strings.Builder
	table.WriteString("| tool | version | what for | source | platforms |\n|---|---|---|---|---|\n")
	for _, tool := range tools {
		source, platforms := "", []string{}
		if tool.Module != nil {
			source = fmt.Sprintf("Go module `%s`", tool.Module.Package)
			if strings.HasSuffix(tool.Module.Package, ".go") {
				source = fmt.Sprintf("Go program `%s/%s`", tool.Module.Folder, tool.Module.Package)
			}
			for _, platform := range tool.Module.Platforms {
				platforms = append(platforms, platform.String())
			}
		}
		bySource := map[string]Source{}
		for platform, given := range tool.Sources {
			bySource[platform.String()] = given
		}
		kinds := []string{}
		for _, platform := range sortedKeys(bySource) {
			platforms = append(platforms, platform)
			kind := bySource[platform].kind()
			if !slices.Contains(kinds, kind) {
				kinds = append(kinds, kind)
			}
		}
		source += strings.Join(kinds, ", ")
		if len(platforms) == 0 {
			platforms = []string{"any that Go builds for"}
		}
		fmt.Fprintf(&table, "| %s | %s | %s | %s | %s |\n",
			tool.Name, tool.Version, tool.Description, source, strings.Join(platforms, ", "))
	}
	return table.String()
}

package cli

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

var update = flag.Bool("update", false, "write the generated files anew")

const generated = "<!-- Written by `make generate` from internal/cli; do not edit. -->\n\n"

// reference renders the command tree: a page for each top-level command, and
// README.md with what they share.
func reference() map[string]string {
	root := newRoot(Environment{})
	root.InitDefaultCompletionCmd()
	pages := map[string]string{}
	var index strings.Builder
	fmt.Fprintf(&index, "%s# Command reference\n\n%s\n\n| command | |\n|---|---|\n", generated, strings.TrimSpace(root.Long))
	for _, command := range root.Commands() {
		if command.Hidden || command.Name() == "help" {
			continue
		}
		name := command.Name() + ".md"
		fmt.Fprintf(&index, "| [%s](%s) | %s |\n", command.CommandPath(), name, command.Short)
		var page strings.Builder
		page.WriteString(generated)
		describe(&page, command, "#")
		page.WriteString("Flags of all commands and exit codes: [reference](README.md).\n")
		pages[name] = page.String()
	}
	fmt.Fprintf(&index, "\n## Flags of all commands\n\n```text\n%s```\n", root.PersistentFlags().FlagUsages())
	_, codes, _ := strings.Cut(exitCodesHelp, "Exit codes:\n")
	fmt.Fprintf(&index, "\n## Exit codes\n\n```text\n%s\n```\n", codes)
	pages["README.md"] = index.String()
	return pages
}

func describe(page *strings.Builder, command *cobra.Command, heading string) {
	fmt.Fprintf(page, "%s %s\n\n%s.\n\n", heading, command.CommandPath(), command.Short)
	if long := strings.TrimSpace(command.Long); long != "" {
		if strings.Contains(long, "\n\t") { // with commands to copy: as it is
			long = "```text\n" + long + "\n```"
		}
		fmt.Fprintf(page, "%s\n\n", long)
	}
	fmt.Fprintf(page, "```text\n%s\n```\n\n", command.UseLine())
	if command.Example != "" {
		fmt.Fprintf(page, "For example:\n\n```sh\n%s\n```\n\n", strings.ReplaceAll(strings.TrimSpace(command.Example), "\n  ", "\n"))
	}
	if flags := command.NonInheritedFlags(); flags.HasAvailableFlags() {
		fmt.Fprintf(page, "```text\n%s```\n\n", flags.FlagUsages())
	}
	for _, sub := range command.Commands() {
		if !sub.Hidden && sub.Name() != "help" {
			describe(page, sub, heading+"#")
		}
	}
}

func TestTheReferenceIsCurrent(t *testing.T) {
	folder := filepath.Join("..", "..", "docs", "reference")
	want := reference()
	if *update {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		path := filepath.Join(folder, name)
		if *update {
			if err := os.WriteFile(path, []byte(want[name]), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if string(got) != want[name] {
			t.Errorf("%s is not what the commands say; run `make generate`", path)
		}
	}
	pages, err := filepath.Glob(filepath.Join(folder, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		if _, there := want[filepath.Base(page)]; there {
			continue
		}
		if *update {
			if err := os.Remove(page); err != nil {
				t.Fatal(err)
			}
			continue
		}
		t.Errorf("%s is of no command; run `make generate`", page)
	}
}

func TestEveryCommandIsInTheReference(t *testing.T) {
	all := strings.Join(slices.Collect(maps.Values(reference())), "\n")
	each(newRoot(Environment{}), func(command *cobra.Command) {
		if command != command.Root() && !strings.Contains(all, "# "+command.CommandPath()+"\n") {
			t.Errorf("%s is missing", command.CommandPath())
		}
	})
}

package cli

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/writesession"
)

func newArtifacts(env Environment, flags *globalFlags) *cobra.Command {
	command := &cobra.Command{
		Use: "artifacts", Short: "Look at artifacts in the object store and on hosts, and remove old ones", Args: cobra.NoArgs,
		Long: `Artifacts travel as chunks: to each host over SSH, or once to the site's object
store, from where hosts pull what they lack. A deploy does all of it by itself.
`,
	}
	command.AddCommand(newArtifactsPush(env, flags), newArtifactsList(env, flags), newArtifactsCollect(env, flags), newArtifactsExport(env, flags))
	return command
}

func newArtifactsPush(env Environment, flags *globalFlags) *cobra.Command {
	run := &runFlags{}
	command := &cobra.Command{
		Use: "push", Short: "Bring a commit's artifacts to the object store", Args: cobra.NoArgs,
		Long: "Builds the artifacts of a commit and uploads what the object store lacks. No host and no job is touched: the deploy that follows finds everything there.",
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := run.runOptions(env, flags)
			if err != nil {
				return err
			}
			result, err := deploy.PushArtifacts(command.Context(), options)
			return finishRun(env, flags, result, err)
		},
	}
	run.add(command)
	command.Flags().StringVar(&run.sha, "sha", "HEAD", "the commit whose artifacts are pushed")
	command.Flags().DurationVar(&run.timeout, "timeout", 0, "deadline of the whole run; default: deadline in site.hcl, 15m if it has none")
	command.Flags().StringSliceVar(&run.only, "only", nil, "deal with these components only")
	return command
}

func newArtifactsList(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	command := &cobra.Command{
		Use: "ls", Short: "Show what is in the object store", Args: cobra.NoArgs,
		Long: "Shows every artifact in the site's object store, and why a gc would keep it. It writes nothing.",
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil // it only looks
			found, err := deploy.ListArtifacts(command.Context(), options)
			if err != nil {
				return err
			}
			if flags.json {
				return printJSON(env.Out, found)
			}
			return printArtifacts(env.Out, found)
		},
	}
	of.add(command)
	return command
}

func newTable(header ...any) table.Writer {
	writer := table.NewWriter()
	writer.SetStyle(table.StyleLight)
	writer.Style().Options.DrawBorder = false
	writer.Style().Options.SeparateColumns = false
	writer.AppendHeader(header)
	return writer
}

func printArtifacts(w io.Writer, found deploy.Artifacts) error {
	writer := newTable("artifact", "digest", "size", "stored", "kept because")
	for _, one := range found.Artifacts {
		reason := found.Kept[one.Artifact.Artifact+"@"+string(one.Digest)]
		if reason == "" {
			reason = "nothing: gc removes it"
		}
		writer.AppendRow(table.Row{one.Artifact.Artifact, shortDigest(one.Digest), bytesOf(one.Size), humanize.Time(one.Stored), reason})
	}
	sessions := ""
	if found.OpenSessions > 0 {
		sessions = fmt.Sprintf(", %d open write sessions", found.OpenSessions)
	}
	enforces := "does not refuse a wrong hash"
	if found.Enforces {
		enforces = "refuses a wrong hash"
	}
	_, err := fmt.Fprintf(w, "%s\n%d packs, %s stored%s; the store %s\n", writer.Render(), found.Packs, bytesOf(found.BytesStored), sessions, enforces)
	return err
}

func bytesOf(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }

func shortDigest(digest blob.Digest) string {
	const enough = 12
	return digest.Hex()[:min(enough, len(digest.Hex()))]
}

func newArtifactsCollect(env Environment, flags *globalFlags) *cobra.Command {
	of, choice := &siteFlags{}, deploy.CollectOptions{}
	command := &cobra.Command{
		Use: "gc", Short: "Remove artifacts that no kept release and no job needs", Args: cobra.NoArgs,
		Long: `Removes from the object store, from every host and from podman's storage what is
not of the last releases (keep_releases in site.hcl), does not run, and is not
the platform's own. Nothing is removed from the store while somebody uploads. It
holds the site's lock, with --dry-run too.
`,
		Example: "  site artifacts gc --site=gamma --dry-run",
		RunE: func(command *cobra.Command, _ []string) error {
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Reporter = newQuietReporter(env, flags)
			collected, err := deploy.CollectArtifacts(command.Context(), options, choice)
			if err != nil {
				return err
			}
			if flags.json {
				return printJSON(env.Out, collected)
			}
			return printCollected(env.Out, collected)
		},
	}
	of.add(command)
	command.Flags().BoolVar(&choice.DryRun, "dry-run", false, "give the reasons and remove nothing")
	return command
}

func printCollected(w io.Writer, collected deploy.Collected) error {
	writer := newTable("where", "artifact", "digest", "size", "fate", "because")
	fate := func(removed bool) string {
		switch {
		case !removed:
			return "stays"
		case collected.DryRun:
			return "would go"
		}
		return "gone"
	}
	add := func(where string, artifacts []writesession.CollectedArtifact) {
		for _, one := range artifacts {
			writer.AppendRow(table.Row{where, one.Artifact, shortDigest(one.Digest), bytesOf(one.Size), fate(one.Removed), one.Reason})
		}
	}
	var freed []string
	if collected.Store != nil {
		add("store", collected.Store.Artifacts)
		freed = append(freed, fmt.Sprintf("store: %s in %d packs", bytesOf(collected.Store.BytesFreed), collected.Store.PacksRemoved))
	}
	for _, name := range slices.Sorted(maps.Keys(collected.Hosts)) {
		of := collected.Hosts[name]
		add(name, of.Artifacts)
		for _, image := range of.Images {
			writer.AppendRow(table.Row{name, "podman: " + image.Name, "", "", fate(image.Removed), image.Reason})
		}
		freed = append(freed, name+": "+bytesOf(of.BytesFreed))
	}
	verb := "freed"
	if collected.DryRun {
		verb = "would free"
	}
	_, err := fmt.Fprintf(w, "%s\n%s %s\n", writer.Render(), verb, strings.Join(freed, ", "))
	if err == nil && collected.Store != nil && collected.Store.Refused != "" {
		_, err = fmt.Fprintf(w, "the store removed nothing: %s\n", collected.Store.Refused)
	}
	return err
}

func newArtifactsExport(env Environment, flags *globalFlags) *cobra.Command {
	of := &siteFlags{}
	command := &cobra.Command{
		Use: "export NAME@sha256:DIGEST FILE", Short: "Write an artifact back as it was", Args: cobra.ExactArgs(2),
		Long: `Writes one blob, whole and proven by its digest: a file artifact, or the manifest
or a layer of an image. A host serves it, and pulls it first if it has it no more.
`,
		Example: "  site artifacts export hello@sha256:… manifest.json",
		RunE: func(command *cobra.Command, args []string) error {
			name, text, found := strings.Cut(args[0], "@")
			digest, err := blob.ParseDigest(text)
			if !found || err != nil {
				return plan.WithHint(fmt.Errorf("%q is no artifact with its digest", args[0]), "write it as NAME@sha256:DIGEST; see `site artifacts ls`")
			}
			options, err := of.options(env, flags)
			if err != nil {
				return err
			}
			options.Warn = nil // it only looks
			exported, err := exportTo(args[1], func(into io.Writer) (deploy.Exported, error) {
				return deploy.ExportArtifact(command.Context(), options, name, digest, into)
			})
			if err != nil {
				return err
			}
			if flags.json {
				return printJSON(env.Out, exported)
			}
			_, err = fmt.Fprintf(env.Out, "wrote %s to %s\n", bytesOf(exported.Bytes), args[1])
			return err
		},
	}
	of.add(command)
	return command
}

// exportTo has a file only when all of it was proven.
func exportTo(path string, fill func(io.Writer) (deploy.Exported, error)) (exported deploy.Exported, err error) {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return exported, fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(file.Name()))
		}
	}()
	exported, err = fill(file)
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return exported, err
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return exported, fmt.Errorf("write %s: %w", path, err)
	}
	return exported, nil
}

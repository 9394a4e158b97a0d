package cli

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/adapter/toolchain"
	"github.com/nomad-site/site/internal/plan"
)

func newTool(env Environment, flags *globalFlags) *cobra.Command {
	command := &cobra.Command{
		Use: "tool", Short: "Install, check and run the pinned tools", Args: cobra.NoArgs,
		Long: `The tools that site needs are pinned in its catalogue. They resolve only to what
was installed for that pin: no PATH is searched, nothing is downloaded at run time.
`,
	}
	platformText := ""
	platform := func() (toolchain.Platform, error) {
		if platformText == "" {
			return toolchain.Host(), nil
		}
		return toolchain.ParsePlatform(platformText)
	}
	install := &cobra.Command{
		Use: "install [NAME…]", Short: "Build or fetch pinned tools; all when none is named",
		RunE: func(command *cobra.Command, args []string) error {
			tools, err := openTools()
			if err != nil {
				return err
			}
			target, err := platform()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				args = tools.Names()
			}
			for _, name := range args {
				path, err := tools.Install(command.Context(), name, target, &lineProgress{w: env.Err, prefix: name})
				if err != nil {
					return err
				}
				_, _ = fmt.Fprintln(env.Out, path)
			}
			return nil
		},
	}
	install.Flags().StringVar(&platformText, "platform", "", "such as linux/arm64; default: this machine's")
	which := &cobra.Command{
		Use: "which NAME", Short: "Print where a tool's executable lies", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			tools, err := openTools()
			if err != nil {
				return err
			}
			path, err := tools.Which(args[0], toolchain.Host())
			if err != nil {
				return err
			}
			if flags.json {
				return printJSON(env.Out, map[string]string{"path": path})
			}
			_, err = fmt.Fprintln(env.Out, path)
			return err
		},
	}
	verify := &cobra.Command{
		Use: "verify [NAME…]", Short: "Hold installed tools against what was recorded at install",
		RunE: func(command *cobra.Command, args []string) error {
			tools, err := openTools()
			if err != nil {
				return err
			}
			differences, err := tools.Verify(command.Context(), args)
			if err != nil {
				return err
			}
			if flags.json {
				if err := printJSON(env.Out, differences); err != nil {
					return err
				}
			}
			var lines []string
			for _, difference := range differences {
				lines = append(lines, fmt.Sprintf("%s for %s: %s", difference.Tool, difference.Platform, strings.Join(difference.Details, "; ")))
			}
			if len(lines) > 0 {
				return plan.WithHint(fmt.Errorf("tools differ from their pins:\n  %s", strings.Join(lines, "\n  ")), "install them again with `site tool install`")
			}
			return nil
		},
	}
	list := &cobra.Command{
		Use: "list", Short: "Show the catalogue", Args: cobra.NoArgs,
		RunE: func(_ *cobra.Command, _ []string) error {
			tools, err := openTools()
			if err != nil {
				return err
			}
			listed := []listedTool{}
			for _, name := range tools.Names() {
				tool, err := tools.Tool(name)
				if err != nil {
					return err
				}
				_, err = tools.Which(name, toolchain.Host())
				listed = append(listed, listedTool{Name: name, Version: tool.Version, Installed: err == nil})
			}
			if flags.json {
				return printJSON(env.Out, listed)
			}
			writer := tabwriter.NewWriter(env.Out, 0, 0, 3, ' ', 0)
			_, _ = fmt.Fprintln(writer, "TOOL\tVERSION\tINSTALLED")
			for _, tool := range listed {
				_, _ = fmt.Fprintf(writer, "%s\t%s\t%t\n", tool.Name, tool.Version, tool.Installed)
			}
			return writer.Flush()
		},
	}
	showWhich, showVerify := false, false
	run := &cobra.Command{
		Use: "run NAME -- ARGUMENTS…", Short: "Run a pinned tool", Args: cobra.MinimumNArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			tools, err := openTools()
			if err != nil {
				return err
			}
			switch {
			case showWhich:
				return which.RunE(command, args[:1])
			case showVerify:
				return verify.RunE(command, args[:1])
			}
			return childEnded(args[0], tools.Run(command.Context(), args[0], args[1:], toolchain.Streams{In: env.In, Out: env.Out, Err: env.Err}))
		},
	}
	run.Flags().BoolVar(&showWhich, "which", false, "only print where the executable lies")
	run.Flags().BoolVar(&showVerify, "verify", false, "only hold it against what was recorded")
	command.AddCommand(install, list, run, verify, which)
	return command
}

// listedTool is a line of `tool list`.
type listedTool struct {
	Name      string `json:"name"`
	Version   string `json:"version"`
	Installed bool   `json:"installed"`
}

// lineProgress prints the progress of an operation that is not a flow.
type lineProgress struct {
	w      io.Writer
	prefix string
	next   int64
}

var _ plan.Progress = (*lineProgress)(nil)

func (p *lineProgress) Message(format string, args ...any) {
	_, _ = fmt.Fprintf(p.w, "%s: %s\n", p.prefix, fmt.Sprintf(format, args...))
}

func (p *lineProgress) Bytes(what string, done, total int64) {
	if done < p.next && done != total {
		return
	}
	p.next = done + 16<<20
	p.Message("%s: %s of %s", what, humanize.IBytes(uint64(done)), humanize.IBytes(uint64(total)))
}

package command

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/sitehost/journal"
)

// maxEvents bounds what one append takes, in bytes.
const maxEvents = 4 << 20

func journalCommand(options Options) *cobra.Command {
	var dir string
	command := &cobra.Command{Use: "journal", Short: "What rotations did, and what is known of generations"}
	command.PersistentFlags().StringVar(&dir, "dir", journal.DefaultDir, "folder of the journal")
	add := &cobra.Command{
		Use: "append", Short: "Add the events on standard input, a JSON list", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			var events []journal.Event
			if err := json.NewDecoder(io.LimitReader(options.Stdin, maxEvents)).Decode(&events); err != nil {
				return fmt.Errorf("read the events: %w", err)
			}
			return journal.Dir(dir).Append(events)
		},
	}
	limit := 0
	list := &cobra.Command{
		Use: "list", Short: "Print the latest events, the oldest first", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			events, err := journal.Dir(dir).List(limit)
			if err != nil {
				return err
			}
			return options.print(events)
		},
	}
	list.Flags().IntVar(&limit, "limit", 0, "how many; 0 is all")
	keep := &cobra.Command{
		Use: "keep", Short: "Replace the summary by the JSON on standard input", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return journal.Dir(dir).Keep(options.Stdin) },
	}
	summary := &cobra.Command{
		Use: "summary", Short: "Print the summary", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			content, err := journal.Dir(dir).Summary()
			if err != nil {
				return err
			}
			return options.print(content)
		},
	}
	command.AddCommand(add, list, keep, summary)
	return command
}

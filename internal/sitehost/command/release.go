package command

import (
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/sitehost/release"
)

func releaseCommand(options Options) *cobra.Command {
	var dir string
	command := &cobra.Command{Use: "release", Short: "The records of what was deployed"}
	command.PersistentFlags().StringVar(&dir, "dir", release.DefaultDir, "folder of the records")
	put := &cobra.Command{
		Use: "put", Short: "Store the record on standard input", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			record, err := release.Decode(options.Stdin)
			if err != nil {
				return err
			}
			return release.Dir(dir).Put(record)
		},
	}
	var brief bool
	list := &cobra.Command{
		Use: "list", Short: "Print all records, newest first", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			records, err := release.Dir(dir).List()
			if err != nil {
				return err
			}
			for _, record := range records {
				for name, component := range record.Components {
					if brief {
						component.Jobspec = ""
						record.Components[name] = component
					}
				}
			}
			return options.print(records)
		},
	}
	list.Flags().BoolVar(&brief, "brief", false, "leave the jobspecs out")
	show := &cobra.Command{
		Use: "show ID", Short: "Print one record", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, arguments []string) error {
			record, err := release.Dir(dir).Show(arguments[0])
			if err != nil {
				return notThere(err)
			}
			return options.print(record)
		},
	}
	command.AddCommand(put, list, show)
	return command
}

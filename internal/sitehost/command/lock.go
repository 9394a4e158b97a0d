package command

import (
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/sitehost/lease"
)

func lockCommand(options Options) *cobra.Command {
	command := &cobra.Command{Use: "lock", Short: "The leased lock of the site"}
	var path string
	command.PersistentFlags().StringVar(&path, "file", lease.DefaultFile, "the lock file")
	file := func() lease.File { return lease.File{Path: path} }
	command.AddCommand(acquireCommand(options, file), renewCommand(options, file), freeCommand(options, file), showCommand(options, file))
	return command
}

func acquireCommand(options Options, file func() lease.File) *cobra.Command {
	var request lease.Request
	var hold bool
	var heartbeat time.Duration
	command := &cobra.Command{
		Use: "acquire", Short: "Take the lock and print it", Args: cobra.NoArgs,
		Long: "Takes the lock and prints it as a line of JSON. Where another holds it, prints that one's and exits with 5.\n" +
			"With --hold it keeps the lock, renewed, until standard input ends, and then releases it; a lock\n" +
			"lost to a takeover ends it with 5 and a second line, the new lock.",
		RunE: func(command *cobra.Command, _ []string) error {
			ctx := command.Context()
			request.Attended = hold
			lock, err := file().Acquire(ctx, request)
			if err != nil {
				return options.refused(err)
			}
			if err := options.print(lock); err != nil {
				return errors.Join(err, file().Release(ctx, lock.ID))
			}
			if !hold {
				return nil
			}
			return options.refused(file().Hold(ctx, lock, options.Stdin, lease.HoldOptions{Lease: request.Lease, Heartbeat: heartbeat}))
		},
	}
	flags := command.Flags()
	flags.StringVar(&request.Holder, "holder", "", "who takes it")
	flags.StringVar(&request.Reason, "reason", "", "what for")
	flags.DurationVar(&request.Lease, "lease", time.Minute, "how long it is held without a renewal")
	flags.StringVar(&request.ID, "id", "", "id of this holding (default: a new one)")
	flags.StringVar(&request.Takeover, "takeover", "", "id of the lock that may be taken although its lease runs")
	flags.BoolVar(&hold, "hold", false, "keep the lock until standard input ends")
	flags.DurationVar(&heartbeat, "heartbeat", 0, "with --hold: release when nothing comes on standard input for so long (0: never)")
	return command
}

func renewCommand(options Options, file func() lease.File) *cobra.Command {
	var id string
	var duration time.Duration
	command := &cobra.Command{
		Use: "renew", Short: "Extend our lock and print it", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			lock, err := file().Renew(command.Context(), id, duration)
			if err != nil {
				return options.refused(err)
			}
			return options.print(lock)
		},
	}
	command.Flags().StringVar(&id, "id", "", "id of our lock")
	command.Flags().DurationVar(&duration, "lease", time.Minute, "how long it is held from now on")
	return command
}

func freeCommand(options Options, file func() lease.File) *cobra.Command {
	var id string
	command := &cobra.Command{
		Use: "release", Short: "Give our lock back", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			return options.refused(file().Release(command.Context(), id))
		},
	}
	command.Flags().StringVar(&id, "id", "", "id of our lock")
	return command
}

func showCommand(options Options, file func() lease.File) *cobra.Command {
	return &cobra.Command{
		Use: "show", Short: "Print the lock, or null where nobody holds it", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			lock, held, err := file().Show()
			if err != nil {
				return err
			}
			if !held {
				return options.print(nil)
			}
			return options.print(lock)
		},
	}
}

// refused also prints the lock that stands in the way; null where there is none.
func (o Options) refused(err error) error {
	var held *lease.HeldError
	if !errors.As(err, &held) {
		return err
	}
	if held.Current.ID == "" {
		return errors.Join(err, o.print(nil))
	}
	return errors.Join(err, o.print(held.Current))
}

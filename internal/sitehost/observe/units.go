package observe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/reconcile/host"
)

type unitState struct {
	host.ObservedUnit
	// started is when its process did, read when it was last started or reloaded.
	started, read time.Time
}

// units asks systemd about all units at once.
func units(ctx context.Context, run Runner, wanted []host.Unit) (map[string]unitState, error) {
	if len(wanted) == 0 {
		return nil, nil
	}
	arguments := []string{
		"show", "--timestamp=us+utc", "--property=Id,LoadState,ActiveState,UnitFileState,NeedDaemonReload,ActiveEnterTimestamp,ExecMainStartTimestamp,StateChangeTimestamp", "--",
	}
	names := make([]string, 0, len(wanted))
	for _, unit := range wanted {
		names = append(names, unit.Name)
	}
	output, err := run(ctx, "systemctl", append(arguments, names...)...)
	if err != nil {
		return nil, fmt.Errorf("ask for units: %w", err)
	}
	return parseUnits(string(output), names)
}

// parseUnits reads one block of properties per unit, in the order they were asked for.
func parseUnits(output string, names []string) (map[string]unitState, error) {
	blocks := strings.Split(strings.TrimSpace(output), "\n\n")
	if len(blocks) != len(names) {
		return nil, fmt.Errorf("ask for units: %d answers for %d units", len(blocks), len(names))
	}
	states := make(map[string]unitState, len(names))
	for index, block := range blocks {
		properties := map[string]string{}
		for line := range strings.Lines(block) {
			if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
				properties[name] = value
			}
		}
		state := unitState{ObservedUnit: host.ObservedUnit{
			Loaded: properties["LoadState"] == "loaded", Active: properties["ActiveState"],
			Enabled: properties["UnitFileState"], NeedsReload: properties["NeedDaemonReload"] == "yes",
		}}
		// A service has read its files when its main process started, which
		// can be well before it said that it is ready.
		started := properties["ExecMainStartTimestamp"]
		if started == "" {
			started = properties["ActiveEnterTimestamp"]
		}
		var err error
		if state.started, err = timestamp(started); err != nil {
			return nil, fmt.Errorf("ask for unit %s: %w", names[index], err)
		}
		// A reload is a change of state, and of a unit that runs the last one.
		if state.read, err = timestamp(properties["StateChangeTimestamp"]); err != nil {
			return nil, fmt.Errorf("ask for unit %s: %w", names[index], err)
		}
		if state.read.Before(state.started) {
			state.read = state.started
		}
		states[names[index]] = state
	}
	return states, nil
}

// units adds which running units are older than what they run on.
func (o Observer) units(document host.Document, states map[string]unitState, observation *host.Observation) error {
	observation.Units = map[string]host.ObservedUnit{}
	for _, unit := range document.Units {
		state := states[unit.Name]
		running := state.Active == "active" || state.Active == "reloading" || state.Active == "activating"
		if running {
			var err error
			if state.Stale, err = o.newerThan(state.started, unit.RestartOn); err != nil {
				return err
			}
			if state.Outdated, err = o.newerThan(state.read, unit.ReloadOn); err != nil {
				return err
			}
		}
		observation.Units[unit.Name] = state.ObservedUnit
	}
	return nil
}

// newerThan is the first of the paths that was modified after a time that is
// known, or empty.
func (o Observer) newerThan(since time.Time, paths []string) (string, error) {
	for _, path := range paths {
		info, err := os.Stat(o.path(path))
		if errors.Is(err, fs.ErrNotExist) {
			continue // the file's own difference; once it is there it is newer
		}
		if err != nil {
			return "", fmt.Errorf("look at %s: %w", path, err)
		}
		if !since.IsZero() && info.ModTime().After(since) {
			return path, nil
		}
	}
	return "", nil
}

// timestamp reads one of systemd's; one that it does not have is zero.
func timestamp(text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	return time.Parse("Mon 2006-01-02 15:04:05.999999 MST", text)
}

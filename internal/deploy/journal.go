package deploy

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"time"

	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/journal"
)

// note remembers what became of a secret, until look writes it into the journal.
func (r *rotation) note(what string, one *rotating, generation int, detail string) {
	r.events = append(r.events, journal.Event{Name: one.FullName(), What: what, Generation: generation, Detail: detail})
}

// look reads the state of the secrets anew, and writes down what has happened
// since the last look.
func (r *rotation) look(ctx context.Context) error {
	moving := make([]site.Secret, len(r.secrets))
	for i, one := range r.secrets {
		moving[i] = one.Secret
	}
	entries, err := r.bao.ObserveDeclared(ctx, moving)
	if err != nil {
		return err
	}
	maps.Copy(r.entries, entries)
	for _, one := range r.secrets {
		one.entry = r.entries[one.FullName()]
		one.state = one.entry.Rotation()
	}
	if len(r.events) == 0 {
		return nil
	}
	if err := r.noteEvents(ctx, r.events...); err != nil {
		return err
	}
	r.events = nil
	return r.keepSummary(ctx)
}

func (r *rotation) noteRoot(ctx context.Context, name string) error {
	return r.noteEvents(ctx, journal.Event{Name: name, What: "rotated"})
}

func (r *rotation) noteEvents(ctx context.Context, events ...journal.Event) error {
	for i := range events {
		events[i].Time, events[i].By = time.Now().UTC(), r.operator
		if events[i].By == "" {
			events[i].By = holderName()
		}
	}
	return r.servers()[0].siteHost(ctx, events, nil, "journal", "append")
}

// summary is what the first server keeps of the catalogue, so that a look at
// what is due costs one round trip. OpenBao's own metadata is the truth.
type summary struct {
	Schema string `json:"schema"`
	// Secrets are by full name.
	Secrets map[string]summaryEntry `json:"secrets"`
}

const summarySchema = "site.rotation_summary/v1"

type summaryEntry struct {
	Version  int               `json:"version"`
	Created  time.Time         `json:"created"`
	HasValue bool              `json:"has_value"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// keepSummary writes what was observed last.
func (s *session) keepSummary(ctx context.Context) error {
	kept := summary{Schema: summarySchema, Secrets: map[string]summaryEntry{}}
	for _, one := range s.site.Secrets() {
		state := s.entries[one.FullName()]
		kept.Secrets[one.FullName()] = summaryEntry{
			Version: state.Version, Created: state.Created, HasValue: state.HasValue(), Metadata: state.CustomMetadata,
		}
	}
	return s.servers()[0].siteHost(ctx, kept, nil, "journal", "keep")
}

// states are what the summary knows, in the form of what OpenBao is asked for.
func (k summary) states() map[string]catalogue.EntryState {
	states := map[string]catalogue.EntryState{}
	for name, entry := range k.Secrets {
		states[name] = catalogue.EntryState{
			Exists: entry.Version > 0, Deleted: !entry.HasValue, Version: entry.Version, Created: entry.Created, CustomMetadata: entry.Metadata,
		}
	}
	return states
}

// dueBySummary reports whether something may be due: by what the summary says, or
// because it does not know a secret.
func dueBySummary(secrets []site.Secret, kept summary, now time.Time) bool {
	for _, one := range secrets {
		if _, known := kept.Secrets[one.FullName()]; !known && one.Rotation != nil && one.Rotation.Every > 0 {
			return true
		}
	}
	return len(catalogue.DueSecrets(secrets, kept.states(), now)) > 0
}

// readSummary is one round trip; a host that has none gives an empty one.
func readSummary(ctx context.Context, h *remoteHost) summary {
	// Whether it takes sudo is found out on the way: asking before would be another round trip.
	const asRoot = `if [ "$(id -u)" = 0 ]; then exec "$@"; fi; exec sudo -n -- "$@"`
	content, err := h.conn.Run(ctx, ssh.Command{
		AsLoginUser: true, Args: []string{"sh", "-c", asRoot, "sh", host.SiteHostPath, "journal", "summary"},
	})
	var kept summary
	// An older site-host knows no journal, an older journal no such schema: OpenBao knows.
	if err != nil || json.Unmarshal(content, &kept) != nil || kept.Schema != summarySchema {
		return summary{}
	}
	return kept
}

// nothingDue answers from the summary on the first server, in one round trip.
func nothingDue(ctx context.Context, options Options) (bool, error) {
	s := newSession(options)
	defer s.close()
	if err := s.readRepository(ctx); err != nil {
		return false, err
	}
	server, err := s.dialFirstServer(ctx)
	if err != nil {
		return false, err
	}
	kept := readSummary(ctx, server)
	return kept.Schema != "" && !dueBySummary(s.site.Secrets(), kept, time.Now()), nil
}

// HistoryVersion names the schema of what `site secrets history` prints.
const HistoryVersion = "site.history/v1"

// History is what rotations did.
type History struct {
	Schema string          `json:"schema"`
	Site   string          `json:"site"`
	Events []journal.Event `json:"events"`
}

// ReadHistory reads the journal; names choose, none is all.
func ReadHistory(ctx context.Context, options Options, names []string) (History, error) {
	s, err := readAfter(ctx, options, func(s *session) error {
		return s.site.CheckSecretNames(withoutRoots(names))
	})
	if err != nil {
		return History{}, err
	}
	defer s.close()
	history := History{Schema: HistoryVersion, Site: s.site.Name, Events: []journal.Event{}}
	if err := s.servers()[0].siteHost(ctx, nil, &history.Events, "journal", "list"); err != nil {
		return history, plan.WithHint(err, "run `site deploy` if the host's site-host is older than this")
	}
	if len(names) > 0 {
		history.Events = slices.DeleteFunc(history.Events, func(event journal.Event) bool { return !slices.Contains(names, event.Name) })
	}
	return history, nil
}

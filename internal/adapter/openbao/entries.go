package openbao

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"

	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// The bounds of a value in bytes. The storage's own is 1 MiB for the whole entry, in
// which the engine keeps the value as JSON: "<" takes six bytes there.
const (
	MaxValue   = 512 * 1024
	maxEncoded = 1020 * 1024
)

// clockTolerance: a version whose end is set for later than this still has its
// value; anything nearer may be the server's clock against ours.
const clockTolerance = time.Hour

func dataPath(entry site.Secret) string     { return site.SecretMount + "/data/" + entry.KVPath() }
func metadataPath(entry site.Secret) string { return site.SecretMount + "/metadata/" + entry.KVPath() }

// ObserveEntries finds what the engine knows about the secrets, by full name;
// it reads no values. Entries that no catalogue declares are in it too, as
// existing and with nothing else.
func (c *Client) ObserveEntries(ctx context.Context, entries []site.Secret) (map[string]reconcile.EntryState, error) {
	folders, err := c.list(ctx, site.SecretMount+"/metadata")
	if err != nil {
		return nil, err
	}
	wanted := map[string]site.Secret{}
	for _, entry := range entries {
		wanted[entry.FullName()] = entry
	}
	// One list per component instead of one request per entry that is not there.
	var mutex sync.Mutex
	states := map[string]reconcile.EntryState{}
	lists, listsCtx := errgroup.WithContext(ctx)
	lists.SetLimit(parallel)
	for _, folder := range folders {
		component, isFolder := strings.CutSuffix(folder, "/")
		if !isFolder {
			states[folder] = reconcile.EntryState{Exists: true}
			continue
		}
		lists.Go(func() error {
			names, err := c.list(listsCtx, site.SecretMount+"/metadata/"+component)
			mutex.Lock()
			defer mutex.Unlock()
			for _, name := range names {
				states[component+"."+name] = reconcile.EntryState{Exists: true}
			}
			return err
		})
	}
	if err := lists.Wait(); err != nil {
		return nil, err
	}
	var present []site.Secret
	for name, entry := range wanted {
		if states[name].Exists {
			present = append(present, entry)
		}
	}
	declared, err := c.ObserveDeclared(ctx, present)
	if err != nil {
		return nil, err
	}
	maps.Copy(states, declared)
	return states, nil
}

// ObserveDeclared is ObserveEntries without a look around for what no catalogue
// declares: all of its requests are under way at once.
func (c *Client) ObserveDeclared(ctx context.Context, entries []site.Secret) (map[string]reconcile.EntryState, error) {
	var mutex sync.Mutex
	states := map[string]reconcile.EntryState{}
	reads, readsCtx := errgroup.WithContext(ctx)
	reads.SetLimit(parallel)
	for _, entry := range entries {
		reads.Go(func() error {
			state, _, err := c.entryState(readsCtx, entry)
			if err != nil {
				return err
			}
			mutex.Lock()
			defer mutex.Unlock()
			states[entry.FullName()] = state
			return nil
		})
	}
	return states, reads.Wait()
}

// entryState reads an entry's metadata: the newest version, and whether the
// active one has a value.
func entryState(entry site.Secret, data map[string]any, now time.Time) reconcile.EntryState {
	newest := number(data, "current_version")
	if newest == 0 { // metadata alone, or removed while we looked
		return reconcile.EntryState{}
	}
	state := reconcile.EntryState{
		Exists: true, Version: newest, CustomMetadata: texts(data, "custom_metadata"), Versions: versionStates(data, now),
	}
	if entry.ProducedBy != nil && entry.ProducedBy.Component != "" {
		// Its job cannot say which version is active: whatever it wrote last is.
		state.CustomMetadata = reconcile.WithoutRotation(state.CustomMetadata)
	}
	active, known := state.Versions[state.Rotation().Active]
	state.Created, state.Deleted = active.Created, !known || active.Gone
	return state
}

func versionStates(data map[string]any, now time.Time) map[int]reconcile.VersionState {
	states := map[int]reconcile.VersionState{}
	versions := object(data, "versions")
	for name := range versions {
		version, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		fields := object(versions, name)
		created, _ := time.Parse(time.RFC3339Nano, text(fields, "created_time"))
		destroyed, _ := fields["destroyed"].(bool)
		end, err := time.Parse(time.RFC3339Nano, text(fields, "deletion_time"))
		states[version] = reconcile.VersionState{Created: created, Gone: destroyed || err == nil && end.Before(now.Add(clockTolerance))}
	}
	return states
}

// NoValueError says that a secret has no value to read.
type NoValueError struct {
	Name    string
	Deleted bool
	// Generation is the one that was asked for; 0 where that was the active one.
	Generation int
}

func (e *NoValueError) Error() string {
	if e.Generation > 0 {
		return fmt.Sprintf("generation %d of secret %s is gone", e.Generation, e.Name)
	}
	if e.Deleted {
		return fmt.Sprintf("the value of secret %s was deleted", e.Name)
	}
	return fmt.Sprintf("secret %s has no value", e.Name)
}

// Hint implements plan.Hinter.
func (e *NoValueError) Hint() string {
	if e.Generation > 0 {
		return "it was retired; jobs follow to the active generation at the next deploy"
	}
	return fmt.Sprintf("deploy the site, which makes generated ones; give others with: site secrets set %s", e.Name)
}

// Read gives a secret's active value and the generation that it is.
func (c *Client) Read(ctx context.Context, entry site.Secret) (secret.Value, int, error) {
	fields, generation, err := c.ReadActive(ctx, entry)
	return fields.Value, generation, err
}

// ConflictError says that somebody else wrote the secret since it was looked at.
type ConflictError struct {
	Name string
	// Expected is the version that the write insisted on; 0 is none.
	Expected int
}

func (e *ConflictError) Error() string {
	if e.Expected == 0 {
		return fmt.Sprintf("secret %s exists already, its value is kept", e.Name)
	}
	return fmt.Sprintf("secret %s is no longer at version %d: somebody else wrote it, their value is kept", e.Name, e.Expected)
}

// Hint implements plan.Hinter.
func (*ConflictError) Hint() string {
	return "look at it with: site secrets status; then run this again"
}

// ValueError says that a value cannot be kept as it is.
type ValueError struct{ Name, Reason, Fix string }

func (e *ValueError) Error() string {
	return fmt.Sprintf("secret %s: the value %s", e.Name, e.Reason)
}

// Hint implements plan.Hinter.
func (e *ValueError) Hint() string { return e.Fix }

const encodeFix = "encode it, such as with base64, and decode it where it is used"

// CheckValue refuses what the engine would not keep, or not as it is.
func CheckValue(entry site.Secret, value secret.Value) error {
	name := entry.FullName()
	switch content := value.Reveal(); {
	case content == "":
		return &ValueError{Name: name, Reason: "is empty", Fix: "give the value itself; a newline alone is none"}
	case len(content) > MaxValue:
		return &ValueError{Name: name, Reason: fmt.Sprintf("has %d bytes, the most is %d", len(content), MaxValue),
			Fix: "keep big files in object storage, and a key to them here"}
	case !utf8.ValidString(content):
		return &ValueError{Name: name, Reason: "is not UTF-8 text", Fix: encodeFix}
	default:
		if encoded, err := json.Marshal(content); err != nil || len(encoded) > maxEncoded {
			return &ValueError{Name: name, Reason: fmt.Sprintf("has %d bytes as JSON, the most is %d", len(encoded), maxEncoded), Fix: encodeFix}
		}
		return nil
	}
}

// Write gives a secret a new version that is active at once; cas is the newest
// version that it must have, 0 for one that never was. Custom metadata, where
// given, replaces the old, but for what belongs to the rotation.
func (c *Client) Write(ctx context.Context, entry site.Secret, value secret.Value, cas int, custom map[string]string) (int, error) {
	return c.WriteFields(ctx, entry, Fields{Value: value}, cas, custom)
}

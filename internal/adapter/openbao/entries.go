package openbao

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/plan"
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
	reads, readsCtx := errgroup.WithContext(ctx)
	reads.SetLimit(parallel)
	for _, entry := range present {
		reads.Go(func() error {
			data, err := c.read(readsCtx, metadataPath(entry))
			if err != nil {
				return err
			}
			mutex.Lock()
			defer mutex.Unlock()
			states[entry.FullName()] = entryState(data, time.Now())
			return nil
		})
	}
	return states, reads.Wait()
}

func entryState(data map[string]any, now time.Time) reconcile.EntryState {
	version := number(data, "current_version")
	if version == 0 { // metadata alone, or removed while we looked
		return reconcile.EntryState{}
	}
	newest := object(object(data, "versions"), strconv.Itoa(version))
	state := reconcile.EntryState{Exists: true, Version: version, CustomMetadata: texts(data, "custom_metadata")}
	state.Created, _ = time.Parse(time.RFC3339Nano, text(newest, "created_time"))
	destroyed, _ := newest["destroyed"].(bool)
	end, err := time.Parse(time.RFC3339Nano, text(newest, "deletion_time"))
	state.Deleted = newest == nil || destroyed || err == nil && end.Before(now.Add(clockTolerance))
	return state
}

// NoValueError says that a secret has no value to read.
type NoValueError struct {
	Name    string
	Deleted bool
}

func (e *NoValueError) Error() string {
	if e.Deleted {
		return fmt.Sprintf("the value of secret %s was deleted", e.Name)
	}
	return fmt.Sprintf("secret %s has no value", e.Name)
}

// Hint implements plan.Hinter.
func (e *NoValueError) Hint() string {
	return fmt.Sprintf("deploy the site, which makes generated ones; give others with: site secrets set %s", e.Name)
}

// Read gives a secret's value and its version.
func (c *Client) Read(ctx context.Context, entry site.Secret) (secret.Value, int, error) {
	name := entry.FullName()
	data, err := c.read(ctx, dataPath(entry))
	if err != nil {
		return secret.Value{}, 0, err
	}
	fields, metadata := object(data, "data"), object(data, "metadata")
	if fields == nil {
		return secret.Value{}, number(metadata, "version"), &NoValueError{Name: name, Deleted: metadata != nil}
	}
	value, ok := fields[site.SecretField].(string)
	if !ok {
		return secret.Value{}, number(metadata, "version"), plan.WithHint(
			fmt.Errorf("secret %s has no text in its field %q", name, site.SecretField),
			"it was not written by site; write it anew with: site secrets set %s", name)
	}
	return secret.New(value), number(metadata, "version"), nil
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

// Write gives a secret a new version; cas is the version that it must have, 0
// for one that never was. Custom metadata, where given, replaces the old.
func (c *Client) Write(ctx context.Context, entry site.Secret, value secret.Value, cas int, custom map[string]string) (int, error) {
	if err := CheckValue(entry, value); err != nil {
		return 0, err
	}
	answer, err := c.api.Logical().WriteWithContext(ctx, dataPath(entry), map[string]any{
		"data":    map[string]any{site.SecretField: value.Reveal()},
		"options": map[string]any{"cas": cas},
	})
	// Decided before the value is taken out of the answer: it may be a part of these words.
	conflict := statusOf(err) == http.StatusBadRequest && strings.Contains(err.Error(), "check-and-set")
	switch err := describe(err, []secret.Value{value, c.token}, "write %s", dataPath(entry)); {
	case conflict:
		return 0, &ConflictError{Name: entry.FullName(), Expected: cas}
	case err != nil:
		return 0, err
	case answer == nil:
		return 0, fmt.Errorf("write %s: the secrets engine answered nothing", dataPath(entry))
	}
	version := number(answer.Data, "version")
	if custom == nil {
		return version, nil
	}
	metadata := map[string]any{}
	for key, text := range custom {
		metadata[key] = text
	}
	_, err = c.write(ctx, metadataPath(entry), map[string]any{"custom_metadata": metadata}, value)
	return version, err
}

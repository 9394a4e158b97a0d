package openbao

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/plan"
	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// usernameField is next to site.SecretField in the passwords of alternating roles.
const usernameField = "username"

// Fields are what one generation of a secret holds.
type Fields struct {
	Value secret.Value
	// Username is whom the value logs in; empty but for the passwords of
	// alternating roles.
	Username string
}

// ReadGeneration gives what one generation of a secret holds; 0 is the newest.
func (c *Client) ReadGeneration(ctx context.Context, entry site.Secret, generation int) (Fields, error) {
	name := entry.FullName()
	var query map[string][]string
	if generation > 0 {
		query = map[string][]string{"version": {strconv.Itoa(generation)}}
	}
	answer, err := c.api.Logical().ReadWithDataWithContext(ctx, dataPath(entry), query)
	if err != nil {
		return Fields{}, describe(err, []secret.Value{c.token}, "read %s", dataPath(entry))
	}
	var fields, metadata map[string]any
	if answer != nil {
		fields, metadata = object(answer.Data, "data"), object(answer.Data, "metadata")
	}
	if fields == nil {
		return Fields{}, &NoValueError{Name: name, Deleted: metadata != nil, Generation: generation}
	}
	value, ok := fields[site.SecretField].(string)
	if !ok {
		return Fields{}, plan.WithHint(fmt.Errorf("secret %s has no text in its field %q", name, site.SecretField),
			"it was not written by site; write it anew with: site secrets set %s", name)
	}
	return Fields{Value: secret.New(value), Username: text(fields, usernameField)}, nil
}

// ReadActive gives what the active generation of a secret holds, and which that is.
func (c *Client) ReadActive(ctx context.Context, entry site.Secret) (Fields, int, error) {
	state, _, err := c.entryState(ctx, entry)
	switch {
	case err != nil:
		return Fields{}, 0, err
	case !state.Exists:
		return Fields{}, 0, &NoValueError{Name: entry.FullName()}
	}
	active := state.Rotation().Active
	fields, err := c.ReadGeneration(ctx, entry, active)
	var none *NoValueError
	if errors.As(err, &none) {
		err = &NoValueError{Name: entry.FullName(), Deleted: true}
	}
	return fields, active, err
}

// entryState reads what the engine knows about one secret, and how many
// versions the entry itself asks it to keep.
func (c *Client) entryState(ctx context.Context, entry site.Secret) (reconcile.EntryState, int, error) {
	data, err := c.read(ctx, metadataPath(entry))
	if err != nil {
		return reconcile.EntryState{}, 0, err
	}
	return entryState(entry, data, time.Now()), number(data, "max_versions"), nil
}

// WriteGeneration gives a secret a new version and does nothing else: an entry
// that names its active generation keeps that. cas is the newest version that
// it must have.
func (c *Client) WriteGeneration(ctx context.Context, entry site.Secret, fields Fields, cas int) (int, error) {
	value := fields.Value
	if err := CheckValue(entry, value); err != nil {
		return 0, err
	}
	document := map[string]any{site.SecretField: value.Reveal()}
	if fields.Username != "" {
		document[usernameField] = fields.Username
	}
	answer, err := c.api.Logical().WriteWithContext(ctx, dataPath(entry), map[string]any{
		"data": document, "options": map[string]any{"cas": cas},
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
	return number(answer.Data, "version"), nil
}

// WriteFields is Write for a secret that has more than its value. A candidate
// of a rotation that it overtakes is one no longer.
func (c *Client) WriteFields(ctx context.Context, entry site.Secret, fields Fields, cas int, custom map[string]string) (int, error) {
	version, err := c.WriteGeneration(ctx, entry, fields, cas)
	if err != nil || cas == 0 && custom == nil && fields.Username == "" { // the first one has no metadata yet
		return version, err
	}
	state, _, err := c.entryState(ctx, entry)
	if err != nil {
		return version, err
	}
	if custom == nil {
		custom = state.CustomMetadata
	}
	rotation := state.Rotation()
	rotation.Active, rotation.Login = 0, fields.Username // the newest one goes without saying
	if state.NamesActive() {
		rotation.Active = version
		rotation.Candidate, rotation.Since, rotation.By = 0, time.Time{}, ""
	}
	metadata := rotation.Metadata(custom)
	if maps.Equal(metadata, state.CustomMetadata) {
		return version, nil
	}
	return version, c.writeCustomMetadata(ctx, entry, metadata, 0, fields.Value)
}

// SetRotation notes how far the secret's rotation has come, in one write. What
// others keep in the entry's metadata stays.
func (c *Client) SetRotation(ctx context.Context, entry site.Secret, rotation reconcile.Rotation) error {
	state, keeps, err := c.entryState(ctx, entry)
	if err != nil {
		return err
	}
	metadata := rotation.Metadata(state.CustomMetadata)
	raised := 0
	if needed := rotation.VersionsNeeded(); needed > max(keeps, reconcile.MaxVersions) {
		raised = needed
	}
	if raised == 0 && maps.Equal(metadata, state.CustomMetadata) {
		return nil
	}
	return c.writeCustomMetadata(ctx, entry, metadata, raised)
}

// SetMetadata replaces what others than the rotation keep in the entry's metadata.
func (c *Client) SetMetadata(ctx context.Context, entry site.Secret, custom map[string]string) error {
	state, _, err := c.entryState(ctx, entry)
	if err != nil {
		return err
	}
	rotation := state.Rotation()
	if !state.NamesActive() {
		rotation.Active = 0 // the newest one goes without saying
	}
	metadata := rotation.Metadata(custom)
	if maps.Equal(metadata, state.CustomMetadata) {
		return nil
	}
	return c.writeCustomMetadata(ctx, entry, metadata, 0)
}

// writeCustomMetadata replaces the entry's custom metadata, and says how many
// versions to keep where that is given.
func (c *Client) writeCustomMetadata(
	ctx context.Context, entry site.Secret, metadata map[string]string, keeps int, secrets ...secret.Value,
) error {
	custom := map[string]any{}
	for key, text := range metadata {
		custom[key] = text
	}
	document := map[string]any{"custom_metadata": custom}
	if keeps > 0 {
		document["max_versions"] = keeps
	}
	_, err := c.write(ctx, metadataPath(entry), document, secrets...)
	return err
}

// ActiveError says that a generation is the one that jobs read.
type ActiveError struct {
	Name       string
	Generation int
}

func (e *ActiveError) Error() string {
	return fmt.Sprintf("generation %d of secret %s is the active one and is not destroyed", e.Generation, e.Name)
}

// Hint implements plan.Hinter.
func (e *ActiveError) Hint() string {
	return fmt.Sprintf("rotate it first: site secrets rotate %s", e.Name)
}

// Destroy removes the values of generations for good; the active one is refused.
func (c *Client) Destroy(ctx context.Context, entry site.Secret, generations []int) error {
	if len(generations) == 0 {
		return nil
	}
	state, _, err := c.entryState(ctx, entry)
	if err != nil {
		return err
	}
	if active := state.Rotation().Active; state.HasValue() && slices.Contains(generations, active) {
		return &ActiveError{Name: entry.FullName(), Generation: active}
	}
	_, err = c.write(ctx, site.SecretMount+"/destroy/"+entry.KVPath(), map[string]any{"versions": generations})
	return err
}

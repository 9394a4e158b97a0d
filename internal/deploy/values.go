package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/adapter/program"
	"github.com/nomad-site/site/internal/plan"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// SecretsVersion names the schema of what `site secrets status` prints.
const SecretsVersion = "site.secrets/v1"

// SecretsStatus is what is known of a site's catalogue without any value.
type SecretsStatus struct {
	Schema  string      `json:"schema"`
	Site    string      `json:"site"`
	Secrets []SecretRow `json:"secrets"`
}

// SecretRow is one secret in `site secrets status`.
type SecretRow struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Source      string `json:"source"`
	// State is "ok", "missing", "deleted", "expires soon", "expired", "rotating",
	// "retiring" (all have the new generation and the old one still works) or "due".
	State string `json:"state"`
	// Generation is the one that jobs read; Candidate is being tried, Retiring
	// is the old one, Failed the last one that did not prove itself.
	Generation int        `json:"generation"`
	Candidate  int        `json:"candidate,omitempty"`
	Retiring   int        `json:"retiring,omitempty"`
	Failed     int        `json:"failed,omitempty"`
	Created    *time.Time `json:"created,omitempty"`
	Expires    *time.Time `json:"expires,omitempty"`
	// Due is when the policy asks for the next generation.
	Due       *time.Time `json:"due,omitempty"`
	Consumers []string   `json:"consumers"`
}

// The states of a secret.
const (
	SecretOK      = "ok"
	SecretMissing = "missing"
	SecretDeleted = "deleted"
	SecretExpires = "expires soon"
	SecretExpired = "expired"
	// SecretRotating and SecretRetiring are rotations on their way, SecretDue one
	// that the policy asks for.
	SecretRotating = "rotating"
	SecretRetiring = "retiring"
	SecretDue      = "due"
)

const (
	// expiresField is the custom metadata of an entry that holds its expiry (RFC 3339).
	expiresField = "expires"
	// expiryWarning is how long before its end a secret is warned of.
	expiryWarning = 14 * 24 * time.Hour
)

// openSecrets opens a session for the commands that deal with values. Names are
// checked before anything remote.
func openSecrets(ctx context.Context, options Options, names []string) (*session, error) {
	s, err := readAfter(ctx, options, func(s *session) error { return s.site.CheckSecretNames(names) })
	if err != nil {
		return nil, err
	}
	if err := s.openOpenBao(ctx); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// ReadSecretsStatus tells source, generation, age, expiry and consumers of every secret.
func ReadSecretsStatus(ctx context.Context, options Options) (SecretsStatus, error) {
	s, err := openSecrets(ctx, options, nil)
	if err != nil {
		return SecretsStatus{}, err
	}
	defer s.close()
	status := SecretsStatus{Schema: SecretsVersion, Site: s.site.Name, Secrets: []SecretRow{}}
	secrets := s.site.Secrets()
	states, err := s.bao.ObserveEntries(ctx, secrets)
	if err != nil {
		return status, err
	}
	for _, one := range secrets {
		status.Secrets = append(status.Secrets, secretRow(one, states[one.FullName()], s.site.Consumers(one.FullName()), time.Now()))
	}
	return status, nil
}

func secretRow(one site.Secret, state catalogue.EntryState, consumers []string, now time.Time) SecretRow {
	row := SecretRow{
		Name: one.FullName(), Description: one.Description, Source: sourceOf(one), State: SecretOK,
		Consumers: consumers,
	}
	rotation := state.Rotation()
	row.Generation, row.Candidate, row.Retiring, row.Failed = rotation.Active, rotation.Candidate, rotation.Retiring, rotation.Failed
	if due, ages := catalogue.DueAt(one, state); ages {
		row.Due = &due
	}
	if row.Consumers == nil {
		row.Consumers = []string{}
	}
	if !state.Created.IsZero() {
		row.Created = &state.Created
	}
	if expires, err := time.Parse(time.RFC3339, state.CustomMetadata[expiresField]); err == nil {
		row.Expires = &expires
	}
	switch {
	case !state.Exists && state.Version == 0:
		row.State = SecretMissing
	case !state.HasValue():
		row.State = SecretDeleted
	case row.Expires != nil && !now.Before(*row.Expires):
		row.State = SecretExpired
	case row.Expires != nil && row.Expires.Sub(now) < expiryWarning:
		row.State = SecretExpires
	case rotation.Candidate > 0:
		row.State = SecretRotating
	case rotation.Retiring > 0:
		row.State = SecretRetiring
	case row.Due != nil && !now.Before(*row.Due):
		row.State = SecretDue
	}
	return row
}

func sourceOf(one site.Secret) string {
	switch {
	case one.Generated != nil:
		return "generated"
	case one.External != nil:
		return "external"
	case one.ProducedBy != nil && one.ProducedBy.Component != "":
		return "produced by " + one.ProducedBy.Component
	case isStoreKey(one):
		return "made by " + one.ProducedBy.Provider
	}
	return "produced by a command"
}

// NewValue is a value on its way into the catalogue.
type NewValue struct {
	Name  string
	Value secret.Value
	// Expires is when the value stops to work; zero for never.
	Expires time.Time
	// Problem is why there is no value: it is reported with all else that is wrong.
	Problem error
}

// Stored is what became of a NewValue.
type Stored struct {
	Name       string `json:"name"`
	Generation int    `json:"generation"`
	// Unchanged: the same value was there already, and nothing was written.
	Unchanged bool `json:"unchanged"`
	// NewlineCut: a newline at the end was cut off, as the catalogue says.
	NewlineCut bool `json:"newline_cut"`
}

// StoreOptions choose how StoreSecrets works.
type StoreOptions struct {
	// SkipChecks stores external values without running their check.
	SkipChecks bool
}

// StoreSecrets writes values, all or none as far as it can be known before: what
// is wrong with any of them is said in one error, and then nothing is written.
func StoreSecrets(ctx context.Context, options Options, values []NewValue, storing StoreOptions) ([]Stored, error) {
	names := make([]string, len(values))
	for i, value := range values {
		names[i] = value.Name
	}
	var stored []Stored
	s, err := readAfter(ctx, options, func(s *session) error {
		problems := []error{s.site.CheckSecretNames(names)}
		stored = make([]Stored, len(values))
		for i := range values {
			stored[i].Name = values[i].Name
			if values[i].Problem != nil {
				problems = append(problems, values[i].Problem)
			} else if one := s.site.Secret(values[i].Name); one != nil {
				problems = append(problems, normalise(*one, &values[i], &stored[i]))
			}
		}
		return errors.Join(problems...)
	})
	if err != nil {
		return nil, err
	}
	defer s.close()
	if !storing.SkipChecks {
		if err := s.checkValues(ctx, values); err != nil {
			return nil, err
		}
	}
	if err := s.openOpenBao(ctx); err != nil {
		return nil, err
	}
	return stored, s.storeValues(ctx, values, stored)
}

// normalise holds a value against what the catalogue says of it.
func normalise(one site.Secret, value *NewValue, stored *Stored) error {
	text := value.Value.Reveal()
	if one.External == nil || !one.External.KeepNewline {
		cut := strings.TrimSuffix(strings.TrimSuffix(text, "\n"), "\r")
		stored.NewlineCut = cut != text
		text = cut
	}
	value.Value = secret.New(text)
	return openbao.CheckValue(one, value.Value)
}

// checkValues runs the checks of external secrets, all of them.
func (s *session) checkValues(ctx context.Context, values []NewValue) error {
	var problems []error
	for _, value := range values {
		one := s.site.Secret(value.Name)
		if one.External == nil || len(one.External.Check) == 0 {
			continue
		}
		if err := s.runCheck(ctx, *one, value.Value); err != nil {
			problems = append(problems, plan.WithHint(fmt.Errorf("secret %s: its check refuses the value: %w", value.Name, err),
				"nothing was stored; give another value, or --skip-check if the check is at fault"))
		}
	}
	return errors.Join(problems...)
}

func (s *session) runCheck(ctx context.Context, one site.Secret, value secret.Value) error {
	_, err := program.Run(ctx, program.Command{Dir: s.tree, Args: one.External.Check, Stdin: value, Limit: producerLimit})
	return err
}

func (s *session) storeValues(ctx context.Context, values []NewValue, stored []Stored) error {
	secrets := make([]site.Secret, len(values))
	for i, value := range values {
		secrets[i] = *s.site.Secret(value.Name)
	}
	states, err := s.bao.ObserveEntries(ctx, secrets)
	if err != nil {
		return err
	}
	var problems []error
	for _, one := range secrets {
		if state := states[one.FullName()]; one.External == nil && state.HasValue() {
			problems = append(problems, plan.WithHint(fmt.Errorf("secret %s is %s and has a value", one.FullName(), sourceOf(one)),
				"only a lost value of it can be put back; a new one comes from its source"))
		}
		problems = append(problems, s.checkOverwrite(one, states[one.FullName()]))
	}
	if err := errors.Join(problems...); err != nil {
		return err
	}
	for i, one := range secrets {
		state := states[one.FullName()]
		if state.HasValue() {
			current, generation, err := s.bao.Read(ctx, one)
			if err != nil {
				return err
			}
			if current.Reveal() == values[i].Value.Reveal() && values[i].Expires.IsZero() {
				stored[i].Generation, stored[i].Unchanged = generation, true
				continue
			}
		}
		var custom map[string]string
		if !values[i].Expires.IsZero() {
			custom = map[string]string{expiresField: values[i].Expires.UTC().Format(time.RFC3339)}
		}
		if stored[i].Generation, err = s.bao.WriteFields(ctx, one, s.fieldsOf(one, values[i].Value, state), state.Version, custom); err != nil {
			return err
		}
	}
	if _, err := s.observeSecrets(ctx, s.site.Secrets()); err != nil {
		return err
	}
	return s.keepSummary(ctx)
}

// checkOverwrite refuses to write over what a rotation is moving, and a password
// under which clients are logged in.
func (s *session) checkOverwrite(one site.Secret, state catalogue.EntryState) error {
	name := one.FullName()
	switch {
	case state.Rotation().Running():
		return plan.WithHint(fmt.Errorf("secret %s is being rotated", name), "finish it first: site secrets rotate %s", name)
	case state.HasValue() && s.site.AlternatingRole(name) != nil:
		return plan.WithHint(fmt.Errorf("secret %s is the password of logins that take turns", name),
			"bring its next value without a gap: site secrets rotate %s --from-file=FILE", name)
	}
	return nil
}

// ReadSecret gives one value away.
func ReadSecret(ctx context.Context, options Options, name string) (secret.Value, int, error) {
	s, err := openSecrets(ctx, options, []string{name})
	if err != nil {
		return secret.Value{}, 0, err
	}
	defer s.close()
	return s.bao.Read(ctx, *s.site.Secret(name))
}

// Verified is what `site secrets verify` found out about one secret.
type Verified struct {
	Name string `json:"name"`
	// Proof is how: "check", "database login" or "none" where there is no way to tell.
	Proof string `json:"proof"`
	// Problem is empty for a value that works.
	Problem string `json:"problem,omitempty"`
}

// VerifySecrets proves that values work: external ones by their check, those of
// database roles by logging in. Without names, all of them.
func VerifySecrets(ctx context.Context, options Options, names []string) ([]Verified, error) {
	s, err := openSecrets(ctx, options, names)
	if err != nil {
		return nil, err
	}
	defer s.close()
	secrets := slices.DeleteFunc(s.site.Secrets(), func(one site.Secret) bool {
		return len(names) > 0 && !slices.Contains(names, one.FullName())
	})
	verified := make([]Verified, len(secrets))
	var group errgroup.Group
	group.SetLimit(4)
	for i, one := range secrets {
		group.Go(func() error {
			verified[i] = s.verify(ctx, one)
			return nil
		})
	}
	_ = group.Wait()
	return verified, ctx.Err()
}

func (s *session) verify(ctx context.Context, one site.Secret) Verified {
	found := Verified{Name: one.FullName(), Proof: "none"}
	fields, _, err := s.bao.ReadActive(ctx, one)
	if err != nil {
		found.Problem = err.Error()
		return found
	}
	value := fields.Value
	problems := []error{}
	if one.External != nil && len(one.External.Check) > 0 {
		found.Proof = "check"
		problems = append(problems, s.runCheck(ctx, one, value))
	}
	for _, role := range s.site.PasswordRoles(one.FullName()) {
		found.Proof = "database login"
		login := role.Name
		if role.Alternating {
			login = fields.Username
		}
		problems = append(problems, s.tryLogin(ctx, role, login, value))
	}
	if err := errors.Join(problems...); err != nil {
		found.Problem = err.Error()
	}
	return found
}

// postgresAddress is where jobs reach Postgres on their host.
const postgresAddress = "127.0.0.1:5432"

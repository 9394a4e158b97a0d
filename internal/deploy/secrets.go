package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/adapter/program"
	"github.com/nomad-site/site/internal/plan"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/release"
)

// secretsState is what the secrets step compares.
type secretsState struct {
	entries map[string]catalogue.EntryState
	// inUse names, by secret, the deployed components that run on it.
	inUse map[string][]string
	// nameless are passwords of alternating roles that do not say whom they log in.
	nameless []string
}

// convergeSecrets makes the values that the site makes itself, once, and finds
// out which ones nobody gave yet.
func (s *session) convergeSecrets() plan.Step {
	return &plan.Reconciler[[]site.Secret, secretsState]{
		Title:   "secrets",
		Desire:  func(context.Context) ([]site.Secret, error) { return s.site.Secrets(), nil },
		Observe: s.observeSecrets,
		Diff: func(desired []site.Secret, actual secretsState) []plan.Change {
			changes, findings := s.diffSecrets(desired, actual)
			s.blockOn(findings)
			for _, name := range catalogue.Undeclared(desired, actual.entries) {
				s.options.Warn(fmt.Sprintf("secret %s in OpenBao is declared by no component: remove it with `bao kv metadata delete %s/%s`",
					name, site.SecretMount, strings.Replace(name, ".", "/", 1)))
			}
			for _, warning := range ageWarnings(desired, actual.entries, time.Now()) {
				s.options.Warn(warning)
			}
			for _, name := range actual.nameless {
				changes = append(changes, plan.Change{
					Action: plan.Update, Kind: catalogue.Kind, Target: name, Reason: "its role has two logins now: it names the one to use",
					Precondition: catalogue.Precondition(actual.entries[name].Version),
				})
			}
			for _, lost := range findings.Lost {
				changes = append(changes, plan.Change{
					Action: catalogue.Import, Kind: catalogue.Kind, Target: lost.Name,
					Reason: "its value is gone and cannot be made again, needed by " + strings.Join(lost.Jobs, ", "),
				})
			}
			return changes
		},
		Converge: func(ctx context.Context, desired []site.Secret, actual secretsState, _ []plan.Change, progress plan.Progress) error {
			changes, findings := s.diffSecrets(desired, actual)
			if err := findings.LostError(); err != nil {
				return err
			}
			for _, name := range actual.nameless {
				if err := s.nameLogin(ctx, actual, name); err != nil {
					return err
				}
			}
			for _, change := range changes {
				if change.Action == catalogue.Import {
					continue // the end of the run asks for it
				}
				if err := s.makeSecret(ctx, actual, change.Target, progress); err != nil {
					return err
				}
			}
			return nil
		},
		Settled: func(ctx context.Context, desired []site.Secret) error {
			actual, err := s.observeSecrets(ctx, desired)
			if err != nil {
				return fmt.Errorf("verify: %w", err)
			}
			left, _ := s.diffSecrets(desired, actual)
			left = slices.DeleteFunc(left, func(change plan.Change) bool { return change.Action == catalogue.Import })
			if len(left) > 0 {
				return &plan.NotSettledError{Left: left}
			}
			return s.keepSummary(ctx)
		},
	}
}

func (s *session) diffSecrets(desired []site.Secret, actual secretsState) ([]plan.Change, catalogue.Findings) {
	return catalogue.Diff(desired, actual.entries, catalogue.DiffOptions{
		InUse:   func(name string) []string { return actual.inUse[name] },
		Waiting: catalogue.Readers(s.site),
		Remake:  s.remake(),
		Site:    s.site.Name,
	})
}

func (s *session) remake() map[string]bool {
	remake := map[string]bool{}
	for _, name := range s.options.RemakeSecrets {
		remake[name] = true
	}
	return remake
}

func (s *session) observeSecrets(ctx context.Context, desired []site.Secret) (secretsState, error) {
	if len(desired) == 0 {
		s.entries = map[string]catalogue.EntryState{}
		return secretsState{}, nil
	}
	if s.bao == nil {
		return secretsState{}, &plan.UnknownError{Until: "openbao"}
	}
	entries, err := s.bao.ObserveEntries(ctx, desired)
	if err != nil {
		return secretsState{}, err
	}
	latest, err := s.latestRelease(ctx)
	if err != nil {
		return secretsState{}, err
	}
	s.entries, s.recorded = entries, map[string]int{}
	if latest != nil {
		for _, component := range latest.Components {
			maps.Copy(s.recorded, component.Secrets)
		}
	}
	nameless, err := s.namelessLogins(ctx, desired)
	return secretsState{entries: entries, inUse: inUse(desired, latest), nameless: nameless}, err
}

// namelessLogins finds the passwords that were made before their role alternated.
func (s *session) namelessLogins(ctx context.Context, desired []site.Secret) ([]string, error) {
	var nameless []string
	for _, one := range desired {
		if s.site.AlternatingRole(one.FullName()) == nil || !s.entries[one.FullName()].HasValue() {
			continue
		}
		fields, _, err := s.bao.ReadActive(ctx, one)
		if err != nil {
			return nil, err
		}
		if fields.Username == "" {
			nameless = append(nameless, one.FullName())
		}
	}
	return nameless, nil
}

// nameLogin writes a password again, with the login that it is now of.
func (s *session) nameLogin(ctx context.Context, actual secretsState, name string) error {
	one := *s.site.Secret(name)
	fields, _, err := s.bao.ReadActive(ctx, one)
	if err != nil {
		return err
	}
	s.renamed[name] = true
	_, err = s.bao.WriteFields(ctx, one, s.fieldsOf(one, fields.Value, actual.entries[name]), actual.entries[name].Version, nil)
	return err
}

// ageWarnings say which values end soon, and which rotations are due or unfinished.
func ageWarnings(secrets []site.Secret, entries map[string]catalogue.EntryState, now time.Time) []string {
	var warnings []string
	for _, one := range secrets {
		row := secretRow(one, entries[one.FullName()], nil, now)
		if row.State == SecretExpires || row.State == SecretExpired {
			warnings = append(warnings, fmt.Sprintf("secret %s: its value ends on %s; bring another with `site secrets rotate %s --from-file=FILE`",
				row.Name, row.Expires.Format(time.DateOnly), row.Name))
		}
	}
	for _, due := range catalogue.DueSecrets(secrets, entries, now) {
		since := ""
		if !due.Since.IsZero() {
			since = " since " + due.Since.Local().Format(time.DateTime)
		}
		warnings = append(warnings, fmt.Sprintf("secret %s: its rotation is %s%s; run `site secrets rotate --due`", due.Name, due.Reason, since))
	}
	return warnings
}

// inUse looks into the jobs that were deployed: a secret that one of them reads
// had a value, whatever OpenBao says of it now.
func inUse(secrets []site.Secret, latest *release.Record) map[string][]string {
	used := map[string][]string{}
	if latest == nil {
		return used
	}
	for _, one := range secrets {
		path := site.SecretMount + "/data/" + one.KVPath()
		for name, component := range latest.Components {
			if strings.Contains(component.Jobspec, path+`\"`) || strings.Contains(component.Jobspec, path+`?`) {
				used[one.FullName()] = append(used[one.FullName()], name)
			}
		}
		slices.Sort(used[one.FullName()])
	}
	return used
}

// blockOn keeps the components back that need a secret which nobody gave, and
// those that wait for them.
func (s *session) blockOn(findings catalogue.Findings) {
	// A run of some components asks for what they need.
	findings.Missing = slices.DeleteFunc(slices.Clone(findings.Missing), func(one catalogue.MissingSecret) bool {
		return !slices.ContainsFunc(one.Components, s.active)
	})
	s.missingSecrets = findings.MissingError()
	s.blocked = map[string]string{}
	for _, missing := range findings.Missing {
		for _, component := range missing.Components {
			s.blocked[component] = "secret " + missing.Name + " is missing"
		}
	}
	for again := true; again; {
		again = false
		for _, component := range s.site.Components {
			if s.blocked[component.Name] != "" {
				continue
			}
			for _, needed := range s.site.WaitsFor(component.Name) {
				if s.blocked[needed] != "" {
					s.blocked[component.Name], again = "it waits for "+needed, true
				}
			}
		}
	}
}

// makeSecret makes one value and writes it where there is none, or the same
// version that the diff saw.
func (s *session) makeSecret(ctx context.Context, actual secretsState, name string, progress plan.Progress) error {
	one := *s.site.Secret(name)
	value, err := s.newValue(ctx, one, progress)
	if err != nil {
		return fmt.Errorf("secret %s: %w", name, err)
	}
	_, err = s.bao.WriteFields(ctx, one, s.fieldsOf(one, value, actual.entries[name]), actual.entries[name].Version, nil)
	return err
}

// fieldsOf are what is written of a value: the login of one that alternates stays
// the one that state knows, and is the first one otherwise.
func (s *session) fieldsOf(one site.Secret, value secret.Value, state catalogue.EntryState) openbao.Fields {
	fields := openbao.Fields{Value: value}
	if role := s.site.AlternatingRole(one.FullName()); role != nil {
		if fields.Username = state.Rotation().Login; fields.Username == "" {
			fields.Username, _ = role.Logins()
		}
	}
	return fields
}

// producerLimit bounds a command that makes or checks a secret.
const producerLimit = time.Minute

// runProducer runs a command of the repository; what it prints is the value,
// without the newline at the end.
func (s *session) runProducer(ctx context.Context, one site.Secret) (secret.Value, error) {
	output, err := program.Run(ctx, program.Command{Dir: s.tree, Args: one.ProducedBy.Command, Limit: producerLimit})
	var exit *program.ExitError
	if errors.As(err, &exit) {
		err = plan.WithHint(err, "nothing was stored; try `%s` in the root of the repository, then deploy again", strings.Join(one.ProducedBy.Command, " "))
	}
	if err != nil {
		return secret.Value{}, err
	}
	value := secret.New(string(bytes.TrimRight(output, "\r\n")))
	if value.IsZero() {
		return value, plan.WithHint(fmt.Errorf("%s printed nothing", one.ProducedBy.Command[0]), "it must print the value on standard output")
	}
	return value, nil
}

// awaitProduced waits until the jobs of a wave wrote what they produce: those who
// read it come next.
func (s *session) awaitProduced(ctx context.Context, components []site.Component, progress plan.Progress) error {
	var produced []site.Secret
	for _, component := range components {
		produced = append(produced, s.site.Produces(component.Name)...)
	}
	if len(produced) == 0 {
		return nil
	}
	start := time.Now()
	var missing []catalogue.AwaitedSecret
	err := retry.Until(ctx, "produced secrets", s.left(), func(ctx context.Context) error {
		states, err := s.bao.ObserveEntries(ctx, produced)
		if err != nil {
			if ctx.Err() == nil {
				missing = nil // what it is waiting for then is an answer
			}
			return err
		}
		was := len(missing)
		missing = missing[:0]
		for _, one := range produced {
			if !states[one.FullName()].HasValue() {
				missing = append(missing, catalogue.AwaitedSecret{Name: one.FullName(), Producer: one.ProducedBy.Component})
			}
		}
		if len(missing) == 0 {
			return nil
		}
		late := &catalogue.AwaitedError{Awaited: missing, After: time.Since(start)}
		if len(missing) != was {
			progress.Message("waiting for %s", late.Names())
		}
		return late
	})
	// Whether this wait or the run ran out of time first, what it was for is the same.
	if err != nil && len(missing) > 0 && (ctx.Err() == nil || errors.Is(context.Cause(ctx), context.DeadlineExceeded)) {
		return &catalogue.AwaitedError{Awaited: missing, After: time.Since(start)}
	}
	return err
}

// askForSecrets ends a run that left something out for want of a secret: all
// of them in one error.
func (s *session) askForSecrets() plan.Step {
	return check{title: "external secrets", run: func(context.Context) error {
		if s.missingSecrets == nil || s.options.DryRun {
			return nil
		}
		return s.missingSecrets
	}}
}

func (s *session) openOpenBao(ctx context.Context) error {
	return s.openOpenBaoFor(ctx, purposeSecrets)
}

func (s *session) noSecretsEngine() error {
	return plan.WithHint(fmt.Errorf("site %q has no secrets engine", s.site.Name),
		"add `component %q {}` to sites/%s/site.hcl, commit it and deploy", site.OpenBaoComponent, s.site.Name)
}

func (s *session) openOpenBaoFor(ctx context.Context, purpose string) error {
	if !s.hasOpenBao() {
		return s.noSecretsEngine()
	}
	client, health, err := s.dialOpenBao(ctx)
	if err != nil {
		return err
	}
	switch {
	case !health.Initialized:
		return plan.WithHint(errors.New("OpenBao is not initialised"), "run `site bootstrap-deploy --site=%s`", s.site.Name)
	case health.Sealed:
		if err := s.awaitUnsealed(ctx, client); err != nil {
			return err
		}
	}
	return s.logInToOpenBao(ctx, client, purpose)
}

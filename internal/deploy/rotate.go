package deploy

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/plan"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/journal"
)

// RotateOptions choose what Rotate rotates.
type RotateOptions struct {
	// Names are secrets ("shop.key") and roots of trust (see Roots).
	Names []string
	// All are all secrets that can be rotated without a value being brought.
	All bool
	// Due are those whose time has come, and what was left unfinished.
	Due bool
	// Roots are all roots of trust, but the site root token.
	Roots bool
	// Values are new values of external secrets.
	Values []NewValue
	// Drain replaces the declared drain of all secrets; negative: as declared.
	Drain time.Duration
	// Detach ends the run without waiting for the drain: the next one retires.
	Detach bool
	// WithoutHosts are hosts that are not waited for before the old generation goes.
	WithoutHosts []string
}

// rotation is one run that gives secrets their next generation.
type rotation struct {
	*session
	choice RotateOptions
	roots  []string
	// secrets are those that this run moves, sorted by name.
	secrets []*rotating
	// consumers are their jobs, in the order of waves.
	consumers []*consumer
	// operator is who runs it; events are what the journal does not have yet.
	operator string
	events   []journal.Event
	// minted are the keys of the object store that this run made at the provider.
	minted map[string]secret.Value
}

// rotating is one secret on its way.
type rotating struct {
	site.Secret
	state catalogue.Rotation
	// versions are which generations there are.
	entry catalogue.EntryState
	// value is what was brought for an external secret.
	value secret.Value
	// fresh: it begins with this run; otherwise an earlier one was cut short.
	fresh bool
	// mintAgain: its candidate is of no use without others that are lacking.
	mintAgain bool
}

// candidateWritten reports whether the version of the candidate is there.
func (r *rotating) candidateWritten() bool {
	version, there := r.entry.Versions[r.state.Candidate]
	return r.state.Candidate > 0 && there && !version.Gone
}

// lacksCandidate reports whether the next generation is still to be written; what
// only drains has none.
func (r *rotating) lacksCandidate() bool {
	if r.mintAgain {
		return true
	}
	drains := r.state.Retiring > 0 && r.state.Candidate == 0
	return !drains && !r.candidateWritten()
}

// Rotate gives secrets their next generation without anyone noticing: write,
// verify, try it with one allocation of each consumer, roll the rest, drain,
// retire. What was cut short is finished by the next run.
func Rotate(ctx context.Context, options Options, choice RotateOptions) (plan.Result, error) {
	choice.Names = withStoreKeys(choice.Names)
	if choice.Due && choice.Drain < 0 {
		idle, err := nothingDue(ctx, options)
		if err != nil || idle {
			return plan.Result{Schema: plan.ResultVersion}, err
		}
	}
	return run(ctx, options, func(s *session) []plan.Step {
		r := &rotation{session: s, choice: choice, roots: rootsOf(options, choice)}
		return append([]plan.Step{
			r.checkChoice(),
			r.connectWhatAnswers(),
			s.takeLock("rotate secrets"),
			r.openPlatform(),
			r.firstStoreKeys(),
			r.mint(),
			r.databaseLogins("database logins", "the next generation may log in"),
			r.verifyCandidates(),
			r.announce(),
			r.tryCanaries(),
			r.commit(),
			r.roll(),
			r.recordRotation(),
			r.drain(),
			r.retire(),
			r.databaseLogins("retired logins", "only the active generation may log in"),
			r.sweepProvider(),
		}, r.rootSteps()...)
	})
}

// checkChoice says all that is wrong with what was asked for, before anything remote.
func (r *rotation) checkChoice() plan.Step {
	return check{title: "check inputs", run: func(ctx context.Context) error {
		if err := r.readRepository(ctx); err != nil {
			return err
		}
		names := withoutRoots(r.choice.Names)
		problems := []error{r.site.CheckSecretNames(names), r.checkHostNames()}
		values := map[string]secret.Value{}
		for i := range r.choice.Values {
			value := &r.choice.Values[i]
			one := r.site.Secret(value.Name)
			switch {
			case value.Problem != nil:
				problems = append(problems, value.Problem)
			case one != nil:
				problems = append(problems, normalise(*one, value, &Stored{}))
				values[value.Name] = value.Value
			}
		}
		for _, one := range r.site.Secrets() {
			if !slices.Contains(names, one.FullName()) {
				continue
			}
			_, brought := values[one.FullName()]
			problems = append(problems, r.checkRotatable(one, brought))
		}
		if err := errors.Join(problems...); err != nil {
			return err
		}
		if slices.Contains(r.roots, rootRootToken) && r.options.NewRootTokenFile == "" {
			return plan.WithHint(errors.New("the next site root token has no file"), "give it with --new-root-token-file=FILE: it is made where there is none")
		}
		if len(r.roots) > 0 && r.options.RootTokenFile == "" {
			return plan.WithHint(fmt.Errorf("%s lies in init.age, which only the site root token opens", strings.Join(r.roots, ", ")),
				"give it with --root-token-file=FILE")
		}
		return r.readMaterials(ctx)
	}}
}

func (r *rotation) checkRotatable(one site.Secret, brought bool) error {
	if err := catalogue.CannotRotate(r.site, one); err != nil {
		return err
	}
	if brought && one.External == nil {
		return plan.WithHint(fmt.Errorf("secret %s is %s: its next value is not brought", one.FullName(), sourceOf(one)), "leave --from-file out")
	}
	return nil // that an external one needs a value is known once it is known whether it is unfinished
}

func (r *rotation) checkHostNames() error {
	var problems []error
	for _, name := range r.choice.WithoutHosts {
		if !slices.ContainsFunc(r.site.Hosts, func(h site.Host) bool { return h.Name == name }) {
			problems = append(problems, plan.WithHint(fmt.Errorf("site %q has no host %q", r.site.Name, name), "see `site status`"))
		}
	}
	return errors.Join(problems...)
}

// connectWhatAnswers goes on without hosts that are down: jobs there follow when
// they are back, and the old generation waits for them.
func (r *rotation) connectWhatAnswers() plan.Step {
	return check{title: "connect", run: func(ctx context.Context) error {
		var problems []error
		r.hosts, problems = r.dial(ctx)
		if len(r.servers()) == 0 || r.servers()[0].Name != r.site.FirstServer() {
			return errors.Join(problems...)
		}
		for _, problem := range problems {
			r.options.Warn(problem.Error())
		}
		if len(problems) > 0 && len(r.roots) > 0 {
			return plan.WithHint(errors.Join(problems...), "roots of trust are rotated with all hosts up")
		}
		return nil
	}}
}

// openPlatform logs in, and finds out what there is to do.
func (r *rotation) openPlatform() plan.Step {
	return check{title: "open", run: func(ctx context.Context) error {
		if err := r.openRoots(ctx); err != nil {
			return err
		}
		if err := r.openNomad(ctx); err != nil {
			return err
		}
		if !r.hasOpenBao() {
			if len(r.roots) > 0 {
				return nil
			}
			return r.noSecretsEngine()
		}
		if err := r.openOpenBaoFor(ctx, purposeDeploy); err != nil {
			return err
		}
		if _, operator, err := r.operatorKey(); err == nil {
			r.operator = operator
		}
		if err := r.choose(ctx); err != nil {
			return err
		}
		return r.refuseUnplaced(ctx)
	}}
}

// refuseUnplaced begins nothing while a job waits for a place, such as on a host
// that is down: its canary could not be told from the trouble that it has, and
// there would be no way back either.
func (r *rotation) refuseUnplaced(ctx context.Context) error {
	if !slices.ContainsFunc(r.secrets, func(one *rotating) bool { return one.fresh }) {
		return nil
	}
	if err := r.findConsumers(ctx); err != nil {
		return err
	}
	var problems []error
	for _, one := range r.consumers {
		if one.trial == nil && one.have.Health.Waiting {
			problems = append(problems, plan.WithHint(fmt.Errorf("job %s is not complete: %s", one.name, one.have.Health.Reason),
				"nothing was begun; wait for it, or mend it, then rotate again"))
		}
	}
	return errors.Join(problems...)
}

// choose finds the secrets that this run moves: those asked for, and those that
// an earlier run did not finish.
func (r *rotation) choose(ctx context.Context) error {
	secrets := r.site.Secrets()
	if _, err := r.observeSecrets(ctx, secrets); err != nil {
		return err
	}
	due := map[string]bool{}
	for _, one := range catalogue.DueSecrets(secrets, r.entries, time.Now()) {
		due[one.Name] = true
	}
	asks := func(one site.Secret) bool {
		name := one.FullName()
		return slices.Contains(r.choice.Names, name) || r.choice.All && r.rotatableAlone(one) || r.choice.Due && due[name]
	}
	keys := r.movesKeys(secrets, asks)
	var problems []error
	r.secrets = nil
	for _, one := range secrets {
		name := one.FullName()
		entry := r.entries[name]
		state := entry.Rotation()
		// What is unfinished is finished by any run.
		asked := asks(one)
		if isStoreKey(one) {
			asked = keys
		}
		switch {
		case isStoreKey(one) && !r.hasStoreKeys():
			continue // all four get their first generation by a step of its own
		case state.Running():
		case !asked:
			continue
		case !entry.HasValue():
			if slices.Contains(r.choice.Names, name) {
				problems = append(problems, plan.WithHint(fmt.Errorf("secret %s has no value yet", name), "deploy the site, or give it one with: site secrets set %s", name))
			}
			continue
		}
		moving := &rotating{Secret: one, state: state, entry: entry, fresh: !state.Running(), value: r.brought(name)}
		if moving.fresh && one.External != nil && moving.value.IsZero() {
			problems = append(problems, plan.WithHint(fmt.Errorf("secret %s is external: its next value must be brought", name),
				"site secrets rotate %s --from-file=FILE", name))
			continue
		}
		if !moving.fresh {
			r.options.Warn(fmt.Sprintf("secret %s: finishing the rotation that was begun %s", name, state.Since.Local().Format(time.DateTime)))
		}
		r.secrets = append(r.secrets, moving)
	}
	return errors.Join(problems...)
}

// rotatableAlone reports whether a new value can be made without anybody.
func (r *rotation) rotatableAlone(one site.Secret) bool {
	return one.External == nil && catalogue.CannotRotate(r.site, one) == nil
}

func (r *rotation) brought(name string) secret.Value {
	for _, value := range r.choice.Values {
		if value.Name == name {
			return value.Value
		}
	}
	return secret.Value{}
}

// mint makes the next generation of each secret and writes it, which disturbs
// nobody: every job reads the generation that it was given.
func (r *rotation) mint() plan.Step {
	return act{
		title: "mint",
		plan: func(context.Context) ([]plan.Change, error) {
			var changes []plan.Change
			r.oneGeneration()
			for _, one := range r.secrets {
				if !one.lacksCandidate() {
					continue
				}
				changes = append(changes, plan.Change{
					Action: plan.Create, Kind: catalogue.Kind, Target: one.FullName(),
					Reason:       fmt.Sprintf("generation %d after %d", one.entry.Version+1, one.state.Active),
					Precondition: catalogue.Precondition(one.entry.Version),
				})
			}
			return changes, nil
		},
		apply: func(ctx context.Context, progress plan.Progress) error {
			for _, one := range r.secrets {
				if !one.lacksCandidate() {
					continue
				}
				if err := r.mintOne(ctx, one, progress); err != nil {
					return err
				}
			}
			return r.look(ctx)
		},
	}
}

func (r *rotation) mintOne(ctx context.Context, one *rotating, progress plan.Progress) error {
	name := one.FullName()
	if one.External != nil && one.value.IsZero() {
		// Cut short before its value was written, which nobody has any more.
		one.state.Candidate = 0
		if err := r.bao.SetRotation(ctx, one.Secret, one.state); err != nil {
			return err
		}
		return plan.WithHint(fmt.Errorf("secret %s: its next value was never written", name), "site secrets rotate %s --from-file=FILE", name)
	}
	fields := openbao.Fields{Value: one.value}
	var err error
	if one.External == nil {
		if fields.Value, err = r.nextValue(ctx, one, progress); err != nil {
			return fmt.Errorf("secret %s: %w", name, err)
		}
	}
	if role := r.site.AlternatingRole(name); role != nil {
		active, _, err := r.bao.ReadActive(ctx, one.Secret)
		if err != nil {
			return err
		}
		fields.Username = site.OtherLogin(role.Name, active.Username)
		one.state.Login = active.Username
	}
	// Noted before it is there: a version that nobody knows of would count as active.
	one.state.Candidate, one.state.Since, one.state.By = one.entry.Version+1, time.Now(), r.operator
	if err := r.bao.SetRotation(ctx, one.Secret, one.state); err != nil {
		return err
	}
	version, err := r.bao.WriteGeneration(ctx, one.Secret, fields, one.entry.Version)
	if err != nil {
		return err
	}
	if version != one.state.Candidate {
		return fmt.Errorf("secret %s: OpenBao wrote version %d, not %d", name, version, one.state.Candidate)
	}
	one.mintAgain = false
	progress.Message("%s: generation %d is written", name, version)
	r.note("minted", one, version, "")
	return nil
}

func (r *rotation) nextValue(ctx context.Context, one *rotating, progress plan.Progress) (secret.Value, error) {
	if isStoreKey(one.Secret) {
		return r.storeKey(ctx, one.FullName(), progress)
	}
	return r.newValue(ctx, one.Secret, progress)
}

// newValue makes a value from its source.
func (s *session) newValue(ctx context.Context, one site.Secret, progress plan.Progress) (secret.Value, error) {
	switch {
	case one.Generated != nil:
		return catalogue.Generate(*one.Generated, rand.Reader)
	case one.ProducedBy != nil && len(one.ProducedBy.Command) > 0:
		progress.Message("%s: running %s", one.FullName(), one.ProducedBy.Command[0])
		return s.runProducer(ctx, one)
	default:
		return secret.Value{}, errors.New("it has no source that site could use")
	}
}

// databaseLogins lets in whom the generations name, and nobody else.
func (r *rotation) databaseLogins(title, reason string) plan.Step {
	return act{
		title: title,
		plan: func(ctx context.Context) ([]plan.Change, error) {
			if !r.hasPostgres() || !slices.ContainsFunc(r.secrets, func(one *rotating) bool { return r.site.AlternatingRole(one.FullName()) != nil }) {
				return nil, nil
			}
			changes, err := r.loginChanges(ctx)
			for i := range changes {
				changes[i].Reason = reason
			}
			return changes, err
		},
		apply: func(ctx context.Context, progress plan.Progress) error { return r.convergeLogins(ctx, nil, progress) },
	}
}

// verifyCandidates proves the new values, each by its declared check or by a
// login, before any job is moved to them. Canaries prove the rest.
func (r *rotation) verifyCandidates() plan.Step {
	return check{title: "verify", run: func(ctx context.Context) error {
		for _, one := range r.secrets {
			if one.state.Candidate == 0 {
				continue
			}
			fields, err := r.bao.ReadGeneration(ctx, one.Secret, one.state.Candidate)
			if err != nil {
				return err
			}
			if err := r.prove(ctx, one.Secret, fields); err != nil {
				// An earlier run may have brought jobs to it.
				if lost := r.findConsumers(ctx); lost != nil {
					return errors.Join(err, lost)
				}
				return r.giveUp(ctx, plan.WithHint(fmt.Errorf("secret %s: generation %d does not work: %w", one.FullName(), one.state.Candidate, err),
					"nothing was moved to it; bring another value"), one.FullName())
			}
		}
		return nil
	}}
}

func (s *session) prove(ctx context.Context, one site.Secret, fields openbao.Fields) error {
	if one.External != nil && len(one.External.Check) > 0 {
		if err := s.runCheck(ctx, one, fields.Value); err != nil {
			return err
		}
	}
	if role := s.site.AlternatingRole(one.FullName()); role != nil {
		return s.tryLogin(ctx, *role, fields.Username, fields.Value)
	}
	return nil
}

// commit is the point of no return: from here on, every run and every deploy
// brings jobs to the new generation, and before it to the old.
func (r *rotation) commit() plan.Step {
	return act{
		title: "commit",
		plan: func(context.Context) ([]plan.Change, error) {
			var changes []plan.Change
			for _, one := range r.secrets {
				if one.state.Candidate > 0 {
					changes = append(changes, plan.Change{
						Action: plan.Update, Kind: catalogue.Kind, Target: one.FullName(),
						Reason: fmt.Sprintf("generation %d is verified and becomes the active one", one.state.Candidate),
					})
				}
			}
			return changes, nil
		},
		apply: func(ctx context.Context, progress plan.Progress) error {
			for _, one := range r.secrets {
				if one.state.Candidate == 0 {
					continue
				}
				state := one.state
				state.Retiring, state.Active, state.Candidate = state.Active, state.Candidate, 0
				state.Rotated = time.Now()
				state.RetireAfter = state.Rotated.Add(r.drainOf(one))
				if role := r.site.AlternatingRole(one.FullName()); role != nil {
					state.Login = site.OtherLogin(role.Name, state.Login)
				}
				if err := r.bao.SetRotation(ctx, one.Secret, state); err != nil {
					return err
				}
				progress.Message("%s: generation %d is active", one.FullName(), state.Active)
				r.note("promoted", one, state.Active, "")
			}
			return r.look(ctx)
		},
	}
}

func (r *rotation) drainOf(one *rotating) time.Duration {
	if r.choice.Drain >= 0 {
		return r.choice.Drain
	}
	return one.Drain()
}

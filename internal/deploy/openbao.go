package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// openBaoLimit bounds how long OpenBao may take to answer, and site-host to unseal it.
const openBaoLimit = time.Minute

// Why somebody is logged in to OpenBao. Tokens of deploys are made under the
// site's lock: whoever holds it may revoke those that a killed run left behind.
const (
	purposeDeploy  = "deploy"
	purposeLook    = "look"
	purposeSecrets = "secrets"
)

// openBaoState is what the OpenBao step compares.
type openBaoState struct {
	health openbao.Health
	// keyOnHost: the host has the unseal key that the init material holds.
	keyOnHost bool
	// refused is why no operator can log in to an OpenBao that is ready.
	refused error
	// engine is known once an operator can log in.
	engine *catalogue.EngineState
}

func (s *session) hasOpenBao() bool { return s.site.Component(site.OpenBaoComponent) != nil }

// openBaoHost is where OpenBao runs.
func (s *session) openBaoHost() *remoteHost { return s.servers()[0] }

// convergeOpenBao initialises OpenBao once, and keeps its mounts, login methods,
// policies and roles in step with the site.
func (s *session) convergeOpenBao() plan.Step {
	return where{&plan.Reconciler[catalogue.Engine, openBaoState]{
		Title: "openbao", Desire: s.desiredEngine, Observe: s.observeOpenBao, Diff: s.diffOpenBao, Converge: s.applyOpenBao,
	}, s.hasOpenBao}
}

// desiredEngine is pure but for the hosts' public keys, which it asks them for.
func (s *session) desiredEngine(ctx context.Context) (catalogue.Engine, error) {
	var operators []catalogue.Operator
	known, err := s.operators()
	if err != nil {
		return catalogue.Engine{}, err
	}
	for _, operator := range known {
		operators = append(operators, catalogue.Operator{Name: operator.Name, PublicKeyPEM: operator.PublicKeyPEM, Rights: operator.Rights})
	}
	keys, err := s.hostKeys(ctx)
	if err != nil {
		return catalogue.Engine{}, err
	}
	return catalogue.DesiredEngine(s.site, operators, keys), nil
}

// hostKeys are the public keys by which hosts log in to OpenBao. They are made on
// the hosts, and never leave them but for this half.
func (s *session) hostKeys(ctx context.Context) ([]string, error) {
	verb := "ensure"
	if s.options.DryRun {
		if s.nomad == nil { // the host may not even have site-host
			return nil, &plan.UnknownError{Until: platformStep}
		}
		verb = "show"
	}
	keys, err := s.askHostKeys(ctx, verb)
	var exit *ssh.ExitError
	if s.options.DryRun && errors.As(err, &exit) && exit.Code == exitNotThere {
		return nil, &plan.UnknownError{Until: platformStep}
	}
	return keys, err
}

// exitNotThere is how site-host says that what was asked for does not exist.
const exitNotThere = 6

// dialOpenBao reaches OpenBao through the host's loopback.
func (s *session) dialOpenBao(ctx context.Context) (*openbao.Client, openbao.Health, error) {
	client, err := openbao.New(openbao.Options{Dial: s.openBaoHost().conn.DialContext})
	if err != nil {
		return nil, openbao.Health{}, err
	}
	s.onClose(client.Close)
	var health openbao.Health
	err = retry.Until(ctx, "OpenBao to answer", min(openBaoLimit, s.left()), func(ctx context.Context) error {
		health, err = client.Health(ctx)
		return err
	})
	if err != nil {
		return nil, health, plan.WithHint(err, "see `site logs %s`", site.OpenBaoComponent)
	}
	s.engine = health.Cluster
	return client, health, nil
}

// logInToOpenBao gives s.bao an operator's short token, which is revoked when the
// run ends, however it ends.
func (s *session) logInToOpenBao(ctx context.Context, client *openbao.Client, purpose string) error {
	if s.engine == "" { // it was sealed when it was asked
		health, err := client.Health(ctx)
		if err != nil {
			return err
		}
		s.engine = health.Cluster
	}
	signer, operator, err := s.operatorKey()
	if err != nil {
		return err
	}
	signed, err := nomad.SignJWTFor(signer, operator, nomad.Audience, purpose, loginTokenTTL)
	if err != nil {
		return err
	}
	mount, role := catalogue.OperatorLogin(s.rightsOf(operator))
	token, _, err := client.Login(ctx, mount, role, signed)
	if err != nil {
		return fmt.Errorf("log in to OpenBao as operator %s: %w", operator, err)
	}
	logged, err := client.WithToken(token)
	if err != nil {
		return err
	}
	stop := s.renewing(logged)
	s.temporary.hold("the operator's token in OpenBao", func(ctx context.Context) error {
		stop()
		return logged.RevokeSelf(ctx)
	})
	s.bao = logged
	if purpose != purposeDeploy || role == catalogue.RotatorRole { // which may not look for tokens
		return nil
	}
	_, err = logged.Sweep(ctx, openbao.SweepOptions{Purpose: purposeDeploy})
	return err
}

// rightsOf is what site.hcl lets an operator do.
func (s *session) rightsOf(operator string) string {
	for _, one := range s.site.Operators {
		if one.Name == operator {
			return one.Rights
		}
	}
	return ""
}

// renewInterval is well below the ten minutes that a token lives unless renewed.
const renewInterval = 4 * time.Minute

// renewing keeps a token good for as long as the run takes.
func (s *session) renewing(client *openbao.Client) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		ticker := time.NewTicker(renewInterval)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				_, _ = client.Renew(ctx) // what needs the token next says that it ended
			}
		}
	}()
	return cancel
}

// observeOpenBao looks as deep as it can: a sealed OpenBao says nothing of its mounts.
func (s *session) observeOpenBao(ctx context.Context, desired catalogue.Engine) (openBaoState, error) {
	var actual openBaoState
	if s.options.DryRun && (s.nomad == nil || s.platformPending) {
		return actual, &plan.UnknownError{Until: platformStep}
	}
	client, health, err := s.dialOpenBao(ctx)
	if err != nil {
		return actual, err
	}
	actual.health = health
	if actual.keyOnHost, err = s.unsealKeyOnHost(ctx); err != nil {
		return actual, err
	}
	if !health.Initialized || s.material != nil && !s.material.OpenBaoReady {
		if s.material == nil {
			return actual, plan.WithHint(errors.New("OpenBao is not initialised"),
				"run `site bootstrap-deploy --site=%s --openbao-site-root-token-file=FILE`", s.site.Name)
		}
		return actual, nil
	}
	if health.Sealed {
		if s.material != nil {
			return actual, nil // the step unseals
		}
		// site-host unseals after a restart; it only needs a moment.
		if err := s.awaitUnsealed(ctx, client); err != nil {
			return actual, err
		}
		actual.health.Sealed = false
	}
	if s.bao == nil {
		err := s.logInToOpenBao(ctx, client, s.purpose())
		var refused *openbao.LoginError
		if s.material != nil && errors.As(err, &refused) {
			actual.refused = err // the unseal key opens a way back
			return actual, nil
		}
		if err != nil {
			return actual, err
		}
	}
	state, err := s.bao.ObserveEngine(ctx, desired)
	if err != nil {
		return actual, err
	}
	actual.engine = &state
	return actual, nil
}

func (s *session) purpose() string {
	if s.options.DryRun {
		return purposeLook
	}
	return purposeDeploy
}

func (s *session) awaitUnsealed(ctx context.Context, client *openbao.Client) error {
	err := retry.Until(ctx, "site-host to unseal OpenBao", min(openBaoLimit, s.left()), func(ctx context.Context) error {
		health, err := client.Health(ctx)
		switch {
		case err != nil:
			return err
		case health.Sealed:
			return errors.New("it is sealed")
		case !health.Active:
			return errors.New("it is not active yet")
		}
		return nil
	})
	return plan.WithHint(err, "run `site bootstrap-deploy` with the site root token, which holds the unseal key; see `journalctl -u site-host` on %s", s.openBaoHost().Name)
}

// unsealKeyOnHost compares by digest: without the init material, only whether
// there is a key.
func (s *session) unsealKeyOnHost(ctx context.Context) (bool, error) {
	var sum struct {
		SHA256 string `json:"sha256"`
		Exists bool   `json:"exists"`
	}
	if err := s.openBaoHost().siteHost(ctx, nil, &sum, "file", "sum", host.UnsealKeyPath); err != nil {
		return false, err
	}
	if s.material == nil || s.material.OpenBaoUnsealKey.IsZero() {
		return sum.Exists, nil
	}
	return sum.Exists && sum.SHA256 == hexSum(s.unsealKeys()), nil
}

func (s *session) diffOpenBao(desired catalogue.Engine, actual openBaoState) []plan.Change {
	name := s.openBaoHost().Name
	switch {
	case !actual.health.Initialized:
		return []plan.Change{{Action: plan.Create, Kind: "secrets engine", Host: name, Target: site.OpenBaoComponent, Reason: "not initialised"}}
	case s.material != nil && !s.material.OpenBaoReady:
		return []plan.Change{{Action: plan.Create, Kind: "secrets engine", Host: name, Target: site.OpenBaoComponent, Reason: "its initialisation was cut short"}}
	}
	var changes []plan.Change
	if !actual.keyOnHost {
		if s.material == nil {
			s.options.Warn(fmt.Sprintf("%s is missing on %s: OpenBao stays sealed after a reboot; run `site bootstrap-deploy` with the site root token",
				host.UnsealKeyPath, name))
		} else {
			changes = append(changes, plan.Change{Action: plan.Create, Kind: "file", Host: name, Target: host.UnsealKeyPath, Reason: "it unseals OpenBao after a reboot"})
		}
	}
	if actual.health.Sealed {
		changes = append(changes, plan.Change{Action: plan.Start, Kind: "secrets engine", Host: name, Target: site.OpenBaoComponent, Reason: "sealed"})
	}
	if actual.refused != nil {
		return append(changes, plan.Change{Action: plan.Update, Kind: "auth method", Target: catalogue.OperatorsMount, Reason: "it lets no operator in"})
	}
	if actual.engine == nil {
		return changes
	}
	changes = append(changes, catalogue.DiffEngine(desired, *actual.engine)...)
	strays := catalogue.StrayEngine(desired, *actual.engine)
	if s.options.Prune {
		return append(changes, strays...)
	}
	for _, stray := range strays {
		s.options.Warn(fmt.Sprintf("%s %s in OpenBao is of no component: remove it with --prune", stray.Kind, stray.Target))
	}
	return changes
}

func (s *session) applyOpenBao(ctx context.Context, desired catalogue.Engine, actual openBaoState, changes []plan.Change, progress plan.Progress) error {
	switch {
	case !actual.health.Initialized:
		return s.initialiseOpenBao(ctx, desired, progress)
	case s.material != nil && !s.material.OpenBaoReady:
		return s.resumeOpenBao(ctx, desired, actual, progress)
	}
	if s.material != nil && !actual.keyOnHost {
		if err := s.putUnsealKey(ctx); err != nil {
			return err
		}
	}
	if actual.health.Sealed {
		progress.Message("unsealing")
		client, _, err := s.dialOpenBao(ctx)
		if err != nil {
			return err
		}
		if _, err := s.withUnsealKey(func(key secret.Value) error { return client.Unseal(ctx, key) }); err != nil {
			return err
		}
	}
	if actual.refused != nil {
		return s.readmitOperators(ctx, desired, progress)
	}
	if actual.engine == nil {
		seen, err := s.observeOpenBao(ctx, desired)
		if err != nil {
			return err
		}
		actual, changes = seen, catalogue.DiffEngine(desired, *seen.engine)
	}
	// Those of the host were made above.
	changes = slices.DeleteFunc(slices.Clone(changes), func(change plan.Change) bool { return change.Host != "" })
	if err := s.bao.ApplyEngine(ctx, desired, *actual.engine, changes, progress); err != nil {
		return err
	}
	_, err := s.bao.RevokeOperators(ctx, s.operatorNames())
	return err
}

func (s *session) operatorNames() []string {
	names := make([]string, 0, len(s.site.Operators))
	for _, operator := range s.site.Operators {
		names = append(names, operator.Name)
	}
	return names
}

package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

const (
	// leaderLimit bounds the first leader election, which takes about 2 s.
	leaderLimit = time.Minute
	// readyLimit bounds how long clients take to find their drivers, about 12 s.
	readyLimit = 2 * time.Minute
	// loginTokenTTL is how long an operator's signed JWT is good for.
	loginTokenTTL = 2 * time.Minute
)

// nomadState is what the Nomad step compares.
type nomadState struct {
	bootstrapped bool
	operators    nomad.Operators
}

// convergeNomad bootstraps the ACLs with the token that was sealed before, and
// keeps the operators' login in step with site.hcl. Without the site root token
// it logs in as an operator and leaves both alone.
func (s *session) convergeNomad() plan.Step {
	return &plan.Reconciler[[]nomad.Operator, nomadState]{
		Title: "nomad",
		Desire: func(context.Context) ([]nomad.Operator, error) {
			return s.operators()
		},
		Observe: func(ctx context.Context, _ []nomad.Operator) (nomadState, error) {
			return s.observeNomad(ctx)
		},
		Diff: func(desired []nomad.Operator, actual nomadState) []plan.Change {
			if s.material == nil {
				return nil
			}
			var changes []plan.Change
			if !actual.bootstrapped {
				changes = append(changes, plan.Change{Action: plan.Create, Kind: "acl", Target: "nomad", Reason: "not bootstrapped"})
			}
			return append(changes, nomad.DiffOperators(desired, host.OperatorsJWKSURL, actual.operators)...)
		},
		Converge: func(ctx context.Context, desired []nomad.Operator, actual nomadState, _ []plan.Change, progress plan.Progress) error {
			if !actual.bootstrapped {
				progress.Message("bootstrapping ACLs")
				if _, err := s.nomad.BootstrapACL(ctx, s.material.NomadManagementToken, leaderLimit); err != nil {
					return err
				}
				if err := s.hurryClients(ctx, progress); err != nil {
					return err
				}
			}
			_, err := s.nomad.EnsureOperators(ctx, desired, host.OperatorsJWKSURL)
			return err
		},
	}
}

// hurryLimit is how long clients of a first bootstrap get to register by themselves.
const hurryLimit = 4 * time.Second

// hurryClients starts agents again whose client asked too early: before its server
// had a leader and a keyring. Nomad's client asks again only after 15 to 30 s. On a
// first bootstrap nothing runs yet that a restart could disturb.
func (s *session) hurryClients(ctx context.Context, progress plan.Progress) error {
	err := s.nomad.Ready(ctx, nomad.ReadyOptions{Nodes: s.clients(), Limit: hurryLimit}, progress)
	var timeout *retry.TimeoutError
	if !errors.As(err, &timeout) {
		return err
	}
	progress.Message("starting agents again that registered too early")
	for _, h := range s.hosts {
		if !h.Client {
			continue
		}
		if _, err := h.conn.Run(ctx, ssh.Command{Args: []string{"systemctl", "restart", "nomad.service"}}); err != nil {
			return fmt.Errorf("host %s: start nomad again: %w", h.Name, err)
		}
		if err := s.nomad.Leader(ctx, min(leaderLimit, s.left())); err != nil {
			return err
		}
	}
	return nil
}

// clients is how many hosts run jobs.
func (s *session) clients() int { return len(s.jobHosts()) }

func (s *session) operators() ([]nomad.Operator, error) {
	var operators []nomad.Operator
	for _, operator := range s.site.Operators {
		pem, err := nomad.PublicKeyPEM(operator.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("operator %s: %w", operator.Name, err)
		}
		operators = append(operators, nomad.Operator{Name: operator.Name, PublicKeyPEM: pem, Rights: operator.Rights})
	}
	return operators, nil
}

func (s *session) observeNomad(ctx context.Context) (nomadState, error) {
	if s.options.DryRun && s.hostsPending() {
		return nomadState{}, &plan.UnknownError{Until: "host"}
	}
	if err := s.dialNomad(ctx); err != nil {
		return nomadState{}, err
	}
	if s.material == nil {
		return nomadState{bootstrapped: true}, s.logIn(ctx)
	}
	client, err := s.nomad.WithToken(s.material.NomadManagementToken)
	if err != nil {
		return nomadState{}, err
	}
	s.nomad = client
	operators, err := client.ObserveOperators(ctx)
	var refused *nomad.ResponseError
	if errors.As(err, &refused) && refused.Status == http.StatusForbidden {
		if s.options.DryRun {
			s.nomad = nil // nothing more can be asked before the bootstrap
		}
		return nomadState{}, nil // ours is not a token yet
	}
	return nomadState{bootstrapped: true, operators: operators}, err
}

// hostsPending reports whether Nomad cannot be expected to answer: on some
// server the agent does not run, or an operator cannot log in because site-host
// does not serve the keys.
func (s *session) hostsPending() bool {
	for _, h := range s.servers() {
		if h.siteHostDigest == "" || h.observed == nil {
			return true
		}
		running := func(unit string) bool { return h.observed.Units[unit].Active == "active" }
		if !running("nomad.service") || s.material == nil && !running("site-host.service") {
			return true
		}
	}
	return false
}

// dialNomad opens the API through the SSH connection of the first server host
// whose agent answers.
func (s *session) dialNomad(ctx context.Context) error {
	if s.nomad != nil {
		return nil
	}
	var problems []error
	for _, h := range s.servers() {
		client, err := nomad.New(nomad.Options{Dial: h.conn.DialContext, Region: s.site.Region})
		if err != nil {
			return err
		}
		if err = client.Leader(ctx, min(leaderLimit, s.left())); err == nil {
			s.nomad = client
			s.onClose(client.Close)
			return nil
		}
		problems = append(problems, fmt.Errorf("host %s: %w", h.Name, err))
	}
	return plan.WithHint(errors.Join(problems...), "see `journalctl -u nomad` on the host")
}

// logIn exchanges a JWT signed with the operator's SSH key for a short Nomad token.
func (s *session) logIn(ctx context.Context) error {
	token, _, err := s.shortToken(ctx)
	if err != nil {
		return err
	}
	return s.useToken(token)
}

func (s *session) useToken(token secret.Value) error {
	client, err := s.nomad.WithToken(token)
	if err != nil {
		return err
	}
	s.nomad = client
	return nil
}

// operatorKey finds the operator of site.hcl whose key we can sign with.
func (s *session) operatorKey() (gossh.Signer, string, error) {
	if len(s.site.Operators) == 0 {
		return nil, "", plan.WithHint(fmt.Errorf("site %q has no operator that could log in", s.site.Name),
			"add an operator block with your SSH public key to sites/%s/site.hcl, and run `site bootstrap-deploy`; or give --root-token-file", s.site.Name)
	}
	for _, h := range s.servers() {
		for _, signer := range h.conn.Signers() {
			for _, operator := range s.site.Operators {
				public, _, _, _, err := gossh.ParseAuthorizedKey([]byte(operator.PublicKey))
				if err == nil && bytes.Equal(public.Marshal(), signer.PublicKey().Marshal()) {
					return signer, operator.Name, nil
				}
			}
		}
	}
	return nil, "", plan.WithHint(errors.New("none of your SSH keys is an operator's key"),
		"load the key into your SSH agent, or have your public key added to sites/%s/site.hcl", s.site.Name)
}

// refuseRotators ends a deploy by an operator who only rotates secrets, before it
// touches a host.
func (s *session) refuseRotators() plan.Step {
	return check{title: "operator may deploy", run: func(context.Context) error {
		if s.material != nil {
			return nil
		}
		_, operator, err := s.operatorKey()
		if err != nil || s.rightsOf(operator) != site.RightsRotate {
			return nil // whose login fails is told so where it is tried
		}
		return plan.WithHint(fmt.Errorf("operator %s may rotate secrets and nothing else", operator),
			"deploy with the key of an operator that has all rights: see `site operators list`")
	}}
}

// clientsReady waits until jobs can be placed.
func (s *session) clientsReady(ctx context.Context, progress plan.Progress) error {
	return s.nomad.Ready(ctx, nomad.ReadyOptions{Nodes: s.clients(), Limit: min(readyLimit, s.left())}, progress)
}

// shortToken logs in and gives the token away: it is good for minutes.
func (s *session) shortToken(ctx context.Context) (secret.Value, time.Time, error) {
	signer, operator, err := s.operatorKey()
	if err != nil {
		return secret.Value{}, time.Time{}, err
	}
	signed, err := nomad.SignJWT(signer, operator, nomad.Audience, loginTokenTTL)
	if err != nil {
		return secret.Value{}, time.Time{}, err
	}
	logIn := s.nomad.Login
	if s.rightsOf(operator) == site.RightsRotate {
		logIn = s.nomad.LoginRotator
	}
	token, expiry, err := logIn(ctx, signed)
	if err != nil {
		return secret.Value{}, time.Time{}, fmt.Errorf("log in to Nomad as operator %s: %w", operator, err)
	}
	return token, expiry, nil
}

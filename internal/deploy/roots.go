package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
)

// The roots: what is there before a secrets engine, and is rotated one by one.
const (
	rootRootToken    = "root-token"
	rootUnsealKey    = "unseal-key"
	rootNomadACL     = "nomad-acl"
	rootGossip       = "gossip"
	rootCA           = "ca"
	rootCertificates = "certificates"
	rootHostKeys     = "host-keys"
)

// Roots lists what rotateRoot rotates.
func Roots() []string {
	return []string{rootRootToken, rootUnsealKey, rootNomadACL, rootGossip, rootCA, rootCertificates, rootHostKeys}
}

// rotateRoot rotates one of the roots on a live site. Whatever cuts it short, it
// can be run again, and goes on from there: what is to come lies in init.age
// before it is used, and what was stays until nothing uses it.
func (s *session) rotateRoot(ctx context.Context, name string, progress plan.Progress) error {
	rotate, known := map[string]func(context.Context, plan.Progress) error{
		rootRootToken: s.rotateRootToken, rootUnsealKey: s.rotateUnsealKey, rootNomadACL: s.rotateNomadACL, rootGossip: s.rotateGossip,
		rootCA: s.rotateCA, rootCertificates: s.rotateCertificates, rootHostKeys: s.rotateHostKeys,
	}[name]
	if !known {
		return plan.WithHint(fmt.Errorf("there is no root %q", name), "there are: %s", strings.Join(Roots(), ", "))
	}
	if err := s.readyForRoot(ctx, progress); err != nil {
		return err
	}
	return rotate(ctx, progress)
}

// readyForRoot refuses a site that is not all there, and brings init.age and
// site-host to where this run begins.
func (s *session) readyForRoot(ctx context.Context, progress plan.Progress) error {
	if len(s.hosts) != len(s.site.Hosts) {
		return plan.WithHint(fmt.Errorf("%d of the %d hosts are connected", len(s.hosts), len(s.site.Hosts)),
			"a host that is away would be left with what goes: bring it back, or take it out of site.hcl")
	}
	if s.rootToken.IsZero() {
		return plan.WithHint(errors.New("it needs the site root token"), "give it with --root-token-file=FILE")
	}
	if err := s.newestMaterial(ctx); err != nil {
		return err
	}
	if s.material == nil {
		return plan.WithHint(errors.New("the site was never bootstrapped"),
			"run `site bootstrap-deploy --site=%s --root-token-file=FILE`", s.site.Name)
	}
	if err := s.keepMaterial(ctx); err != nil {
		return err
	}
	return runStep(ctx, s.placeSiteHost(), progress)
}

// runStep plans and applies one step inside of another.
func runStep(ctx context.Context, step plan.Step, progress plan.Progress) error {
	changes, err := step.Plan(ctx)
	if err != nil || len(changes) == 0 {
		return err
	}
	return step.Apply(ctx, changes, progress)
}

// reached says how far a rotation has come, and is where tests cut it short.
func (s *session) reached(ctx context.Context, root, point string, progress plan.Progress) error {
	progress.Message("%s", point)
	if s.options.AfterStep == nil {
		return nil
	}
	return s.options.AfterStep(ctx, root+": "+point)
}

// rotateRootToken seals init.age to another root token: first to both, so that
// whichever of them is at hand after a cut opens every copy, then to the new alone.
func (s *session) rotateRootToken(ctx context.Context, progress plan.Progress) error {
	if !s.opensMaterial(s.rootToken) {
		progress.Message("%s is sealed to the new one alone already", s.initPath())
		s.rootToken = s.newRootToken
		return nil
	}
	both := []secret.Value{s.rootToken, s.newRootToken}
	for _, phase := range []struct {
		point      string
		recipients []secret.Value
	}{{"sealed to both", both}, {"sealed to the new one alone", both[1:]}} {
		s.sealTo = phase.recipients
		if err := s.changeMaterial(ctx, func(*seal.Material) {}); err != nil {
			return err
		}
		if err := s.reached(ctx, rootRootToken, phase.point, progress); err != nil {
			return err
		}
	}
	s.rootToken = s.newRootToken
	s.options.Warn(fmt.Sprintf("copies of %s from before, as in git's history, still open with the old site root token: "+
		"rotate the other roots too if anybody else may have it; put %s into the safe", s.initPath(), s.options.NewRootTokenFile))
	return nil
}

// openers are the root tokens that init.age may be sealed to.
func (s *session) openers() []secret.Value {
	if s.newRootToken.IsZero() {
		return []secret.Value{s.rootToken}
	}
	return []secret.Value{s.rootToken, s.newRootToken}
}

// recipients are the root tokens that init.age is to be sealed to: those of ours
// that open it now, whatever else changes in it.
func (s *session) recipients() []secret.Value {
	if len(s.sealTo) > 0 {
		return s.sealTo
	}
	var recipients []secret.Value
	for _, token := range s.openers() {
		if s.opensMaterial(token) {
			recipients = append(recipients, token)
		}
	}
	if len(recipients) == 0 { // there is none yet
		return []secret.Value{s.rootToken}
	}
	return recipients
}

func (s *session) opensMaterial(token secret.Value) bool {
	if s.material == nil {
		return false
	}
	_, err := seal.Open(s.material.sealed, []secret.Value{token}, s.site.Name, s.initPath())
	return err == nil
}

// readNewRootToken reads the root token to come, and makes it where there is none
// yet: it is in its file before anything is sealed to it.
func (s *session) readNewRootToken() error {
	path := s.options.NewRootTokenFile
	if path == "" {
		return nil
	}
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) && !s.options.DryRun {
		if err := seal.WriteNewRootToken(path); err != nil {
			return err
		}
	}
	token, err := seal.ReadRootToken(path)
	if err != nil {
		return err
	}
	if token.Reveal() == s.rootToken.Reveal() {
		return plan.WithHint(fmt.Errorf("%s holds the site root token that is in use", path), "name a file that does not exist: a new one is made there")
	}
	s.newRootToken = token
	return nil
}

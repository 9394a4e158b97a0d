package deploy

import (
	"context"
	"errors"

	"github.com/nomad-site/site/internal/plan"
)

// Bootstrap brings bare hosts to healthy jobs. Running it again resumes what
// was cut short, and finds nothing to do when all is done.
func Bootstrap(ctx context.Context, options Options) (plan.Result, error) {
	return run(ctx, options, func(s *session) []plan.Step {
		return []plan.Step{
			s.checkInputs(),
			s.connectHosts(),
			s.placeSiteHost(),
			s.takeLock("bootstrap-deploy"),
			s.sealInitMaterial(),
			s.sendPlatformArtifacts(),
			s.installPackages(),
			s.convergeHosts(),
			s.convergeNomad(),
			s.sendArtifacts(),
			s.runPlatformJobs(),
			s.convergeOpenBao(),
			s.uploadArtifacts(),
			s.pullArtifacts(),
			s.convergeSecrets(),
			s.convergeDatabases(),
			s.runWaves(),
			s.closeOldLogins(),
			s.recordRelease(),
			s.keepArtifacts(),
			s.fillStore(),
			s.askForSecrets(),
		}
	})
}

// Deploy brings a commit to a site that was bootstrapped. It needs no site root
// token: the operator logs in to Nomad with an SSH key.
func Deploy(ctx context.Context, options Options) (plan.Result, error) {
	return run(ctx, options, func(s *session) []plan.Step {
		return []plan.Step{
			s.checkInputs(),
			s.connectHosts(),
			s.refuseBareHosts(),
			s.refuseRotators(),
			s.placeSiteHost(),
			s.takeLock("deploy"),
			s.sendPlatformArtifacts(),
			s.installPackages(),
			s.convergeHosts(),
			s.convergeNomad(),
			s.sendArtifacts(),
			s.runPlatformJobs(),
			s.convergeOpenBao(),
			s.uploadArtifacts(),
			s.pullArtifacts(),
			s.convergeSecrets(),
			s.convergeDatabases(),
			s.runWaves(),
			s.closeOldLogins(),
			s.recordRelease(),
			s.keepArtifacts(),
			s.fillStore(),
			s.askForSecrets(),
		}
	})
}

// Plan is Deploy, or Bootstrap where a site root token is given, without any write.
func Plan(ctx context.Context, options Options) (plan.Result, error) {
	options.DryRun = true
	if options.RootTokenFile != "" {
		return Bootstrap(ctx, options)
	}
	return Deploy(ctx, options)
}

func run(ctx context.Context, options Options, flow func(*session) []plan.Step) (plan.Result, error) {
	s := newSession(options)
	defer s.close()
	mode := plan.Apply
	if options.DryRun {
		mode = plan.DryRun
	}
	ctx, cancel := s.bound(ctx)
	defer cancel()
	return plan.Run(ctx, followed(flow(s), options), mode, options.Reporter)
}

// followed has AfterStep called behind each step. The one list of the flow's
// steps is what faults are injected by: a new step is covered by itself.
func followed(steps []plan.Step, options Options) []plan.Step {
	if options.AfterStep == nil || options.DryRun {
		return steps
	}
	for i, step := range steps {
		steps[i] = &followedStep{Step: step, after: options.AfterStep}
	}
	return steps
}

type followedStep struct {
	plan.Step
	after func(ctx context.Context, step string) error
}

func (f *followedStep) Plan(ctx context.Context) ([]plan.Change, error) {
	changes, err := f.Step.Plan(ctx)
	if err == nil && len(changes) == 0 {
		err = f.after(ctx, f.Name())
	}
	return changes, err
}

func (f *followedStep) Apply(ctx context.Context, changes []plan.Change, progress plan.Progress) error {
	if err := f.Step.Apply(ctx, changes, progress); err != nil {
		return err
	}
	return f.after(ctx, f.Name())
}

// read opens a session that only looks: no lock, nothing built.
func read(ctx context.Context, options Options) (*session, error) {
	return readAfter(ctx, options, func(*session) error { return nil })
}

// readAfter is read with a look at the configuration before anything remote.
func readAfter(ctx context.Context, options Options, look func(*session) error) (*session, error) {
	s := newSession(options)
	if err := s.open(ctx, look); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *session) open(ctx context.Context, look func(*session) error) error {
	if err := s.readRepository(ctx); err != nil {
		return err
	}
	if err := look(s); err != nil {
		return err
	}
	if err := s.readMaterial(); err != nil {
		return err
	}
	var problems []error
	s.hosts, problems = s.dial(ctx)
	if len(s.servers()) == 0 {
		return errors.Join(problems...)
	}
	s.unreachable = problems
	return nil
}

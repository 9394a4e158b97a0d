package deploy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/adapter/postgres"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/reconcile/role"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// postgresLimit bounds how long Postgres may take to accept connections: a crash
// recovery takes minutes.
const postgresLimit = 5 * time.Minute

func (s *session) hasPostgres() bool { return s.site.Component(site.PostgresComponent) != nil }

// convergeDatabases keeps roles, databases and grants in step with the site.
func (s *session) convergeDatabases() plan.Step {
	return where{s.databaseStep("databases", s.desiredRoles), s.hasPostgres}
}

// closeOldLogins takes the login of roles away that alternate since this run,
// once no job uses it any more.
func (s *session) closeOldLogins() plan.Step {
	return where{
		s.databaseStep("old logins", func(ctx context.Context) (role.Desired, error) {
			s.renamed = nil
			return s.desiredRoles(ctx)
		}),
		func() bool { return len(s.renamed) > 0 && s.hasPostgres() },
	}
}

func (s *session) databaseStep(title string, desire func(context.Context) (role.Desired, error)) plan.Step {
	return &plan.Reconciler[role.Desired, role.Actual]{
		Title:  title,
		Desire: desire,
		Observe: func(ctx context.Context, desired role.Desired) (role.Actual, error) {
			if err := s.dialPostgres(ctx, observing{s.options.Reporter, title}); err != nil {
				return role.Actual{}, err
			}
			return s.databases.Observe(ctx, desired)
		},
		Diff: func(desired role.Desired, actual role.Actual) []plan.Change {
			changes, undeclared := role.Diff(desired, actual), role.Undeclared(desired, actual)
			for _, one := range role.Waiting(desired, actual) {
				s.options.Warn("granted once it exists: " + one)
			}
			if s.options.Prune {
				return append(changes, undeclared...)
			}
			for _, one := range undeclared {
				s.options.Warn(one.Kind + " " + one.Target + " in Postgres is declared by no component: remove it with --prune")
			}
			return changes
		},
		Converge: func(ctx context.Context, desired role.Desired, actual role.Actual, changes []plan.Change, progress plan.Progress) error {
			return s.databases.Apply(ctx, desired, actual, changes, progress)
		},
	}
}

// desiredRoles reads the passwords that roles must have. A role whose password
// nobody gave yet is made without one: nobody can log in as it.
func (s *session) desiredRoles(ctx context.Context) (role.Desired, error) {
	desired := role.DesiredOf(s.site)
	if s.bao == nil && slices.ContainsFunc(desired.Roles, func(one site.Role) bool { return one.Password != "" }) {
		return desired, &plan.UnknownError{Until: "openbao"}
	}
	desired.Passwords, desired.Logins = map[string]secret.Value{}, map[string][]role.Login{}
	var mutex sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(10)
	for _, one := range desired.Roles {
		if one.Password == "" {
			continue
		}
		if one.Alternating {
			group.Go(func() error {
				logins, err := s.loginsOf(ctx, one, s.entries[one.Password].Rotation())
				if len(logins) > 0 && s.renamed[one.Password] {
					// What ran before it alternated logs in as the role itself.
					logins = append(logins, role.Login{Name: one.Name, Password: logins[0].Password})
				}
				mutex.Lock()
				defer mutex.Unlock()
				if len(logins) > 0 {
					desired.Logins[one.Name] = logins
				}
				return err
			})
			continue
		}
		group.Go(func() error {
			value, _, err := s.bao.Read(ctx, *s.site.Secret(one.Password))
			var none *openbao.NoValueError
			if errors.As(err, &none) {
				return nil
			}
			mutex.Lock()
			defer mutex.Unlock()
			desired.Passwords[one.Name] = value
			return err
		})
	}
	return desired, group.Wait()
}

// dialPostgres connects as the superuser, which can be nobody but root on the
// host: over the Unix socket, through SSH.
func (s *session) dialPostgres(ctx context.Context, progress plan.Progress) error {
	if s.databases != nil {
		return nil
	}
	if s.options.DryRun && (s.nomad == nil || s.platformPending) {
		return &plan.UnknownError{Until: platformStep}
	}
	h := s.servers()[0]
	client := postgres.New(postgres.Options{
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return h.conn.DialThrough(ctx, []string{host.SiteHostPath, "dial", network, address})
		},
	})
	if err := client.Ready(ctx, min(postgresLimit, s.left()), progress); err != nil {
		return plan.WithHint(err, "see `site logs %s`", site.PostgresComponent)
	}
	s.databases = client
	return nil
}

// observing is the progress of an observation that has to wait first.
type observing struct {
	reporter plan.Reporter
	step     string
}

var _ plan.Progress = observing{}

// Message implements plan.Progress.
func (o observing) Message(format string, args ...any) {
	o.reporter.Report(plan.Event{
		Schema: plan.EventVersion, Time: time.Now().UTC(), Type: plan.StepProgress, Step: o.step, Message: fmt.Sprintf(format, args...),
	})
}

// Bytes implements plan.Progress.
func (observing) Bytes(string, int64, int64) {}

// loginsOf are who may log in for an alternating role: the active generation,
// the one that is being tried, and the old one until it is retired.
func (s *session) loginsOf(ctx context.Context, one site.Role, state catalogue.Rotation) ([]role.Login, error) {
	var logins []role.Login
	for _, generation := range []int{state.Active, state.Candidate, state.Retiring} {
		if generation == 0 {
			continue
		}
		fields, err := s.bao.ReadGeneration(ctx, *s.site.Secret(one.Password), generation)
		var none *openbao.NoValueError
		if errors.As(err, &none) {
			continue // noted and not written yet, or gone
		}
		if err != nil {
			return nil, err
		}
		login := role.Login{Name: fields.Username, Password: fields.Value}
		if login.Name == "" {
			login.Name, _ = one.Logins()
		}
		if !slices.ContainsFunc(logins, func(other role.Login) bool { return other.Name == login.Name }) {
			logins = append(logins, login)
		}
	}
	return logins, nil
}

// tryLogin logs in to the database of a role the way a job does: by TCP with
// the password.
func (s *session) tryLogin(ctx context.Context, of site.Role, name string, password secret.Value) error {
	client := postgres.New(postgres.Options{Dial: s.servers()[0].conn.DialContext})
	return client.Login(ctx, postgresAddress, s.databaseOf(of), name, password)
}

// databaseOf is a database that a role may connect to.
func (s *session) databaseOf(of site.Role) string {
	database := "postgres"
	for _, component := range s.site.Components {
		for _, one := range component.Databases {
			if one.Owner == of.Name {
				database = one.Name
			}
		}
		for _, grant := range component.Grants {
			if grant.Role == of.Name && grant.Object == site.OnDatabase {
				database = grant.Database
			}
		}
	}
	return database
}

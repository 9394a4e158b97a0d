package postgres

import (
	"context"
	"encoding/json"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/role"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// mostConnections is how many databases are looked into at the same time.
const mostConnections = 4

// The answers of the queries.

type clusterAnswer struct {
	Roles []struct {
		Name            string
		System          bool
		Login           bool
		Superuser       bool
		CreateDB        bool `json:"create_db"`
		CreateRole      bool `json:"create_role"`
		Inherit         bool
		Replication     bool
		BypassRLS       bool   `json:"bypass_rls"`
		ConnectionLimit int    `json:"connection_limit"`
		ValidUntil      string `json:"valid_until"`
		Verifier        string
		ActsAs          map[string]string `json:"acts_as"`
	}
	Memberships []struct {
		Role, Member string
		Admin        bool
	}
	Databases []struct {
		Name            string
		System          bool
		Owner           string
		ConnectionLimit int `json:"connection_limit"`
		Sessions        int
		ACL             []aclEntry
	}
	IdentStale bool `json:"ident_stale"`
	HbaStale   bool `json:"hba_stale"`
}

type aclEntry struct {
	Role, Grantor, Privilege string
	Grantable, Initial       bool
}

type objectAnswer struct {
	Kind, Schema, Name, Column, Signature, Owner string
	DefaultFor                                   string `json:"default_for"`
	ACL                                          []aclEntry
}

// Observe reads roles, databases, memberships and privileges: one connection
// for the cluster and one for each declared database, one query on each.
func (c *Client) Observe(ctx context.Context, want role.Desired) (role.Actual, error) {
	if err := want.Check(); err != nil {
		return role.Actual{}, err
	}
	var cluster clusterAnswer
	inside := make([][]objectAnswer, len(want.Databases))
	work, workCtx := errgroup.WithContext(ctx)
	work.SetLimit(mostConnections)
	work.Go(func() error { return c.ask(workCtx, clusterDatabase, clusterQuery(), &cluster) })
	for i, database := range want.Databases {
		work.Go(func() error {
			err := c.ask(workCtx, database.Name, objectsQuery(), &inside[i])
			switch codeOf(err) {
			case codeNoSuchDatabase:
				return nil
			case codeNotAllowed:
				return plan.WithHint(err, "allow them again with: ALTER DATABASE %s ALLOW_CONNECTIONS true", database.Name)
			}
			return err
		})
	}
	if err := work.Wait(); err != nil {
		return role.Actual{}, fmt.Errorf("observe postgres: %w", err)
	}
	have := stateOf(&cluster)
	for i, database := range want.Databases {
		for _, answer := range inside[i] {
			have.Objects = append(have.Objects, role.Object{
				Place: role.Place{
					Database: database.Name, Kind: site.GrantObject(answer.Kind), Schema: answer.Schema,
					Name: answer.Name, Column: answer.Column, DefaultFor: answer.DefaultFor,
				},
				Owner: answer.Owner, Signature: answer.Signature, Held: privilegesOf(answer.ACL),
			})
		}
	}
	return have, nil
}

func (c *Client) ask(ctx context.Context, database, query string, answer any) error {
	connection, err := c.connect(ctx, database)
	if err != nil {
		return err
	}
	defer disconnect(connection)
	document, err := queryText(ctx, connection, query)
	if err != nil {
		return fmt.Errorf("read the catalog of database %q: %w", database, err)
	}
	if err := json.Unmarshal(document, answer); err != nil {
		// No cause: it might quote the document, which holds verifiers.
		return fmt.Errorf("read the catalog of database %q: an answer of %d bytes can't be decoded", database, len(document))
	}
	return nil
}

func stateOf(cluster *clusterAnswer) role.Actual {
	have := role.Actual{
		Roles: map[string]role.State{}, Databases: map[string]role.Database{},
		IdentStale: cluster.IdentStale, HbaStale: cluster.HbaStale,
	}
	for _, one := range cluster.Roles {
		state := role.State{
			System: one.System, Login: one.Login, Superuser: one.Superuser, CreateDB: one.CreateDB, CreateRole: one.CreateRole,
			Inherit: one.Inherit, Replication: one.Replication, BypassRLS: one.BypassRLS,
			ConnectionLimit: one.ConnectionLimit, ValidUntil: one.ValidUntil, ActsAs: one.ActsAs,
		}
		if one.Verifier != "" {
			state.Verifier = secret.New(one.Verifier)
		}
		have.Roles[one.Name] = state
	}
	for _, one := range cluster.Memberships {
		have.Memberships = append(have.Memberships, role.Membership{Role: one.Role, Member: one.Member, Admin: one.Admin})
	}
	for _, one := range cluster.Databases {
		have.Databases[one.Name] = role.Database{System: one.System, Owner: one.Owner, ConnectionLimit: one.ConnectionLimit, Sessions: one.Sessions}
		have.Objects = append(have.Objects, role.Object{
			Place: role.Place{Database: one.Name, Kind: site.OnDatabase}, Owner: one.Owner, Held: privilegesOf(one.ACL),
		})
	}
	return have
}

func privilegesOf(entries []aclEntry) []role.Privilege {
	var privileges []role.Privilege
	for _, entry := range entries {
		privileges = append(privileges, role.Privilege{
			Role: entry.Role, Name: entry.Privilege, Grantor: entry.Grantor, Grantable: entry.Grantable, Initial: entry.Initial,
		})
	}
	return privileges
}

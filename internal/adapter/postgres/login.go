package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/nomad-site/site/internal/secret"
)

// The verdicts of Login, to be asked for with errors.Is.
var (
	ErrWrongPassword = errors.New("wrong password")
	// ErrNoAccess is a role that may not log in, or not to the database.
	ErrNoAccess = errors.New("no access")
)

// Login proves that a password opens a database over TCP, with SCRAM: the
// password itself is not sent. A role that has no connection left is no
// ErrWrongPassword.
func (c *Client) Login(ctx context.Context, address, database, user string, password secret.Value) error {
	config, err := blankConfig()
	if err != nil {
		return err
	}
	config.User, config.Database, config.Password = user, database, password.Reveal()
	config.RequireAuth = "scram-sha-256"
	config.RuntimeParams = map[string]string{"application_name": "site"}
	config.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return c.options.Dial(ctx, "tcp", address)
	}
	connection, err := pgconn.ConnectConfig(ctx, config)
	if err == nil {
		disconnect(connection)
		return nil
	}
	answer := answerOf(err)
	what := fmt.Sprintf("log in to database %q as %q", database, user)
	if answer == nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	switch answer.Code {
	case codeInvalidPassword:
		return fmt.Errorf("%s: %w", what, ErrWrongPassword)
	case codeInvalidAuthorization, codeInsufficientPrivilege, codeNoSuchDatabase, codeNotAllowed:
		return fmt.Errorf("%s: %w: %w", what, ErrNoAccess, answer)
	}
	return fmt.Errorf("%s: %w", what, answer)
}

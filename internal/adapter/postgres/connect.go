package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/nomad-site/site/internal/plan"
)

// Codes of errors that someone decides on (appendix A of the manual).
const (
	codeInvalidPassword       = "28P01"
	codeInvalidAuthorization  = "28000"
	codeInsufficientPrivilege = "42501"
	codeNoSuchDatabase        = "3D000"
	codeNotAllowed            = "55000" // a database that takes no connections
	codeObjectInUse           = "55006"
	codeDependentObjects      = "2BP01"
	codeCannotConnectNow      = "57P03"
)

// ErrNotReady is a server that is not there, or starts up: see Client.Ready.
var ErrNotReady = errors.New("postgres is not ready")

// closeLimit bounds the good-bye to a server that may be gone.
const closeLimit = 2 * time.Second

// sessionSettings keep what we send out of the server's log, whatever the
// server is set to: they come with the connection, so that no statement is ever
// without them, and they beat the settings of files, databases and roles.
func sessionSettings() map[string]string {
	return map[string]string{
		"application_name":            "site",
		"client_encoding":             "UTF8",
		"standard_conforming_strings": "on",
		// Names mean what they mean to the server, not to a schema of someone's.
		"search_path": "pg_catalog",
		// No statement with a verifier is logged: not as such, not for its
		// duration, not because it failed, and not as a parse tree.
		"log_statement":               "none",
		"log_duration":                "off",
		"log_min_duration_statement":  "-1",
		"log_min_duration_sample":     "-1",
		"log_transaction_sample_rate": "0",
		"log_min_error_statement":     "panic",
		"log_statement_stats":         "off",
		"debug_print_parse":           "off",
		"debug_print_rewritten":       "off",
		"debug_print_plan":            "off",
		"pg_stat_statements.track":    "none",
		// Someone's open transaction must not hold us up for ever.
		"lock_timeout":      "30s",
		"statement_timeout": "0",
		"row_security":      "off",
	}
}

// connect opens a connection as the superuser.
func (c *Client) connect(ctx context.Context, database string) (*pgconn.PgConn, error) {
	config, err := blankConfig()
	if err != nil {
		return nil, err
	}
	config.User, config.Database = c.options.User, database
	config.RuntimeParams = sessionSettings()
	// Peer: the server asks for nothing. A password would have come from nowhere.
	config.RequireAuth = "none"
	config.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return c.options.Dial(ctx, "unix", c.options.Socket)
	}
	connection, err := pgconn.ConnectConfig(ctx, config)
	switch {
	case err == nil:
		return connection, nil
	case ctx.Err() == nil && (answerOf(err) == nil || codeOf(err) == codeCannotConnectNow):
		return nil, fmt.Errorf("connect to database %q: %w: %w", database, ErrNotReady, refusal(err))
	}
	return nil, fmt.Errorf("connect to database %q of postgres: %w", database, refusal(err))
}

func disconnect(connection *pgconn.PgConn) {
	ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	_ = connection.Close(ctx)
}

// refusal drops the library's words around a server's answer, and says what to
// do where the socket lets us in as nobody.
func refusal(err error) error {
	answer := answerOf(err)
	if answer == nil {
		return err
	}
	if answer.Code == codeInvalidAuthorization {
		return plan.WithHint(answer, "the peer map of pg_ident.conf must let the host's root in as the superuser; deploy the host again, and have the server reload its configuration")
	}
	return answer
}

func answerOf(err error) *pgconn.PgError {
	var answer *pgconn.PgError
	errors.As(err, &answer)
	return answer
}

func codeOf(err error) string {
	if answer := answerOf(err); answer != nil {
		return answer.Code
	}
	return ""
}

// blankConfig is a configuration without anything of the environment or the
// user's home. The library can't make one from nothing: it is given each
// setting by which a variable could make it fail, and what it took from the
// environment besides is thrown away.
func blankConfig() (*pgconn.Config, error) {
	settings := "host=/ port=5432 user=none dbname=none password=none passfile='' connect_timeout=0 " +
		"sslmode=disable sslcertmode=disable sslnegotiation=postgres target_session_attrs=any " +
		"min_protocol_version=3.0 max_protocol_version=3.0 channel_binding=disable require_auth=''"
	if os.Getenv("PGSERVICE") != "" {
		// A service that is asked for must exist, if only as an empty section.
		file, err := emptyService()
		if err != nil {
			return nil, err
		}
		defer func() { _ = os.Remove(file) }()
		settings += " service=none servicefile='" + file + "'"
	}
	config, err := pgconn.ParseConfig(settings)
	if err != nil {
		return nil, fmt.Errorf("configure a connection to postgres: %w", err)
	}
	config.Password, config.RuntimeParams = "", map[string]string{}
	return config, nil
}

func emptyService() (string, error) {
	file, err := os.CreateTemp("", "site-pgservice-")
	if err != nil {
		return "", fmt.Errorf("configure a connection to postgres: %w", err)
	}
	_, err = file.WriteString("[none]\n")
	if err = errors.Join(err, file.Close()); err != nil {
		_ = os.Remove(file.Name())
		return "", fmt.Errorf("configure a connection to postgres: %w", err)
	}
	return file.Name(), nil
}

// queryText runs a statement that gives one value.
func queryText(ctx context.Context, connection *pgconn.PgConn, sql string) ([]byte, error) {
	results, err := connection.Exec(ctx, sql).ReadAll()
	if err != nil {
		return nil, err
	}
	if len(results) == 0 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 1 {
		return nil, errors.New("the server gave another answer than one value")
	}
	return results[0].Rows[0][0], nil
}

package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
)

// reloadLimit is enough for the second to pass in which a file was written.
const reloadLimit = 15 * time.Second

// Reload makes the server load pg_hba.conf and pg_ident.conf, and waits until
// what it has loaded is newer than the files. A file that it can't read is an error.
func (c *Client) Reload(ctx context.Context) error {
	err := retry.Until(ctx, "postgres to load its configuration files", reloadLimit, func(ctx context.Context) error {
		connection, err := c.connect(ctx, clusterDatabase)
		if err != nil {
			return retry.Permanent(err)
		}
		defer disconnect(connection)
		return reload(ctx, connection)
	})
	var late *retry.TimeoutError
	if errors.As(err, &late) {
		return plan.WithHint(err, "a file that says it was changed in the future is always newer: check the host's clock")
	}
	return err
}

func reload(ctx context.Context, connection *pgconn.PgConn) error {
	problems, err := queryText(ctx, connection, configurationErrors)
	if err != nil {
		return retry.Permanent(fmt.Errorf("check postgres' configuration files: %w", err))
	}
	if len(problems) > 0 {
		return retry.Permanent(fmt.Errorf("postgres can't read its configuration: %s", problems))
	}
	if _, err := queryText(ctx, connection, "SELECT pg_reload_conf()"); err != nil {
		return retry.Permanent(fmt.Errorf("have postgres load its configuration files: %w", err))
	}
	// The server tells its sessions; they hear it between two statements.
	stale, err := queryText(ctx, connection, configurationStale)
	if err != nil {
		return retry.Permanent(fmt.Errorf("read when postgres loaded its configuration files: %w", err))
	}
	if string(stale) != "f" {
		return errors.New("the files are newer than what it has loaded")
	}
	return nil
}

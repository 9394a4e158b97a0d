package postgres

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/nomad-site/site/internal/retry"
)

// endLimit is enough for sessions to hear that they end: a busy one hears it at
// once, but for what can't be interrupted.
const endLimit = 30 * time.Second

// endSessions tells the sessions of roles to end, and gives who was told. They
// are found first and told then: as one condition, the server is free to tell
// all sessions before it looks whose they are. Who helps a session with its
// query ends with it.
const endSessions = `
WITH sessions AS MATERIALIZED (
  SELECT pid FROM pg_stat_activity
  WHERE usename IN (SELECT json_array_elements_text($1::json)) AND backend_type <> 'parallel worker' AND pid <> pg_backend_pid()
)
SELECT coalesce(json_agg(pid) FILTER (WHERE pg_terminate_backend(pid)), '[]') FROM sessions`

// EndSessions ends all sessions that were begun as one of the roles, whatever
// role they have become since, and waits until there are none. It gives how many
// there were. Who may still log in can begin new ones: take that away first.
func (c *Client) EndSessions(ctx context.Context, roles []string) (int, error) {
	if len(roles) == 0 {
		return 0, nil
	}
	names, err := json.Marshal(roles)
	if err != nil {
		return 0, fmt.Errorf("end sessions of %q: %w", roles, err)
	}
	connection, err := c.connect(ctx, clusterDatabase)
	if err != nil {
		return 0, fmt.Errorf("end sessions of %q: %w", roles, err)
	}
	defer disconnect(connection)
	told := map[int]bool{}
	err = retry.Until(ctx, fmt.Sprintf("sessions of %q to end", roles), endLimit, func(ctx context.Context) error {
		running, err := tellToEnd(ctx, connection, names)
		if err != nil {
			return retry.Permanent(fmt.Errorf("end sessions of %q: %w", roles, err))
		}
		for _, process := range running {
			told[process] = true
		}
		if len(running) > 0 {
			return fmt.Errorf("sessions left: %d", len(running))
		}
		return nil
	})
	return len(told), err
}

func tellToEnd(ctx context.Context, connection *pgconn.PgConn, names []byte) (processes []int, err error) {
	result := connection.ExecParams(ctx, endSessions, [][]byte{names}, nil, nil, nil).Read()
	if result.Err != nil {
		return nil, result.Err
	}
	if len(result.Rows) != 1 || len(result.Rows[0]) != 1 {
		return nil, fmt.Errorf("the server gave %d rows instead of one", len(result.Rows))
	}
	if err := json.Unmarshal(result.Rows[0][0], &processes); err != nil {
		return nil, fmt.Errorf("read the server's answer: %w", err)
	}
	return processes, nil
}

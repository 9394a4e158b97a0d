package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
)

// errRecovery is a server that answers and does not write yet.
var errRecovery = errors.New("in recovery: it takes no writes yet")

// attemptLimit is for a server that takes a connection and says nothing.
const attemptLimit = 10 * time.Second

// Ready waits, at most for limit, until the server takes connections and
// writes. What it waits for is said each time that changes.
func (c *Client) Ready(ctx context.Context, limit time.Duration, progress plan.Progress) error {
	said := ""
	return retry.Until(ctx, "postgres", limit, func(ctx context.Context) error {
		err := c.ready(ctx)
		if err == nil {
			return nil
		}
		if codeOf(err) == codeInvalidAuthorization {
			return retry.Permanent(err)
		}
		if reason := whyNotReady(err); reason != said && ctx.Err() == nil {
			said = reason
			progress.Message("waiting for postgres: %s", reason)
		}
		return err
	})
}

func (c *Client) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attemptLimit)
	defer cancel()
	connection, err := c.connect(ctx, clusterDatabase)
	if err != nil {
		return err
	}
	defer disconnect(connection)
	recovering, err := queryText(ctx, connection, "SELECT pg_is_in_recovery()")
	if err != nil {
		return fmt.Errorf("ask postgres whether it is in recovery: %w", err)
	}
	if string(recovering) != "f" {
		return errRecovery
	}
	return nil
}

func whyNotReady(err error) string {
	answer := answerOf(err)
	switch {
	case errors.Is(err, errRecovery):
		return errRecovery.Error()
	case errors.Is(err, context.DeadlineExceeded):
		return "it takes connections and does not answer"
	case answer == nil:
		return "nothing answers on its socket yet"
	case answer.Code == codeCannotConnectNow && answer.Detail != "":
		return answer.Message + " (" + answer.Detail + ")"
	}
	return answer.Message // "the database system is starting up"
}

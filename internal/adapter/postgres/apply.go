package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/role"
)

// Apply makes changes of role.Diff and role.Undeclared: what belongs to one
// database in one transaction, what can't be in a transaction by itself. What
// can't be dropped stops nothing else, and is in the error.
func (c *Client) Apply(ctx context.Context, want role.Desired, have role.Actual, changes []plan.Change, progress plan.Progress) error {
	if err := want.Check(); err != nil {
		return err
	}
	statements, err := role.Statements(want, have, changes)
	if err != nil {
		return err
	}
	var kept []error
	reloaded := false
	for _, batch := range batchesOf(statements) {
		first := batch[0]
		switch {
		case first.Reload && reloaded:
			continue
		case first.Reload:
			progress.Message("having postgres load its configuration files")
			err, reloaded = c.Reload(ctx), true
		default:
			progress.Message("%s", describe(batch))
			err = c.run(ctx, batch)
		}
		if err != nil && first.Alone && first.Change.Action == plan.Delete && ctx.Err() == nil {
			kept = append(kept, err)
			continue
		}
		if err != nil {
			return errors.Join(append(kept, err)...)
		}
	}
	return errors.Join(kept...)
}

func describe(batch []role.Statement) string {
	first := batch[0]
	if first.Alone {
		return fmt.Sprintf("%s %s %s", first.Change.Action, first.Change.Kind, first.Change.Target)
	}
	where := "the cluster"
	if first.Database != "" {
		where = "database " + first.Database
	}
	return fmt.Sprintf("changing %s: %d statements", where, len(batch))
}

// batchesOf groups statements by transaction. None moves to before or behind
// one that stands alone.
func batchesOf(statements []role.Statement) [][]role.Statement {
	var batches [][]role.Statement
	open := map[string]int{}
	for _, statement := range statements {
		if statement.Alone || statement.Reload {
			batches = append(batches, []role.Statement{statement})
			clear(open)
			continue
		}
		at, found := open[statement.Database]
		if !found {
			at = len(batches)
			open[statement.Database] = at
			batches = append(batches, nil)
		}
		batches[at] = append(batches[at], statement)
	}
	return batches
}

// run sends a batch in one message, so that it takes one round trip. The
// session's settings keep it out of the server's log; see sessionSettings.
func (c *Client) run(ctx context.Context, batch []role.Statement) error {
	database := batch[0].Database
	if database == "" {
		database = clusterDatabase
	}
	connection, err := c.connect(ctx, database)
	if err != nil {
		return err
	}
	defer disconnect(connection)
	var text strings.Builder
	if !batch[0].Alone {
		text.WriteString("BEGIN;\n")
	}
	for _, statement := range batch {
		text.WriteString(statement.Text() + ";\n")
	}
	if !batch[0].Alone {
		text.WriteString("COMMIT;\n")
	}
	results, err := connection.Exec(ctx, text.String()).ReadAll()
	if err == nil {
		return nil
	}
	// As many statements were done as there are results.
	at := 0
	for _, result := range results {
		if result.Err == nil {
			at++
		}
	}
	if !batch[0].Alone {
		at-- // BEGIN
	}
	change := batch[min(max(at, 0), len(batch)-1)].Change
	return explain(err, change)
}

func explain(err error, change plan.Change) error {
	answer := answerOf(err)
	if answer == nil {
		return fmt.Errorf("%s %s %s: %w", change.Action, change.Kind, change.Target, err)
	}
	text := answer.Message
	if answer.Detail != "" {
		text += " (" + strings.ReplaceAll(strings.TrimSpace(answer.Detail), "\n", "; ") + ")"
	}
	failed := &statementError{change: change, text: text, cause: answer}
	switch answer.Code {
	case codeObjectInUse:
		return plan.WithHint(failed, "end the sessions that use %s, then run it again", change.Target)
	case codeDependentObjects:
		return plan.WithHint(failed, "give what role %s owns to another with REASSIGN OWNED, or drop it; then run it again", change.Target)
	}
	return failed
}

// statementError says what was being done, with the server's own detail.
type statementError struct {
	change plan.Change
	text   string
	cause  error
}

func (e *statementError) Error() string {
	return fmt.Sprintf("%s %s %s: %s", e.change.Action, e.change.Kind, e.change.Target, e.text)
}

func (e *statementError) Unwrap() error { return e.cause }

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// store counts the starts of the application.
type store interface {
	// Ping ends without an error when the database answers.
	Ping(ctx context.Context) error
	// Start adds a row; it makes the table when there is none.
	Start(ctx context.Context, sha, alloc string) error
	// Rows is how many there are.
	Rows(ctx context.Context) (int, error)
	Close()
}

// What the application waits for its database.
const (
	connectPatience = 3 * time.Second
	askPatience     = 700 * time.Millisecond // less than the job's check waits
	firstPause      = 100 * time.Millisecond
	longestPause    = 2 * time.Second
)

// database is a store whose first row is being written, or is.
type database struct {
	store store

	mutex sync.Mutex
	state error // nil once the row is there
}

var errStarting = errors.New("the database was not reached yet")

func newDatabase(s store) *database { return &database{store: s, state: errStarting} }

// start writes this start's row. It tries as long as ctx lasts: the database may
// come up later, and who asks for our health is told until then.
func (d *database) start(ctx context.Context, sha, alloc string) {
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		attempt, cancel := context.WithTimeout(ctx, connectPatience)
		err := d.store.Start(attempt, sha, alloc)
		cancel()
		d.mutex.Lock()
		d.state = err
		d.mutex.Unlock()
		if err == nil {
			slog.Info("this start is written down")
			return
		}
		if ctx.Err() != nil {
			return
		}
		slog.Warn("the database is not ready", "error", err, "again_in", pause.String())
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// check says whether the database can be used.
func (d *database) check(ctx context.Context) error {
	d.mutex.Lock()
	err := d.state
	d.mutex.Unlock()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	return d.store.Ping(ctx)
}

func (d *database) rows(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	return d.store.Rows(ctx)
}

// postgres is the store of the job.
type postgres struct{ pool *pgxpool.Pool }

var _ store = postgres{}

// openPostgres connects when it is first used. The password is in a file, which
// Nomad's template writes: not in the address, and not in the environment.
func openPostgres(ctx context.Context, address, passwordFile string) (postgres, error) {
	settings, err := pgxpool.ParseConfig(address)
	if err != nil {
		return postgres{}, fmt.Errorf("read DATABASE_URL: %w", err)
	}
	if passwordFile != "" {
		password, err := os.ReadFile(passwordFile)
		if err != nil {
			return postgres{}, fmt.Errorf("read the database's password: %w", err)
		}
		settings.ConnConfig.Password = string(bytes.TrimSuffix(password, []byte("\n")))
	}
	settings.MaxConns = 4
	settings.ConnConfig.ConnectTimeout = connectPatience
	settings.ConnConfig.RuntimeParams["application_name"] = "hello"
	pool, err := pgxpool.NewWithConfig(ctx, settings)
	return postgres{pool}, err
}

func (p postgres) Ping(ctx context.Context) error { return p.pool.Ping(ctx) }

func (p postgres) Close() { p.pool.Close() }

func (p postgres) Start(ctx context.Context, sha, alloc string) error {
	// Two starts at once must not both make it: the lock ends with the transaction.
	const table = `
		select pg_advisory_xact_lock(8080);
		create table if not exists starts (
			id    bigint generated always as identity primary key,
			at    timestamptz not null default now(),
			sha   text not null,
			alloc text not null
		)`
	transaction, err := p.pool.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = transaction.Rollback(context.WithoutCancel(ctx)) }()
	if _, err := transaction.Exec(ctx, table); err != nil {
		return fmt.Errorf("make the table: %w", err)
	}
	if _, err := transaction.Exec(ctx, "insert into starts (sha, alloc) values ($1, $2)", sha, alloc); err != nil {
		return fmt.Errorf("write the row: %w", err)
	}
	return transaction.Commit(ctx)
}

func (p postgres) Rows(ctx context.Context) (int, error) {
	var count int
	err := p.pool.QueryRow(ctx, "select count(*) from starts").Scan(&count)
	return count, err
}

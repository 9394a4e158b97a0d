package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/role"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

const (
	passwordOfA = "alternating-horse-1"
	passwordOfB = "alternating-horse-2"
)

func loginA() role.Login { return role.Login{Name: "shop_a", Password: secret.New(passwordOfA)} }
func loginB() role.Login { return role.Login{Name: "shop_b", Password: secret.New(passwordOfB)} }

// alternating is what wanted is, with a role shop whose logins take turns.
func alternating(logins ...role.Login) role.Desired {
	want := wanted()
	at := slices.IndexFunc(want.Roles, func(one site.Role) bool { return one.Name == "shop" })
	want.Roles[at].Alternating = true
	want.Logins = map[string][]role.Login{"shop": logins}
	return want
}

// pool is what an application has.
func (s *server) pool(t testing.TB, database string, login role.Login) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(fmt.Sprintf("host=127.0.0.1 port=%d user=%s dbname=%s sslmode=disable pool_max_conns=4", s.port, login.Name, database))
	if err != nil {
		t.Fatal(err)
	}
	config.ConnConfig.Password = login.Password.Reveal()
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func ask(t testing.TB, from interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}, sql string,
) string {
	t.Helper()
	var answer string
	if err := from.QueryRow(t.Context(), sql).Scan(&answer); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return answer
}

func execute(t testing.TB, pool *pgxpool.Pool, statements ...string) {
	t.Helper()
	for _, statement := range statements {
		if _, err := pool.Exec(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

// load asks again and again until it is stopped, and gives the number of
// answers and the first failure. It lets the last one end: the library gives up
// a connection whose query is cancelled.
func load(ctx context.Context, pool *pgxpool.Pool) (stop func() (int, error)) {
	stopped, done := make(chan struct{}), make(chan struct{})
	answers := 0
	var failure error
	go func() {
		defer close(done)
		for failure == nil {
			select {
			case <-stopped:
				return
			default:
			}
			if _, failure = pool.Exec(ctx, "UPDATE orders SET total = total + 1"); failure == nil {
				answers++
			}
		}
	}()
	return func() (int, error) {
		close(stopped)
		<-done
		return answers, failure
	}
}

func TestTheLoginsOfAnAlternatingRoleTakeTurnsWithoutAGap(t *testing.T) {
	t.Parallel()
	s := start(t, talkative...)
	s.converge(t, alternating(loginA()))
	first := s.pool(t, "shop", loginA())
	if who := ask(t, first, "SELECT session_user || ' as ' || current_user"); who != "shop_a as shop" {
		t.Errorf("a session is %s", who)
	}
	execute(t, first, "CREATE TABLE orders (id int, total int)", "INSERT INTO orders VALUES (1, 0)",
		// What poolers send between two users of a connection.
		"DISCARD ALL", "RESET ROLE", "CREATE TABLE items (id int)", "CREATE SCHEMA later")
	const owners = "SELECT string_agg(relname || ' of ' || pg_get_userbyid(relowner), ', ' ORDER BY relname) FROM pg_class WHERE relname IN ('items', 'orders')"
	if owned := ask(t, first, owners); owned != "items of shop, orders of shop" {
		t.Errorf("a login made %s", owned)
	}
	if err := s.Login(t.Context(), s.address(), "shop", "shop_b", secret.New(passwordOfB)); err == nil {
		t.Error("the second login works before its turn")
	}

	both := alternating(loginA(), loginB())
	both.Grants = slices.DeleteFunc(both.Grants, func(grant site.Grant) bool { return grant.Object == site.OnFunctions })
	s.converge(t, both)
	have, _ := s.diff(t, both)
	if undeclared := role.Undeclared(both, have); len(undeclared) > 0 {
		t.Errorf("undeclared: %v", undeclared)
	}
	second := s.pool(t, "shop", loginB())
	execute(t, second, "ALTER TABLE orders ADD COLUMN note text", "DROP TABLE items", "CREATE TABLE later.items (id int)")
	process := ask(t, second, "SELECT pg_backend_pid()::text")
	stop := load(t.Context(), second)
	execute(t, first, "UPDATE orders SET total = total + 1")

	want := alternating(loginB())
	want.Grants = both.Grants
	s.converge(t, want)
	held, err := first.Acquire(t.Context())
	if err != nil {
		t.Fatalf("the session of before the retirement: %v", err)
	}
	if ended, err := s.EndSessions(t.Context(), []string{"shop_a"}); err != nil || ended != 1 {
		t.Errorf("ended %d: %v", ended, err)
	}
	if _, err := held.Exec(t.Context(), "SELECT 1"); err == nil {
		t.Error("a session of the retired login goes on")
	}
	held.Release()
	for _, password := range []string{passwordOfA, passwordOfB, ""} {
		if err := s.Login(t.Context(), s.address(), "shop", "shop_a", secret.New(password)); !errors.Is(err, ErrWrongPassword) {
			t.Errorf("the retired login: got %v", err)
		}
	}
	answers, failure := stop()
	t.Logf("answers to the other login: %d", answers)
	if failure != nil || answers == 0 {
		t.Errorf("the other login: %d answers, then %v", answers, failure)
	}
	if after := ask(t, second, "SELECT count(*)::text FROM pg_stat_activity WHERE pid = "+process); after != "1" {
		t.Error("a session of the other login was ended")
	}
	for _, hidden := range []string{passwordOfA, passwordOfB, "SCRAM-SHA-256$"} {
		if strings.Contains(s.log(t), hidden) {
			t.Errorf("the log holds %q", hidden)
		}
	}
}

func TestARoleWithALoginOfItsOwnBecomesAlternatingAndBack(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.converge(t, wanted())
	s.sql(t, "shop", migration)
	s.converge(t, wanted())
	before := s.pool(t, "shop", role.Login{Name: "shop", Password: secret.New(shopPassword)})
	execute(t, before, "INSERT INTO orders (total) VALUES (7)")

	withOld := alternating(loginA(), role.Login{Name: "shop", Password: secret.New(shopPassword)})
	_, changes := s.diff(t, withOld)
	expect(t, "while the old login is in use", changes,
		"create role shop_a (no such role)",
		"create role shop_b (no such role)",
		"create role membership shop_a in shop (not a member)",
		"create role membership shop_b in shop (not a member)",
		"update role session shop_a (acts as: itself → shop)",
		"update role session shop_b (acts as: itself → shop)",
	)
	s.converge(t, withOld)
	execute(t, before, "INSERT INTO orders (total) VALUES (8)")
	after := s.pool(t, "shop", loginA())
	execute(t, after, "ALTER TABLE orders ADD COLUMN note text")

	_, changes = s.diff(t, alternating(loginA()))
	expect(t, "once nobody uses it", changes,
		"update role shop (login: true → false)",
		"update role password shop (it has a password and may not log in now)",
	)
	s.converge(t, alternating(loginA()))
	if sum := ask(t, after, "SELECT sum(total)::text FROM orders"); sum != "15" {
		t.Errorf("sum %s", sum)
	}
	if err := s.Login(t.Context(), s.address(), "shop", "shop", secret.New(shopPassword)); err == nil {
		t.Error("the role itself still logs in")
	}

	s.converge(t, wanted())
	have, _ := s.diff(t, wanted())
	undeclared := role.Undeclared(wanted(), have)
	expect(t, "undeclared afterwards", undeclared,
		"delete role membership shop_a in shop (nobody declares it)",
		"delete role membership shop_b in shop (nobody declares it)",
		"delete role shop_a (nobody declares it)",
		"delete role shop_b (nobody declares it)",
	)
	s.apply(t, wanted(), have, undeclared)
	have, changes = s.diff(t, wanted())
	expect(t, "in the end", append(changes, role.Undeclared(wanted(), have)...))
}

func TestWhatIsBrokenOnALoginIsFoundAndRepairedExactly(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := alternating(loginA())
	s.converge(t, want)
	s.sql(t, "shop", migration)
	s.converge(t, want)
	const settings = "SELECT setrole::regrole, setdatabase, setconfig FROM pg_db_role_setting ORDER BY 1, 2"
	intact := s.catalog(t, false) + s.sql(t, "postgres", settings)
	quiet := s.catalog(t, true)
	s.converge(t, want)
	if again := s.catalog(t, true); again != quiet {
		t.Error("a run without changes wrote")
	}
	for _, test := range []struct {
		name, sql string
		changes   []string
	}{
		{"a login is dropped", "DROP ROLE shop_b", []string{
			"create role shop_b (no such role)", "create role membership shop_b in shop (not a member)", "update role session shop_b (acts as: itself → shop)"}},
		{"a login acts as itself", "ALTER ROLE shop_a RESET role", []string{"update role session shop_a (acts as: itself → shop)"}},
		{"a login acts as another in one database", `CREATE DATABASE "o""d"; ALTER ROLE shop_b IN DATABASE "o""d" SET role = 'none'`, []string{
			`update role session shop_b (acts in database "o\"d" as: none → shop)`}},
		{"a login is a member no more", "REVOKE shop FROM shop_a", []string{"create role membership shop_a in shop (not a member)"}},
		{"the one whose turn it is not may log in", "ALTER ROLE shop_b LOGIN PASSWORD 'door'", []string{
			"update role shop_b (login: true → false)", "update role password shop_b (it has a password and may not log in now)"}},
		{"the one whose turn it is may not", "ALTER ROLE shop_a NOLOGIN PASSWORD NULL", []string{
			"update role shop_a (login: false → true)", "update role password shop_a (it has no password)"}},
		{"the role itself may log in", "ALTER ROLE shop LOGIN PASSWORD 'door'", []string{
			"update role shop (login: true → false)", "update role password shop (it has a password and may not log in now)"}},
		{"a login has another limit", "ALTER ROLE shop_b CONNECTION LIMIT 1", []string{"update role shop_b (connection limit: 1 → 20)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			for statement := range strings.SplitSeq(test.sql, "; ") {
				s.sql(t, "postgres", statement)
			}
			have, changes := s.diff(t, want)
			expect(t, "found", changes, test.changes...)
			s.apply(t, want, have, changes)
			_, left := s.diff(t, want)
			expect(t, "left", left)
			s.sql(t, "postgres", `DROP DATABASE IF EXISTS "o""d"`)
			if after := s.catalog(t, false) + s.sql(t, "postgres", settings); after != intact {
				t.Errorf("repaired to\n%s\nwant\n%s", after, intact)
			}
		})
	}
}

func TestSessionsOfALoginEndWhateverTheyDo(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := alternating(loginA(), loginB())
	s.converge(t, want)
	hold := func(login role.Login, statement string) *pgxpool.Conn {
		connection, err := s.pool(t, "shop", login).Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(connection.Release)
		if _, err := connection.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
		return connection
	}
	idle := hold(loginA(), "SELECT 1")
	other := hold(loginB(), "SELECT pg_advisory_lock(1)")
	inTransaction := hold(loginA(), "BEGIN; SET ROLE none")
	busy := hold(loginA(), "SELECT 1")
	answer := make(chan error, 1)
	go func() {
		_, err := busy.Exec(t.Context(), "SELECT pg_advisory_lock(1)")
		answer <- err
	}()
	s.waitFor(t, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'", "1")

	s.converge(t, alternating(loginB()))
	ended, err := s.EndSessions(t.Context(), []string{"shop_a", "nobody", "'; SELECT pg_terminate_backend(pg_backend_pid()); --"})
	if err != nil || ended != 3 {
		t.Fatalf("ended %d: %v", ended, err)
	}
	if err := <-answer; err == nil {
		t.Error("a session that waits was not ended")
	}
	for name, connection := range map[string]*pgxpool.Conn{"an idle session": idle, "a session in a transaction, as itself": inTransaction} {
		if _, err := connection.Exec(t.Context(), "SELECT 1"); err == nil {
			t.Errorf("%s was not ended", name)
		}
	}
	if who := ask(t, other, "SELECT session_user::text"); who != "shop_b" {
		t.Errorf("the other session is %s", who)
	}
	for _, roles := range [][]string{{"shop_a"}, {"nobody"}, nil} {
		if ended, err := s.EndSessions(t.Context(), roles); err != nil || ended != 0 {
			t.Errorf("sessions of %q, later: ended %d: %v", roles, ended, err)
		}
	}
}

func TestEndingSessionsOfAServerThatIsNotThereIsAnError(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	if ended, err := s.EndSessions(t.Context(), []string{"shop_a"}); !errors.Is(err, ErrNotReady) || ended != 0 || !strings.Contains(err.Error(), `end sessions of ["shop_a"]`) {
		t.Errorf("ended %d: %v, hint %q", ended, err, plan.HintOf(err))
	}
}

// waitFor waits until a query gives an answer.
func (s *server) waitFor(t testing.TB, query, want string) {
	t.Helper()
	err := retry.Until(t.Context(), query, 20*time.Second, func(context.Context) error {
		if got := s.sql(t, "postgres", query); got != want {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

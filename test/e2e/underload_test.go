package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/template"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/plan"
)

const (
	// leastLoad is how long there is load at least.
	leastLoad = time.Minute
	// connectionLife is that of the pools of the test; jobs/hello has the same.
	connectionLife = 5 * time.Second
	// stays is how long a job answers after it was taken out of the catalogue.
	stays = "2s"
	// sentKey is the generated secret that one job sends and the other checks.
	sentKey = "checker.key"
	// keysFolder, on the host, holds a file while new senders are to fail.
	keysFolder = "/run/e2e-keys"
)

// keysFiles are the two jobs of testdata/keys. Who checks a key accepts the one
// before too.
var keysFiles = template.Must(template.New("").Parse(`
{{define "component"}}
artifact "keys" {
  go_package = "./keys"
}
{{if eq .Name "checker"}}
secret "key" {
  generated {}
}
{{else}}
reads = ["checker.key"]
{{end}}
{{end}}

{{define "job"}}
variable "artifacts" {
  type = map(string)
}

job "{{.Name}}" {
  group "{{.Name}}" {
    count = 2

    network {
      mode = "host"
      port "http" {}
    }

    update {
      max_parallel      = 1
      min_healthy_time  = "1s"
      healthy_deadline  = "1m"
      progress_deadline = "2m"
      auto_revert       = true
    }

    # A task that ends is reported at once.
    restart {
      attempts = 0
      mode     = "fail"
    }

    service {
      name     = "{{.Name}}"
      provider = "nomad"
      port     = "http"

      check {
        type     = "http"
        path     = "/healthz"
        interval = "1s"
        timeout  = "1s"
      }
    }

    task "{{.Name}}" {
      driver         = "podman"
      shutdown_delay = "{{.Stays}}"

      config {
        image        = var.artifacts["keys"]
        network_mode = "host"
        volumes      = ["{{.Folder}}:{{.Folder}}:ro"]
      }

      vault {
        env = false
      }

      template {
        destination = "${NOMAD_SECRETS_DIR}/keys"
        perms       = "0400"
        uid         = 65532
        gid         = 65532
        data        = <<-EOT
          {{"{{"}} with secret "site/data/checker/key" {{"}}{{"}} .Data.data.value {{"}}{{"}} end {{"}}"}}
          {{if eq .Name "checker" -}}
          {{"{{"}} with secret "site/data/checker/key?version=previous" {{"}}{{"}} .Data.data.value {{"}}{{"}} end {{"}}"}}
          {{- end}}
        EOT
      }

      env {
        KEYS = "/secrets/keys"
        {{if eq .Name "sender"}}BROKEN = "{{.Folder}}/broken"{{end}}
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
{{end}}
`))

// deployTwice gives every job two allocations at ports that Nomad chooses.
func (s *testSite) deployTwice() {
	s.t.Helper()
	path, content := s.activate("checker", "sender")
	const plain = "component \"hello\" {}"
	if strings.Count(content, plain) != 1 {
		s.t.Fatalf("%s has another %s", path, plain)
	}
	files := map[string]string{
		path: strings.Replace(content, plain, fmt.Sprintf(
			"component \"hello\" {\n    variables = {\n      count = 2\n      port = 0\n      shutdown_delay = %q\n    }\n  }", stays), 1),
		filepath.Join("keys", "main.go"): s.read(filepath.Join("testdata", "keys", "main.go")),
	}
	for _, name := range []string{"checker", "sender"} {
		for template, file := range map[string]string{"component": "component.hcl", "job": name + ".nomad.hcl"} {
			var out strings.Builder
			if err := keysFiles.ExecuteTemplate(&out, template, struct{ Name, Stays, Folder string }{name, stays, keysFolder}); err != nil {
				s.t.Fatal(err)
			}
			files[filepath.Join("jobs", name, file)] = out.String()
		}
	}
	s.host.exec("mkdir", "--parents", keysFolder)
	s.commit("two of each, at free ports", files)
	s.must("deploy")
}

// login is one generation of a database password.
type login struct {
	generation         int
	username, password string
}

// activeLogin is what a job of the site would be given now.
func (b *bao) activeLogin(ctx context.Context) (login, error) {
	active, _, err := b.activeAndRetiring(ctx, ownPassword)
	if err != nil {
		return login{}, err
	}
	var entry struct {
		Data struct {
			Data struct{ Value, Username string }
		}
	}
	err = b.try(ctx, "GET", fmt.Sprintf("site/data/hello/database_password?version=%d", active), nil, &entry)
	return login{active, entry.Data.Data.Username, entry.Data.Data.Value}, err
}

// activeAndRetiring are the active one, and the one that waits for its retirement or 0.
func (b *bao) activeAndRetiring(ctx context.Context, secret string) (active, retiring int, err error) {
	var entry struct {
		Data struct {
			CurrentVersion int               `json:"current_version"`
			CustomMetadata map[string]string `json:"custom_metadata"`
		}
	}
	if err := b.try(ctx, "GET", "site/metadata/"+strings.Replace(secret, ".", "/", 1), nil, &entry); err != nil {
		return 0, 0, err
	}
	active = entry.Data.CurrentVersion
	for key, into := range map[string]*int{"active": &active, "retiring": &retiring} {
		if text := entry.Data.CustomMetadata[key]; text != "" {
			if *into, err = strconv.Atoi(text); err != nil {
				return 0, 0, fmt.Errorf("secret %s: %s: %w", secret, key, err)
			}
		}
	}
	return active, retiring, nil
}

// database is how a program outside of the site's jobs reaches it.
type database struct {
	s      *testSite
	tunnel *ssh.Client
	bao    *bao
}

func (s *testSite) database() *database {
	s.t.Helper()
	return &database{s: s, tunnel: s.dialHost(s.labKey().signer), bao: s.bao()}
}

func (d *database) config(program string) *pgxpool.Config {
	d.s.t.Helper()
	config, err := pgxpool.ParseConfig("host=127.0.0.1 database=hello sslmode=disable connect_timeout=5 application_name=" + program)
	if err != nil {
		d.s.t.Fatal(err)
	}
	config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		return d.tunnel.DialContext(ctx, network, address)
	}
	config.MaxConns, config.MaxConnLifetime, config.HealthCheckPeriod = 4, connectionLife, time.Second
	return config
}

// connect logs in once.
func (d *database) connect(as login) (*pgx.Conn, error) {
	config := d.config("once").ConnConfig
	config.User, config.Password = as.username, as.password
	return pgx.ConnectConfig(d.s.t.Context(), config)
}

// sessions are those of a login; of one program, or of all where it is empty.
func (d *database) sessions(username, program string) string {
	d.s.t.Helper()
	const counted = "SELECT count(*) FROM pg_stat_activity WHERE usename = '%s' AND application_name LIKE '%s%%'"
	return d.s.psql("postgres", fmt.Sprintf(counted, username, program))
}

// pooled is a program that keeps asking the database through a pool.
type pooled struct {
	name string
	pool *pgxpool.Pool
	end  context.CancelFunc
	done sync.WaitGroup

	mutex                       sync.Mutex
	queries, failures, connects int
	said                        []string
}

// poolPause is between two queries of one of the pool's users.
const poolPause = 50 * time.Millisecond

// keepQuerying begins to ask; credentials gives what a new connection logs in with.
func (d *database) keepQuerying(name string, credentials func(context.Context) (login, error)) *pooled {
	d.s.t.Helper()
	p := &pooled{name: name}
	config := d.config(name)
	config.BeforeConnect = func(ctx context.Context, config *pgx.ConnConfig) error {
		as, err := credentials(ctx)
		config.User, config.Password = as.username, as.password
		p.mutex.Lock()
		p.connects++
		p.mutex.Unlock()
		return err
	}
	ctx, cancel := context.WithCancel(d.s.t.Context())
	p.end = cancel
	var err error
	if p.pool, err = pgxpool.NewWithConfig(context.WithoutCancel(ctx), config); err != nil {
		d.s.t.Fatal(err)
	}
	for range config.MaxConns {
		p.done.Go(func() { p.ask(ctx) })
	}
	d.s.t.Cleanup(p.stop)
	return p
}

func (p *pooled) ask(ctx context.Context) {
	ticker := time.NewTicker(poolPause)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		var rows int
		err := p.pool.QueryRow(patience, "SELECT count(*) FROM starts").Scan(&rows)
		cancel()
		p.mutex.Lock()
		p.queries++
		if err != nil {
			p.failures++
			p.said = append(p.said, err.Error())
		}
		p.mutex.Unlock()
	}
}

// stop ends the asking; its connections are closed.
func (p *pooled) stop() {
	p.end()
	p.done.Wait()
	p.pool.Close()
}

// isWhole insists that no query failed.
func (p *pooled) isWhole(t *testing.T) {
	t.Helper()
	p.mutex.Lock()
	defer p.mutex.Unlock()
	t.Logf("the pool %s: %d queries, %d failures, %d connections", p.name, p.queries, p.failures, p.connects)
	if p.failures > 0 {
		t.Errorf("%d of %d queries of the pool %s failed, the first: %s", p.failures, p.queries, p.name, p.said[0])
	}
	if p.connects < 2*int(p.pool.Config().MaxConns) {
		t.Errorf("the pool %s connected %d times: its connections were not made anew", p.name, p.connects)
	}
}

func TestSecretsRotateUnderLoadWithoutOneFailure(t *testing.T) {
	s := newSite(t, platform)
	s.deployTwice()
	d := s.database()
	application := s.underLoad(t, loadOptions{service: "hello"})
	follower := d.keepQuerying("follower", d.bao.activeLogin)

	t.Run("the database's password", func(t *testing.T) {
		s := s.in(t)
		before := application.counts()
		s.rotateDatabasePassword(d, follower)
		since := application.counts().since(before)
		t.Logf("the application: %s", since)
		since.isWhole(t)
		if len(since.answered) < 4 {
			t.Errorf("only %d allocations answered: want two of the old and two of the new", len(since.answered))
		}
	})
	t.Run("a generated secret that one job sends and another checks", func(t *testing.T) {
		before := application.counts()
		try := func(title string, rotate func(*testSite, *sent)) {
			t.Run(title, func(t *testing.T) {
				s := s.in(t)
				checkers := s.balance("checker")
				rotate(s, &sent{s.bao(), checkers, s.underLoad(t, loadOptions{service: "sender", ask: sendTo(checkers)})})
			})
		}
		try("is given up by the run after a killed one, as its canary fails", (*testSite).giveUpSentKey)
		try("rotates", (*testSite).rotateSentKey)
		since := application.counts().since(before)
		t.Logf("the application beside: %s", since)
		since.isWhole(t)
	})
	s.until("the load to last for long enough", 2*leastLoad, func() error {
		if took := application.counts().took; took < leastLoad {
			return fmt.Errorf("it lasted for %s", took)
		}
		return nil
	})
	total := application.stop()
	t.Logf("all of it: %s", total)
	total.isWhole(t)
	follower.stop()
	follower.isWhole(t)
}

// rotateDatabasePassword rotates it in two runs, to see what is between them:
// the old login works until the second one retires it.
func (s *testSite) rotateDatabasePassword(d *database, follower *pooled) {
	s.t.Helper()
	ctx := s.t.Context()
	d = &database{s: s, tunnel: d.tunnel, bao: d.bao}
	old, err := d.bao.activeLogin(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	stayer := d.keepQuerying("stayer", func(context.Context) (login, error) { return old, nil })
	session, err := d.connect(old)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = session.Close(ctx) }()

	moved := s.must("secrets", "rotate", ownPassword, "--detach")
	s.t.Logf("the new login was taken by all after %s", moved.duration.Round(100*time.Millisecond))
	now, err := d.bao.activeLogin(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	if now.generation == old.generation || now.username == old.username || now.password == old.password {
		s.t.Fatalf("generation %d of %s follows %d of %s", now.generation, now.username, old.generation, old.username)
	}
	for _, program := range []string{follower.name, "hello"} {
		s.until(program+" to have left the old login", time.Minute, func() error {
			if count := d.sessions(old.username, program); count != "0" {
				return fmt.Errorf("it has %s sessions", count)
			}
			return nil
		})
	}
	if again, err := d.connect(old); err != nil {
		s.t.Errorf("the old login before its retirement: %v", err)
	} else {
		_ = again.Close(ctx)
	}
	stayer.stop()
	stayer.isWhole(s.t)

	s.until("the old generation to be retired", time.Minute, func() error {
		s.must("secrets", "rotate", "--due", "--drain=0s")
		_, retiring, err := d.bao.activeAndRetiring(ctx, ownPassword)
		if err == nil && retiring != 0 {
			err = fmt.Errorf("generation %d is not", retiring)
		}
		return err
	})
	var refused *pgconn.PgError
	if _, err := d.connect(old); !errors.As(err, &refused) {
		s.t.Errorf("the old login after its retirement: %v, want it to be refused", err)
	}
	if err := session.Ping(ctx); err == nil {
		s.t.Error("a session of the old login outlived its retirement")
	}
}

// sent is the key that senders send all the time, and checkers check.
type sent struct {
	bao      *bao
	checkers *balancer
	load     *steadyLoad
}

// rotateSentKey rotates it in one run, as an operator does.
func (s *testSite) rotateSentKey(keys *sent) {
	s.t.Helper()
	before, old := keys.bao.sentKey()
	got := s.must("secrets", "rotate", sentKey, "--drain=5s")
	keys.isWhole(s.t, got)
	after, now := keys.bao.sentKey()
	if after <= before || now == old {
		s.t.Errorf("generation %d follows %d:\n%v", after, before, got)
	}
	if _, retiring, err := keys.bao.activeAndRetiring(s.t.Context(), sentKey); err != nil || retiring != 0 {
		s.t.Errorf("generation %d waits to be retired, %v:\n%v", retiring, err, got)
	}
	for range 10 { // each of the two is asked
		if err := keys.accepted(now); err != nil {
			s.t.Errorf("the new key: %v", err)
		}
		if keys.accepted(old) == nil {
			s.t.Error("the old key is still accepted")
		}
	}
}

// giveUpSentKey kills a rotation while checkers learn of the next key, and has the
// next run find that no sender starts with it.
func (s *testSite) giveUpSentKey(keys *sent) {
	s.t.Helper()
	before, value := keys.bao.sentKey()
	senders := s.allocations("sender")
	s.runUntil(moment{step: "announce", kind: plan.StepProgress, says: "checker"}, func(process *os.Process) {
		_ = process.Kill()
	}, "secrets", "rotate", sentKey)
	s.lockIsFree(10 * time.Second)
	s.host.exec("touch", keysFolder+"/broken")
	got := s.run("secrets", "rotate", "--due")
	s.host.exec("rm", keysFolder+"/broken")
	if !strings.Contains(got.stderr, "announce: job checker: healthy") {
		s.t.Errorf("the second run did not go on where the first was killed: %v", got)
	}
	if got.code != 3 || !strings.Contains(got.stderr, "every consumer runs on the generation that it had") {
		s.t.Errorf("want exit code 3 and a word about the consumers: %v", got)
	}
	keys.isWhole(s.t, got)
	if after, now := keys.bao.sentKey(); after != before || now != value {
		s.t.Errorf("generation %d is active, it was %d", after, before)
	}
	if now := s.allocations("sender"); !slices.Equal(now, senders) {
		s.t.Errorf("the senders are %v, they were %v", now, senders)
	}
	var job struct{ Meta map[string]string }
	s.nomad("/v1/job/checker", &job)
	if want := fmt.Sprintf(`{"checker.key":%d,"checker.key?version=previous":%d}`, before, before); job.Meta["site_secrets"] != want {
		s.t.Errorf("the checkers read %s, want %s", job.Meta["site_secrets"], want)
	}
}

// isWhole ends the load and insists that each key was accepted.
func (k *sent) isWhole(t *testing.T, got result) {
	t.Helper()
	counts := k.load.stop()
	t.Logf("the rotation took %s", got.duration.Round(100*time.Millisecond))
	t.Logf("the senders: %s", counts)
	counts.isWhole(t)
}

func (k *sent) accepted(key string) error {
	_, err := httpGet(k.bao.s.t.Context(), k.load.client, k.checkers.pick(), "/check", http.Header{"X-Key": {key}})
	return err
}

// sentKey is the active generation of the key, and its value.
func (b *bao) sentKey() (int, string) {
	b.s.t.Helper()
	active, _, err := b.activeAndRetiring(b.s.t.Context(), sentKey)
	if err != nil {
		b.s.t.Fatal(err)
	}
	var entry struct {
		Data struct{ Data struct{ Value string } }
	}
	b.must("GET", fmt.Sprintf("site/data/checker/key?version=%d", active), nil, &entry)
	return active, entry.Data.Data.Value
}

// sendTo has a sender, or as often a checker, send its key to one of the checkers.
func sendTo(checkers *balancer) func(context.Context, *http.Client, string) error {
	return func(ctx context.Context, client *http.Client, address string) error {
		if rand.IntN(2) == 0 {
			address = checkers.pick()
		}
		_, err := httpGet(ctx, client, address, "/send?to="+url.QueryEscape(checkers.pick()), nil)
		return err
	}
}

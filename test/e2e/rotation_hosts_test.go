package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/nomad-site/site/internal/lab"
)

// growToTwo gives the site a second host, a client, and the application an
// allocation on each. Only the new host is bootstrapped; the lab keeps it, and the
// tests to come find it bare.
func (s *testSite) growToTwo() (first, second *testHost) {
	s.t.Helper()
	if err := s.lab.Up(s.t.Context(), lab.Options{Hosts: 2}); err != nil {
		s.t.Fatal(err)
	}
	status, err := s.lab.Status(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	// A host without power is not waited for any longer than need be.
	s.write(filepath.Join(s.dir, ".lab", name, "ssh_config"), s.read(s.lab.SSHConfig())+"\nHost *\n    ConnectTimeout 3\n")
	siteFile := s.siteHCL(2)
	const server = "server = true"
	at := strings.LastIndex(siteFile, server)
	siteFile = siteFile[:at] + "server = false" + siteFile[at+len(server):]
	// The kind of job that has an allocation on every host that there is.
	job := filepath.Join("jobs", "hello", "hello.nomad.hcl")
	content := s.replace(job, "  type = \"service\"\n", "  type = \"system\"\n")
	from := strings.Index(content, "    # After the host comes back")
	to := strings.Index(content, "    service {")
	if from < 0 || to < from { // a system job has no reschedule block
		s.t.Fatalf("%s has no reschedule block in front of its service", job)
	}
	s.commit("an application on each of two hosts", map[string]string{
		filepath.Join("sites", name, "site.hcl"): siteFile, job: content[:from] + content[to:],
	})
	// Nomad keeps a job's type as long as it knows the job.
	token, err := s.managementToken()
	if err != nil {
		s.t.Fatal(err)
	}
	s.host.exec("env", "NOMAD_TOKEN="+token, "/opt/site/bin/nomad", "job", "stop", "-purge", "-detach", "hello")
	got := s.bootstrap()
	s.t.Logf("the second host was bootstrapped in %s", got.duration.Round(100*time.Millisecond))
	return s.host, &testHost{site: s, name: status.Hosts[1].Name, address: status.Hosts[1].Address}
}

// generation is a password of the application's database, and whom it logs in.
type generation struct {
	number          int
	login, password string
}

const rotatedPassword = "hello.database_password"

// generations are what OpenBao has of the application's password: the active
// one, and the one that is to be retired, if there is any.
func (b *bao) generations() (active, retiring generation) {
	b.s.t.Helper()
	var metadata struct {
		Data struct {
			CurrentVersion int               `json:"current_version"`
			CustomMetadata map[string]string `json:"custom_metadata"`
		}
	}
	b.must("GET", "site/metadata/hello/database_password", nil, &metadata)
	number := func(key string) (n int) {
		_, _ = fmt.Sscan(metadata.Data.CustomMetadata[key], &n)
		return n
	}
	active.number, retiring.number = number("active"), number("retiring")
	if active.number == 0 {
		active.number = metadata.Data.CurrentVersion
	}
	for _, one := range []*generation{&active, &retiring} {
		if one.number > 0 {
			*one = b.generation(one.number)
		}
	}
	return active, retiring
}

func (b *bao) generation(number int) generation {
	b.s.t.Helper()
	var entry struct {
		Data struct {
			Data struct{ Value, Username string }
		}
	}
	b.must("GET", fmt.Sprintf("site/data/hello/database_password?version=%d", number), nil, &entry)
	return generation{number: number, login: entry.Data.Data.Username, password: entry.Data.Data.Value}
}

// logsIn tries a generation at the database, by TCP as the application does.
func (s *testSite) logsIn(one generation) error {
	s.t.Helper()
	return s.logsInThrough(s.labKey(), one)
}

func (s *testSite) logsInThrough(key sshKey, one generation) error {
	s.t.Helper()
	config, err := pgconn.ParseConfig("host=127.0.0.1 database=hello sslmode=disable connect_timeout=5")
	if err != nil {
		s.t.Fatal(err)
	}
	config.User, config.Password = one.login, one.password
	tunnel := s.dialHost(key.signer)
	config.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		return tunnel.DialContext(ctx, network, address)
	}
	connection, err := pgconn.ConnectConfig(s.t.Context(), config)
	if err != nil {
		return err
	}
	return connection.Close(s.t.Context())
}

// reads is which generation of the password the application's allocation on a
// host was started with.
func (s *testSite) reads(host *testHost) (int, error) {
	var allocations []struct{ ID, NodeName, DesiredStatus, ClientStatus string }
	if err := s.tryNomad("/v1/job/hello/allocations", &allocations); err != nil {
		return 0, err
	}
	for _, each := range allocations {
		if each.NodeName != host.name || each.DesiredStatus != "run" || each.ClientStatus != "running" {
			continue
		}
		var allocation struct {
			Job struct{ Meta map[string]string }
		}
		if err := s.tryNomad("/v1/allocation/"+each.ID, &allocation); err != nil {
			return 0, err
		}
		read := map[string]int{}
		err := json.Unmarshal([]byte(allocation.Job.Meta["site_secrets"]), &read)
		return read[rotatedPassword], err
	}
	return 0, fmt.Errorf("none runs on %s: %+v", host.name, allocations)
}

func TestAHostThatWasDownDuringARotationKeepsItsGenerationAndCatchesUp(t *testing.T) {
	s := newSite(t, platform)
	first, second := s.growToTwo()
	b := s.bao()
	for _, host := range []*testHost{first, second} {
		s.readsGeneration(host, 1)
	}
	old, _ := b.generations()

	t.Run("what is there moves, and the old generation waits for the host", func(t *testing.T) {
		s := s.in(t)
		s.loses(second)
		s.isMissed(second)
		got := s.must("secrets", "rotate", rotatedPassword, "--drain=1s")
		s.keptFor(second, got, old)
		s.readsGeneration(first, old.number+1)
		s.keptFor(second, s.must("secrets", "rotate", "--due"), old)
	})

	t.Run("the host catches up by itself", func(t *testing.T) {
		s := s.in(t)
		if err := s.lab.Start(t.Context(), second.name); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		s.readsGeneration(second, old.number+1)
		s.answers(second)
		t.Logf("it had caught up %s after it was started", time.Since(begun).Round(100*time.Millisecond))
		if err := s.logsIn(old); err != nil {
			t.Errorf("the old generation went without anybody retiring it: %v", err)
		}
	})

	t.Run("then the next run retires the old one", func(t *testing.T) {
		s := s.in(t)
		s.theLostHaveEnded()
		s.isRetired(s.must("secrets", "rotate", "--due"), old)
		if got := s.must("secrets", "rotate", "--due"); !strings.Contains(got.stdout, "nothing is due") {
			t.Errorf("something is left\n%v", got)
		}
		s.answers(first)
		s.answers(second)
		s.planIs()
	})

	t.Run("a host that is given up is not waited for", func(t *testing.T) {
		s := s.in(t)
		old, _ := b.generations()
		s.loses(second) // which Nomad learns of only while the rotation goes on
		s.isRetired(s.must("secrets", "rotate", rotatedPassword, "--drain=1s", "--retire-without-host="+second.name), old)
		s.readsGeneration(first, old.number+1)
		if err := s.lab.Start(t.Context(), second.name); err != nil {
			t.Fatal(err)
		}
		s.readsGeneration(second, old.number+1)
		s.answers(second)
	})
}

// theLostHaveEnded waits until a host that came back has told Nomad that what ran
// there before does so no longer.
func (s *testSite) theLostHaveEnded() {
	s.t.Helper()
	s.until("the allocations of before to have ended", time.Minute, func() error {
		var allocations []struct{ ID, NodeName, DesiredStatus, ClientStatus string }
		if err := s.tryNomad("/v1/job/hello/allocations?all=true", &allocations); err != nil {
			return err
		}
		for _, each := range allocations {
			if each.DesiredStatus != "run" && each.ClientStatus == "running" {
				return fmt.Errorf("one still runs: %+v", each)
			}
		}
		return nil
	})
}

// loses cuts a host's power.
func (s *testSite) loses(host *testHost) {
	s.t.Helper()
	if err := s.lab.Kill(s.t.Context(), host.name); err != nil {
		s.t.Fatal(err)
	}
}

// isMissed waits until Nomad knows that a host is down.
func (s *testSite) isMissed(host *testHost) {
	s.t.Helper()
	s.until("Nomad to miss "+host.name, 2*time.Minute, func() error {
		var nodes []struct{ Name, Status string }
		if err := s.tryNomad("/v1/nodes", &nodes); err != nil {
			return err
		}
		for _, node := range nodes {
			if node.Name == host.name && node.Status != "down" {
				return fmt.Errorf("it is %s", node.Status)
			}
		}
		return nil
	})
}

// answers waits until the application on a host counts rows in the database.
func (s *testSite) answers(host *testHost) {
	s.t.Helper()
	s.until("the application on "+host.name+" to count rows", time.Minute, func() error {
		_, err := (&testHost{site: s, name: host.name, address: host.address}).says()
		return err
	})
}

// readsGeneration waits until the application on a host reads a generation.
func (s *testSite) readsGeneration(host *testHost, number int) {
	s.t.Helper()
	s.until(fmt.Sprintf("the application on %s to read generation %d", host.name, number), 2*time.Minute, func() error {
		read, err := s.reads(host)
		if err == nil && read != number {
			err = fmt.Errorf("it reads generation %d", read)
		}
		return err
	})
}

// keptFor insists that a generation works because a host is away, and that the
// run said so.
func (s *testSite) keptFor(away *testHost, got result, old generation) {
	s.t.Helper()
	said := false
	for line := range strings.Lines(got.stderr) {
		said = said || strings.HasPrefix(line, "warning: ") && strings.Contains(line, fmt.Sprintf("generation %d stays", old.number)) &&
			strings.Contains(line, away.name) && strings.Contains(line, "--retire-without-host")
	}
	if !said {
		s.t.Errorf("no warning says that generation %d stays because of %s\n%v", old.number, away.name, got)
	}
	active, retiring := s.bao().generations()
	if active.number != old.number+1 || retiring != old {
		s.t.Errorf("generation %d is active and %d retiring, want %d and %d", active.number, retiring.number, old.number+1, old.number)
	}
	for _, one := range []generation{active, old} {
		if err := s.logsIn(one); err != nil {
			s.t.Errorf("generation %d does not log in: %v", one.number, err)
		}
	}
}

// isRetired insists that a generation is worth nothing any more, and the one
// after it is.
func (s *testSite) isRetired(got result, old generation) {
	s.t.Helper()
	b := s.bao()
	active, retiring := b.generations()
	if active.number != old.number+1 || retiring.number != 0 {
		s.t.Errorf("generation %d is active and %d retiring\n%v", active.number, retiring.number, got)
	}
	if err := s.logsIn(active); err != nil {
		s.t.Errorf("generation %d does not log in: %v", active.number, err)
	}
	if s.logsIn(old) == nil {
		s.t.Errorf("generation %d still logs in\n%v", old.number, got)
	}
	path := fmt.Sprintf("site/data/hello/database_password?version=%d", old.number)
	var gone *statusError
	if err := b.try(s.t.Context(), "GET", path, nil, nil); !errors.As(err, &gone) || gone.status != http.StatusNotFound {
		s.t.Errorf("generation %d can be read: %v", old.number, err)
	}
}

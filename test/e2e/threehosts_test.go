package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/lab"
	"github.com/nomad-site/site/internal/testneeds"
)

const threeHosts = 3

// newThreeHosts gives a platform site on three bare hosts of a lab of their own.
// Its application runs on each of them.
func newThreeHosts(t *testing.T) (*testSite, []*testHost) {
	t.Helper()
	testneeds.Lab(t)
	if os.Getenv(fullVariable) != "1" {
		t.Skip("boots three hosts more: set " + fullVariable + "=1")
	}
	if err := removeLeftovers(t.Context()); err != nil {
		t.Fatal(err)
	}
	folder, err := os.MkdirTemp("", folderPattern)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := lockFolder(folder)
	if err != nil {
		t.Fatal(err)
	}
	it, err := lab.Open(folder, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(it.Down(ctx), os.RemoveAll(folder), lock.Close()); err != nil {
			t.Errorf("take the lab down: %v", err)
		}
	})
	if err := it.Up(t.Context(), lab.Options{Hosts: threeHosts, Progress: func(line string) { t.Log("lab: " + line) }}); err != nil {
		t.Fatal(err)
	}
	status, err := it.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	s := &testSite{t: t, lab: it, site: siteBinary(t), dir: filepath.Join(t.TempDir(), "repository"), platform: true}
	var hosts []*testHost
	for _, each := range status.Hosts {
		hosts = append(hosts, &testHost{site: s, name: each.Name, address: each.Address})
	}
	s.host = hosts[0]
	s.makeRepository()
	s.tokenFile = filepath.Join(s.dir, ".lab", "root-token")
	s.must("root-token", "new", s.tokenFile)
	everywhere := fmt.Sprintf("component \"hello\" {\n    variables = {\n      count = %d\n    }\n  }", threeHosts)
	job := filepath.Join("jobs", "hello", "hello.nomad.hcl")
	s.commit("an application on each of three hosts", map[string]string{
		filepath.Join("sites", name, "site.hcl"): strings.Replace(s.siteHCL(threeHosts), `component "hello" {}`, everywhere, 1),
		job:                                      s.replace(job, "    count = var.count\n", "    count = var.count\n\n    constraint {\n      distinct_hosts = true\n    }\n"),
	})
	return s, hosts
}

// says asks the application on one host.
func (h *testHost) says() (answer, error) {
	on := *h.site
	on.host = h
	says, err := on.answer()
	if err == nil && says.Rows < 1 {
		err = errors.New("it counts no rows")
	}
	return says, err
}

// allAnswer waits until the application of each host counts rows, by the secret
// and in the database of the first, and returns the most that one has counted.
func (s *testSite) allAnswer(hosts []*testHost) (rows int) {
	s.t.Helper()
	for _, host := range hosts {
		s.until("the application on "+host.name+" to count rows", 2*time.Minute, func() error {
			says, err := host.says()
			rows = max(rows, says.Rows)
			return err
		})
	}
	return rows
}

// onIt waits until Nomad has a healthy allocation of the application on a host.
func (s *testSite) onIt(host *testHost) {
	s.t.Helper()
	s.until("Nomad to run the application on "+host.name, time.Minute, func() error {
		var allocations []struct{ NodeName, DesiredStatus, ClientStatus string }
		if err := s.tryNomad("/v1/job/hello/allocations", &allocations); err != nil {
			return err
		}
		for _, each := range allocations {
			if each.NodeName == host.name && each.DesiredStatus == "run" && each.ClientStatus == "running" {
				return nil
			}
		}
		return fmt.Errorf("none runs there: %+v", allocations)
	})
}

// restartApplication ends the application's process on a host: as it starts
// again, it reads its password and writes a row.
func (h *testHost) restartApplication() {
	h.site.t.Helper()
	h.shell(`podman kill --signal KILL $(podman ps --quiet --filter name=^hello-) >&2`)
}

func TestAJobOnEveryHostUsesThePlatformOfTheFirst(t *testing.T) {
	s, hosts := newThreeHosts(t)
	got := s.bootstrap()
	t.Logf("the bootstrap of three hosts took %s", got.duration.Round(100*time.Millisecond))
	if rows := s.allAnswer(hosts); rows < threeHosts {
		t.Errorf("%d rows, though %d applications have started", rows, threeHosts)
	}
	for _, host := range hosts {
		if says, err := host.says(); err != nil || says.SHA != s.head() {
			t.Errorf("%s says %+v, %v: want commit %s", host.name, says, err, s.head())
		}
	}

	t.Run("the servers are a quorum of three", func(t *testing.T) {
		s := s.in(t)
		var raft struct {
			Servers []struct {
				Node          string
				Leader, Voter bool
			}
		}
		s.until("three voters", time.Minute, func() error {
			s.nomad("/v1/operator/raft/configuration", &raft)
			voters, leaders := 0, 0
			for _, server := range raft.Servers {
				if server.Voter {
					voters++
				}
				if server.Leader {
					leaders++
				}
			}
			if voters != threeHosts || leaders != 1 {
				return fmt.Errorf("%d voters and %d leaders: %+v", voters, leaders, raft.Servers)
			}
			return nil
		})
	})

	t.Run("a second run changes nothing", func(t *testing.T) {
		s := s.in(t)
		s.commit("the sealed init material", nil)
		before := s.statesOf(hosts)
		for _, args := range [][]string{
			{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}, {"deploy"}, {"plan", "--check"},
		} {
			s.unchanged(args[0], func() {
				if got := s.must(args...); !strings.Contains(got.stdout, "nothing to do") {
					t.Errorf("it found something to do:\n%s", got.stdout)
				}
			})
		}
		if after := s.statesOf(hosts); !slices.Equal(before, after) {
			t.Errorf("units and files were\n%s\nand are\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
		}
	})

	t.Run("nothing but the relay is open between hosts, and not to strangers", func(t *testing.T) {
		s := s.in(t)
		s.strangersAreRefused()
	})

	t.Run("a job that starts again on another host reads its secret and writes its row", func(t *testing.T) {
		s := s.in(t)
		rows := s.allAnswer(hosts)
		hosts[1].restartApplication()
		s.until("one more row", time.Minute, func() error {
			says, err := hosts[1].says()
			if err == nil && says.Rows <= rows {
				err = fmt.Errorf("still %d rows", says.Rows)
			}
			return err
		})
	})

	t.Run("a host without power is named, and the others go on", func(t *testing.T) {
		s := s.in(t)
		off := hosts[2]
		if err := s.lab.Kill(t.Context(), off.name); err != nil {
			t.Fatal(err)
		}
		got := s.run("status", "--json")
		var status struct {
			Hosts       []struct{ Name string }
			Unreachable []string
		}
		if err := json.Unmarshal([]byte(got.stdout), &status); err != nil {
			t.Fatalf("%v\n%v", err, got)
		}
		if len(status.Hosts) != 2 || len(status.Unreachable) != 1 || !strings.Contains(status.Unreachable[0], off.name) {
			t.Errorf("status does not say that %s is off\n%v", off.name, got)
		}
		s.until("Nomad to know of it", 2*time.Minute, func() error {
			var nodes []struct{ Name, Status string }
			if err := s.tryNomad("/v1/nodes", &nodes); err != nil {
				return err
			}
			for _, node := range nodes {
				if (node.Status == "down") != (node.Name == off.name) {
					return fmt.Errorf("%s is %s", node.Name, node.Status)
				}
			}
			return nil
		})
		rows := s.allAnswer(hosts[:2])
		hosts[1].restartApplication()
		s.until("one more row of the host that is left", time.Minute, func() error {
			says, err := hosts[1].says()
			if err == nil && says.Rows <= rows {
				err = fmt.Errorf("still %d rows", says.Rows)
			}
			return err
		})

		begun := time.Now()
		if err := s.lab.Start(t.Context(), off.name); err != nil {
			t.Fatal(err)
		}
		s.allAnswer(hosts)
		for _, host := range hosts {
			s.onIt(host)
		}
		t.Logf("all answer %s after the power came back", time.Since(begun).Round(100*time.Millisecond))
	})

	t.Run("after a reboot of the first server all comes back by itself", func(t *testing.T) {
		s := s.in(t)
		hosts[0].reboot()
		s.allAnswer(hosts)
		s.until("nothing to be left to do", time.Minute, func() error {
			if left := s.plan(); len(left) > 0 {
				return fmt.Errorf("left to do: %+v", left)
			}
			return nil
		})
	})
}

// statesOf is what a second run must leave alone on each host: when units began,
// and what is in files and when it came there.
func (s *testSite) statesOf(hosts []*testHost) []string {
	s.t.Helper()
	var states []string
	for _, host := range hosts {
		states = append(states, host.name+": "+host.shell(`systemctl show --property=Id,InvocationID,ActiveState \
			nomad.service site-host.service site-relay.service podman.socket
			find /etc/nomad.d /etc/site /etc/systemd/system /opt/site -type f -printf '%p %s %C@\n' | sort`))
	}
	return states
}

// strangersAreRefused looks from outside: services are on loopback, and the
// relay wants a certificate of the site.
func (s *testSite) strangersAreRefused() {
	s.t.Helper()
	for _, port := range []string{"8200", "5432"} {
		connection, err := net.DialTimeout("tcp", net.JoinHostPort(s.host.address, port), 3*time.Second)
		if err == nil {
			_ = connection.Close()
			s.t.Errorf("port %s is open to all", port)
		}
	}
	connection, err := tls.DialWithDialer(&net.Dialer{Timeout: 3 * time.Second}, "tcp", net.JoinHostPort(s.host.address, "7381"), &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{"site-relay/openbao"},
	})
	if err != nil {
		s.t.Fatal(err) // under TLS 1.3 the refusal comes with the first read
	}
	defer func() { _ = connection.Close() }()
	if err := connection.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		s.t.Fatal(err)
	}
	if read, err := io.ReadAll(connection); err == nil || len(read) > 0 || !strings.Contains(err.Error(), "certificate required") {
		s.t.Errorf("a client without a certificate read %q, %v", read, err)
	}
}

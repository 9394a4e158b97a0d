package e2e

import (
	"fmt"
	"slices"
	"sort"
	"strings"
)

// state is all that a run that changes nothing must leave alone, one line for
// each thing: files with their change times, units with the times of their
// start, containers, and what Nomad keeps with its modify indexes.
type state []string

// snapshotState reads the host behind the product's back.
func (s *testSite) snapshotState() state {
	s.t.Helper()
	var lines state
	add := func(kind, text string) {
		for line := range strings.Lines(text) {
			lines = append(lines, kind+" "+strings.TrimSpace(line))
		}
	}
	// The time of the last status change (%C@) cannot be set back by a program.
	// The locks are no state: every run takes and releases them, and that touches
	// the folders that they lie in.
	add("file", s.host.shell(`find /etc /opt/site /var/lib/site /usr/local /root -xdev \
		! -path '/var/lib/site/lock.json*' ! -path /var/lib/site \
		! -path /var/lib/site/store ! -path /var/lib/site/store/lock \
		-printf '%p %y %m %U:%G %s %C@ %l\n'`))
	add("file", s.host.shell(`stat -c '%n %F %a %U:%G' /var/lib/site /var/lib/site/store /var/lib/nomad; ls /var/lib/site | grep -v ^lock`))
	add("package", s.host.exec("dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Status}\n"))
	add("unit", s.host.shell(`for unit in nomad.service site-host.service podman.socket; do
		systemctl show --property=InvocationID,ExecMainPID,ActiveEnterTimestampMonotonic,ActiveState,UnitFileState $unit | sed "s/^/$unit /"; done`))
	for _, each := range s.containers() {
		add("container", each.ID+" "+each.Image)
	}
	s.nomadState(add)
	if s.platform {
		s.platformState(add)
	}
	sort.Strings(lines)
	return lines
}

func (s *testSite) nomadState(add func(kind, text string)) {
	s.t.Helper()
	var jobs []struct {
		ID                          string
		ModifyIndex, JobModifyIndex uint64
	}
	s.nomad("/v1/jobs?namespace=*", &jobs)
	for _, job := range jobs {
		add("job", fmt.Sprint(job.ID, " ", job.ModifyIndex, " ", job.JobModifyIndex))
		var versions struct{ Versions []struct{ Version uint64 } }
		s.nomad("/v1/job/"+job.ID+"/versions", &versions)
		add("job", fmt.Sprint(job.ID, " versions ", len(versions.Versions)))
		var allocations []struct {
			ID          string
			CreateIndex uint64
		}
		s.nomad("/v1/job/"+job.ID+"/allocations", &allocations)
		for _, allocation := range allocations {
			add("allocation", fmt.Sprint(allocation.ID, " ", allocation.CreateIndex))
		}
	}
	var variables []struct {
		Path        string
		ModifyIndex uint64
	}
	s.nomad("/v1/vars", &variables)
	for _, each := range variables {
		add("variable", fmt.Sprint(each.Path, " ", each.ModifyIndex))
	}
	// Tokens are not among them: every login makes one.
	for kind, path := range map[string]string{"policy": "/v1/acl/policies", "role": "/v1/acl/roles", "method": "/v1/acl/auth-methods", "rule": "/v1/acl/binding-rules"} {
		var found []struct {
			ID, Name    string
			ModifyIndex uint64
		}
		s.nomad(path, &found)
		for _, each := range found {
			add(kind, fmt.Sprint(each.ID, each.Name, " ", each.ModifyIndex))
		}
	}
}

// diff lists what is not the same: "-" was there, "+" is there now.
func (before state) diff(after state) []string {
	var lines []string
	for _, line := range before {
		if _, found := slices.BinarySearch(after, line); !found {
			lines = append(lines, "- "+line)
		}
	}
	for _, line := range after {
		if _, found := slices.BinarySearch(before, line); !found {
			lines = append(lines, "+ "+line)
		}
	}
	return lines
}

// unchanged runs do and fails the test if anything on the host differs after it.
func (s *testSite) unchanged(what string, do func()) {
	s.t.Helper()
	before := s.snapshotState()
	do()
	if lines := before.diff(s.snapshotState()); len(lines) > 0 {
		s.t.Errorf("%s changed the host:\n%s", what, strings.Join(lines, "\n"))
	}
}

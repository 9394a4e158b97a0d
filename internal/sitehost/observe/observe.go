// Package observe looks at a machine, against the document that says what it
// must be. It is one shot, it changes nothing, and no file's content leaves it.
package observe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/nomad-site/site/internal/reconcile/host"
)

// Runner runs a program and returns what it printed.
type Runner func(ctx context.Context, name string, arguments ...string) ([]byte, error)

// Observer looks at one machine.
type Observer struct {
	// Root is put before every path; "/" on a host.
	Root string
	// Store is the path whose free bytes count.
	Store string
	Run   Runner
}

// New looks at this machine.
func New(store string) Observer { return Observer{Root: "/", Store: store, Run: Exec} }

// Exec runs a program in a clean, English environment.
func Exec(ctx context.Context, name string, arguments ...string) ([]byte, error) {
	command := exec.CommandContext(ctx, name, arguments...)
	command.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "TZ=UTC"}
	output, err := command.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return output, fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(exit.Stderr))
	}
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", name, err)
	}
	return output, nil
}

// Observe returns the actual state of everything that the document names.
func (o Observer) Observe(ctx context.Context, document host.Document) (host.Observation, error) {
	if document.Version != host.DocumentVersion {
		return host.Observation{}, fmt.Errorf("observe: the document has version %d, this site-host knows %d", document.Version, host.DocumentVersion)
	}
	observation := host.Observation{Version: host.DocumentVersion}
	// The programs take longest; files are hashed while they run.
	type outcome struct {
		packages map[string]Installed
		units    map[string]unitState
		err      error
	}
	asked := make(chan outcome, 1)
	go func() {
		var result outcome
		defer func() { asked <- result }()
		if result.packages, result.err = Packages(ctx, o.Run); result.err == nil {
			result.units, result.err = units(ctx, o.Run, document.Units)
		}
	}()
	accounts, err := readAccounts(o.Root)
	if err == nil {
		err = o.paths(ctx, document, accounts, &observation)
	}
	result := <-asked
	if err = errors.Join(err, result.err); err != nil {
		return host.Observation{}, fmt.Errorf("observe: %w", err)
	}
	accounts.observe(document, &observation)
	if err := o.packages(ctx, document, result.packages, &observation); err != nil {
		return host.Observation{}, fmt.Errorf("observe: %w", err)
	}
	if err := o.units(document, result.units, &observation); err != nil {
		return host.Observation{}, fmt.Errorf("observe: %w", err)
	}
	if err := o.machine(&observation); err != nil {
		return host.Observation{}, fmt.Errorf("observe: %w", err)
	}
	return observation, nil
}

func (o Observer) path(path string) string { return filepath.Join(o.Root, path) }

// accounts are the users and groups of /etc/passwd and /etc/group: what the
// host itself owns, without any directory service.
type accounts struct {
	users      map[string]host.User
	userNames  map[string]string // by number
	groupNames map[string]string
	groups     map[string]host.Group
}

func readAccounts(root string) (accounts, error) {
	read := accounts{users: map[string]host.User{}, userNames: map[string]string{}, groupNames: map[string]string{}, groups: map[string]host.Group{}}
	content, err := os.ReadFile(filepath.Join(root, "etc/group"))
	if err != nil {
		return accounts{}, err
	}
	for line := range strings.Lines(string(content)) {
		if fields := strings.Split(strings.TrimSpace(line), ":"); len(fields) >= 3 {
			if gid, err := strconv.Atoi(fields[2]); err == nil {
				read.groups[fields[0]] = host.Group{Name: fields[0], GID: gid}
			}
			if _, known := read.groupNames[fields[2]]; !known {
				read.groupNames[fields[2]] = fields[0]
			}
		}
	}
	if content, err = os.ReadFile(filepath.Join(root, "etc/passwd")); err != nil {
		return accounts{}, err
	}
	for line := range strings.Lines(string(content)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) < 7 {
			continue
		}
		var uid int
		if _, err := fmt.Sscanf(fields[2], "%d", &uid); err != nil {
			continue
		}
		read.users[fields[0]] = host.User{Name: fields[0], UID: uid, Group: nameOf(read.groupNames, fields[3]), Home: fields[5]}
		if _, known := read.userNames[fields[2]]; !known {
			read.userNames[fields[2]] = fields[0]
		}
	}
	return read, nil
}

func (a accounts) observe(document host.Document, observation *host.Observation) {
	observation.Groups, observation.Users = map[string]host.Group{}, map[string]host.User{}
	for _, group := range document.Groups {
		if found, ok := a.groups[group.Name]; ok {
			observation.Groups[group.Name] = found
		}
	}
	for _, user := range document.Users {
		if found, ok := a.users[user.Name]; ok {
			observation.Users[user.Name] = found
		}
	}
}

// nameOf keeps a number that has no name.
func nameOf(names map[string]string, number string) string {
	if name, ok := names[number]; ok {
		return name
	}
	return number
}

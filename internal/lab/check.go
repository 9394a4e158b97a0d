package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"github.com/nomad-site/site/internal/plan"
)

// Problem is one thing that this machine lacks for a lab.
type Problem struct {
	What string
	Fix  string
}

// Check finds what this machine lacks for a lab; it changes nothing.
func Check() []Problem {
	return problems(runtime.GOOS, os.Geteuid(), func(name string) bool {
		_, err := exec.LookPath(name)
		return err == nil
	})
}

// tools are the programs that a lab runs on the machine, and the Debian package of each.
func tools() [][2]string {
	return [][2]string{
		{"podman", "podman"},
		{"netavark", "netavark"},
		{"debootstrap", "debootstrap"},
		{"unshare", "util-linux"},
		{"nsenter", "util-linux"},
		{"mount", "mount"},
		{"ip", "iproute2"},
		{"cp", "coreutils"},
	}
}

func problems(system string, uid int, has func(string) bool) []Problem {
	if system != "linux" {
		return []Problem{{"a lab runs on Linux only", "run it in a Linux virtual machine"}}
	}
	var found []Problem
	if uid != 0 {
		found = append(found, Problem{"a lab needs root: it mounts, makes a bridge and boots hosts", "run the same command with sudo"})
	}
	for _, tool := range tools() {
		name, deb := tool[0], tool[1]
		if name == "netavark" {
			// It is not on the path: podman keeps it with its helpers.
			if has("/usr/lib/podman/netavark") || has("/usr/libexec/podman/netavark") || has("/usr/local/libexec/podman/netavark") {
				continue
			}
		} else if has(name) {
			continue
		}
		found = append(found, Problem{fmt.Sprintf("%s is not installed", name), "apt-get install " + deb})
	}
	return found
}

// checkMachine turns problems into one error with a hint per problem.
func checkMachine() error {
	found := Check()
	if len(found) == 0 {
		return nil
	}
	var all []error
	fixes := ""
	for _, each := range found {
		all = append(all, errors.New(each.What))
		if fixes != "" {
			fixes += "; "
		}
		fixes += each.Fix
	}
	return plan.WithHint(fmt.Errorf("start a lab on this machine: %w", errors.Join(all...)), "%s", fixes)
}

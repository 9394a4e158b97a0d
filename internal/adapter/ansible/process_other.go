//go:build !linux

package ansible

import (
	"os/exec"
	"syscall"
)

// run runs a command in a process group of its own.
func run(command *exec.Cmd) error {
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return command.Run()
}

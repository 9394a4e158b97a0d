package ansible

import (
	"os/exec"
	"runtime"
	"syscall"
)

// run runs a command in a process group of its own, which ends with us even
// where we are killed: the lock is free then, and the next run must not meet it.
func run(command *exec.Cmd) error {
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	// The signal comes when the thread ends that started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return command.Run()
}

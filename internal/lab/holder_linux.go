package lab

import "syscall"

// holderAttributes give the lab's holder mount and process namespaces of its own.
func holderAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}
}

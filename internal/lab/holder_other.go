//go:build !linux

package lab

import "syscall"

// holderAttributes are never used: Check refuses a machine without unshare.
func holderAttributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

package lease

import (
	"fmt"
	"os"
	"strings"
)

// processID names a process so that no later one has the same name, also after
// a reboot: the machine's boot, the number and the start. Empty where it cannot
// be told.
func processID(pid int) string {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The program's name stands in parentheses and may hold anything.
	_, after, found := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " ")
	fields := strings.Fields(after)
	const state, started = 0, 19 // as proc(5) counts them, less the two before
	if !found || len(fields) <= started || fields[state] == "Z" {
		return ""
	}
	return fmt.Sprintf("%s/%d/%s", strings.TrimSpace(string(boot)), pid, fields[started])
}

// dead reports whether the process that held a lock is gone, as after kill -9
// or a power cut; then its lease protects nobody.
func dead(process string) bool {
	parts := strings.Split(process, "/")
	if len(parts) != 3 {
		return false
	}
	var pid int
	if _, err := fmt.Sscan(parts[1], &pid); err != nil {
		return false
	}
	if processID(os.Getpid()) == "" { // no /proc here
		return false
	}
	return processID(pid) != process
}

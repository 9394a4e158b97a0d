package ssh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
)

// ErrConnectionLost says that the connection to a host broke or fell silent.
var ErrConnectionLost = errors.New("ssh connection lost")

// LostError is an ErrConnectionLost with the host and the cause.
type LostError struct {
	Host  string
	Cause error
}

func (e *LostError) Error() string {
	return fmt.Sprintf("host %s: %v: %v", e.Host, ErrConnectionLost, e.Cause)
}

// Unwrap makes errors.Is find ErrConnectionLost and the cause.
func (e *LostError) Unwrap() []error { return []error{ErrConnectionLost, e.Cause} }

// Hint implements plan.Hinter.
func (e *LostError) Hint() string {
	return "check the network and the host, then run the same command again: it goes on from where it stopped"
}

// HostKeyChangedError says that a host presented a key other than the pinned ones.
type HostKeyChangedError struct {
	Host    string
	Address string
	// Known are the SHA256 fingerprints that were expected, each with its type.
	Known []string
	// Places says where those were pinned, in the same order.
	Places []string
	// Presented is the SHA256 fingerprint of what the host showed, with its type.
	Presented string
}

func (e *HostKeyChangedError) Error() string {
	return fmt.Sprintf("host key of %s (%s) changed: pinned %s, presented %s",
		e.Host, e.Address, strings.Join(e.Known, " or "), e.Presented)
}

// Hint implements plan.Hinter.
func (e *HostKeyChangedError) Hint() string {
	return fmt.Sprintf("someone may be in between, or the host was installed anew; compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on its console, then remove the old key from %s",
		strings.Join(e.Places, ", "))
}

// HostKeyUnknownError says that no key is pinned for a host.
type HostKeyUnknownError struct {
	Host      string
	Address   string
	Presented string
}

func (e *HostKeyUnknownError) Error() string {
	return fmt.Sprintf("host key of %s (%s) is not pinned: presented %s", e.Host, e.Address, e.Presented)
}

// Hint implements plan.Hinter.
func (e *HostKeyUnknownError) Hint() string {
	return "compare it with the host's console or cloud panel, then pin it in site.hcl, or pass --accept-new-host-key once to record it"
}

// HostKeyRevokedError says that a known_hosts file marks the presented key as revoked.
type HostKeyRevokedError struct {
	Host      string
	Presented string
	Place     string
}

func (e *HostKeyRevokedError) Error() string {
	return fmt.Sprintf("host key of %s is revoked by %s: presented %s", e.Host, e.Place, e.Presented)
}

// Hint implements plan.Hinter.
func (e *HostKeyRevokedError) Hint() string { return "give the host a new key before you use it" }

// AuthError says that a host accepted none of the identities.
type AuthError struct {
	Host string
	User string
	// Tried names each identity that was offered, or why it could not be.
	Tried []string
	Err   error
}

func (e *AuthError) Error() string {
	tried := "no identity was found"
	if len(e.Tried) > 0 {
		tried = "tried " + strings.Join(e.Tried, ", ")
	}
	return fmt.Sprintf("log in to %s as %s: permission denied: %s", e.Host, e.User, tried)
}

func (e *AuthError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *AuthError) Hint() string {
	all := strings.Join(e.Tried, " ")
	switch {
	case e.Err != nil && strings.Contains(e.Err.Error(), "Too many authentication failures"):
		return "the agent holds more keys than the host lets one try: name one with IdentityFile and set IdentitiesOnly yes in the ssh config"
	case strings.Contains(all, encryptedNotice):
		return "load the encrypted key into the agent: ssh-add <file>"
	case len(e.Tried) == 0:
		return "start an ssh-agent and ssh-add your key, or name one with IdentityFile in the ssh config"
	default:
		return fmt.Sprintf("put one of these public keys into ~/.ssh/authorized_keys of %s on the host, or name another key with IdentityFile", e.User)
	}
}

// ConnectReason classifies why no connection came about.
type ConnectReason string

// The reasons.
const (
	Refused     ConnectReason = "connection refused"
	TimedOut    ConnectReason = "timed out"
	Unreachable ConnectReason = "unreachable"
	NoSuchName  ConnectReason = "no such host name"
	NotSSH      ConnectReason = "handshake failed"
	Failed      ConnectReason = "failed"
)

// ConnectError says why no SSH connection came about.
type ConnectError struct {
	Host    string
	Address string
	Reason  ConnectReason
	Err     error
}

func (e *ConnectError) Error() string {
	return fmt.Sprintf("connect to %s (%s): %s: %v", e.Host, e.Address, e.Reason, e.Err)
}

func (e *ConnectError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *ConnectError) Hint() string {
	switch e.Reason {
	case Refused:
		return "is sshd running there, and is the port right?"
	case TimedOut, Unreachable:
		return "is the host up, and does a firewall or a missing VPN stand in between?"
	case NoSuchName:
		return "check the host's address in site.hcl and HostName in the ssh config"
	case NotSSH:
		return "is it an SSH server that listens there, and does it still accept connections?"
	default:
		return "try `ssh -v` with the same host"
	}
}

func newConnectError(host, address string, err error) *ConnectError {
	reason := Failed
	var lookup *net.DNSError
	var timeout net.Error
	switch {
	case errors.As(err, &lookup) && lookup.IsNotFound:
		reason = NoSuchName
	case errors.Is(err, syscall.ECONNREFUSED):
		reason = Refused
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		reason = Unreachable
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		reason = TimedOut
	}
	return &ConnectError{Host: host, Address: address, Reason: reason, Err: err}
}

// ExitError says that a command on a host ended with another code than 0.
type ExitError struct {
	Host    string
	Command string
	// Code is 128 + n, as in a shell, where a signal ended the command.
	Code   int
	Signal string
	// Stderr is the tail of what the command wrote there.
	Stderr string
}

func (e *ExitError) Error() string {
	how := fmt.Sprintf("exit code %d", e.Code)
	if e.Signal != "" {
		how = "signal " + e.Signal
	}
	text := fmt.Sprintf("run %s on %s: %s", e.Command, e.Host, how)
	if last := strings.TrimSpace(e.Stderr); last != "" {
		text += ": " + last
	}
	return text
}

// SudoError says that the user is not root and cannot become it.
type SudoError struct {
	Host string
	User string
	// Missing is set where sudo is not installed.
	Missing bool
	Output  string
}

func (e *SudoError) Error() string {
	if e.Missing {
		return fmt.Sprintf("become root on %s: user %s is not root and sudo is not installed", e.Host, e.User)
	}
	return fmt.Sprintf("become root on %s: sudo refuses user %s without a password: %s", e.Host, e.User, e.Output)
}

// Hint implements plan.Hinter.
func (e *SudoError) Hint() string {
	if e.Missing {
		return "log in as root for the first deploy, or install sudo on the host"
	}
	return fmt.Sprintf("on the host, write `%s ALL=(ALL) NOPASSWD: ALL` to /etc/sudoers.d/%s, or log in as root", e.User, e.User)
}

// DiskFullError says that a host has no room for what was put there.
type DiskFullError struct {
	Host string
	Path string
	Size int64
	Err  error
}

func (e *DiskFullError) Error() string {
	return fmt.Sprintf("put %s on %s: no space left for %d bytes", e.Path, e.Host, e.Size)
}

func (e *DiskFullError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *DiskFullError) Hint() string {
	return fmt.Sprintf("make room on the file system of %s (df -h, df -i), then run again", e.Path)
}

// DigestError says that bytes were not those that their digest promises.
type DigestError struct {
	Host string
	Path string
	Want string
	Got  string
	// AtSource is set where the bytes were wrong before they were sent.
	AtSource bool
}

func (e *DigestError) Error() string {
	where := "arrived with"
	if e.AtSource {
		where = "were read with"
	}
	return fmt.Sprintf("put %s on %s: bytes %s digest sha256:%s instead of sha256:%s", e.Path, e.Host, where, e.Got, e.Want)
}

// Hint implements plan.Hinter.
func (e *DigestError) Hint() string {
	if e.AtSource {
		return "the file on this machine is not the pinned one: build or fetch it again"
	}
	return "the bytes were damaged on the way or on the host's disk: run again, and check the disk if it stays"
}

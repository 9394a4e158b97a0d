package deploy

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/user"
	"time"

	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/sitehost/lease"
)

// takeLock holds the site's lock on the first server host until the session
// ends. A dry run takes none: it writes nothing.
func (s *session) takeLock(reason string) plan.Step {
	return check{title: "lock", run: func(ctx context.Context) error {
		if s.options.DryRun {
			return nil
		}
		h := s.servers()[0]
		id := rand.Text()
		args := []string{
			host.SiteHostPath, "lock", "acquire", "--hold", "--file", host.LockPath, "--id", id,
			"--holder", holderName(), "--reason", reason, "--lease", "60s", "--heartbeat", heartbeatLimit.String(),
		}
		if s.options.TakeOverLock != "" {
			args = append(args, "--takeover", s.options.TakeOverLock)
		}
		// Not ctx: the lock must outlive a cancelled run until its clean-up is done.
		holding, err := h.conn.Start(context.WithoutCancel(ctx), args)
		if err != nil {
			return err
		}
		line, readErr := bufio.NewReader(holding).ReadBytes('\n')
		var current lease.Lock
		if readErr == nil {
			readErr = json.Unmarshal(line, &current)
		}
		if readErr != nil {
			_ = holding.CloseWrite()
			err := holding.Wait()
			return fmt.Errorf("take the lock on %s: %w", h.Name, errors.Join(err, readErr))
		}
		if current.ID != id { // refused: it printed the lock that is held
			_ = holding.Close()
			return &LockedError{
				Site: s.site.Name, ID: current.ID, Holder: current.Holder, Reason: current.Reason,
				Since: current.Since, Until: current.LeaseUntil,
			}
		}
		ended := s.attend(holding)
		s.onClose(func() {
			_ = holding.CloseWrite() // site-host releases the lock at the end of its input
			<-ended
		})
		return nil
	}}
}

const (
	heartbeat = 5 * time.Second
	// heartbeatLimit is when a holder counts as gone: a host that a broken
	// network cuts off hears no end, only silence.
	heartbeatLimit = 30 * time.Second
)

// attend keeps telling the host that we live, and ends the run when the lock is
// lost: two runs at a time are worse than none.
func (s *session) attend(holding *ssh.Process) (ended <-chan struct{}) {
	over := make(chan struct{})
	go func() {
		ticker := time.NewTicker(heartbeat)
		defer ticker.Stop()
		for {
			select {
			case <-over:
				return
			case <-ticker.C:
				_, _ = holding.Write([]byte("\n")) // a failure ends Wait too
			}
		}
	}()
	go func() {
		defer close(over)
		err := holding.Wait()
		if !errors.Is(err, ssh.ErrConnectionLost) {
			err = &LockLostError{Site: s.site.Name, Err: err}
		}
		s.abort(err) // does nothing after the run's end
	}()
	return over
}

// LockLostError ends a run whose lock is no longer its own.
type LockLostError struct {
	Site string
	Err  error
}

func (e *LockLostError) Error() string {
	return fmt.Sprintf("the lock of site %q was lost: %v", e.Site, e.Err)
}

func (e *LockLostError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (*LockLostError) Hint() string {
	return "somebody took it over, or this machine slept; run it again: it goes on from here"
}

// holderName tells other operators who holds the lock.
func holderName() string {
	name := "unknown"
	if current, err := user.Current(); err == nil {
		name = current.Username
	}
	machine, err := os.Hostname()
	if err != nil {
		return name
	}
	return name + "@" + machine
}

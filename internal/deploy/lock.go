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
			"--holder", holderName(), "--reason", reason, "--lease", "60s",
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
		s.onClose(func() {
			_ = holding.CloseWrite() // site-host releases the lock at the end of its input
			_ = holding.Wait()
		})
		return nil
	}}
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

package deploy

import (
	"errors"
	"fmt"
	"io"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
)

// finish ends a protocol that ran over a remote command. Where the protocol
// failed without saying much, what the command wrote to stderr explains it.
func finish(process *ssh.Process, err error) error {
	if err == nil {
		_ = process.CloseWrite()
		return process.Wait()
	}
	said := process.Stderr()
	_ = process.Close()
	if errors.Is(err, io.ErrUnexpectedEOF) {
		// The command ended in the middle: how it did says more.
		if ended := process.Wait(); errors.Is(ended, ssh.ErrConnectionLost) {
			return ended
		} else if ended != nil {
			return plan.WithHint(fmt.Errorf("%w: %w", err, ended), "run it again: what arrived is kept; if it stays, see `journalctl` on the host")
		}
	}
	if said != "" {
		return fmt.Errorf("%w (site-host said: %s)", err, said)
	}
	return err
}

// Verdicts collects what failed rollouts say, from anywhere in err.
func Verdicts(err error) []nomad.Verdict {
	var verdicts []nomad.Verdict
	plan.EachError(err, func(one error) bool {
		if rollout, ok := one.(*nomad.RolloutError); ok { //nolint:errorlint // each node of the tree is looked at
			verdicts = append(verdicts, rollout.Verdict)
		}
		return true
	})
	return verdicts
}

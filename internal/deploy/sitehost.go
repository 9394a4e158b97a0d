package deploy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"

	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
)

// placeSiteHost puts our static binary on every host over plain SSH: it is the
// first thing there, and all that comes later goes through it.
func (s *session) placeSiteHost() plan.Step {
	type wanted map[string][]byte // by platform
	return &plan.Reconciler[wanted, perHost[string]]{
		Title: "site-host",
		Desire: func(context.Context) (wanted, error) {
			desired := wanted{}
			for _, h := range s.hosts {
				content, err := s.options.Platform.SiteHost(h.platform)
				if err != nil {
					return nil, err
				}
				desired[h.platform] = content
			}
			return desired, nil
		},
		Observe: func(_ context.Context, _ wanted) (perHost[string], error) {
			actual := perHost[string]{}
			for _, h := range s.hosts {
				actual[h.Name] = h.siteHostDigest
			}
			return actual, nil
		},
		Diff: func(desired wanted, actual perHost[string]) []plan.Change {
			var changes []plan.Change
			for _, h := range s.hosts {
				content := desired[h.platform]
				change := plan.Change{
					Action: plan.Upload, Kind: "binary", Host: h.Name, Target: host.SiteHostPath, Bytes: int64(len(content)),
				}
				switch digest := actual[h.Name]; {
				case digest == hexSum(content):
					continue
				case digest == "":
					change.Reason = "missing"
				default:
					change.Reason = "another version"
				}
				changes = append(changes, change)
			}
			return changes
		},
		Converge: func(ctx context.Context, desired wanted, _ perHost[string], _ []plan.Change, progress plan.Progress) error {
			return s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
				content := desired[h.platform]
				digest := hexSum(content)
				if h.siteHostDigest == digest {
					return nil
				}
				_, err := ssh.PutBinary(ctx, h.conn, bytes.NewReader(content), int64(len(content)), digest, host.SiteHostPath, 0o755,
					func(done, total int64) { progress.Bytes("site-host to "+h.Name, done, total) })
				if err == nil {
					h.siteHostDigest = digest
				}
				return err
			})
		},
	}
}

func hexSum(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

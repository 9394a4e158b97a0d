package objectstore

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
	"github.com/nomad-site/site/internal/writesession/contract"
)

func TestWriteSessionsKeepTheirPromisesOnARealStore(t *testing.T) {
	g := startGateway(t)
	for name, enforces := range map[string]bool{"that enforces hashes": true, "that does not": false} {
		t.Run(name, func(t *testing.T) {
			cases := 0
			contract.Run(t, func(t *testing.T) contract.Store {
				cases++
				b := g.bucket(t, g.admin)
				store := contract.Store{Bucket: b, HTTP: b.http, Enforces: enforces, Site: fmt.Sprintf("gamma-%t-%d", enforces, cases)}
				if !enforces {
					store.Bucket = unhashed{b}
				}
				return store
			})
		})
	}
}

// unhashed signs nothing of what is uploaded: the gateway takes any bytes of any size.
type unhashed struct{ *Bucket }

// PresignPut implements writesession.Bucket.
func (u unhashed) PresignPut(ctx context.Context, key string, _ blob.Digest, _ int64, ttl time.Duration) (writesession.Put, error) {
	return u.presign(ctx, key, nil, 0, ttl)
}

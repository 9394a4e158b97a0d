package server_test

import (
	"testing"
	"time"

	"github.com/nomad-site/site/internal/writesession/contract"
	"github.com/nomad-site/site/internal/writesession/storetest"
)

// faster is how much sooner a second has passed for the store than for the test.
const faster = 25

func TestTheServiceKeepsItsPromisesOnAStoreInMemory(t *testing.T) {
	for name, enforces := range map[string]bool{"enforcing hashes": true, "not enforcing hashes": false} {
		t.Run(name, func(t *testing.T) {
			contract.Run(t, func(t *testing.T) contract.Store {
				start := time.Now()
				store := storetest.New(t, storetest.Options{
					Enforces: enforces, OneWritePerSecond: true,
					Now: func() time.Time { return start.Add(faster * time.Since(start)) },
				})
				return contract.Store{Bucket: store, Enforces: enforces}
			})
		})
	}
}

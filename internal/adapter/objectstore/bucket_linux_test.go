package objectstore

import (
	"context"
	"net"
	"testing"

	"github.com/nomad-site/site/internal/writesession/storetest"
)

func TestARealStoreBehavesAsABucketDoes(t *testing.T) {
	g := startGateway(t)
	b := g.bucket(t, g.admin)
	storetest.Behave(t, storetest.Case{Bucket: b, HTTP: b.http, Enforces: true})
}

func TestARealStoreThatKnowsNoChecksumBehavesAsABucketDoes(t *testing.T) {
	g := startGateway(t)
	b := g.bucket(t, g.admin)
	storetest.Behave(t, storetest.Case{Bucket: unhashed{b}, HTTP: b.http})
}

func TestABucketMayBeInTheHostsNameAndBehindATunnel(t *testing.T) {
	const domain = "store.test"
	g := startGateway(t, "--virtual-domain", domain)
	b := g.bucket(t, g.admin, func(o *Options) {
		o.Endpoint, o.PathStyle = "http://"+domain, false
		o.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if want := testBucket + "." + domain + ":80"; address != want {
				t.Errorf("it dials %s, want %s", address, want)
			}
			return (&net.Dialer{}).DialContext(ctx, network, g.address)
		}
	})
	storetest.Behave(t, storetest.Case{Bucket: b, HTTP: b.http, Enforces: true})
}

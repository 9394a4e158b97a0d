package openbao

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// roundTrip is that of the connection under measurement, such as to a host in
// the same country.
const roundTrip = 20 * time.Millisecond

// BenchmarkSecondReconcile looks at a converged site of 50 jobs with 200 secrets
// (50 policies, 50 roles): as site does it, and as a plain loop that asks for
// the same things one by one. The second must write nothing.
func BenchmarkSecondReconcile(b *testing.B) {
	s := ownServerOf(b, largeSite(50, 4))
	if err := s.bootstrap(b.Context()); err != nil {
		b.Fatal(err)
	}
	catalogue := largeSite(50, 4).Secrets()
	root := s.client(b, s.rootToken)
	for _, entry := range catalogue {
		if _, err := root.Write(b.Context(), entry, secret.New("value"), 0, nil); err != nil {
			b.Fatal(err)
		}
	}
	slow, err := New(Options{Address: s.address, Token: s.rootToken, Dial: far})
	if err != nil {
		b.Fatal(err)
	}
	defer slow.Close()
	for name, look := range map[string]func(context.Context) error{
		"site": func(ctx context.Context) error {
			have, err := slow.ObserveEngine(ctx, s.want)
			if err != nil {
				return err
			}
			if changes := reconcile.DiffEngine(s.want, have); len(changes) > 0 {
				return fmt.Errorf("not converged: %v", changes)
			}
			entries, err := slow.ObserveEntries(ctx, catalogue)
			if err != nil {
				return err
			}
			if changes, _ := reconcile.Diff(catalogue, entries, reconcile.DiffOptions{}); len(changes) > 0 {
				return fmt.Errorf("not converged: %v", changes)
			}
			return nil
		},
		"one by one": func(ctx context.Context) error {
			paths := []string{"sys/audit", "sys/mounts", "sys/auth", "site/config"}
			for _, mount := range s.want.Auth {
				paths = append(paths, "auth/"+mount.Path+"/config")
			}
			for policy := range s.want.Policies {
				paths = append(paths, "sys/policies/acl/"+policy)
			}
			for _, role := range s.want.Roles {
				paths = append(paths, rolePath(role))
			}
			for _, entry := range catalogue {
				paths = append(paths, metadataPath(entry))
			}
			for _, path := range paths {
				if _, err := slow.read(ctx, path); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		b.Run(name, func(b *testing.B) {
			_, offset := s.requests(b, 0)
			for b.Loop() {
				if err := look(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
			all, _ := s.requests(b, offset)
			writes, _ := s.mutations(b, offset)
			b.ReportMetric(float64(len(all))/float64(b.N), "requests/op")
			b.ReportMetric(float64(len(writes))/float64(b.N), "writes/op")
		})
	}
}

func largeSite(jobs, secrets int) *site.Site {
	large := &site.Site{Name: "large"}
	for i := range jobs {
		component := site.Component{Name: fmt.Sprintf("job%02d", i)}
		for j := range secrets {
			entry := site.Secret{Component: component.Name, Name: fmt.Sprintf("secret%02d", j), Generated: &site.Generated{}}
			component.Secrets = append(component.Secrets, entry)
			component.Reads = append(component.Reads, site.SecretRead{Secret: entry.FullName()})
		}
		large.Components = append(large.Components, component)
	}
	return large
}

// far dials as if the engine were a round trip away.
func far(ctx context.Context, network, address string) (net.Conn, error) {
	connection, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return farConnection{connection}, nil
}

type farConnection struct{ net.Conn }

func (c farConnection) Write(content []byte) (int, error) {
	<-time.After(roundTrip) // the answer is that much later
	return c.Conn.Write(content)
}

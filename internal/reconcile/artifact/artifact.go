// Package artifact holds the pure half of bringing artifacts to hosts: what
// should be served there, what is, and what has to travel.
package artifact

import (
	"fmt"

	"github.com/nomad-site/site/internal/plan"
)

// Kind is the plan.Change kind of every change to an artifact.
const Kind = "artifact"

// Desired is one artifact that a host must serve.
type Desired struct {
	// Name is "<site>/<artifact>".
	Name   string
	Digest string
	// Size is the plain length of all its blobs, in bytes.
	Size int64
}

// Actual is what a host said of one artifact.
type Actual struct {
	// Published: the host serves this digest under this name.
	Published bool
	// MissingBlobs and MissingBytes are what would travel, uncompressed.
	MissingBlobs int
	MissingBytes int64
}

// Diff names what has to travel to host. actual has one entry for each desired
// artifact, in the same order.
func Diff(host string, desired []Desired, actual []Actual) []plan.Change {
	var changes []plan.Change
	for i, want := range desired {
		have := actual[i]
		if have.Published && have.MissingBlobs == 0 {
			continue
		}
		change := plan.Change{
			Action: plan.Upload, Kind: Kind, Host: host, Target: want.Name + "@" + want.Digest, Bytes: have.MissingBytes,
		}
		switch {
		case have.MissingBytes == 0:
			change.Reason = "its bytes are there, its name is not"
		case have.MissingBytes < want.Size:
			change.Reason = fmt.Sprintf("%d of %d bytes missing", have.MissingBytes, want.Size)
		default:
			change.Reason = "missing"
		}
		changes = append(changes, change)
	}
	return changes
}

package artifact

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// ReleaseArtifacts is what one release put on the hosts: digests by component and
// artifact.
type ReleaseArtifacts map[string]map[string]string

// Retention is all that decides which artifacts stay.
type Retention struct {
	// Releases are those that are recorded, newest first.
	Releases []ReleaseArtifacts
	// KeepReleases is how many states of each component stay, the current one
	// included. Below 1 it is 1: what was deployed last never goes.
	KeepReleases int
	// Running are the digests that tasks run on, by artifact.
	Running map[string][]string
	// Platform are the digests of what site itself needs on the hosts, by artifact.
	Platform map[string][]string
}

// Kept is an artifact that stays, and why.
type Kept struct {
	Artifact string
	Digest   string
	Reason   string
}

// The reasons for which an artifact stays, beside "release 2 of 5".
const (
	KeptPlatform = "platform"
	KeptRunning  = "running"
)

// Keep names what stays, sorted by artifact and digest, each once with its
// strongest reason. Everything else may go.
func Keep(in Retention) []Kept {
	reasons := map[Kept]string{} // by artifact and digest
	give := func(artifact, digest, reason string) {
		key := Kept{Artifact: artifact, Digest: digest}
		if _, known := reasons[key]; !known && digest != "" {
			reasons[key] = reason
		}
	}
	for _, group := range []struct {
		reason  string
		digests map[string][]string
	}{{KeptPlatform, in.Platform}, {KeptRunning, in.Running}} {
		for artifact, digests := range group.digests {
			for _, digest := range digests {
				give(artifact, digest, group.reason)
			}
		}
	}
	keep := max(in.KeepReleases, 1)
	states := componentStates(in.Releases, keep)
	// Release by release: of two components with one artifact, the newer state counts.
	for number := range keep {
		for _, of := range states {
			if number >= len(of) {
				continue
			}
			for artifact, digest := range of[number] {
				give(artifact, digest, fmt.Sprintf("release %d of %d", number+1, keep))
			}
		}
	}
	kept := make([]Kept, 0, len(reasons))
	for key, reason := range reasons {
		key.Reason = reason
		kept = append(kept, key)
	}
	slices.SortFunc(kept, func(a, b Kept) int {
		return cmp.Or(strings.Compare(a.Artifact, b.Artifact), strings.Compare(a.Digest, b.Digest))
	})
	return kept
}

// componentStates are the newest states of each component, newest first. A release
// in which a component was as in a newer one counts for it no second time, so that
// many deploys of one component push out nothing of another.
func componentStates(releases []ReleaseArtifacts, most int) map[string][]map[string]string {
	states := map[string][]map[string]string{}
	for _, release := range releases {
		for component, artifacts := range release {
			of := states[component]
			known := slices.ContainsFunc(of, func(state map[string]string) bool { return maps.Equal(state, artifacts) })
			if len(of) < most && !known {
				states[component] = append(of, artifacts)
			}
		}
	}
	return states
}

package artifact_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/reconcile/artifact"
)

// one is a release in which each component has one artifact of its own name.
func one(pairs ...string) artifact.ReleaseArtifacts {
	release := artifact.ReleaseArtifacts{}
	for _, pair := range pairs {
		name, digest, _ := strings.Cut(pair, "=")
		release[name] = map[string]string{name: digest}
	}
	return release
}

func TestKeep(t *testing.T) {
	for _, test := range []struct {
		name string
		in   artifact.Retention
		want []string
	}{
		{"nothing was deployed yet", artifact.Retention{KeepReleases: 5}, nil},
		{"the newest states stay, and older ones go", artifact.Retention{
			KeepReleases: 2, Releases: []artifact.ReleaseArtifacts{one("web=3"), one("web=2"), one("web=1")},
		}, []string{"web@2 release 2 of 2", "web@3 release 1 of 2"}},
		{"a release that changed another component does not count", artifact.Retention{
			KeepReleases: 2, Releases: []artifact.ReleaseArtifacts{
				one("web=2", "api=9"), one("web=2", "api=8"), one("web=2", "api=7"), one("web=1", "api=7"), one("web=0", "api=7"),
			},
		}, []string{"api@8 release 2 of 2", "api@9 release 1 of 2", "web@1 release 2 of 2", "web@2 release 1 of 2"}},
		{"going back and forth counts each state once", artifact.Retention{
			KeepReleases: 3, Releases: []artifact.ReleaseArtifacts{one("web=a"), one("web=b"), one("web=a"), one("web=b"), one("web=c")},
		}, []string{"web@a release 1 of 3", "web@b release 2 of 3", "web@c release 3 of 3"}},
		{"a component that a deploy left out keeps its states", artifact.Retention{
			KeepReleases: 1, Releases: []artifact.ReleaseArtifacts{one("api=2"), one("api=1", "web=1")},
		}, []string{"api@2 release 1 of 1", "web@1 release 1 of 1"}},
		{"what was deployed last stays whatever is asked for", artifact.Retention{
			KeepReleases: 0, Releases: []artifact.ReleaseArtifacts{one("web=2"), one("web=1")},
		}, []string{"web@2 release 1 of 1"}},
		{"what runs stays, in a release or in none", artifact.Retention{
			KeepReleases: 1, Releases: []artifact.ReleaseArtifacts{one("web=2"), one("web=1")},
			Running: map[string][]string{"web": {"1", "2"}, "old": {"0"}},
		}, []string{"old@0 running", "web@1 running", "web@2 running"}},
		{"the platform's come before all", artifact.Retention{
			KeepReleases: 1, Releases: []artifact.ReleaseArtifacts{one("openbao=1")},
			Running: map[string][]string{"openbao": {"1"}}, Platform: map[string][]string{"openbao": {"1"}, "nomad": {"5"}},
		}, []string{"nomad@5 platform", "openbao@1 platform"}},
		{"an artifact of two components has the newer one's reason", artifact.Retention{
			KeepReleases: 2, Releases: []artifact.ReleaseArtifacts{
				{"a": {"shared": "1"}, "b": {"shared": "2"}}, {"a": {"shared": "1"}, "b": {"shared": "1"}},
			},
		}, []string{"shared@1 release 1 of 2", "shared@2 release 1 of 2"}},
		{"a component of several artifacts is one state", artifact.Retention{
			KeepReleases: 2, Releases: []artifact.ReleaseArtifacts{
				{"web": {"app": "2", "rules": "1"}}, {"web": {"app": "1", "rules": "1"}}, {"web": {"app": "1", "rules": "0"}},
			},
		}, []string{"app@1 release 2 of 2", "app@2 release 1 of 2", "rules@1 release 1 of 2"}},
		{"an artifact without a digest is none", artifact.Retention{
			KeepReleases: 2, Releases: []artifact.ReleaseArtifacts{one("web=")}, Running: map[string][]string{"web": {""}},
		}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []string
			for _, kept := range artifact.Keep(test.in) {
				got = append(got, kept.Artifact+"@"+kept.Digest+" "+kept.Reason)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(test.want, "\n"))
			}
		})
	}
}

package job_test

import (
	"slices"
	"testing"

	"github.com/nomad-site/site/internal/reconcile/job"
	"github.com/nomad-site/site/internal/site"
)

func TestWavesPutEachComponentAfterWhatItNeeds(t *testing.T) {
	component := func(name string, after ...string) site.Component { return site.Component{Name: name, After: after} }
	for _, test := range []struct {
		name       string
		components []site.Component
		want       [][]string
	}{
		{"nothing gives no wave", nil, nil},
		{"what needs nothing starts together", []site.Component{component("b"), component("a")}, [][]string{{"b", "a"}}},
		{
			"a chain gives one wave each",
			[]site.Component{component("web", "api"), component("api", "db"), component("db")},
			[][]string{{"db"}, {"api"}, {"web"}},
		},
		{
			"a diamond gives three",
			[]site.Component{component("top", "left", "right"), component("left", "base"), component("right", "base"), component("base")},
			[][]string{{"base"}, {"left", "right"}, {"top"}},
		},
		{
			"who reads what another's job produces comes after it",
			[]site.Component{
				{
					Name:    "shop",
					Secrets: []site.Secret{{Component: "shop", Name: "token", ProducedBy: &site.Producer{Component: "broker"}}},
					Reads:   []site.SecretRead{{Secret: "shop.token"}},
				},
				component("broker"),
			},
			[][]string{{"broker"}, {"shop"}},
		},
		{"a name outside the list holds nothing back", []site.Component{component("web", "db")}, [][]string{{"web"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got [][]string
			for _, wave := range job.Waves(test.components, (&site.Site{Components: test.components}).WaitsFor) {
				var names []string
				for _, c := range wave {
					names = append(names, c.Name)
				}
				got = append(got, names)
			}
			if !slices.EqualFunc(got, test.want, slices.Equal[[]string]) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

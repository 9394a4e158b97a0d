package job

import "github.com/nomad-site/site/internal/site"

// Waves groups components so that each comes after all that it names in
// `after`; what can start together is in one wave, in the order given. Names
// outside the list do not hold anything back. The configuration has no cycles:
// site.Load refuses them.
func Waves(components []site.Component) [][]site.Component {
	waiting := map[string]bool{}
	for _, component := range components {
		waiting[component.Name] = true
	}
	var waves [][]site.Component
	for rest := components; len(rest) > 0; {
		var wave, later []site.Component
		for _, component := range rest {
			if blocked(component, waiting) {
				later = append(later, component)
			} else {
				wave = append(wave, component)
			}
		}
		if len(wave) == 0 {
			return append(waves, rest)
		}
		for _, component := range wave {
			delete(waiting, component.Name)
		}
		waves, rest = append(waves, wave), later
	}
	return waves
}

func blocked(component site.Component, waiting map[string]bool) bool {
	for _, name := range component.After {
		if waiting[name] && name != component.Name {
			return true
		}
	}
	return false
}

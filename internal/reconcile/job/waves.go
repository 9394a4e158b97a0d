package job

import "github.com/nomad-site/site/internal/site"

// Waves groups components so that each comes after all that it waits for; what
// can start together is in one wave, in the order given. Names outside the list
// do not hold anything back. waitsFor is (*site.Site).WaitsFor: `after` and
// produced secrets. The configuration has no cycles: site.Load refuses them.
func Waves(components []site.Component, waitsFor func(component string) []string) [][]site.Component {
	waiting := map[string]bool{}
	for _, component := range components {
		waiting[component.Name] = true
	}
	var waves [][]site.Component
	for rest := components; len(rest) > 0; {
		var wave, later []site.Component
		for _, component := range rest {
			if blocked(component.Name, waitsFor(component.Name), waiting) {
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

func blocked(component string, needs []string, waiting map[string]bool) bool {
	for _, name := range needs {
		if waiting[name] && name != component {
			return true
		}
	}
	return false
}

package site

import (
	"fmt"
	"reflect"
	"slices"

	"github.com/hashicorp/hcl/v2"
)

// placedComponent is a component with the places of its attributes.
type placedComponent struct {
	Component
	body hcl.Body // nil where component.hcl could not be decoded
	file hcl.Range
	// decoded and facts are nil where the file could not be read.
	decoded *componentFile
	facts   *jobspecFacts
}

func (c placedComponent) afterRange(index int) hcl.Range {
	if c.body == nil {
		return c.file
	}
	return atElement(c.body, "after", index)
}

// activeNames lists the names that a site makes active, readable or not: a component
// that is broken is no reason to call a reference to it unknown.
func activeNames(blocks []*useBlock) []string {
	var names []string
	for _, block := range blocks {
		names = append(names, block.Name)
	}
	return names
}

// checkOrder reports references of after to nothing, and cycles.
func checkOrder(s *Site, components []placedComponent, active []string, p *problems) {
	byName := map[string]placedComponent{}
	for _, c := range components {
		byName[c.Name] = c
		for i, name := range c.After {
			switch {
			case slices.Index(c.After, name) < i:
				p.add(c.afterRange(i), "Duplicate reference", "%q is already in after.", name)
			case !slices.Contains(active, name):
				p.add(c.afterRange(i), "Unknown component in after", "No component %q is active on this site.%s", name, didYouMean(name, without(active, c.Name), "other components"))
			}
		}
	}
	needs := func(name string) []need {
		if c, exists := byName[name]; exists {
			return s.needs(&c.Component)
		}
		return nil
	}
	reported := map[string]bool{}
	for _, c := range components {
		if reported[c.Name] {
			continue
		}
		cycle := shortestCycle(c.Name, needs)
		if cycle == nil {
			continue
		}
		text := c.Name
		for _, step := range cycle {
			reported[step.component] = true
			text += " waits for " + step.component
			if step.read != nil {
				text += fmt.Sprintf(" (which produces %s)", step.read.Secret)
			}
		}
		subject := c.afterRange(slices.Index(c.After, cycle[0].component))
		if read := cycle[0].read; read != nil {
			subject = read.Range
		}
		p.add(subject, "Components wait for each other", "%s.", text)
	}
}

// shortestCycle walks breadth first from start back to start, and returns what
// is waited for on the way, start last.
func shortestCycle(start string, needs func(string) []need) []need {
	type trail struct {
		at  string
		way []need
	}
	queue, seen := []trail{{at: start}}, map[string]bool{}
	for len(queue) > 0 {
		current := queue[0]
		queue = queue[1:]
		for _, next := range needs(current.at) {
			way := append(slices.Clone(current.way), next)
			if next.component == start {
				return way
			}
			if !seen[next.component] {
				seen[next.component] = true
				queue = append(queue, trail{next.component, way})
			}
		}
	}
	return nil
}

// checkShared reports artifacts and directories that two components declare
// differently: they are one thing on the hosts.
func checkShared(components []placedComponent, p *problems) {
	type owner struct {
		component string
		value     any
	}
	seen := map[string]owner{}
	check := func(c placedComponent, key, what string, value any, subject hcl.Range) {
		first, taken := seen[key]
		if !taken {
			seen[key] = owner{c.Name, value}
			return
		}
		if first.component != c.Name && !reflect.DeepEqual(first.value, value) {
			p.add(subject, fmt.Sprintf("Conflicting %s", what), "Component %q declares it too, differently.", first.component)
		}
	}
	for _, c := range components {
		for _, a := range c.Artifacts {
			plain := a
			plain.Range = hcl.Range{}
			check(c, "artifact "+a.Name, "artifact", plain, a.Range)
		}
		for _, d := range c.Directories {
			plain := d
			plain.Range = hcl.Range{}
			check(c, "directory "+d.Path, "directory", plain, d.Range)
		}
	}
}

func without(names []string, left string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name == left })
}

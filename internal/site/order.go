package site

import (
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// placedComponent is a component with the places of its attributes.
type placedComponent struct {
	Component
	body hcl.Body // nil where component.hcl could not be decoded
	file hcl.Range
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
func checkOrder(components []placedComponent, active []string, p *problems) {
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
	reported := map[string]bool{}
	for _, c := range components {
		if reported[c.Name] {
			continue
		}
		cycle := shortestCycle(c.Name, byName)
		if cycle == nil {
			continue
		}
		for _, name := range cycle {
			reported[name] = true
		}
		p.add(c.afterRange(slices.Index(c.After, cycle[1])), "Components wait for each other", "%s.", strings.Join(cycle, " waits for "))
	}
}

// shortestCycle walks breadth first from start back to start, and returns the
// names on the way with start at both ends.
func shortestCycle(start string, byName map[string]placedComponent) []string {
	type trail []string
	queue, seen := []trail{{start}}, map[string]bool{}
	for len(queue) > 0 {
		current := queue[0]
		queue = queue[1:]
		for _, next := range byName[current[len(current)-1]].After {
			way := append(slices.Clone(current), next)
			if next == start {
				return way
			}
			if _, exists := byName[next]; exists && !seen[next] {
				seen[next] = true
				queue = append(queue, way)
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

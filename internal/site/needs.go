package site

import "slices"

// need is one reason to wait: for a component of `after`, or for one whose job
// produces a secret that is read.
type need struct {
	component string
	read      *SecretRead // nil for `after`
}

// needs lists what a component waits for, those of `after` first.
func (s *Site) needs(c *Component) []need {
	var needs []need
	for _, name := range c.After {
		needs = append(needs, need{component: name})
	}
	for i, read := range c.Reads {
		secret := s.secret(read.Secret)
		// A command is no component, and a producer may read what it wrote.
		if secret != nil && secret.ProducedBy != nil && secret.ProducedBy.Component != "" && secret.ProducedBy.Component != c.Name {
			needs = append(needs, need{secret.ProducedBy.Component, &c.Reads[i]})
		}
	}
	return needs
}

// WaitsFor are the components that must be healthy before this one starts:
// those of `after`, and those whose jobs produce secrets that it reads. Sorted,
// each once.
func (s *Site) WaitsFor(component string) []string {
	c := s.Component(component)
	if c == nil {
		return nil
	}
	var names []string
	for _, need := range s.needs(c) {
		names = append(names, need.component)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Consumers are the components that need a secret: their jobs read it, or it is
// the password of one of their roles. Sorted.
func (s *Site) Consumers(fullName string) []string {
	var names []string
	for _, c := range s.Components {
		reads := slices.ContainsFunc(c.Reads, func(read SecretRead) bool { return read.Secret == fullName })
		logsIn := slices.ContainsFunc(c.Roles, func(role Role) bool { return role.Password == fullName })
		if reads || logsIn {
			names = append(names, c.Name)
		}
	}
	slices.Sort(names)
	return names
}

// Produces are the secrets that a component's job writes, sorted by full name.
func (s *Site) Produces(component string) []Secret {
	return slices.DeleteFunc(s.Secrets(), func(secret Secret) bool {
		return secret.ProducedBy == nil || secret.ProducedBy.Component != component
	})
}

// FirstServer is the name of the first host that runs a Nomad server.
func (s *Site) FirstServer() string {
	for _, host := range s.Hosts {
		if host.Server {
			return host.Name
		}
	}
	return ""
}

func (s *Site) secret(fullName string) *Secret {
	for i := range s.Components {
		for j := range s.Components[i].Secrets {
			if secret := &s.Components[i].Secrets[j]; secret.FullName() == fullName {
				return secret
			}
		}
	}
	return nil
}

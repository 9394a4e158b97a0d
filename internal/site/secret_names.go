package site

import (
	"errors"
	"fmt"
	"slices"
)

// Secret gives a secret of the catalogue by its full name; nil for an unknown one.
func (s *Site) Secret(fullName string) *Secret { return s.secret(fullName) }

// UnknownSecretError is a name that no active component declares.
type UnknownSecretError struct {
	Name string
	// Known are the names there are.
	Known []string
}

func (e *UnknownSecretError) Error() string {
	text := fmt.Sprintf("no secret %q in the catalogue", e.Name)
	if near := nearest(e.Name, e.Known); near != "" {
		text += fmt.Sprintf("; did you mean %q?", near)
	}
	return text
}

// Hint implements plan.Hinter.
func (e *UnknownSecretError) Hint() string {
	if len(e.Known) == 0 {
		return "components declare secrets in jobs/NAME/component.hcl"
	}
	return "see `site secrets status`; a new secret is declared in jobs/NAME/component.hcl, and committed"
}

// CheckSecretNames reports all names that are not in the catalogue, and those
// that are given twice.
func (s *Site) CheckSecretNames(names []string) error {
	var known []string
	for _, one := range s.Secrets() {
		known = append(known, one.FullName())
	}
	var problems []error
	for i, name := range names {
		switch {
		case slices.Index(names, name) < i:
			problems = append(problems, fmt.Errorf("secret %q is given twice", name))
		case !slices.Contains(known, name):
			problems = append(problems, &UnknownSecretError{Name: name, Known: known})
		}
	}
	return errors.Join(problems...)
}

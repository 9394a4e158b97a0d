package site

import "time"

// DefaultDrain is how long an old generation stays good where nothing is declared.
const DefaultDrain = time.Minute

// The names of an alternating role's logins are its own with these behind it.
const (
	firstLogin  = "_a"
	secondLogin = "_b"
)

// Drain is how long the old generation works once all have the new one: as
// declared, or the default.
func (s Secret) Drain() time.Duration {
	if s.Rotation == nil {
		return DefaultDrain
	}
	return s.Rotation.Drain
}

// Logins are the two that take turns for an alternating role.
func (r Role) Logins() (a, b string) { return r.Name + firstLogin, r.Name + secondLogin }

// OtherLogin is the login of an alternating role whose turn it is after login;
// the first one where login is neither.
func OtherLogin(role, login string) string {
	a, b := Role{Name: role}.Logins()
	if login == a {
		return b
	}
	return a
}

// AlternatingRole is the alternating role whose password a secret is; nil for none.
func (s *Site) AlternatingRole(secretFullName string) *Role {
	for _, role := range s.PasswordRoles(secretFullName) {
		if role.Alternating {
			return &role
		}
	}
	return nil
}

// PasswordRoles are all roles whose password a secret is.
func (s *Site) PasswordRoles(secretFullName string) []Role {
	var roles []Role
	for _, c := range s.Components {
		for _, role := range c.Roles {
			if role.Password == secretFullName && secretFullName != "" {
				roles = append(roles, role)
			}
		}
	}
	return roles
}

package site

import (
	"testing"
	"time"
)

func TestDurationsMayBeginWithDays(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"30d": 30 * day, "12h": 12 * time.Hour, "90m": 90 * time.Minute, "1d12h": 36 * time.Hour, "0d": 0, "0s": 0, "-1h": -time.Hour, "99999d": 99999 * day,
	} {
		if got, ok := parseDays(text); !ok || got != want {
			t.Errorf("%q: got %v (%v), want %v", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "d", "30", "30 d", "-1d", "1.5d", "1d-1h", "1d+1h", "1d24h", "1d1d", "100000d", "1w"} {
		if got, ok := parseDays(text); ok {
			t.Errorf("%q: got %v", text, got)
		}
	}
}

func TestTheOldGenerationIsDrainedForAMinuteWhereNothingIsDeclared(t *testing.T) {
	for _, tt := range []struct {
		name   string
		secret Secret
		want   time.Duration
	}{
		{"no rotation", Secret{}, time.Minute},
		{"declared", Secret{Rotation: &Rotation{Drain: time.Hour}}, time.Hour},
		{"declared as none", Secret{Rotation: &Rotation{}}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.secret.Drain(); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestTheLoginsOfAnAlternatingRoleTakeTurns(t *testing.T) {
	if a, b := (Role{Name: "shop"}).Logins(); a != "shop_a" || b != "shop_b" {
		t.Errorf("got %s and %s", a, b)
	}
	for login, want := range map[string]string{"shop_a": "shop_b", "shop_b": "shop_a", "": "shop_a", "shop": "shop_a", "books_a": "shop_a"} {
		if got := OtherLogin("shop", login); got != want {
			t.Errorf("after %q: got %s, want %s", login, got, want)
		}
	}
}

func TestRolesAreFoundByTheirPassword(t *testing.T) {
	s := &Site{Components: []Component{
		{Name: "shop", Roles: []Role{{Name: "shop", Password: "shop.password", Alternating: true}, {Name: "readers"}}},
		{Name: "books", Roles: []Role{{Name: "books", Password: "books.password"}, {Name: "reports", Password: "books.password"}}},
	}}
	if one := s.AlternatingRole("shop.password"); one == nil || one.Name != "shop" {
		t.Errorf("got %+v", one)
	}
	for _, name := range []string{"books.password", "shop.key", ""} {
		if one := s.AlternatingRole(name); one != nil {
			t.Errorf("%q: got %+v", name, one)
		}
	}
	for name, want := range map[string]int{"shop.password": 1, "books.password": 2, "shop.key": 0, "": 0} {
		if got := s.PasswordRoles(name); len(got) != want {
			t.Errorf("%q: got %+v, want %d", name, got, want)
		}
	}
}

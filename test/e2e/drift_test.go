package e2e

import "testing"

func TestWhatIsBrokenByHandInOpenBaoAndPostgresIsNamedAndRepaired(t *testing.T) {
	s := newSite(t, platform)
	_ = s
}

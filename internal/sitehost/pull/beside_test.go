package pull

import "testing"

func TestAHalfThatIsSwitchedIsReadAsItWasUntilTheOtherIs(t *testing.T) {
	for name, test := range map[string]struct {
		one, other generations
		want       int
	}{
		"nothing is rotated":             {generations{active: 3}, generations{active: 3}, 3},
		"both are tried":                 {generations{active: 3, candidate: 4}, generations{active: 3, candidate: 4}, 3},
		"it is switched, the other not":  {generations{active: 4, retiring: 3}, generations{active: 3, candidate: 4}, 3},
		"the other is switched, it not":  {generations{active: 3, candidate: 4}, generations{active: 4, retiring: 3}, 3},
		"both are switched":              {generations{active: 4, retiring: 3}, generations{active: 4, retiring: 3}, 4},
		"the other half was put by hand": {generations{active: 4}, generations{active: 5, candidate: 6}, 4},
	} {
		if got := test.one.beside(test.other); got != test.want {
			t.Errorf("%s: generation %d, want %d", name, got, test.want)
		}
	}
}

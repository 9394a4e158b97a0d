package secret_test

import (
	"testing"

	"github.com/nomad-site/site/internal/secret"
)

func TestAMaskBlacksOutValuesHoweverTheyAreSpelled(t *testing.T) {
	mask := secret.Mask(secret.New("p&ss\"word"), secret.New("p&ss\"word-longer"), secret.New("first line\nsecond line\n"), secret.New("abc"), secret.New(`ends in "`), secret.Value{})
	for _, test := range []struct{ name, text, want string }{
		{"nothing of it", "the database does not answer", "the database does not answer"},
		{"as it is", `said p&ss"word twice: p&ss"word`, "said [redacted] twice: [redacted]"},
		{"a longer one that begins with it", `p&ss"word-longer`, "[redacted]"},
		{"in JSON", `{"value":"p\u0026ss\"word"}`, `{"value":"[redacted]"}`},
		{"with a quote at its end, in JSON", `"ends in \""`, `"[redacted]"`},
		{"in a URL", "postgres://hello:p%26ss%22word@127.0.0.1", "postgres://hello:[redacted]@127.0.0.1"},
		{"a line of several", "stdout: second line", "stdout: [redacted]"},
		{"too short to be secret", "abcabc", "abcabc"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := mask(test.text); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

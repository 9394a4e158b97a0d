package command

import (
	"strings"
	"testing"
)

func TestARelayIsRefusedByALineThatSaysWhatToDo(t *testing.T) {
	for name, test := range map[string]struct {
		arguments []string
		says      string
	}{
		"a service that others could reach": {
			[]string{"connect", "--to=10.0.0.1:7381", "--server-name=alpha", "--local=openbao=0.0.0.0:8200"},
			`error: refuse openbao at "0.0.0.0:8200": it is not a loopback address (hint: want an address and port such as 127.0.0.1:8200)`,
		},
		"a target on another host": {
			[]string{"serve", "--listen=10.0.0.1:7381", "--target=openbao=10.0.0.2:8200"},
			`error: refuse openbao at "10.0.0.2:8200": it is not a loopback address (hint: `,
		},
		"no service":                {[]string{"serve", "--listen=10.0.0.1:7381"}, "error: relay: no service is named (hint: such as openbao="},
		"every address of the host": {[]string{"serve", "--listen=[::]:7381", "--target=openbao=127.0.0.1:8200"}, `error: refuse to listen on "[::]:7381"`},
		"a server without a name":   {[]string{"connect", "--to=10.0.0.1:7381", "--local=openbao=127.0.0.1:0"}, "error: relay: the server has no name (hint: give --server-name"},
		"no certificates": {
			[]string{"connect", "--to=10.0.0.1:7381", "--server-name=alpha", "--local=openbao=127.0.0.1:0", "--ca=/nowhere/ca.crt"},
			"error: read the site's CA: open /nowhere/ca.crt: no such file",
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := run(t.Context(), "", "", append([]string{"relay"}, test.arguments...)...)
			if got.code != ExitError || !strings.HasPrefix(got.stderr, test.says) || strings.Count(got.stderr, "\n") != 1 {
				t.Errorf("%+v, want %q", got, test.says)
			}
		})
	}
}

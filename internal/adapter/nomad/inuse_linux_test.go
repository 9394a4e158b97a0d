package nomad

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/testneeds"
)

// node is one more node of the shared agent's cluster, in a pool of its own, so
// that only jobs that ask for it are placed there.
type node struct {
	t       *testing.T
	config  string
	command *exec.Cmd
}

func startNode(t *testing.T, name string) *node {
	t.Helper()
	folder, err := os.MkdirTemp("", "site-nomad-")
	if err != nil {
		t.Fatal(err)
	}
	ports, err := freePorts(2)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, config: filepath.Join(folder, "agent.hcl")}
	content := fmt.Sprintf(`
name      = %q
data_dir  = %q
bind_addr = "127.0.0.1"
advertise {
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
}
ports {
  http = %d
  rpc  = %d
}
acl { enabled = true }
plugin "raw_exec" { config { enabled = true } }
client {
  enabled   = true
  servers   = [%q]
  node_pool = %q
  options   = { "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean" }
}
`, name, filepath.Join(folder, "data"), ports[0], ports[1], agent.rpc, name)
	if err := os.WriteFile(n.config, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	t.Cleanup(func() {
		n.kill()
		removeAgentFolder(folder)
	})
	return n
}

func (n *node) start() {
	n.t.Helper()
	n.command = exec.Command(testneeds.Tool(n.t, "nomad"), "agent", "-config", n.config)
	n.command.Env = []string{"PATH=" + os.Getenv("PATH"), "TMPDIR=" + filepath.Dir(n.config), "HOME=" + filepath.Dir(n.config)}
	n.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.command.Start(); err != nil {
		n.t.Fatal(err)
	}
}

// kill is what a host that loses power does, but for the tasks: they go on.
func (n *node) kill() {
	_ = n.command.Process.Kill()
	_ = n.command.Wait()
}

func TestANodeThatIsAwayIsNamedForAsLongAsItIs(t *testing.T) {
	t.Parallel()
	c := client(t)
	ctx := context.Background()
	away := startNode(t, "away")
	prepared := generation(t, c, shellSpec("on-node", "system", "sleep 300", fmt.Sprintf(update, "")+"\nnode_pool = \"away\""), 6)
	elsewhere := generation(t, c, shellSpec("elsewhere", "service", "sleep 300", fmt.Sprintf(update, "")), 6)
	until := func(what string, is func() bool) {
		t.Helper()
		if err := retry.Until(ctx, what, 90*time.Second, func(context.Context) error {
			if !is() {
				return errors.New("not yet")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	until("the node to join", func() bool {
		nodes, _, err := c.api.Nodes().List(c.query(ctx))
		return err == nil && len(nodes) == 2 && nodes[0].Status == "ready" && nodes[1].Status == "ready"
	})
	for _, one := range []*Prepared{prepared, elsewhere} {
		if err := deploy(t, c, one, quick); err != nil {
			t.Fatal(err)
		}
	}
	wantInUse(t, c, "on-node", 6)

	away.kill()
	until("the node to be missed", func() bool {
		used, err := c.GenerationsInUse(ctx, []string{"on-node", "elsewhere"})
		return err == nil && slices.Equal(used.Unready, []string{"away"})
	})
	if names, err := c.NodesNotReady(ctx); err != nil || !slices.Equal(names, []string{"away"}) {
		t.Errorf("nodes %v, %v, want the one", names, err)
	}
	wantInUse(t, c, "elsewhere", 6) // a node that has nothing of a job holds nobody up

	away.start()
	until("the node to be back", func() bool {
		names, err := c.NodesNotReady(ctx)
		return err == nil && len(names) == 0
	})
	wantInUse(t, c, "on-node", 6)
	if err := c.Stop(ctx, "on-node"); err != nil {
		t.Fatal(err)
	}
	wantInUse(t, c, "on-node")
}

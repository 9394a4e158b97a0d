package nomad

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/testneeds"
)

const (
	// helperVariable makes the test binary a task of a job under test.
	helperVariable = "SITE_TEST_TASK"
	bootstrapToken = "4f0c3f0e-3c5e-4f5b-9a5e-0a4a6a1f7d11"
	firstGossipKey = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
)

// agent is the one real Nomad that all tests of the package share; jobs have
// names of their own.
var agent = struct {
	once    sync.Once
	err     error
	address string
	// rpc is where other nodes join.
	rpc string
	// engine is where the secrets engine is to listen that the agent reads from;
	// whoever tests with one starts it there.
	engine string
	stop   func()
}{}

func TestMain(m *testing.M) {
	if os.Getenv(helperVariable) == "serve" {
		serve()
		return
	}
	code := m.Run()
	if agent.stop != nil {
		agent.stop()
	}
	os.Exit(code)
}

func serve() {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if os.Getenv("HEALTH") != "ok" {
			http.Error(w, "broken on purpose", http.StatusInternalServerError)
		}
	})
	fmt.Fprintln(os.Stderr, "listening, sha "+os.Getenv("NOMAD_META_site_git_sha"))
	if err := http.ListenAndServe("127.0.0.1:"+os.Getenv("NOMAD_PORT_http"), mux); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// client connects to the shared agent with the management token.
func client(t *testing.T) *Client {
	t.Helper()
	binary := testneeds.Tool(t, "nomad")
	agent.once.Do(func() { agent.err = startAgent(binary) })
	if agent.err != nil {
		t.Fatal(agent.err)
	}
	connected, err := New(Options{Address: agent.address, Token: secret.New(bootstrapToken)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(connected.Close)
	return connected
}

func startAgent(binary string) error {
	folder, err := os.MkdirTemp("", "site-nomad-")
	if err != nil {
		return err
	}
	ports, err := freePorts(4)
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`
ports {
  http = %d
  rpc  = %d
  serf = %d
}
acl { enabled = true }
server { encrypt = %q }
vault {
  enabled               = true
  address               = "http://127.0.0.1:%d"
  jwt_auth_backend_path = "jwt-nomad"
  default_identity {
    aud = ["vault.io"]
    ttl = "1h"
  }
}
plugin "raw_exec" { config { enabled = true } }
client {
  host_volume "scratch" {
    path = %q
  }
  options = { "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean" }
}
`, ports[0], ports[1], ports[2], firstGossipKey, ports[3], folder)
	file := filepath.Join(folder, "agent.hcl")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(folder, "agent.log"))
	if err != nil {
		return err
	}
	command := exec.Command(binary, "agent", "-dev", "-bind", "127.0.0.1", "-config", file)
	// A dev agent keeps its keyring in the folder it is started in.
	command.Dir = folder
	command.Env = []string{"PATH=" + os.Getenv("PATH"), "TMPDIR=" + folder, "HOME=" + folder}
	command.Stdout, command.Stderr = log, log
	// If the tests die, the agent must not stay.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		return err
	}
	agent.stop = func() { stopAgent(command, log, folder) }
	agent.address = fmt.Sprintf("http://127.0.0.1:%d", ports[0])
	agent.rpc = fmt.Sprintf("127.0.0.1:%d", ports[1])
	agent.engine = fmt.Sprintf("127.0.0.1:%d", ports[3])

	ctx := context.Background()
	anonymous, err := New(Options{Address: agent.address})
	if err != nil {
		return err
	}
	if err := anonymous.Leader(ctx, time.Minute); err != nil {
		return err
	}
	wrote, err := anonymous.BootstrapACL(ctx, secret.New(bootstrapToken), 30*time.Second)
	if err != nil {
		return err
	}
	if !wrote {
		return errors.New("the first bootstrap wrote nothing")
	}
	managed, err := anonymous.WithToken(secret.New(bootstrapToken))
	if err != nil {
		return err
	}
	defer managed.Close()
	return managed.Ready(ctx, ReadyOptions{Driver: "raw_exec", Limit: time.Minute}, nil)
}

func stopAgent(command *exec.Cmd, log *os.File, folder string) {
	_ = command.Process.Signal(syscall.SIGINT)
	done := make(chan struct{})
	go func() { _ = command.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		_ = command.Process.Kill()
		<-done
	}
	_ = log.Close()
	removeAgentFolder(folder)
}

func removeAgentFolder(folder string) {
	// The client leaves tmpfs mounts under its allocation folders.
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.HasPrefix(fields[1], folder+"/") {
			_ = syscall.Unmount(fields[1], syscall.MNT_DETACH)
		}
	}
	if os.Getenv("SITE_TEST_KEEP") == "" {
		_ = os.RemoveAll(folder)
	}
}

func freePorts(count int) ([]int, error) {
	var ports []int
	for range count {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer func() { _ = listener.Close() }()
		ports = append(ports, listener.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

package nomad

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/testneeds"
)

// engine is the secrets engine that the shared agent's tasks read from.
type engine struct {
	t       *testing.T
	address string
	token   string
}

// startEngine starts a real one, where job live reads all of live's secrets.
func startEngine(t *testing.T) *engine {
	t.Helper()
	binary := testneeds.Tool(t, "secrets-server")
	folder := t.TempDir()
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(folder, "server.hcl")
	content := fmt.Sprintf(`
disable_mlock = true
api_addr      = "http://%[1]s"
cluster_addr  = "https://127.0.0.1:%[2]d"
listener "tcp" {
  address         = %[1]q
  cluster_address = "127.0.0.1:%[2]d"
  tls_disable     = true
}
storage "raft" {
  path                   = %[3]q
  node_id                = "one"
  performance_multiplier = 1
}
`, agent.engine, ports[0], folder)
	if err := os.WriteFile(config, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	command := exec.Command(binary, "server", "-config="+config)
	command.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + folder}
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill()
		_ = command.Wait()
	})
	e := &engine{t: t, address: "http://" + agent.engine}
	e.bootstrap()
	return e
}

func (e *engine) bootstrap() {
	var made struct {
		Keys      []string `json:"keys"`
		RootToken string   `json:"root_token"`
	}
	e.until("initialise", func() error {
		return e.call(http.MethodPut, "sys/init", map[string]int{"secret_shares": 1, "secret_threshold": 1}, &made)
	})
	e.token = made.RootToken
	e.put("sys/unseal", map[string]string{"key": made.Keys[0]})
	e.until("mount", func() error {
		return e.call(http.MethodPost, "sys/mounts/site", map[string]any{"type": "kv", "options": map[string]string{"version": "2"}}, nil)
	})
	e.put("sys/auth/jwt-nomad", map[string]string{"type": "jwt"})
	e.put("auth/jwt-nomad/config", map[string]string{"jwks_url": agent.address + "/.well-known/jwks.json"})
	e.put("sys/policies/acl/live", map[string]string{"policy": `path "site/data/live/*" { capabilities = ["read"] }`})
	e.put("auth/jwt-nomad/role/live", map[string]any{
		"role_type": "jwt", "bound_audiences": []string{"vault.io"}, "user_claim": "nomad_job_id",
		"bound_claims": map[string]string{"nomad_job_id": "live"}, "token_policies": []string{"live"}, "token_period": "1h",
	})
}

func (e *engine) until(what string, try func() error) {
	e.t.Helper()
	if err := retry.Until(e.t.Context(), what, 30*time.Second, func(context.Context) error { return try() }); err != nil {
		e.t.Fatal(err)
	}
}

func (e *engine) put(path string, content any) {
	e.t.Helper()
	if err := e.call(http.MethodPost, path, content, nil); err != nil {
		e.t.Fatal(err)
	}
}

func (e *engine) call(method, path string, content, answer any) error {
	body, err := json.Marshal(content)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(e.t.Context(), method, e.address+"/v1/"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("X-Vault-Token", e.token)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	said, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %s", method, path, response.Status, said)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(said, answer)
}

// liveSpec is a task that says what it reads when it starts and at each signal.
const liveSpec = `job "live" {
  group "web" {
    update {
      min_healthy_time = "1s"
      healthy_deadline = "50s"
    }
    task "hello" {
      driver = "raw_exec"
      vault {}
      config {
        command = "/bin/sh"
        args    = ["-c", "trap 'echo signalled ` + "`cat local/key`" + `' HUP; echo started ` + "`cat local/key` with `cat local/other`" + `; while :; do sleep 1 & wait $!; done"]
      }
      template {
        destination   = "local/key"
        change_mode   = "signal"
        change_signal = "SIGHUP"
        data          = <<END
{{ define "shown" }}{{ with secret "site/data/live/key" }}{{ .Data.data.value }}{{ end }}{{ end -}}
{{ template "shown" }} {{ with secret "site/data/live/key?version=previous" }}{{ .Data.data.value }}{{ end }}
END
      }
      template {
        destination = "local/other"
        data        = "{{ with secret \"site/data/live/other\" }}{{ .Data.data.value }}{{ end }}"
      }
      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}`

func TestASignalledTemplateFollowsItsVariableWithoutARestart(t *testing.T) {
	c := client(t)
	ctx := context.Background()
	secrets := startEngine(t)
	write := func(name, value string) {
		secrets.put("site/data/live/"+name, map[string]any{"data": map[string]string{"value": value}})
	}
	parsed, err := c.Parse(ctx, Jobspec{Path: "live.nomad.hcl", Content: []byte(liveSpec)}, "")
	if err != nil {
		t.Fatal(err)
	}
	pin := func(active, previous int) (PinnedJob, *Prepared) {
		pinned, err := Pin(parsed, Pins{Active: map[string]int{"live.key": active, "live.other": 1}, Previous: map[string]int{"live.key": previous}})
		if err != nil {
			t.Fatal(err)
		}
		prepared, err := Prepare(pinned.Job, Brief{Site: "lab", Component: "live", Secrets: pinned.Generations})
		if err != nil {
			t.Fatal(err)
		}
		return pinned, prepared
	}
	said := func() string {
		var log bytes.Buffer
		if err := c.Logs(ctx, LogOptions{Job: "live", Stream: Stdout}, &log); err != nil {
			return err.Error()
		}
		return log.String()
	}
	wantSaid := func(want string) {
		t.Helper()
		waitFor(t, "the task to say "+want, func() bool { return strings.HasSuffix(strings.TrimSpace(said()), want) })
	}

	write("key", "one")
	write("other", "fixed")
	pinned, prepared := pin(1, 1)
	// Where the variable is not there yet the task waits for it, and reads no other generation meanwhile.
	write("key", "two")
	waiting := WaitOptions{Limit: 2 * time.Minute, FactGrace: time.Minute}
	registered, err := c.Register(ctx, prepared, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Stop(context.Background(), "live") })
	waitFor(t, "the task to wait for its templates", func() bool {
		shot, err := c.snapshot(ctx, "live")
		if err != nil || len(shot.allocations) == 0 {
			return false
		}
		state := shot.allocations[0].TaskStates["hello"]
		return state != nil && state.State == "pending" && len(state.Events) > 1
	})
	if err := c.PutLive(ctx, pinned.Live); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(ctx, prepared, registered, waiting, logProgress{t}); err != nil {
		t.Fatal(err)
	}
	wantSaid("started one one with fixed")
	before := tasks(t, c, "live", every)
	if used, err := c.GenerationsInUse(ctx, []string{"live"}); err != nil || fmt.Sprint(used.Generations) != "map[live.other:[1]]" {
		t.Errorf("in use %+v, %v, want what restart templates read", used, err)
	}

	for _, step := range []struct {
		active, previous int
		want             string
	}{{2, 1, "signalled two one"}, {2, 2, "signalled two two"}} {
		pinned, prepared := pin(step.active, step.previous)
		wantNothing(t, c, prepared)
		if err := c.PutLive(ctx, pinned.Live); err != nil {
			t.Fatal(err)
		}
		wantSaid(step.want)
	}
	wantTasks(t, c, "live", before)
	if log := said(); strings.Count(log, "started") != 1 {
		t.Errorf("the task was started again: %s", log)
	}
}

func TestPutLiveKeepsWhatOthersWrote(t *testing.T) {
	c := client(t)
	ctx := context.Background()
	const path = "nomad/jobs/put-live/web/serve"
	foreign := &api.Variable{Path: path, Items: api.VariableItems{"colour": "red", "site_generation:shop.old": "3"}}
	if _, _, err := c.api.Variables().Create(foreign, c.write(ctx)); err != nil {
		t.Fatal(err)
	}
	put := func(generation string) uint64 {
		t.Helper()
		if err := c.PutLive(ctx, []LiveGenerations{{Path: path, Items: map[string]string{"site_generation:shop.key": generation}}}); err != nil {
			t.Fatal(err)
		}
		have, err := c.variable(ctx, path)
		if err != nil || have.Items["colour"] != "red" || have.Items["site_generation:shop.key"] != generation {
			t.Fatalf("variable %+v, %v", have, err)
		}
		return have.ModifyIndex
	}
	if first, second := put("7"), put("7"); first != second {
		t.Error("the same generation was written again")
	}
	put("8")
	live, err := c.Live(ctx, []string{path, "nomad/jobs/put-live/web/none", path})
	if want := "map[" + path + ":map[site_generation:shop.key:8 site_generation:shop.old:3]]"; err != nil || fmt.Sprint(live) != want {
		t.Errorf("live %v, %v, want %s", live, err, want)
	}
	var conflict api.ErrCASConflict
	stale := &api.Variable{Path: path, Items: api.VariableItems{"colour": "blue"}, ModifyIndex: 1}
	if _, _, err := c.api.Variables().CheckedUpdate(stale, c.write(ctx)); !errors.As(err, &conflict) {
		t.Errorf("got %v, want the conflict that PutLive reads anew for", err)
	}
}

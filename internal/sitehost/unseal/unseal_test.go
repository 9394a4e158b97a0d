package unseal

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/testneeds"
)

// secretsServer is a real server that can be stopped and started again.
type secretsServer struct {
	t       *testing.T
	program string
	config  string
	url     string
	process *exec.Cmd
}

func newSecretsServer(t *testing.T, storage string) *secretsServer {
	t.Helper()
	s := &secretsServer{t: t, program: testneeds.Tool(t, "secrets-server")}
	folder := t.TempDir()
	api, cluster := freeAddress(t), freeAddress(t)
	s.config, s.url = filepath.Join(folder, "config.hcl"), "http://"+api
	node := ""
	if storage == "raft" {
		node = `node_id = "one"`
	}
	s.write(s.config, 0o600, fmt.Sprintf(`
listener "tcp" {
  address         = %q
  cluster_address = %q
  tls_disable     = true
}
storage %q {
  path = %q
  %s
}
api_addr     = %q
cluster_addr = "https://%s"
`, api, cluster, storage, filepath.Join(folder, "data"), node, s.url, cluster))
	s.start()
	return s
}

func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	return listener.Addr().String()
}

func (s *secretsServer) write(path string, mode os.FileMode, content string) {
	s.t.Helper()
	_ = os.Remove(path)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		s.t.Fatal(err)
	}
}

func (s *secretsServer) start() {
	s.t.Helper()
	var said bytes.Buffer
	s.process = exec.Command(s.program, "server", "-config="+s.config)
	s.process.Stdout, s.process.Stderr = &said, &said
	s.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	process := s.process
	s.t.Cleanup(func() { _ = process.Process.Kill(); _ = process.Wait() })
	await(s.t, "the server", func() error {
		response, err := http.Get(s.url + "/v1/sys/seal-status")
		if err == nil {
			_ = response.Body.Close()
		}
		return err
	})
}

func (s *secretsServer) stop() {
	s.t.Helper()
	_ = s.process.Process.Signal(syscall.SIGTERM)
	_ = s.process.Wait()
}

// initialize returns the unseal key.
func (s *secretsServer) initialize() string {
	s.t.Helper()
	request, err := http.NewRequestWithContext(s.t.Context(), http.MethodPut, s.url+"/v1/sys/init", strings.NewReader(`{"secret_shares":1,"secret_threshold":1}`))
	if err != nil {
		s.t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		s.t.Fatal(err)
	}
	defer response.Body.Close()
	var answer struct {
		Keys []string `json:"keys_base64"`
	}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil || len(answer.Keys) != 1 {
		s.t.Fatalf("initialize: %d, %v", response.StatusCode, err)
	}
	return answer.Keys[0]
}

func await(t *testing.T, what string, attempt func() error) {
	t.Helper()
	if err := retry.Until(t.Context(), what, 30*time.Second, func(context.Context) error { return attempt() }); err != nil {
		t.Fatal(err)
	}
}

type lockedBuffer struct {
	mutex  sync.Mutex
	buffer bytes.Buffer
}

func (l *lockedBuffer) Write(data []byte) (int, error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.buffer.Write(data)
}

func (l *lockedBuffer) String() string {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.buffer.String()
}

// watch runs an unsealer until the test's end.
func watch(t *testing.T, address, keyFile string) (*Unsealer, *lockedBuffer) {
	t.Helper()
	log := &lockedBuffer{}
	unsealer, err := New(Options{Address: address, KeyFile: keyFile, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	unsealer.pause = func(state State) time.Duration { return pause(state) / 40 }
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); unsealer.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return unsealer, log
}

func awaitState(t *testing.T, unsealer *Unsealer, want State) {
	t.Helper()
	await(t, string(want), func() error {
		unsealer.mutex.Lock()
		defer unsealer.mutex.Unlock()
		if unsealer.state != want {
			return fmt.Errorf("it is %s", unsealer.state)
		}
		return nil
	})
}

func TestTheServerIsUnsealedWheneverItIsSealed(t *testing.T) {
	for _, storage := range []string{"file", "raft"} {
		t.Run(storage, func(t *testing.T) {
			t.Parallel()
			server := newSecretsServer(t, storage)
			keyFile := filepath.Join(t.TempDir(), "unseal.key")
			unsealer, log := watch(t, server.url, keyFile)
			awaitState(t, unsealer, NoKey)

			server.write(keyFile, 0o600, "not yet")
			awaitState(t, unsealer, NotInitialized)
			if err := os.Remove(keyFile); err != nil {
				t.Fatal(err)
			}
			awaitState(t, unsealer, NoKey)
			key := server.initialize()
			server.write(keyFile, 0o600, key+"\n")
			awaitState(t, unsealer, Unsealed)

			// It is gone for a while, and comes back sealed.
			server.stop()
			awaitState(t, unsealer, Unreachable)
			server.start()
			awaitState(t, unsealer, Unsealed)
			status, err := unsealer.status(t.Context())
			if err != nil || status.Sealed {
				t.Errorf("%+v, %v", status, err)
			}
			if unsealer.unseals != 2 {
				t.Errorf("unsealed %d times", unsealer.unseals)
			}
			if said := log.String(); strings.Contains(said, key) || strings.Count(said, "\n") > 10 {
				t.Errorf("the log: %s", said)
			}
		})
	}
}

func TestAKeyThatDoesNotFitIsSaidOnceAndTheRightOneHelps(t *testing.T) {
	server := newSecretsServer(t, "file")
	right := server.initialize()
	const wrong = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
	for _, planted := range []string{wrong, "no key at all"} {
		keyFile := filepath.Join(t.TempDir(), "unseal.key")
		server.write(keyFile, 0o600, planted)
		unsealer, log := watch(t, server.url, keyFile)
		awaitState(t, unsealer, Sealed)
		unsealer.record(Sealed, nil) // what a second look does
		if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, "level=ERROR") || strings.Contains(said, planted) {
			t.Errorf("the log: %s", said)
		}
	}
	keyFile := filepath.Join(t.TempDir(), "unseal.key")
	server.write(keyFile, 0o600, right)
	unsealer, _ := watch(t, server.url, keyFile)
	awaitState(t, unsealer, Unsealed)
}

func TestOfTwoKeysTheOneThatFitsUnseals(t *testing.T) {
	const other = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
	for name, lines := range map[string]string{"the first fits": "RIGHT\n" + other + "\n", "the second fits": other + "\nRIGHT"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := newSecretsServer(t, "file")
			right := server.initialize()
			keyFile := filepath.Join(t.TempDir(), "unseal.key")
			server.write(keyFile, 0o600, strings.Replace(lines, "RIGHT", right, 1))
			unsealer, log := watch(t, server.url, keyFile)
			awaitState(t, unsealer, Unsealed)
			if said := log.String(); strings.Contains(said, right) || strings.Contains(said, "ERROR") {
				t.Errorf("the log: %s", said)
			}
		})
	}
}

func TestTwoKeysOfWhichNoneFitsAreRefusedAndNotShown(t *testing.T) {
	server := newSecretsServer(t, "file")
	server.initialize()
	const first, second = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=", "planted second"
	keyFile := filepath.Join(t.TempDir(), "unseal.key")
	server.write(keyFile, 0o600, first+"\n"+second+"\n")
	unsealer, log := watch(t, server.url, keyFile)
	awaitState(t, unsealer, Sealed)
	if said := log.String(); strings.Contains(said, first) || strings.Contains(said, second) || strings.Count(said, "\n") != 1 {
		t.Errorf("the log: %s", said)
	}
}

func TestAKeyFileHasOneKeyOrTwo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "unseal.key")
	for content, want := range map[string]string{
		"one": "one", "one\n": "one", "\n one \n\ntwo\r\n": "one two", "": "", "\n \n": "", "one\ntwo\nthree\n": "",
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		keys, err := readKeys(path)
		if got := strings.Join(keys, " "); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v", content, got, err)
		}
	}
}

func TestAKeyFileThatOthersCouldHaveReadIsNotUsed(t *testing.T) {
	asked := make(chan string, 100)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, request *http.Request) { asked <- request.URL.Path }))
	defer server.Close()
	folder := t.TempDir()
	for name, plant := range map[string]func(path string) error{
		"group.key":  func(path string) error { return os.WriteFile(path, []byte("key"), 0o640) },
		"folder.key": func(path string) error { return os.Mkdir(path, 0o700) },
		"large.key":  func(path string) error { return os.WriteFile(path, make([]byte, maxKey+1), 0o600) },
		"link.key":   func(path string) error { return os.Symlink("/etc/hostname", path) },
	} {
		path := filepath.Join(folder, name)
		if err := plant(path); err != nil {
			t.Fatal(err)
		}
		unsealer, log := watch(t, server.URL, path)
		awaitState(t, unsealer, BadKeyFile)
		if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, name) {
			t.Errorf("the log: %s", said)
		}
	}
	if len(asked) > 0 {
		t.Errorf("asked for %s", <-asked)
	}
}

func TestTheKeyNeverLeavesTheHost(t *testing.T) {
	for _, address := range []string{
		"http://203.0.113.5:8200", "https://127.0.0.1:8200", "http://localhost:8200", "http://0.0.0.0:8200", "127.0.0.1:8200",
		"http://127.0.0.1", "http://user@127.0.0.1:8200", "unix:///run/openbao", "",
	} {
		if _, err := New(Options{Address: address, Log: slog.Default()}); err == nil {
			t.Errorf("%q is taken", address)
		}
	}
	// Neither by a redirect nor by a proxy.
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the key went elsewhere") }))
	defer elsewhere.Close()
	t.Setenv("HTTP_PROXY", elsewhere.URL)
	server := httptest.NewServer(http.HandlerFunc(func(writer http.ResponseWriter, request *http.Request) {
		if request.Method == http.MethodPut {
			http.Redirect(writer, request, elsewhere.URL, http.StatusTemporaryRedirect)
			return
		}
		_, _ = writer.Write([]byte(`{"type":"shamir","initialized":true,"sealed":true}`))
	}))
	defer server.Close()
	keyFile := filepath.Join(t.TempDir(), "unseal.key")
	if err := os.WriteFile(keyFile, []byte("key"), 0o600); err != nil {
		t.Fatal(err)
	}
	unsealer, _ := watch(t, server.URL, keyFile)
	awaitState(t, unsealer, Sealed)
}

func TestTheLastStateIsAMetric(t *testing.T) {
	unsealer, err := New(Options{Address: DefaultAddress, KeyFile: filepath.Join(t.TempDir(), "none"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	unsealer.record(Sealed, nil)
	registry := prometheus.NewRegistry()
	registry.MustRegister(unsealer)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	set := ""
	for _, family := range families {
		for _, metric := range family.GetMetric() {
			if metric.GetGauge().GetValue() == 1 {
				set += metric.GetLabel()[0].GetValue()
			}
		}
	}
	if len(families) != 2 || set != "sealed" {
		t.Errorf("%v", families)
	}
}

package openbao

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
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

	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/testneeds"
)

// engineVariable names another server to test with, such as a real bao.
const engineVariable = "SITE_LAB_SECRETS_ENGINE"

// server is one running secrets engine, initialised and converged.
type server struct {
	address string
	audit   string
	logs    string
	nomad   *httptest.Server
	command *exec.Cmd
	folder  string
	want    reconcile.Engine

	unsealKey secret.Value
	rootToken secret.Value
}

// keys are made once: an RSA key takes a while.
type keys struct {
	ed25519  ed25519.PrivateKey
	rsa      *rsa.PrivateKey
	ecdsa    *ecdsa.PrivateKey
	host     ed25519.PrivateKey
	workload *rsa.PrivateKey
}

var testKeys = sync.OnceValues(func() (keys, error) {
	var made keys
	var errs [5]error
	_, made.ed25519, errs[0] = ed25519.GenerateKey(rand.Reader)
	_, made.host, errs[1] = ed25519.GenerateKey(rand.Reader)
	made.rsa, errs[2] = rsa.GenerateKey(rand.Reader, 2048)
	made.workload, errs[3] = rsa.GenerateKey(rand.Reader, 2048)
	made.ecdsa, errs[4] = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return made, errors.Join(errs[:]...)
})

func signers(t testing.TB) keys {
	t.Helper()
	made, err := testKeys()
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// shared is the server of the tests that leave it converged.
var shared = struct {
	once   sync.Once
	server *server
	err    error
}{}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.server != nil {
		shared.server.stop()
	}
	os.Exit(code)
}

func sharedServer(t testing.TB) *server {
	t.Helper()
	binary := engineBinary(t)
	made := signers(t)
	shared.once.Do(func() {
		// Not t.Context: the server outlives the first test.
		shared.server, shared.err = startServer(context.Background(), binary, made, testSite())
		if shared.err == nil {
			shared.err = shared.server.bootstrap(context.Background())
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.server
}

// ownServer is one that the test may wreck. It is not initialised yet.
func ownServer(t testing.TB) *server {
	t.Helper()
	return ownServerOf(t, testSite())
}

func ownServerOf(t testing.TB, wanted *site.Site) *server {
	t.Helper()
	started, err := startServer(t.Context(), engineBinary(t), signers(t), wanted)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(started.stop)
	return started
}

func engineBinary(t testing.TB) string {
	t.Helper()
	pinned := testneeds.Tool(t, "secrets-server") // leaves out unit tests too
	if other := os.Getenv(engineVariable); other != "" {
		return other
	}
	return pinned
}

func startServer(ctx context.Context, binary string, made keys, wanted *site.Site) (*server, error) {
	folder, err := os.MkdirTemp("", "site-openbao-")
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(2)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(folder, "data"), 0o700); err != nil {
		return nil, err
	}
	s := &server{
		folder: folder, address: fmt.Sprintf("http://127.0.0.1:%d", ports[0]),
		audit: filepath.Join(folder, "audit.log"), logs: filepath.Join(folder, "server.log"),
	}
	config := fmt.Sprintf(`
ui            = false
disable_mlock = true
api_addr      = "http://127.0.0.1:%[1]d"
cluster_addr  = "https://127.0.0.1:%[2]d"
listener "tcp" {
  address         = "127.0.0.1:%[1]d"
  cluster_address = "127.0.0.1:%[2]d"
  tls_disable     = true
}
storage "raft" {
  path                   = "%[3]s/data"
  node_id                = "one"
  performance_multiplier = 1
}
audit "file" "file" {
  options {
    file_path = "%[3]s/audit.log"
  }
}
`, ports[0], ports[1], folder)
	file := filepath.Join(folder, "server.hcl")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	log, err := os.Create(s.logs)
	if err != nil {
		return nil, err
	}
	s.command = exec.Command(binary, "server", "-config="+file)
	s.command.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + folder}
	s.command.Stdout, s.command.Stderr = log, log
	// If the tests die, the server must not stay.
	s.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s.nomad = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]any{"keys": []any{jwk(made.workload)}})
	}))
	if err := s.command.Start(); err != nil {
		return nil, err
	}
	s.want = s.desired(wanted, made)
	client, err := New(Options{Address: s.address})
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return s, retry.Until(ctx, "the server under test", 20*time.Second, func(ctx context.Context) error {
		_, err := client.Health(ctx)
		return err
	})
}

func (s *server) stop() {
	_ = s.command.Process.Signal(syscall.SIGTERM)
	done := make(chan struct{})
	go func() { _ = s.command.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		_ = s.command.Process.Kill()
		<-done
	}
	s.nomad.Close()
	if os.Getenv("SITE_TEST_KEEP") == "" {
		_ = os.RemoveAll(s.folder)
	}
}

// bootstrap is what the first deploy does.
func (s *server) bootstrap(ctx context.Context) error {
	client, err := New(Options{Address: s.address})
	if err != nil {
		return err
	}
	defer client.Close()
	if s.unsealKey, s.rootToken, err = client.Initialize(ctx); err != nil {
		return err
	}
	if err := client.Unseal(ctx, s.unsealKey); err != nil {
		return err
	}
	root, err := client.WithToken(s.rootToken)
	if err != nil {
		return err
	}
	have, err := root.ObserveEngine(ctx, s.want)
	if err != nil {
		return err
	}
	return root.ApplyEngine(ctx, s.want, have, reconcile.DiffEngine(s.want, have), nil)
}

// desired is the site's, with this server's own addresses.
func (s *server) desired(wanted *site.Site, made keys) reconcile.Engine {
	engine := reconcile.DesiredEngine(wanted, []reconcile.Operator{
		{Name: "ada", PublicKeyPEM: publicPEM(made.ed25519)},
		{Name: "grace", PublicKeyPEM: publicPEM(made.rsa)},
		{Name: "joan", PublicKeyPEM: publicPEM(made.ecdsa)},
	}, []string{publicPEM(made.host)})
	engine.Audit[0].Options["file_path"] = s.audit
	for i := range engine.Auth {
		if engine.Auth[i].Path == reconcile.JobsMount {
			engine.Auth[i].Config["jwks_url"] = s.nomad.URL
		}
	}
	return engine
}

// testSite: job a reads its own and produces for b; job c needs nothing.
func testSite() *site.Site {
	return &site.Site{Name: "test", Components: []site.Component{
		{
			Name: "a",
			Secrets: []site.Secret{
				{Component: "a", Name: "password", Generated: &site.Generated{}},
				{Component: "a", Name: "stripe", External: &site.External{}},
			},
			Reads: []site.SecretRead{{Secret: "a.password"}, {Secret: "a.stripe"}},
		},
		{
			Name: "b",
			Secrets: []site.Secret{
				{Component: "b", Name: "password", Generated: &site.Generated{}},
				{Component: "b", Name: "token", ProducedBy: &site.Producer{Component: "a"}},
			},
			Reads: []site.SecretRead{{Secret: "b.password"}, {Secret: "b.token"}},
		},
		{Name: "c"},
	}}
}

func (s *server) client(t testing.TB, token secret.Value) *Client {
	t.Helper()
	client, err := New(Options{Address: s.address, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

// operator logs in as ada does.
func (s *server) operator(t testing.TB, purpose string) *Client {
	t.Helper()
	token, err := s.login(t, signers(t).ed25519, "ada", purpose)
	if err != nil {
		t.Fatal(err)
	}
	return s.client(t, token)
}

func (s *server) login(t testing.TB, key crypto.Signer, operator, purpose string) (secret.Value, error) {
	t.Helper()
	jwt := sign(t, key, map[string]any{
		"iss": reconcile.OperatorIssuer, "aud": []string{reconcile.Audience}, "sub": operator,
		reconcile.OperatorClaim: operator, reconcile.PurposeClaim: purpose,
	})
	token, _, err := s.client(t, secret.Value{}).Login(t.Context(), reconcile.OperatorsMount, reconcile.OperatorRole, jwt)
	return token, err
}

// job logs in as a task of the job does.
func (s *server) job(t testing.TB, job string) *Client {
	t.Helper()
	token, err := s.jobLogin(t, job, job)
	if err != nil {
		t.Fatal(err)
	}
	return s.client(t, token)
}

func (s *server) jobLogin(t testing.TB, job, role string) (secret.Value, error) {
	t.Helper()
	jwt := sign(t, signers(t).workload, map[string]any{
		"aud": reconcile.JobAudience, "sub": "global:default:" + job, "nomad_job_id": job,
		"nomad_namespace": "default", "nomad_task": "main", "nomad_allocation_id": "1",
	})
	token, _, err := s.client(t, secret.Value{}).Login(t.Context(), reconcile.JobsMount, role, jwt)
	return token, err
}

// diff looks at the engine and says what is left to do.
func (s *server) diff(t testing.TB, client *Client) (reconcile.EngineState, []string) {
	t.Helper()
	have, err := client.ObserveEngine(t.Context(), s.want)
	if err != nil {
		t.Fatal(err)
	}
	lines := []string{}
	for _, change := range reconcile.DiffEngine(s.want, have) {
		lines = append(lines, change.String())
	}
	return have, lines
}

// requests are those in the audit log since the offset.
func (s *server) requests(t testing.TB, offset int64) (found []string, end int64) {
	t.Helper()
	log, err := os.Open(s.audit)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	if _, err := log.Seek(offset, 0); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(log)
	for {
		line, err := reader.ReadBytes('\n')
		if err != nil {
			return found, offset
		}
		offset += int64(len(line))
		var entry struct {
			Type    string
			Request struct{ Operation, Path string }
		}
		if err := json.Unmarshal(line, &entry); err != nil {
			t.Fatal(err)
		}
		if entry.Type == "request" {
			found = append(found, entry.Request.Operation+" "+entry.Request.Path)
		}
	}
}

// mutations are the requests since the offset that wrote anything; logins,
// look-ups and a token's own end do not count.
func (s *server) mutations(t testing.TB, offset int64) (found []string, end int64) {
	t.Helper()
	all, end := s.requests(t, offset)
	for _, request := range all {
		operation, path, _ := strings.Cut(request, " ")
		switch {
		case operation == "read", operation == "list":
		case strings.HasSuffix(path, "/login"), path == "auth/token/revoke-self", strings.HasPrefix(path, "auth/token/lookup"):
		default:
			found = append(found, request)
		}
	}
	return found, end
}

// sign makes a JWT of any kind of key that operators have.
func sign(t testing.TB, key crypto.Signer, claims map[string]any) secret.Value {
	t.Helper()
	now := time.Now()
	claims["iat"], claims["nbf"], claims["exp"] = now.Unix(), now.Unix(), now.Add(5*time.Minute).Unix()
	algorithm := ""
	switch key.(type) {
	case ed25519.PrivateKey:
		algorithm = "EdDSA"
	case *rsa.PrivateKey:
		algorithm = "RS256"
	case *ecdsa.PrivateKey:
		algorithm = "ES256"
	}
	encode := base64.RawURLEncoding.EncodeToString
	part := func(content any) string {
		raw, err := json.Marshal(content)
		if err != nil {
			t.Fatal(err)
		}
		return encode(raw)
	}
	content := part(map[string]string{"alg": algorithm, "typ": "JWT"}) + "." + part(claims)
	digest := sha256.Sum256([]byte(content))
	var signature []byte
	var err error
	switch key := key.(type) {
	case ed25519.PrivateKey:
		signature = ed25519.Sign(key, []byte(content))
	case *rsa.PrivateKey:
		signature, err = rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
	case *ecdsa.PrivateKey:
		var r, s *big.Int
		if r, s, err = ecdsa.Sign(rand.Reader, key, digest[:]); err == nil {
			signature = append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return secret.New(content + "." + encode(signature))
}

func publicPEM(key crypto.Signer) string {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func jwk(key *rsa.PrivateKey) map[string]string {
	encode := base64.RawURLEncoding.EncodeToString
	return map[string]string{
		"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "1",
		"n": encode(key.N.Bytes()), "e": encode(big.NewInt(int64(key.E)).Bytes()),
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

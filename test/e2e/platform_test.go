package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// engineVariable names an executable that takes the place of the pinned secrets
// server on platform sites, such as a real bao.
const engineVariable = "SITE_LAB_SECRETS_ENGINE"

// secretsEngine gives what a repository needs for the executable that
// engineVariable names: a jobs/openbao of its own, and what it is called there.
// All is empty where the variable is not set.
func (s *testSite) secretsEngine() (files map[string]string, executable, digest string) {
	s.t.Helper()
	path := os.Getenv(engineVariable)
	if path == "" {
		return nil, "", ""
	}
	if !filepath.IsAbs(path) {
		s.t.Fatalf("%s=%s is not an absolute path", engineVariable, path)
	}
	sum := sha256.Sum256([]byte(s.read(path)))
	digest = hex.EncodeToString(sum[:])
	component := s.read(filepath.Join(projectRoot(s.t), "jobs", site.OpenBaoComponent, "component.hcl"))
	_, block, _ := strings.Cut(component, "\nartifact ")
	block, rest, found := strings.Cut(block, "\n}\n")
	if !found || !strings.Contains(block, `user       = "8200:8200"`) {
		s.t.Fatalf("the openbao component has another artifact than this test knows: %s", block)
	}
	artifact := fmt.Sprintf("artifact %q {\n  path       = %q\n  sha256     = %q\n  executable = %q\n  user       = \"8200:8200\"\n}\n",
		site.OpenBaoComponent, enginePath, digest, filepath.Base(enginePath))
	return map[string]string{filepath.Join("jobs", site.OpenBaoComponent, "component.hcl"): artifact + rest}, path, digest
}

// runsEngine insists that OpenBao is the executable that engineVariable names.
func (s *testSite) runsEngine() {
	s.t.Helper()
	_, path, digest := s.secretsEngine()
	if path == "" {
		return
	}
	process := strings.TrimSpace(s.host.exec("podman", "inspect", "--format", "{{.State.Pid}}", s.containerOf(site.OpenBaoComponent)))
	if running := s.host.exec("sha256sum", "/proc/"+process+"/exe"); !strings.HasPrefix(running, digest) {
		s.t.Errorf("OpenBao is %s, not the %s of %s", running, digest, path)
	}
}

// enginePath is where a repository has that executable: not in git, like any build output.
const enginePath = ".lab/bao"

// answer is what the application of a platform site says of itself.
type answer struct {
	SHA  string `json:"sha"`
	Rows int    `json:"rows"`
}

func (s *testSite) answer() (answer, error) {
	var says answer
	text, err := s.get(8080, "/version")
	if err == nil {
		err = json.Unmarshal([]byte(text), &says)
	}
	return says, err
}

// containerOf is the name of a job's running container on the host.
func (s *testSite) containerOf(job string) string {
	s.t.Helper()
	for _, each := range s.containers() {
		if strings.HasPrefix(each.Name, job+"-") {
			return each.Name
		}
	}
	s.t.Fatalf("job %s has no container", job)
	return ""
}

// psql asks Postgres on the host itself, as root is let in: over the socket.
func (s *testSite) psql(database, sql string) string {
	s.t.Helper()
	out, err := s.tryPsql(database, sql)
	if err != nil {
		s.t.Fatalf("%s: %v", sql, err)
	}
	return out
}

func (s *testSite) tryPsql(database, sql string) (string, error) {
	out, err := s.host.tryExec("podman", "exec", "--user", "0", s.containerOf("postgresql"), "/usr/lib/postgresql/15/bin/psql",
		"--host", "/run/postgresql", "--username", "postgres", "--dbname", database, "--no-psqlrc",
		"--tuples-only", "--no-align", "--set", "ON_ERROR_STOP=1", "--command", sql)
	return strings.TrimSpace(out), err
}

// material opens the site's init material.
func (s *testSite) material() seal.Material {
	s.t.Helper()
	token, err := seal.ReadRootToken(s.tokenFile)
	if err != nil {
		s.t.Fatal(err)
	}
	path := filepath.Join(s.dir, "sites", name, "init.age")
	material, err := seal.Open([]byte(s.read(path)), []secret.Value{token}, name, path)
	if err != nil {
		s.t.Fatal(err)
	}
	return material
}

// bao is OpenBao's API, asked through the host's sshd by an operator who is not site.
type bao struct {
	s      *testSite
	client *http.Client
	token  string
}

// bao logs in with the lab's key. The token is revoked at the test's end.
func (s *testSite) bao() *bao {
	s.t.Helper()
	signer := s.labKey().signer
	connection := s.dialHost(signer)
	b := &bao{s: s, client: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return connection.DialContext(ctx, network, address)
		},
	}}}
	signed, err := nomad.SignJWTFor(signer, name, nomad.Audience, "test", time.Minute)
	if err != nil {
		s.t.Fatal(err)
	}
	var login struct {
		Auth struct {
			ClientToken string `json:"client_token"`
		} `json:"auth"`
	}
	b.must("POST", "auth/operators/login", map[string]string{"role": "operator", "jwt": signed.Reveal()}, &login)
	b.token = login.Auth.ClientToken
	s.t.Cleanup(func() { _ = b.try(context.Background(), "POST", "auth/token/revoke-self", nil, nil) })
	return b
}

// dialHost logs in to the host by SSH.
func (s *testSite) dialHost(signer ssh.Signer) *ssh.Client {
	s.t.Helper()
	connection, err := ssh.Dial("tcp", net.JoinHostPort(s.host.address, "22"), &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, Timeout: 10 * time.Second,
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = connection.Close() })
	return connection
}

// statusError is an answer of OpenBao that is not a good one.
type statusError struct {
	status int
	body   string
}

func (e *statusError) Error() string { return fmt.Sprintf("OpenBao answered %d: %s", e.status, e.body) }

func (b *bao) must(method, path string, body, into any) {
	b.s.t.Helper()
	if err := b.try(b.s.t.Context(), method, path, body, into); err != nil {
		b.s.t.Fatalf("%s %s: %v", method, path, err)
	}
}

func (b *bao) try(ctx context.Context, method, path string, body, into any) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	encoded, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://127.0.0.1:8200/v1/"+path, bytes.NewReader(encoded))
	if err != nil {
		return err
	}
	request.Header.Set("X-Vault-Token", b.token)
	response, err := b.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode >= 300 {
		return &statusError{response.StatusCode, strings.TrimSpace(string(content))}
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(content, into)
}

// refused insists that OpenBao says no.
func (b *bao) refused(method, path string, body any) {
	b.s.t.Helper()
	var status *statusError
	if err := b.try(b.s.t.Context(), method, path, body, nil); !errors.As(err, &status) || status.status != http.StatusForbidden {
		b.s.t.Errorf("%s %s: got %v, want a 403", method, path, err)
	}
}

// mutations are the writes in OpenBao's audit log, but for logins and what ends them.
func (s *testSite) mutations() []string {
	s.t.Helper()
	var found []string
	for line := range strings.Lines(s.host.shell("cat /var/log/openbao/*.log")) {
		var entry struct {
			Type    string `json:"type"`
			Request struct {
				Operation string `json:"operation"`
				Path      string `json:"path"`
			} `json:"request"`
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			s.t.Fatalf("the audit log has %q: %v", line, err)
		}
		operation, path := entry.Request.Operation, entry.Request.Path
		if entry.Type != "request" || operation != "create" && operation != "update" && operation != "delete" {
			continue
		}
		if strings.HasSuffix(path, "/login") || strings.HasPrefix(path, "auth/token/") || strings.HasPrefix(path, "sys/leases/lookup") {
			continue // no state of the site's
		}
		found = append(found, operation+" "+path)
	}
	return found
}

// platformState is what OpenBao and Postgres keep of the site.
func (s *testSite) platformState(add func(kind, text string)) {
	s.t.Helper()
	add("openbao", strings.Join(s.mutations(), "\n"))
	for _, query := range []string{
		"SELECT rolname, rolsuper, rolcanlogin, rolreplication, rolconnlimit, rolpassword, rolvaliduntil FROM pg_authid ORDER BY 1",
		"SELECT datname, datdba::regrole, datconnlimit, datacl FROM pg_database ORDER BY 1",
		"SELECT roleid::regrole, member::regrole, admin_option FROM pg_auth_members ORDER BY 1, 2",
	} {
		add("postgres", s.psql("postgres", query))
	}
	for _, query := range []string{
		"SELECT nspname, nspowner::regrole, nspacl FROM pg_namespace WHERE nspname !~ '^pg_(temp|toast)' ORDER BY 1",
		"SELECT relname, relkind, relowner::regrole, relacl FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1",
		"SELECT defaclrole::regrole, defaclnamespace::regnamespace, defaclobjtype, defaclacl FROM pg_default_acl ORDER BY 1, 2, 3",
	} {
		add("postgres", s.psql("hello", query))
	}
}

func TestABareHostBecomesAPlatformAndComesBackByItself(t *testing.T) {
	s := newSite(t, platform, bare)
	got := s.must("bootstrap-deploy", "--root-token-file="+s.tokenFile)
	t.Logf("the bootstrap took %s", got.duration.Round(100*time.Millisecond))
	says, err := s.answer()
	if err != nil {
		t.Fatal(err)
	}
	if says.SHA != s.head() || says.Rows < 1 {
		t.Fatalf("the application says %+v, want the commit %s and a row", says, s.head())
	}
	s.runsEngine()

	t.Run("a second run writes nothing", func(t *testing.T) {
		s := s.in(t)
		s.commit("the sealed init material", nil)
		for _, args := range [][]string{
			{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}, {"deploy"}, {"plan", "--check"},
		} {
			s.unchanged(args[0], func() {
				if got := s.must(args...); !strings.Contains(got.stdout, "nothing to do") {
					t.Errorf("it found something to do:\n%s", got.stdout)
				}
			})
		}
	})

	t.Run("nobody is left in OpenBao but the jobs", func(t *testing.T) { s.in(t).onlyJobsAreIn() })

	t.Run("after a reboot all is back without an operator", func(t *testing.T) {
		s := s.in(t)
		s.host.reboot()
		begun := time.Now()
		s.until("the application to answer with its rows", 2*time.Minute, func() error {
			again, err := s.answer()
			if err == nil && again.Rows < says.Rows {
				err = fmt.Errorf("%d rows of %d are left", again.Rows, says.Rows)
			}
			return err
		})
		t.Logf("it answered %s after the reboot", time.Since(begun).Round(100*time.Millisecond))
		for _, job := range []string{"openbao", "postgresql", "hello"} {
			s.waitHealthy(job)
		}
	})
}

// onlyJobsAreIn insists that OpenBao knows no token but those of tasks, and the
// one that asks.
func (s *testSite) onlyJobsAreIn() {
	s.t.Helper()
	b := s.bao()
	var accessors struct {
		Data struct{ Keys []string } `json:"data"`
	}
	b.must("LIST", "auth/token/accessors", nil, &accessors)
	mine := 0
	for _, accessor := range accessors.Data.Keys {
		var token struct {
			Data struct {
				Path     string
				Policies []string
				Meta     map[string]string
			} `json:"data"`
		}
		b.must("POST", "auth/token/lookup-accessor", map[string]string{"accessor": accessor}, &token)
		switch {
		case token.Data.Path == "auth/jwt-nomad/login":
		case token.Data.Path == "auth/operators/login" && token.Data.Meta["purpose"] == "test":
			mine++
		default:
			s.t.Errorf("a token of %s with policies %v is good: %v", token.Data.Path, token.Data.Policies, token.Data.Meta)
		}
	}
	if mine == 0 {
		s.t.Error("not even the token that asks was found")
	}
}

package e2e

import (
	"context"
	"encoding/json"
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
)

// labKey is the key that the site's first operator logs in with.
func (s *testSite) labKey() sshKey {
	s.t.Helper()
	file := filepath.Join(s.lab.Dir(), "id")
	key := sshKey{name: name, file: file, public: s.read(file + ".pub")}
	var err error
	if key.signer, err = ssh.ParsePrivateKey([]byte(s.read(file))); err != nil {
		s.t.Fatal(err)
	}
	return key
}

// through is OpenBao's API, and Nomad's, for whom a key lets into the host; there
// it is nobody yet.
func (s *testSite) through(user string, key sshKey) *bao {
	s.t.Helper()
	connection, err := ssh.Dial("tcp", net.JoinHostPort(s.host.address, "22"), &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(key.signer)}, Timeout: 10 * time.Second,
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = connection.Close() })
	return &bao{s: s, client: &http.Client{Transport: &http.Transport{DialContext: connection.DialContext}}}
}

// admitted logs in to OpenBao, until the test's end.
func (b *bao) admitted(mount, role string, key sshKey) *bao {
	b.s.t.Helper()
	token, err := b.login(mount, role, key.signed(b.s.t, "test"))
	if err != nil {
		b.s.t.Fatalf("%s at %s: %v", key.name, mount, err)
	}
	in := b.as(token)
	b.s.t.Cleanup(func() { _ = in.try(context.Background(), "POST", "auth/token/revoke-self", nil, nil) })
	return in
}

// nomadBy logs in to Nomad by one of its ways, as who a token says that it is.
func (b *bao) nomadBy(method, jwt string) (string, error) {
	b.s.t.Helper()
	status, content := b.asksNomad("", http.MethodPost, "acl/login", map[string]string{"AuthMethodName": method, "LoginToken": jwt})
	if status != http.StatusOK {
		return "", fmt.Errorf("Nomad answered %d: %s", status, content)
	}
	var token struct{ SecretID string }
	err := json.Unmarshal([]byte(content), &token)
	return token.SecretID, err
}

// asksNomad asks its API on the host's loopback.
func (b *bao) asksNomad(token, method, path string, body any) (status int, content string) {
	b.s.t.Helper()
	encoded, err := json.Marshal(body)
	if err != nil {
		b.s.t.Fatal(err)
	}
	if body == nil {
		encoded = nil
	}
	request, err := http.NewRequestWithContext(b.s.t.Context(), method, "http://127.0.0.1:4646/v1/"+path, strings.NewReader(string(encoded)))
	if err != nil {
		b.s.t.Fatal(err)
	}
	request.Header.Set("X-Nomad-Token", token)
	response, err := b.client.Do(request)
	if err != nil {
		b.s.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = response.Body.Close() }()
	read, err := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	if err != nil {
		b.s.t.Fatalf("%s %s: %v", method, path, err)
	}
	return response.StatusCode, string(read)
}

// runsIn runs a command in a job's allocation by Nomad's exec.
func (s *testSite) runsIn(job, token string, command ...string) error {
	s.t.Helper()
	args := []string{"env", "NOMAD_TOKEN=" + token, "/opt/site/bin/nomad", "alloc", "exec", "-i=false", "-t=false", "-job", job}
	_, err := s.host.tryExec(append(args, command...)...)
	return err
}

// withKeyAlone has site log in with a key and nothing else.
func (s *testSite) withKeyAlone(user string, key sshKey) {
	s.loggingIn("IdentityFile "+key.file, "IdentitiesOnly yes", "IdentityAgent none")
	path := filepath.Join(s.dir, ".lab", name, "ssh_config")
	s.write(path, strings.Replace(s.read(path), "User root", "User "+user, 1))
}

// newMachine is an operator who only rotates, known to all since a bootstrap. Its
// account on the host may become root for what a rotation asks of site-host, and for
// nothing else.
func (s *testSite) newMachine() sshKey {
	s.t.Helper()
	machine := s.newKey("cron", "-t", "ed25519")
	s.host.shell(`useradd --create-home --shell /bin/sh cron
		install -d -m 700 -o cron -g cron /home/cron/.ssh
		cat >/home/cron/.ssh/authorized_keys <<'END'
` + machine.public + `END
		chown cron:cron /home/cron/.ssh/authorized_keys
		echo 'cron ALL=(root) NOPASSWD: /opt/site/bin/site-host version, /opt/site/bin/site-host lock *, /opt/site/bin/site-host journal *, /opt/site/bin/site-host release *, /opt/site/bin/site-host dial unix /run/postgresql/.s.PGSQL.5432' >/etc/sudoers.d/cron
		chmod 440 /etc/sudoers.d/cron`)
	s.must("operators", "add", machine.name, "--public-key-file="+machine.file+".pub", "--rights=rotate")
	s.commit("a machine that rotates", nil)
	s.bootstrap()
	return machine
}

func TestAMachineThatRotatesSecretsCanDoNothingElse(t *testing.T) {
	s := newSite(t, platform)
	machine, operator := s.newMachine(), s.labKey()
	// What the machine has: the repository and its key.
	kept := filepath.Join(t.TempDir(), "root-token")
	s.write(kept, s.read(s.tokenFile))
	if err := os.Remove(s.tokenFile); err != nil {
		t.Fatal(err)
	}
	s.tokenFile = kept
	s.withKeyAlone("cron", machine)
	b := s.through("cron", machine)
	deploying := s.through("root", operator).admitted("operators", "operator", operator)

	t.Run("it rotates what it is asked to, and what is due", func(t *testing.T) {
		s := s.in(t)
		if got := s.must("secrets", "rotate", "--due"); !strings.Contains(got.stdout, "nothing is due") {
			t.Errorf("nothing can be due yet\n%v", got)
		}
		before, _ := deploying.generations()
		s.must("secrets", "rotate", rotatedPassword, "--drain=1s", "--detach")
		now, retiring := deploying.generations()
		if now.number != before.number+1 || now.login == before.login || retiring != before {
			t.Errorf("generation %d (%s) after %d (%s), %d is retiring", now.number, now.login, before.number, before.login, retiring.number)
		}
		for _, one := range []generation{before, now} {
			if err := s.logsIn(one); err != nil {
				t.Errorf("generation %d does not log in before the old one is retired: %v", one.number, err)
			}
		}
		s.must("secrets", "rotate", "--due", "--drain=0s")
		if again, retiring := deploying.generations(); again != now || retiring.number != 0 {
			t.Errorf("generation %d is active, %d is retiring", again.number, retiring.number)
		}
		if err := s.logsIn(now); err != nil {
			t.Errorf("the new generation does not log in: %v", err)
		}
		if s.logsIn(before) == nil {
			t.Error("the old generation still logs in")
		}
		if _, err := s.answer(); err != nil {
			t.Errorf("the application: %v", err)
		}
		if history := s.must("secrets", "history").stdout; strings.Count(history, machine.name) < 2 {
			t.Errorf("history does not say that the machine did it:\n%s", history)
		}
	})

	t.Run("it does not deploy", func(t *testing.T) {
		s := s.in(t)
		s.writesNothing("a refused deploy", func() {
			for _, args := range [][]string{{"deploy"}, {"plan"}} {
				s.wantRefusal(s.run(args...), []string{"operator cron may rotate secrets and nothing else"}, []string{"operators list"})
			}
		})
		if got := s.run("logs", "hello"); got.code == 0 || !strings.Contains(got.stderr, "403") && !strings.Contains(got.stderr, "ermission denied") {
			t.Errorf("it reads logs\n%v", got)
		}
	})

	t.Run("its key is nobody else's", func(t *testing.T) {
		s := s.in(t)
		b := &bao{s: s, client: b.client}
		posing := machine
		posing.name = operator.name
		for _, key := range []sshKey{machine, posing} {
			for _, place := range [][2]string{{"operators", "operator"}, {"operators", "rotator"}, {"rotators", "operator"}, {"hosts", "host"}, {"jwt-nomad", "hello"}} {
				if _, err := b.login(place[0], place[1], key.signed(t, "test")); !isRefused(err) {
					t.Errorf("it is let in by %s/%s as %s: %v", place[0], place[1], key.name, err)
				}
			}
			if _, err := b.nomadBy("operators", key.signed(t, "test")); err == nil {
				t.Errorf("Nomad lets it in among those who deploy, as %s", key.name)
			}
		}
		if _, err := b.login("rotators", "rotator", posing.signed(t, "test")); !isRefused(err) {
			t.Errorf("it rotates in the name of %s: %v", posing.name, err)
		}
		if _, err := b.nomadBy("rotators", posing.signed(t, "test")); err == nil {
			t.Errorf("Nomad lets it rotate in the name of %s", posing.name)
		}
		// Both ways work with the key and the name that belong to them.
		b.admitted("rotators", "rotator", machine)
		if _, err := b.nomadBy("rotators", machine.signed(t, "test")); err != nil {
			t.Error(err)
		}
		if _, err := b.nomadBy("operators", operator.signed(t, "test")); err != nil {
			t.Error(err)
		}
	})

	t.Run("OpenBao lets it at values and at nothing of its own", func(t *testing.T) {
		s := s.in(t)
		in := (&bao{s: s, client: b.client}).admitted("rotators", "rotator", machine)
		in.must("GET", "site/data/hello/database_password", nil, nil)
		in.must("LIST", "site/metadata", nil, nil)
		for _, path := range []string{"sys/policies/acl", "auth/operators/role", "auth/rotators/role", "auth/jwt-nomad/role", "auth/token/accessors", "sys/leases/lookup/auth"} {
			in.refused("LIST", path, nil)
		}
		for _, path := range []string{
			"sys/mounts", "sys/auth", "sys/audit", "sys/policies/acl/site-rotator", "sys/policies/acl/site-operator", "sys/policies/acl/job-hello",
			"auth/operators/config", "auth/rotators/config", "auth/rotators/role/rotator", "auth/hosts/config", "site/config", "sys/storage/raft/configuration",
		} {
			in.refused("GET", path, nil)
			deploying.as(deploying.token).mayKnow(path)
		}
		all := map[string]string{"policy": `path "*" { capabilities = ["sudo", "read", "update"] }`}
		for path, body := range map[string]any{
			"sys/policies/acl/site-rotator": all, "sys/policies/acl/mine": all, "sys/mounts/more": map[string]string{"type": "kv"},
			"sys/auth/more": map[string]string{"type": "jwt"}, "auth/rotators/role/rotator": map[string]any{"token_policies": []string{"site-operator"}},
			"auth/rotators/config": map[string]any{"jwt_validation_pubkeys": []string{}}, "auth/operators/role/operator": map[string]any{"token_ttl": 1},
			"sys/audit/more": map[string]any{"type": "file", "options": map[string]string{"file_path": "discard"}},
			"sys/seal":       nil, "sys/rotate": nil, "sys/rotate/root/init": map[string]int{"secret_shares": 1, "secret_threshold": 1},
			"auth/token/create": map[string]any{"policies": []string{"site-operator"}}, "auth/token/create-orphan": nil,
			"auth/token/revoke-accessor": map[string]string{"accessor": "x"}, "site/config": map[string]any{"max_versions": 1},
		} {
			in.refused("PUT", path, body)
		}
		in.refused("DELETE", "site/metadata/hello/database_password", nil)
		in.refused("DELETE", "site/data/hello/database_password", nil)
		in.refused("DELETE", "sys/mounts/site", nil)
		in.refused("DELETE", "sys/audit/file", nil)
	})

	t.Run("Nomad lets it at jobs and at nothing that runs in them", func(t *testing.T) {
		s := s.in(t)
		asking := &bao{s: s, client: b.client}
		token, err := asking.nomadBy("rotators", machine.signed(t, "test"))
		if err != nil {
			t.Fatal(err)
		}
		all, err := asking.nomadBy("operators", operator.signed(t, "test"))
		if err != nil {
			t.Fatal(err)
		}
		allocation := s.allocations("hello")[0]
		// The same question, asked by an operator, is answered: otherwise a refusal proves nothing.
		for _, path := range []string{
			"client/fs/logs/" + allocation + "?task=hello&type=stderr&plain=true", "client/fs/ls/" + allocation + "?path=/",
			"client/fs/cat/" + allocation + "?path=alloc/logs/hello.stderr.0", "agent/self",
		} {
			// Some answers begin before Nomad looks at the token.
			if status, content := asking.asksNomad(token, http.MethodGet, path, nil); status != http.StatusForbidden && content != "Permission denied" {
				t.Errorf("GET %s: %d %.100q", path, status, content)
			}
			if status, content := asking.asksNomad(all, http.MethodGet, path, nil); status != http.StatusOK || content == "Permission denied" {
				t.Errorf("GET %s is refused to operators too: %d %.100q", path, status, content)
			}
		}
		for _, one := range []struct {
			method, path string
			body         any
		}{
			{http.MethodGet, "acl/tokens", nil},
			{http.MethodPost, "acl/token", map[string]string{"Name": "mine", "Type": "management"}},
			{http.MethodPost, "acl/policy/site-rotator", map[string]string{"Name": "site-rotator", "Rules": `operator { policy = "write" }`}},
			{http.MethodPost, "acl/policy/mine", map[string]string{"Name": "mine", "Rules": `operator { policy = "write" }`}},
			{http.MethodPost, "acl/auth-method", map[string]string{"Name": "mine", "Type": "JWT"}},
			{http.MethodPost, "acl/binding-rule", map[string]string{"AuthMethod": "rotators", "BindType": "management"}},
			{http.MethodDelete, "acl/policy/site-operator", nil},
			{http.MethodPost, "job/hello/dispatch", map[string]string{}},
			{http.MethodPut, "client/allocation/" + allocation + "/restart", map[string]string{}},
			{http.MethodPut, "allocation/" + allocation + "/stop", nil},
			{http.MethodPost, "namespace/mine", map[string]string{"Name": "mine"}},
			{http.MethodPut, "system/gc", nil},
			{http.MethodPut, "var/elsewhere/mine", map[string]any{"Path": "elsewhere/mine", "Items": map[string]string{"a": "b"}}},
			{http.MethodGet, "agent/keyring/list", nil},
		} {
			if status, content := asking.asksNomad(token, one.method, one.path, one.body); status != http.StatusForbidden {
				t.Errorf("%s %s: %d %.100q", one.method, one.path, status, content)
			}
		}
		version := []string{"/usr/lib/postgresql/15/bin/psql", "--version"}
		if err := s.runsIn("postgresql", all, version...); err != nil {
			t.Errorf("not even an operator runs a command in an allocation: %v", err)
		}
		if err := s.runsIn("postgresql", token, version...); err == nil || !strings.Contains(err.Error(), "ermission denied") {
			t.Errorf("it runs a command in an allocation: %v", err)
		}
		if status, content := asking.asksNomad(token, http.MethodGet, "job/hello", nil); status != http.StatusOK {
			t.Errorf("it does not even see jobs: %d %s", status, content)
		}
	})

	t.Run("taken out of the site it is refused", func(t *testing.T) {
		s := s.in(t)
		s.loggingIn()
		s.must("operators", "remove", machine.name)
		s.commit("no machine that rotates", nil)
		asking := &bao{s: s, client: b.client}
		in := asking.admitted("rotators", "rotator", machine)
		s.must("deploy")
		in.refused("GET", "site/data/hello/database_password", nil)
		if _, err := asking.login("rotators", "rotator", machine.signed(t, "test")); !isRefused(err) {
			t.Errorf("OpenBao lets it in: %v", err)
		}
		s.until("Nomad to refuse it", time.Minute, func() error {
			if token, err := asking.nomadBy("rotators", machine.signed(t, "test")); err == nil {
				return fmt.Errorf("it gives it %d bytes of a token", len(token))
			}
			return nil
		})
		s.bootstrap()
		s.planIs()
	})
}

// mayKnow insists that somebody may read a path, whether there is something or not.
func (b *bao) mayKnow(path string) {
	b.s.t.Helper()
	if err := b.try(b.s.t.Context(), "GET", path, nil, nil); isRefused(err) && !strings.Contains(path, "raft") {
		b.s.t.Errorf("GET %s is refused to operators too, so that the refusal proves nothing: %v", path, err)
	}
}

func TestALostWorkstationIsReplacedByACloneAndTheRootToken(t *testing.T) {
	s := newSite(t, platform)
	lost := s.labKey()
	siteFile := filepath.Join("sites", name, "site.hcl")
	s.commit("the operator's key is in git", map[string]string{
		siteFile: s.replace(siteFile, fmt.Sprintf("public_key_file = \".lab/%s/id.pub\"", name), fmt.Sprintf("public_key = %q", strings.TrimSpace(lost.public))),
	})
	s.must("deploy")
	// What whoever has the old workstation holds: its key, and what it logged in to.
	thief := s.through("root", lost)
	inBao := thief.admitted("operators", "operator", lost)
	inNomad, err := thief.nomadBy("operators", lost.signed(t, "test"))
	if err != nil {
		t.Fatal(err)
	}
	oldManagement, err := s.managementToken()
	if err != nil {
		t.Fatal(err)
	}
	before, _ := inBao.generations()

	// Another machine: a clone, the token out of the safe, a new key, which the
	// provider's console puts into authorized_keys in the place of the old one.
	own := s.in(t)
	own.dir, own.tokenFile = filepath.Join(t.TempDir(), "clone"), filepath.Join(t.TempDir(), "root-token")
	own.write(own.tokenFile, s.read(s.tokenFile))
	s.git("clone", "--quiet", s.dir, own.dir)
	if _, err := os.Stat(filepath.Join(own.dir, ".lab")); err == nil {
		t.Fatal("the clone has what is not in git")
	}
	key := own.newKey("ann", "-t", "ed25519")
	s.host.shell("cat >/root/.ssh/authorized_keys <<'END'\n" + key.public + "END")
	own.withKeyAlone("root", key)

	own.must("operators", "add", key.name, "--public-key-file="+key.file+".pub")
	own.must("operators", "remove", lost.name)
	own.commit("another workstation", nil)
	own.bootstrap()
	own.must("secrets", "rotate", "--all", "--drain=1s")
	own.must("secrets", "rotate", "nomad-acl", "--root-token-file="+own.tokenFile)
	own.commit("rotated", nil)

	t.Run("the site goes on", func(t *testing.T) {
		s := own.in(t)
		now, retiring := s.through("root", key).admitted("operators", "operator", key).generations()
		if now.number != before.number+1 || retiring.number != 0 {
			t.Errorf("generation %d follows %d, %d is retiring", now.number, before.number, retiring.number)
		}
		if s.logsInThrough(key, before) == nil {
			t.Error("the old password still works")
		}
		if err := s.logsInThrough(key, now); err != nil {
			t.Errorf("the new password: %v", err)
		}
		says, err := s.answer()
		if err != nil || says.Rows < 2 {
			t.Errorf("the application says %+v, %v", says, err)
		}
		s.planIs()
		s.waitHealthy("hello") // with the new management token
	})

	t.Run("what was lost is refused everywhere", func(t *testing.T) {
		old := s.in(t)
		if got := old.run("status"); got.code != 1 || !strings.Contains(got.stderr, "permission denied") {
			t.Errorf("the old workstation gets in\n%v", got)
		}
		inBao.refused("GET", "auth/token/lookup-self", nil)
		inBao.refused("GET", "site/data/hello/database_password", nil)
		posing := lost
		posing.name = key.name
		for _, one := range []sshKey{lost, posing} {
			if _, err := thief.login("operators", "operator", one.signed(t, "test")); !isRefused(err) {
				t.Errorf("OpenBao takes the old key for %s: %v", one.name, err)
			}
			if _, err := thief.nomadBy("operators", one.signed(t, "test")); err == nil {
				t.Errorf("Nomad takes the old key for %s", one.name)
			}
		}
		for what, token := range map[string]string{"operator's": inNomad, "management": oldManagement} {
			if thief.nomadKnows(token) {
				t.Errorf("the old %s token of Nomad still works", what)
			}
		}
	})
}

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/adapter/nomad"
)

// secretFile is a file that Nomad gave a running task of a job, in the folder of
// its secrets on the host.
func (s *testSite) secretFile(job, file string) string {
	s.t.Helper()
	var allocations []struct{ ID, ClientStatus string }
	s.nomad("/v1/job/"+job+"/allocations", &allocations)
	for _, allocation := range allocations {
		if allocation.ClientStatus == "running" {
			return strings.TrimSpace(s.host.exec("cat", filepath.Join("/var/lib/nomad/alloc", allocation.ID, job, "secrets", file)))
		}
	}
	s.t.Fatalf("job %s does not run", job)
	return ""
}

// as is the same API, asked with another token.
func (b *bao) as(token string) *bao { return &bao{s: b.s, client: b.client, token: token} }

// login tries to log in to OpenBao and gives the token.
func (b *bao) login(mount, role, jwt string) (string, error) {
	var answer struct {
		Auth struct {
			ClientToken string `json:"client_token"`
		} `json:"auth"`
	}
	err := b.as("").try(b.s.t.Context(), "POST", "auth/"+mount+"/login", map[string]string{"role": role, "jwt": jwt}, &answer)
	return answer.Auth.ClientToken, err
}

// isRefused says whether OpenBao answered that somebody may not: a login that is
// none is a bad request to it.
func isRefused(err error) bool {
	var status *statusError
	return errors.As(err, &status) && (status.status == http.StatusForbidden || status.status == http.StatusBadRequest)
}

func TestAJobReachesItsOwnSecretsAndNothingElse(t *testing.T) {
	s := newSite(t, platform)
	s.commitHolders("three jobs", nil,
		broker("produce", "produced"),
		reader(9001, producedBy("join_token", "broker")+"secret \"key\" {\n  generated {}\n}\nsecret \"unread\" {\n  generated {}\n}\n", "join_token", "key"),
		holder{Name: "audit", Mode: "show", Port: 9002, Component: "reads = [\"reader.key\"]\n", Reads: []string{"site/data/reader/key"}})
	s.must("deploy")
	operator := s.bao()
	value := map[string]any{"data": map[string]string{"value": "forged"}}
	var before, after struct{ Data any }
	operator.must("GET", "site/data/reader/key", nil, &before)

	// What each may read and write, of all that there is.
	paths := []string{"hello/database_password", "reader/join_token", "reader/key", "reader/unread"}
	for job, may := range map[string]struct{ read, write []string }{
		"hello":  {read: []string{"hello/database_password"}},
		"reader": {read: []string{"reader/join_token", "reader/key"}},
		"audit":  {read: []string{"reader/key"}},
		"broker": {write: []string{"reader/join_token"}},
	} {
		t.Run(job, func(t *testing.T) {
			s := s.in(t)
			b := s.bao().as(s.secretFile(job, "vault_token"))
			var self struct {
				Data struct {
					Policies []string
					Meta     map[string]string
				} `json:"data"`
			}
			b.must("GET", "auth/token/lookup-self", nil, &self)
			slices.Sort(self.Data.Policies)
			if !slices.Equal(self.Data.Policies, []string{"default", "job-" + job}) || self.Data.Meta["nomad_job_id"] != job {
				t.Errorf("the token is of %+v", self.Data)
			}
			for _, path := range append(slices.Clone(paths), "reader/absent", job+"/absent") {
				if slices.Contains(may.read, path) {
					b.must("GET", "site/data/"+path, nil, nil)
				} else {
					b.refused("GET", "site/data/"+path, nil)
				}
				if slices.Contains(may.write, path) {
					// Its own value again: the next subtest has its reader.
					b.must("POST", "site/data/"+path, map[string]any{"data": map[string]string{"value": "produced"}}, nil)
					b.must("GET", "site/metadata/"+path, nil, nil)
				} else {
					b.refused("POST", "site/data/"+path, value)
					b.refused("GET", "site/metadata/"+path, nil)
				}
				// Not even what it produces is its to destroy.
				b.refused("DELETE", "site/data/"+path, nil)
				b.refused("DELETE", "site/metadata/"+path, nil)
				b.refused("POST", "site/undelete/"+path, map[string]any{"versions": []int{1}})
				b.refused("PUT", "site/destroy/"+path, map[string]any{"versions": []int{1}})
			}
			for _, folder := range []string{"", "/hello", "/reader", "/" + job} {
				b.refused("LIST", "site/metadata"+folder, nil)
			}
			for _, path := range []string{"sys/policies/acl", "auth/jwt-nomad/role", "auth/operators/role", "auth/token/accessors", "sys/leases/lookup/auth"} {
				b.refused("LIST", path, nil)
			}
			for _, path := range []string{
				"sys/mounts", "sys/auth", "sys/audit", "sys/policies/acl/job-" + job, "sys/policies/acl/site-operator",
				"auth/jwt-nomad/role/" + job, "auth/operators/config", "site/config", "sys/storage/raft/configuration",
			} {
				b.refused("GET", path, nil)
			}
			for path, body := range map[string]any{
				"sys/policies/acl/job-" + job: map[string]string{"policy": `path "site/*" { capabilities = ["read"] }`},
				"sys/seal":                    nil, "sys/rotate": nil, "sys/mounts/more": map[string]string{"type": "kv"},
				"auth/jwt-nomad/role/" + job: map[string]any{"token_policies": []string{"site-operator"}},
				"auth/token/create":          map[string]any{"policies": []string{"site-operator"}},
				"auth/token/create-orphan":   nil, "auth/token/revoke-accessor": map[string]string{"accessor": "x"},
				"site/config": map[string]any{"max_versions": 1},
			} {
				b.refused("PUT", path, body)
			}
		})
	}

	t.Run("what a job's identity says cannot be used for another job", func(t *testing.T) {
		s := s.in(t)
		b := s.bao()
		identity := s.secretFile("reader", "nomad_vault_default.jwt")
		token, err := b.login("jwt-nomad", "reader", identity)
		if err != nil {
			t.Fatalf("the identity is of no use at all, so this proves nothing: %v", err)
		}
		t.Cleanup(func() { _ = b.as(token).try(context.Background(), "POST", "auth/token/revoke-self", nil, nil) })
		b.as(token).must("GET", "site/data/reader/key", nil, nil)
		for _, place := range [][2]string{{"jwt-nomad", "hello"}, {"jwt-nomad", "broker"}, {"jwt-nomad", "absent"}, {"operators", "operator"}, {"hosts", "host"}} {
			if _, err := b.login(place[0], place[1], identity); !isRefused(err) {
				t.Errorf("the identity of reader as %s of %s: %v", place[1], place[0], err)
			}
		}
		// A changed one is none.
		parts := strings.Split(identity, ".")
		for title, forged := range map[string]string{
			"without a signature": parts[0] + "." + parts[1] + ".", "with nobody's": parts[0] + "." + parts[1] + "." + strings.Repeat("A", len(parts[2])),
		} {
			if _, err := b.login("jwt-nomad", "reader", forged); !isRefused(err) {
				t.Errorf("an identity %s: %v", title, err)
			}
		}
	})

	operator.must("GET", "site/data/reader/key", nil, &after)
	if fmt.Sprint(before) != fmt.Sprint(after) {
		t.Error("a refused write changed the secret")
	}
	s.unchanged("a deploy afterwards", func() { s.must("deploy") })
}

// sshKey is a key pair of an operator.
type sshKey struct {
	name, file string
	public     string
	signer     ssh.Signer
}

// newKey makes a key pair as an operator does.
func (s *testSite) newKey(name string, args ...string) sshKey {
	s.t.Helper()
	key := sshKey{name: name, file: filepath.Join(s.t.TempDir(), name)}
	command := exec.CommandContext(s.t.Context(), "ssh-keygen", append([]string{"-q", "-N", "", "-C", name + "@laptop", "-f", key.file}, args...)...)
	if out, err := command.CombinedOutput(); err != nil {
		s.t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	key.public = s.read(key.file + ".pub")
	var err error
	if key.signer, err = ssh.ParsePrivateKey([]byte(s.read(key.file))); err != nil {
		s.t.Fatal(err)
	}
	return key
}

// agentWith runs an SSH agent that holds keys, until the test's end.
func (s *testSite) agentWith(keys ...sshKey) (socket string) {
	s.t.Helper()
	socket = filepath.Join(privateTemp(s.t), "agent")
	agent := exec.CommandContext(context.WithoutCancel(s.t.Context()), "ssh-agent", "-D", "-a", socket)
	if err := agent.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = agent.Process.Kill()
		_ = agent.Wait()
	})
	s.until("the SSH agent to listen", 10*time.Second, func() error {
		_, err := os.Stat(socket)
		return err
	})
	for _, key := range keys {
		add := exec.CommandContext(s.t.Context(), "ssh-add", "-q", key.file)
		add.Env = append(os.Environ(), "SSH_AUTH_SOCK="+socket)
		if out, err := add.CombinedOutput(); err != nil {
			s.t.Fatalf("ssh-add: %v\n%s", err, out)
		}
	}
	return socket
}

// loggingIn has all that follows log in as these settings of SSH say, and in no
// other way; without any, as the lab says.
func (s *testSite) loggingIn(settings ...string) {
	s.t.Helper()
	content := s.read(s.lab.SSHConfig())
	if len(settings) > 0 {
		content = fmt.Sprintf("Host %s\n    HostName %s\n    User root\n    UserKnownHostsFile %s\n    %s\n",
			s.host.name, s.host.address, filepath.Join(s.lab.Dir(), "known_hosts"), strings.Join(settings, "\n    "))
	}
	s.write(filepath.Join(s.dir, ".lab", name, "ssh_config"), content)
}

// signed is a login token as site makes it.
func (k sshKey) signed(t *testing.T, purpose string) string {
	t.Helper()
	jwt, err := nomad.SignJWTFor(k.signer, k.name, nomad.Audience, purpose, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return jwt.Reveal()
}

// nomadLogin tries to log in to Nomad, and gives the token.
func (b *bao) nomadLogin(jwt string) (string, error) {
	content, err := json.Marshal(map[string]string{"AuthMethodName": "operators", "LoginToken": jwt})
	if err != nil {
		return "", err
	}
	request, err := http.NewRequestWithContext(b.s.t.Context(), http.MethodPost, "http://127.0.0.1:4646/v1/acl/login", bytes.NewReader(content))
	if err != nil {
		return "", err
	}
	response, err := b.client.Do(request)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("Nomad answered %s", response.Status)
	}
	var token struct{ SecretID string }
	err = json.NewDecoder(response.Body).Decode(&token)
	return token.SecretID, err
}

// nomadKnows asks Nomad whether a token is good.
func (b *bao) nomadKnows(token string) bool {
	b.s.t.Helper()
	request, err := http.NewRequestWithContext(b.s.t.Context(), http.MethodGet, "http://127.0.0.1:4646/v1/acl/token/self", nil)
	if err != nil {
		b.s.t.Fatal(err)
	}
	request.Header.Set("X-Nomad-Token", token)
	response, err := b.client.Do(request)
	if err != nil {
		b.s.t.Fatal(err)
	}
	_ = response.Body.Close()
	return response.StatusCode == http.StatusOK
}

func TestOperatorsComeAndGo(t *testing.T) {
	s := newSite(t, platform)
	siteFile := filepath.Join("sites", name, "site.hcl")
	keys := []sshKey{
		s.newKey("ed", "-t", "ed25519"), s.newKey("rsa", "-t", "rsa", "-b", "3072"), s.newKey("ec", "-t", "ecdsa", "-b", "256"),
	}
	var lines strings.Builder
	for _, key := range keys {
		lines.WriteString(key.public)
	}
	s.host.shell("cat >>/root/.ssh/authorized_keys <<'END'\n" + lines.String() + "END")
	s.commit("comments", map[string]string{siteFile: "# The site of the shop.\n" +
		strings.Replace(s.source(siteFile), "  component ", "  # what runs there\n  component ", 1)})
	for _, key := range keys {
		got := s.must("operators", "add", key.name, "--public-key-file="+key.file+".pub")
		if !strings.Contains(got.stdout, "added "+key.name) || !strings.Contains(got.stdout, "git commit") {
			t.Errorf("it does not say what is left to do: %v", got)
		}
	}

	t.Run("the list has all of them with their fingerprints", func(t *testing.T) {
		s := s.in(t)
		human := s.must("operators", "list").stdout
		var listed struct {
			Schema    string
			Operators []struct {
				Name        string
				KeyType     string `json:"key_type"`
				Fingerprint string
			}
		}
		if err := json.Unmarshal([]byte(s.must("operators", "list", "--json").stdout), &listed); err != nil {
			t.Fatal(err)
		}
		if len(listed.Operators) != len(keys)+1 || listed.Schema == "" {
			t.Errorf("listed are %+v", listed)
		}
		for _, key := range keys {
			fingerprint, keyType := ssh.FingerprintSHA256(key.signer.PublicKey()), key.signer.PublicKey().Type()
			if !slices.ContainsFunc(strings.Split(human, "\n"), func(line string) bool {
				fields := strings.Fields(line)
				return slices.Contains(fields, key.name) && slices.Contains(fields, fingerprint) && slices.Contains(fields, keyType)
			}) {
				t.Errorf("%s with %s %s is not in\n%s", key.name, keyType, fingerprint, human)
			}
			found := 0
			for _, one := range listed.Operators {
				if one.Name == key.name && one.Fingerprint == fingerprint && one.KeyType == keyType {
					found++
				}
			}
			if found != 1 {
				t.Errorf("%s with %s is %d times in %+v", key.name, fingerprint, found, listed)
			}
		}
	})

	t.Run("what is no operator is refused and changes nothing", func(t *testing.T) {
		s := s.in(t)
		folder := t.TempDir()
		short, p521 := s.newKey("short", "-t", "rsa", "-b", "1024"), s.newKey("long", "-t", "ecdsa", "-b", "521")
		file := func(base, content string) string {
			path := filepath.Join(folder, base)
			s.write(path, content)
			return "--public-key-file=" + path
		}
		before := s.source(siteFile)
		for title, test := range map[string]struct{ args, says, hints []string }{
			"a name that is taken":     {[]string{"ed", "--public-key-file=" + short.file + ".pub"}, []string{"ed is there already"}, []string{"another name"}},
			"a key that is taken":      {[]string{"ned", "--public-key-file=" + keys[0].file + ".pub"}, []string{`Operator "ed" has the same key`}, nil},
			"a private key":            {[]string{"new", "--public-key-file=" + keys[0].file}, []string{"private key"}, []string{".pub"}},
			"garbage":                  {[]string{"new", file("garbage", plantedSecret)}, []string{"not an SSH public key"}, []string{".pub"}},
			"nothing":                  {[]string{"new", file("empty", "")}, []string{"not an SSH public key"}, []string{".pub"}},
			"two keys":                 {[]string{"new", file("two", keys[0].public+keys[1].public)}, []string{"more than one key"}, []string{"one line"}},
			"a short key":              {[]string{"new", "--public-key-file=" + short.file + ".pub"}, []string{"1024"}, nil},
			"a key that cannot log in": {[]string{"new", "--public-key-file=" + p521.file + ".pub"}, []string{"ecdsa-sha2-nistp521"}, nil},
			"a key that is not there":  {[]string{"new", "--public-key-file=" + filepath.Join(folder, "absent")}, []string{"absent"}, []string{"public key file"}},
			"no key":                   {[]string{"new"}, []string{"--public-key-file"}, []string{"name the file"}},
			"a name that is none":      {[]string{"No Body", "--public-key-file=" + short.file + ".pub"}, []string{`"No Body"`}, []string{"lower-case"}},
		} {
			got := s.run(append([]string{"operators", "add"}, test.args...)...)
			s.wantRefusal(got, test.says, test.hints)
			for line := range strings.Lines(s.read(keys[0].file)) {
				if line = strings.TrimSpace(line); len(line) > 20 && !strings.Contains(line, "-----") && strings.Contains(got.stdout+got.stderr, line) {
					t.Errorf("%s: the output shows the private key", title)
				}
			}
			if s.source(siteFile) != before {
				t.Errorf("%s changed site.hcl", title)
				s.write(filepath.Join(s.dir, siteFile), before)
			}
		}
		s.wantRefusal(s.run("operators", "remove", "nobody"), []string{`"nobody"`}, []string{"there are: ", "ed"})
		if s.source(siteFile) != before || s.git("status", "--porcelain", "--untracked-files=all") != "M "+siteFile {
			t.Errorf("left behind is\n%s", s.git("status", "--porcelain"))
		}
	})

	all := s.commit("three more operators", nil)
	t.Run("the new ones may do all that the first one may, once they were told of", func(t *testing.T) {
		s := s.in(t)
		s.must("deploy") // by the first operator: OpenBao and the hosts
		secret := s.must("secrets", "status", "--json").stdout
		socket := s.agentWith(keys...)
		ways := map[string]func(sshKey) []string{
			"file": func(k sshKey) []string {
				return []string{"IdentityFile " + k.file, "IdentitiesOnly yes", "IdentityAgent none"}
			},
			"agent": func(k sshKey) []string {
				return []string{"IdentityFile " + k.file + ".pub", "IdentitiesOnly yes", "IdentityAgent " + socket}
			},
		}
		t.Cleanup(func() { s.loggingIn() })
		each := func(try func(s *testSite, key sshKey)) {
			for way, settings := range ways {
				for _, key := range keys {
					t.Run(key.name+" from "+way, func(t *testing.T) {
						s := s.in(t)
						if way == "agent" { // the key is only there
							if err := os.Rename(key.file, key.file+".away"); err != nil {
								t.Fatal(err)
							}
							defer func() { _ = os.Rename(key.file+".away", key.file) }()
						}
						s.loggingIn(settings(key)...)
						try(s, key)
					})
				}
			}
		}
		each(func(s *testSite, _ sshKey) {
			if got := s.must("secrets", "status", "--json").stdout; got != secret {
				s.t.Errorf("they see\n%s\nand not\n%s", got, secret)
			}
		})
		// Nomad learns of a name only from who has the root token, and says so.
		s.loggingIn(ways["file"](keys[0])...)
		s.wantRefusal(s.run("plan"), []string{"log in to Nomad as operator ed"}, []string{"site bootstrap-deploy"})
		s.loggingIn()
		s.bootstrap()
		each(func(s *testSite, _ sshKey) {
			if changes := s.plan(); len(changes) > 0 {
				s.t.Errorf("they see %v", changes)
			}
		})
	})

	t.Run("one who was removed is refused within a minute", func(t *testing.T) {
		s := s.in(t)
		b := s.bao()
		gone, stays := keys[0], keys[1]
		tokens := map[string]string{}
		nomads := map[string]string{}
		for _, key := range []sshKey{gone, stays} {
			var err error
			// Not of a deploy: those are swept away anyway.
			if tokens[key.name], err = b.login("operators", "operator", key.signed(t, "secrets")); err != nil {
				t.Fatal(err)
			}
			if nomads[key.name], err = b.nomadLogin(key.signed(t, "")); err != nil {
				t.Fatal(err)
			}
			b.as(tokens[key.name]).must("GET", "site/data/hello/database_password", nil, nil)
		}
		s.must("operators", "remove", gone.name)
		s.commit("one operator less", nil)
		s.loggingIn("IdentityFile "+stays.file, "IdentitiesOnly yes", "IdentityAgent none")
		t.Cleanup(func() { s.loggingIn() })
		s.must("deploy")
		begun := time.Now()
		b.as(tokens[gone.name]).refused("GET", "auth/token/lookup-self", nil)
		b.as(tokens[gone.name]).refused("GET", "site/data/hello/database_password", nil)
		b.as(tokens[stays.name]).must("GET", "site/data/hello/database_password", nil, nil)
		if _, err := b.login("operators", "operator", gone.signed(t, "secrets")); !isRefused(err) {
			t.Errorf("OpenBao lets them in: %v", err)
		}
		s.until("Nomad to refuse them", time.Minute, func() error {
			if token, err := b.nomadLogin(gone.signed(t, "")); err == nil {
				return fmt.Errorf("it gives them %d bytes of a token", len(token))
			}
			return nil
		})
		t.Logf("refused everywhere %s after the deploy", time.Since(begun).Round(100*time.Millisecond))
		if _, err := b.nomadLogin(stays.signed(t, "")); err != nil {
			t.Errorf("Nomad refuses who stays: %v", err)
		}
		// Nor does their key help them to another's name.
		borrowed := gone
		borrowed.name = stays.name
		if _, err := b.login("operators", "operator", borrowed.signed(t, "secrets")); !isRefused(err) {
			t.Errorf("OpenBao takes their key for %s: %v", stays.name, err)
		}
		if _, err := b.nomadLogin(borrowed.signed(t, "")); err == nil {
			t.Errorf("Nomad takes their key for %s", stays.name)
		}
		s.loggingIn("IdentityFile "+gone.file, "IdentitiesOnly yes", "IdentityAgent none")
		s.wantRefusal(s.run("secrets", "status"), []string{"none of your SSH keys is an operator's key"}, []string{"site.hcl"})
		// A clone from before does not help: the site decides.
		s.wantRefusal(s.run("plan", "--sha="+all), []string{"operator ed"}, nil)
		if !b.nomadKnows(nomads[stays.name]) {
			t.Error("Nomad revoked the token of who stays")
		}
		// The token that Nomad gave them before ends with the next run of who has the root token.
		s.loggingIn()
		s.bootstrap()
		if b.nomadKnows(nomads[gone.name]) {
			t.Error("their token in Nomad is good")
		}
		for _, key := range []sshKey{stays} {
			b.as(tokens[key.name]).must("POST", "auth/token/revoke-self", nil, nil)
		}
	})

	t.Run("the last one stays", func(t *testing.T) {
		s := s.in(t)
		for _, each := range []string{name, "rsa"} {
			s.must("operators", "remove", each)
		}
		before := s.source(siteFile)
		s.wantRefusal(s.run("operators", "remove", "ec"), []string{"ec is the only operator"}, []string{"add another operator first"})
		if s.source(siteFile) != before {
			t.Error("site.hcl changed")
		}
		for _, comment := range []string{"# The site of the shop.\n", "# what runs there\n"} {
			if !strings.Contains(before, comment) {
				t.Errorf("the comment %q is gone from\n%s", comment, before)
			}
		}
		if strings.Contains(before, "\n\n\n") {
			t.Errorf("holes are left in\n%s", before)
		}
		if strings.Contains(before, "@laptop") {
			t.Error("the comment of a key came along")
		}
	})
}

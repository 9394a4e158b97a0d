package pull

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	engine "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/hostkey"
	"github.com/nomad-site/site/internal/testneeds"
)

// realOpenBao is a server with the mounts, the role and the policy that the site
// has for its hosts.
type realOpenBao struct{ address, root string }

func startOpenBao(t *testing.T, publicPEM string) realOpenBao {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	address := listener.Addr().String()
	must(t, listener.Close())
	folder := t.TempDir()
	var logs bytes.Buffer
	command := exec.Command(testneeds.Tool(t, "secrets-server"), "server", "-storage=file", "-data="+folder, "-listen="+address)
	command.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + folder}
	command.Stdout, command.Stderr = &logs, &logs
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, command.Start())
	t.Cleanup(func() {
		_ = command.Process.Kill()
		_ = command.Wait()
	})
	b := realOpenBao{address: "http://" + address}
	var made struct {
		Keys []string `json:"keys"`
		Root string   `json:"root_token"`
	}
	err = retry.Until(t.Context(), "OpenBao", 20*time.Second, func(ctx context.Context) error {
		return b.send(ctx, http.MethodPut, "sys/init", map[string]int{"secret_shares": 1, "secret_threshold": 1}, &made)
	})
	if err != nil {
		t.Fatalf("%v: %s", err, logs.String())
	}
	b.root = made.Root
	b.put(t, "sys/unseal", map[string]string{"key": made.Keys[0]})
	want := engine.DesiredEngine(&site.Site{Name: "lab", ObjectStore: &site.ObjectStore{}}, nil, []string{publicPEM})
	b.put(t, "sys/mounts/"+site.SecretMount, map[string]any{"type": "kv", "options": map[string]string{"version": "2"}})
	b.put(t, "sys/policies/acl/"+engine.HostPolicy, map[string]any{"policy": want.Policies[engine.HostPolicy]})
	for _, mount := range want.Auth {
		if mount.Path == engine.HostsMount {
			b.put(t, "sys/auth/"+mount.Path, map[string]any{"type": mount.Type})
			b.put(t, "auth/"+mount.Path+"/config", mount.Config)
		}
	}
	for _, role := range want.Roles {
		if role.Mount == engine.HostsMount {
			b.put(t, "auth/"+role.Mount+"/role/"+role.Name, role.Settings)
		}
	}
	return b
}

func (b realOpenBao) send(ctx context.Context, method, path string, body, into any) error {
	encoded, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, b.address+"/v1/"+path, bytes.NewReader(encoded))
	if err != nil {
		return err
	}
	request.Header.Set("X-Vault-Token", b.root)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode >= http.StatusMultipleChoices {
		var said bytes.Buffer
		_, _ = said.ReadFrom(response.Body)
		return fmt.Errorf("%s %s: %d: %s", method, path, response.StatusCode, said.String())
	}
	if into == nil {
		return nil
	}
	return json.NewDecoder(response.Body).Decode(into)
}

func (b realOpenBao) put(t *testing.T, path string, body any) {
	t.Helper()
	err := retry.Until(t.Context(), "a write to OpenBao", 10*time.Second, func(ctx context.Context) error {
		return b.send(ctx, http.MethodPost, path, body, nil) // a new mount needs a moment
	})
	must(t, err)
}

// write gives a secret a new version.
func (b realOpenBao) write(t *testing.T, name, value string) {
	t.Helper()
	b.put(t, site.SecretMount+"/data/"+kvPath(name), map[string]any{"data": map[string]string{site.SecretField: value}})
}

func TestARealOpenBaoGivesAHostItsKeysAndNothingElse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "host.key")
	public, err := hostkey.Ensure(path)
	must(t, err)
	b := startOpenBao(t, public)
	keys, err := NewOpenBao(OpenBaoOptions{Address: b.address, HostKey: path, Host: "lab-1"})
	must(t, err)
	wants := func(refresh bool, id, key string, generation int) {
		t.Helper()
		later(keys)
		gotID, gotKey, got, err := keys.Keys(t.Context(), refresh)
		if err != nil || gotID != id || gotKey.Reveal() != key || got != generation {
			t.Errorf("got %q, %q of generation %d, %v", gotID, gotKey.Reveal(), got, err)
		}
	}
	if _, _, _, err := keys.Keys(t.Context(), false); Code(err) != CodeNoKeys || !strings.Contains(err.Error(), "has nothing at") {
		t.Errorf("before there are any: %v", err)
	}
	b.write(t, site.StoreProxyID, "id-1")
	b.write(t, site.StoreProxySecret, "key-1")
	wants(true, "id-1", "key-1", 1)
	// A candidate is written behind the back of metadata that names the active one.
	for _, name := range []string{site.StoreProxyID, site.StoreProxySecret} {
		b.put(t, site.SecretMount+"/metadata/"+kvPath(name), map[string]any{"custom_metadata": map[string]string{"active": "1"}})
	}
	b.write(t, site.StoreProxyID, "id-2")
	b.write(t, site.StoreProxySecret, "key-2")
	wants(true, "id-1", "key-1", 1)
	for _, name := range []string{site.StoreProxyID, site.StoreProxySecret} {
		b.put(t, site.SecretMount+"/metadata/"+kvPath(name), map[string]any{"custom_metadata": map[string]string{"active": "2"}})
	}
	wants(true, "id-2", "key-2", 2)
	// A token that was revoked is replaced.
	b.put(t, "sys/leases/revoke-prefix/auth/"+engine.HostsMount, nil)
	b.put(t, site.SecretMount+"/metadata/"+kvPath(site.StoreProxyID), map[string]any{"custom_metadata": map[string]string{"active": "1"}})
	b.put(t, site.SecretMount+"/metadata/"+kvPath(site.StoreProxySecret), map[string]any{"custom_metadata": map[string]string{"active": "1"}})
	wants(true, "id-1", "key-1", 1)

	b.write(t, site.StoreAdminID, "admin")
	if _, err := keys.value(t.Context(), site.StoreAdminID, 1); err == nil || !strings.Contains(err.Error(), "status 403") {
		t.Errorf("the admin's key: %v", err)
	}
	stranger := filepath.Join(t.TempDir(), "host.key")
	_, err = hostkey.Ensure(stranger)
	must(t, err)
	other, err := NewOpenBao(OpenBaoOptions{Address: b.address, HostKey: stranger, Host: "lab-1"})
	must(t, err)
	if _, _, _, err := other.Keys(t.Context(), false); Code(err) != CodeNoKeys {
		t.Errorf("another's key: %v", err)
	}
}

package lab

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"
)

// keyPair makes an ed25519 key in OpenSSH's formats.
func keyPair(comment string) (private, public []byte, err error) {
	open, closed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make ssh key %s: %w", comment, err)
	}
	block, err := ssh.MarshalPrivateKey(closed, comment)
	if err != nil {
		return nil, nil, fmt.Errorf("make ssh key %s: %w", comment, err)
	}
	key, err := ssh.NewPublicKey(open)
	if err != nil {
		return nil, nil, fmt.Errorf("make ssh key %s: %w", comment, err)
	}
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))) + " " + comment + "\n"
	return pem.EncodeToMemory(block), []byte(line), nil
}

// ensureKey makes the key path and path.pub unless both are there.
func ensureKey(path, comment string, replace bool) error {
	_, errPrivate := os.Stat(path)
	_, errPublic := os.Stat(path + ".pub")
	if !replace && errPrivate == nil && errPublic == nil {
		return nil
	}
	for _, err := range []error{errPrivate, errPublic} {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read ssh key: %w", err)
		}
	}
	private, public, err := keyPair(comment)
	if err != nil {
		return err
	}
	if err := writeFile(path, private, 0o600); err != nil {
		return err
	}
	return writeFile(path+".pub", public, 0o644)
}

// sshHost is what the client's files say about one host.
type sshHost struct{ name, address, publicKey string }

func renderSSHConfig(dir string, hosts []sshHost) string {
	var out strings.Builder
	out.WriteString("# Written by `site lab up`.\n")
	for _, host := range hosts {
		fmt.Fprintf(&out, `
Host %s
    HostName %s
    Port 22
    User root
    IdentityFile %s
    IdentitiesOnly yes
    UserKnownHostsFile %s
    StrictHostKeyChecking yes
`, host.name, host.address, quoteSSH(filepath.Join(dir, "id")), quoteSSH(filepath.Join(dir, "known_hosts")))
	}
	return out.String()
}

// quoteSSH quotes only where it must: not every reader of the format knows quotes.
func quoteSSH(path string) string {
	if strings.ContainsAny(path, " \t") {
		return `"` + path + `"`
	}
	return path
}

func renderKnownHosts(hosts []sshHost) string {
	var out strings.Builder
	for _, host := range hosts {
		fields := strings.Fields(host.publicKey)
		if len(fields) < 2 {
			continue
		}
		fmt.Fprintf(&out, "%s,%s %s %s\n", host.name, host.address, fields[0], fields[1])
	}
	return out.String()
}

// writeFile writes whole and private from the first byte, then renames.
func writeFile(path string, content []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(temp.Name())
	_, err = temp.Write(content)
	err = errors.Join(err, temp.Chmod(mode), temp.Sync(), temp.Close())
	if err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

package ssh

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// SSHCommandConfig is an OpenSSH client configuration with which plain `ssh
// NAME`, and so Ansible, reaches the same host with the same key and the same
// host key. It names files in dir that WriteSSHConfig writes.
func (c *Conn) SSHCommandConfig(dir string) string {
	var text strings.Builder
	c.writeHost(&text, dir, configFile(dir, c.host.name), c.host.name)
	return text.String()
}

func (c *Conn) writeHost(text *strings.Builder, dir, file, name string) {
	fmt.Fprintf(text, "Host %s\n", name)
	set := func(key, value string) { fmt.Fprintf(text, "  %s %s\n", key, value) }
	set("HostName", c.host.hostName)
	set("Port", fmt.Sprint(c.host.port))
	set("User", c.host.user)
	if c.host.keyAlias != "" {
		set("HostKeyAlias", c.host.keyAlias)
	}
	switch {
	case c.login.signer == nil:
	case c.login.inAgent:
		set("IdentityFile", quotePath(publicKeyFile(dir, name)))
		set("IdentityAgent", quotePath(c.host.agentSocket))
	default:
		set("IdentityFile", quotePath(absolute(c.login.file)))
		set("IdentityAgent", "none")
	}
	set("IdentitiesOnly", "yes")
	set("UserKnownHostsFile", quotePath(knownHostsFile(dir, name)))
	set("GlobalKnownHostsFile", "/dev/null")
	set("StrictHostKeyChecking", "yes")
	set("UpdateHostKeys", "no")
	set("BatchMode", "yes")
	set("ConnectTimeout", fmt.Sprint(max(1, int(c.host.connectTimeout.Seconds()))))
	set("ServerAliveInterval", "5")
	set("ServerAliveCountMax", "3")
	if c.via != nil {
		// Not ProxyJump: ssh forgets to quote the path of -F when it starts itself.
		command := Quote([]string{"ssh", "-F", file})
		set("ProxyCommand", strings.ReplaceAll(command, "%", "%%")+" -W [%h]:%p "+name+"-jump")
		text.WriteString("\n")
		c.via.writeHost(text, dir, file, name+"-jump")
	}
}

// WriteSSHConfig writes the configuration, the pinned key and, for a key in
// the agent, its public half into dir, and returns the configuration's path
// for `ssh -F`. Hosts do not collide in one dir.
func (c *Conn) WriteSSHConfig(dir string) (string, error) {
	dir = absolute(dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("write ssh config of %s: %w", c.host.name, err)
	}
	for conn, name := c, c.host.name; conn != nil; conn, name = conn.via, name+"-jump" {
		listed := knownhosts.Normalize(conn.host.keyName())
		line := knownhosts.Line([]string{listed}, conn.hostKey) + "\n"
		if certificate, ok := conn.hostKey.(*ssh.Certificate); ok {
			line = "@cert-authority " + knownhosts.Line([]string{listed}, certificate.SignatureKey) + "\n"
		}
		if err := writeFile(knownHostsFile(dir, name), line); err != nil {
			return "", fmt.Errorf("write ssh config of %s: %w", c.host.name, err)
		}
		if conn.login.inAgent {
			if err := writeFile(publicKeyFile(dir, name), string(ssh.MarshalAuthorizedKey(conn.login.signer.PublicKey()))); err != nil {
				return "", fmt.Errorf("write ssh config of %s: %w", c.host.name, err)
			}
		}
	}
	path := configFile(dir, c.host.name)
	if err := writeFile(path, c.SSHCommandConfig(dir)); err != nil {
		return "", fmt.Errorf("write ssh config of %s: %w", c.host.name, err)
	}
	return path, nil
}

func knownHostsFile(dir, name string) string {
	return filepath.Join(absolute(dir), name+".known_hosts")
}

func configFile(dir, name string) string { return filepath.Join(absolute(dir), name+".ssh_config") }

func publicKeyFile(dir, name string) string { return filepath.Join(absolute(dir), name+".pub") }

func absolute(path string) string {
	if full, err := filepath.Abs(path); err == nil {
		return full
	}
	return path
}

// quotePath keeps blanks together and percent signs from being tokens.
func quotePath(path string) string {
	return `"` + strings.ReplaceAll(path, "%", "%%") + `"`
}

// writeFile replaces a file whole: another process may be reading it.
func writeFile(path, content string) error {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = file.WriteString(content)
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		_ = os.Remove(file.Name())
	}
	return err
}

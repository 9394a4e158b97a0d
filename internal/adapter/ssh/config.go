package ssh

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kevinburke/ssh_config"

	"github.com/nomad-site/site/internal/plan"
)

// Target is a host as the site's configuration names it.
type Target struct {
	// Name is how messages call the host.
	Name string
	// Address is looked up in the ssh config, as `ssh ADDRESS` would; empty
	// means Name.
	Address string
	Port    int
	User    string
	// IdentityFile is offered before those of the ssh config.
	IdentityFile string
	// HostKeys are pinned keys in authorized_keys form.
	HostKeys []string
	// KnownHostsFiles count beside those of the ssh config; missing ones are skipped.
	KnownHostsFiles []string
	// ConfigFile replaces ~/.ssh/config and /etc/ssh/ssh_config, as `ssh -F` does.
	ConfigFile string
}

// settings is a target after the ssh config was read.
type settings struct {
	name           string
	alias          string
	hostName       string
	port           int
	user           string
	keyAlias       string
	identityFiles  []string
	explicitFiles  bool
	identitiesOnly bool
	agentSocket    string
	knownHosts     []string
	proxyJump      []string
	connectTimeout time.Duration
}

func (s settings) address() string {
	return net.JoinHostPort(s.hostName, strconv.Itoa(s.port))
}

// keyName is the name under which known_hosts files list the host.
func (s settings) keyName() string {
	if s.keyAlias != "" {
		// OpenSSH lists an alias without a port.
		return net.JoinHostPort(s.keyAlias, "22")
	}
	return net.JoinHostPort(strings.ToLower(s.hostName), strconv.Itoa(s.port))
}

// layers are configuration files, the first one that sets a value wins.
type layers []*ssh_config.Config

func readLayers(configFile, home string) (layers, error) {
	paths, explicit := []string{configFile}, true
	if configFile == "" {
		paths, explicit = []string{filepath.Join(home, ".ssh", "config"), "/etc/ssh/ssh_config"}, false
	}
	var found layers
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) && !explicit {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read ssh config: %w", err)
		}
		parsed, err := ssh_config.DecodeBytes(content)
		if err != nil {
			return nil, plan.WithHint(fmt.Errorf("read ssh config %s: %w", path, err),
				"give the site a configuration of its own with ssh_config in site.hcl")
		}
		found = append(found, parsed)
	}
	return found, nil
}

func (l layers) all(alias, key string) ([]string, error) {
	var values []string
	for _, layer := range l {
		found, err := layer.GetAll(alias, key)
		if err != nil {
			return nil, fmt.Errorf("read %s of %s from the ssh config: %w", key, alias, err)
		}
		for _, value := range found {
			values = append(values, strings.Trim(value, `"`))
		}
	}
	return values, nil
}

// resolve merges the target with the ssh config; the target wins.
func resolve(target Target, options Options) (settings, error) {
	home, err := os.UserHomeDir()
	if err != nil {
		return settings{}, fmt.Errorf("find the home folder: %w", err)
	}
	found, err := readLayers(target.ConfigFile, home)
	if err != nil {
		return settings{}, err
	}
	s := settings{name: target.Name, alias: target.Address, port: target.Port, user: target.User}
	if s.alias == "" {
		s.alias = target.Name
	}
	if s.name == "" {
		s.name = s.alias
	}
	var lookupErr error
	get := func(key string) string {
		values, err := found.all(s.alias, key)
		if err != nil {
			lookupErr = errors.Join(lookupErr, err)
		}
		if len(values) == 0 {
			return ""
		}
		return values[0]
	}
	number := func(key string) int {
		text := get(key)
		if text == "" || strings.EqualFold(text, "none") {
			return 0
		}
		value, err := strconv.Atoi(text)
		if err != nil || value < 0 {
			lookupErr = errors.Join(lookupErr, fmt.Errorf("ssh config: %s of %s: %q is not a number", key, s.alias, text))
		}
		return value
	}

	s.hostName = s.alias
	if name := get("HostName"); name != "" {
		s.hostName = strings.NewReplacer("%%", "%", "%h", s.alias).Replace(name)
	}
	if s.port == 0 {
		s.port = number("Port")
	}
	if s.port == 0 {
		s.port = 22
	}
	local := localUser()
	if s.user == "" {
		s.user = get("User")
	}
	if s.user == "" {
		s.user = local
	}
	s.keyAlias = get("HostKeyAlias")
	expand := func(path string) string { return expandPath(path, home, local, s) }

	if target.IdentityFile != "" {
		s.identityFiles, s.explicitFiles = append(s.identityFiles, expand(target.IdentityFile)), true
	}
	configured, err := found.all(s.alias, "IdentityFile")
	if err != nil {
		return settings{}, err
	}
	for _, path := range configured {
		if s.explicitFiles = true; !strings.EqualFold(path, "none") {
			s.identityFiles = append(s.identityFiles, expand(path))
		}
	}
	if !s.explicitFiles {
		for _, name := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
			s.identityFiles = append(s.identityFiles, filepath.Join(home, ".ssh", name))
		}
	}
	s.identitiesOnly = strings.EqualFold(get("IdentitiesOnly"), "yes")
	s.agentSocket = os.Getenv("SSH_AUTH_SOCK")
	switch named := get("IdentityAgent"); {
	case strings.EqualFold(named, "none"):
		s.agentSocket = ""
	case named == "", named == "SSH_AUTH_SOCK":
	case strings.HasPrefix(named, "$") && !strings.HasPrefix(named, "${"):
		s.agentSocket = os.Getenv(named[1:])
	default:
		s.agentSocket = expand(named)
	}

	for _, path := range target.KnownHostsFiles {
		s.knownHosts = append(s.knownHosts, expand(path))
	}
	if files := get("UserKnownHostsFile"); files != "" {
		for _, path := range strings.Fields(files) {
			if !strings.EqualFold(path, "none") {
				s.knownHosts = append(s.knownHosts, expand(strings.Trim(path, `"`)))
			}
		}
	} else {
		s.knownHosts = append(s.knownHosts, filepath.Join(home, ".ssh", "known_hosts"))
	}
	if files := get("GlobalKnownHostsFile"); files != "" {
		s.knownHosts = append(s.knownHosts, strings.Fields(files)...)
	} else if target.ConfigFile == "" {
		s.knownHosts = append(s.knownHosts, "/etc/ssh/ssh_known_hosts")
	}
	if options.RecordTo != "" {
		s.knownHosts = append(s.knownHosts, options.RecordTo)
	}

	if jump := get("ProxyJump"); jump != "" && !strings.EqualFold(jump, "none") {
		for hop := range strings.SplitSeq(jump, ",") {
			s.proxyJump = append(s.proxyJump, strings.TrimSpace(hop))
		}
	}
	// Going around a proxy that the user asked for would dial another machine.
	if command := get("ProxyCommand"); command != "" && !strings.EqualFold(command, "none") && len(s.proxyJump) == 0 {
		return settings{}, plan.WithHint(fmt.Errorf("connect to %s: the ssh config's ProxyCommand is not supported", s.name),
			"use ProxyJump instead")
	}
	s.connectTimeout = options.ConnectTimeout
	if s.connectTimeout == 0 {
		s.connectTimeout = time.Duration(number("ConnectTimeout")) * time.Second
	}
	if s.connectTimeout == 0 {
		s.connectTimeout = 15 * time.Second
	}
	return s, lookupErr
}

// expandPath expands "~", ${VARIABLES} and the percent tokens of ssh_config(5).
func expandPath(path, home, local string, s settings) string {
	if path == "~" || strings.HasPrefix(path, "~/") {
		path = home + path[1:]
	}
	for {
		before, rest, open := strings.Cut(path, "${")
		name, after, closed := strings.Cut(rest, "}")
		if !open || !closed {
			break
		}
		path = before + os.Getenv(name) + after
	}
	return strings.NewReplacer("%%", "%", "%d", home, "%u", local, "%r", s.user, "%h", s.hostName,
		"%n", s.alias, "%p", strconv.Itoa(s.port)).Replace(path)
}

func localUser() string {
	if current, err := user.Current(); err == nil {
		return current.Username
	}
	return os.Getenv("USER")
}

// hop reads one [user@]host[:port] of a ProxyJump, or its ssh:// form.
func hop(text string, from Target) (Target, error) {
	target := Target{ConfigFile: from.ConfigFile, KnownHostsFiles: from.KnownHostsFiles}
	rest := strings.TrimPrefix(text, "ssh://")
	if at := strings.LastIndex(rest, "@"); at >= 0 {
		target.User, rest = rest[:at], rest[at+1:]
	}
	if host, port, err := net.SplitHostPort(rest); err == nil {
		number, err := strconv.Atoi(port)
		if err != nil {
			return Target{}, fmt.Errorf("ssh config: ProxyJump %q: port %q is not a number", text, port)
		}
		rest, target.Port = host, number
	}
	target.Address = strings.Trim(rest, "[]")
	if target.Address == "" {
		return Target{}, fmt.Errorf("ssh config: ProxyJump %q names no host", text)
	}
	return target, nil
}

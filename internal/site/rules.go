package site

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"
)

var (
	namePattern     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	artifactPattern = regexp.MustCompile(`^[a-z0-9]+([._-][a-z0-9]+)*$`)
	operatorPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._@-]{0,62}$`)
	hostnamePattern = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?$`)
	accountPattern  = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	packagePattern  = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	modePattern     = regexp.MustCompile(`^[0-7]{3,4}$`)
	signalPattern   = regexp.MustCompile(`^SIG[A-Z]{2,6}[12]?$`)
	digestPattern   = regexp.MustCompile(`^[0-9a-f]{64}$`)
	importPattern   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._~-]*(/[A-Za-z0-9._~-]+)*$`)
	settingPattern  = regexp.MustCompile(`^[a-z0-9_.-]+$`)
	localePattern   = regexp.MustCompile(`^[A-Za-z0-9_-]{1,63}$`) // datacenter, region
	loginPattern    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9._-]{0,63}$`)
)

const nameRule = "a name is 1 to 63 lower-case letters, digits and hyphens, with a letter or digit at both ends."

// checkAddress accepts what SSH can dial: an IP address, a DNS name or an alias
// of the ssh configuration.
func checkAddress(address string) error {
	if _, err := netip.ParseAddr(address); err == nil {
		return nil
	}
	if host, port, found := strings.Cut(address, ":"); found && hostnamePattern.MatchString(host) {
		if _, err := strconv.Atoi(port); err == nil {
			return fmt.Errorf("%q holds a port; write address = %q and port = %s", address, host, port)
		}
	}
	if strings.Contains(address, "@") {
		return fmt.Errorf("%q holds a user; that is the attribute user", address)
	}
	if len(address) > 253 || !hostnamePattern.MatchString(address) {
		return fmt.Errorf("%q is not an IP address, a DNS name or a name of the ssh configuration", address)
	}
	// The last label of a DNS name is never a number: this is a mistyped IPv4 address.
	labels := strings.Split(strings.TrimSuffix(address, "."), ".")
	if _, err := strconv.Atoi(labels[len(labels)-1]); err == nil && len(labels) > 1 {
		return fmt.Errorf("%q is not an IP address", address)
	}
	return nil
}

// checkPrivateAddress accepts what an agent can advertise to the others.
func checkPrivateAddress(address string) error {
	ip, err := netip.ParseAddr(address)
	switch {
	case err != nil:
		return fmt.Errorf("%q is not an IP address", address)
	case ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() || ip.IsLinkLocalUnicast():
		return fmt.Errorf("other hosts cannot reach %s; give an address of this host on the network that the hosts share", address)
	}
	return nil
}

// parsePublicKey reads one key in authorized_keys form.
func parsePublicKey(text string) (ssh.PublicKey, error) {
	if strings.Contains(text, "PRIVATE KEY") {
		return nil, fmt.Errorf("this is a private key; give the .pub half, and consider the private one disclosed if it was ever committed")
	}
	key, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(text))
	if err != nil {
		return nil, fmt.Errorf("not an SSH public key such as \"ssh-ed25519 AAAA…\": %w", err)
	}
	if len(options) > 0 {
		return nil, fmt.Errorf("options before the key are not accepted")
	}
	if strings.TrimSpace(string(rest)) != "" {
		return nil, fmt.Errorf("more than one key")
	}
	if _, isCertificate := key.(*ssh.Certificate); isCertificate {
		return nil, fmt.Errorf("certificates are not accepted; give the plain public key")
	}
	return key, nil
}

// checkOperatorKey accepts the keys that can sign a login: EdDSA, RS256, ES256.
func checkOperatorKey(key ssh.PublicKey) error {
	switch key.Type() {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoRSA:
	default:
		return fmt.Errorf("%s keys cannot sign a login; use ssh-ed25519, ecdsa-sha2-nistp256 or ssh-rsa", key.Type())
	}
	crypto, ok := key.(ssh.CryptoPublicKey)
	if !ok {
		return fmt.Errorf("%s key holds no plain public key", key.Type())
	}
	switch public := crypto.CryptoPublicKey().(type) {
	case *rsa.PublicKey:
		if public.N.BitLen() < 2048 {
			return fmt.Errorf("RSA key of %d bits; at least 2048 are needed", public.N.BitLen())
		}
	case *ecdsa.PublicKey:
		if public.Curve.Params().BitSize != 256 {
			return fmt.Errorf("only P-256 ECDSA keys can sign a login")
		}
	}
	return nil
}

// checkRepositoryPath returns the clean form of a path inside the repository.
func checkRepositoryPath(text string) (string, error) {
	clean := path.Clean(text)
	if text == "" || strings.ContainsAny(text, "\\\x00\n") || !fs.ValidPath(clean) {
		return "", fmt.Errorf("%q is not a path inside the repository; without .. and with /, write it relative to the repository's root", text)
	}
	return clean, nil
}

// systemTrees belong to the distribution or to site itself, with all below them.
var systemTrees = []string{
	"/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/root", "/sbin", "/sys", "/usr",
	"/opt/site", "/var/lib/site", "/var/lib/nomad", "/var/lib/containers", "/var/lib/dpkg", "/var/lib/apt",
	"/var/lib/systemd", "/var/lib/private", "/run/systemd", "/run/dbus", "/run/containers", "/run/lock", "/run/user",
	"/var/run", "/var/lock", "/run/podman", "/run/sshd",
}

// sharedFolders hold folders of others: themselves untouchable, below them is fine.
var sharedFolders = []string{
	"/", "/home", "/media", "/mnt", "/opt", "/run", "/srv", "/tmp", "/var",
	"/var/cache", "/var/lib", "/var/local", "/var/log", "/var/mail", "/var/opt", "/var/spool", "/var/tmp", "/var/backups",
}

func checkDirectoryPath(text string) error {
	switch {
	case !strings.HasPrefix(text, "/"):
		return fmt.Errorf("%q is not absolute", text)
	case path.Clean(text) != text:
		return fmt.Errorf("%q is not a clean path (no .., no double or final slash)", text)
	case strings.ContainsAny(text, "\x00\n\t\"'\\ *?[]{}$%:"):
		return fmt.Errorf("%q has characters that are not accepted in a folder of a host", text)
	}
	for _, shared := range sharedFolders {
		if text == shared {
			return fmt.Errorf("%s belongs to the system; declare a folder below it", text)
		}
	}
	for _, tree := range systemTrees {
		if text == tree || strings.HasPrefix(text, tree+"/") {
			return fmt.Errorf("%s belongs to the system; use a folder such as /srv/NAME or /var/lib/NAME", text)
		}
	}
	return nil
}

// checkAccount accepts a user or group name, or its number.
func checkAccount(text string) error {
	if accountPattern.MatchString(text) {
		return nil
	}
	if _, err := strconv.ParseUint(text, 10, 31); err != nil {
		return fmt.Errorf("%q is neither a number nor a name of an account", text)
	}
	return nil
}

// checkImageUser accepts uid or uid:gid in digits: an image without /etc/passwd knows no names.
func checkImageUser(text string) error {
	for _, part := range strings.SplitN(text, ":", 2) {
		if _, err := strconv.ParseUint(part, 10, 31); err != nil {
			return fmt.Errorf("%q is not a numeric uid or uid:gid", text)
		}
	}
	return nil
}

// normalMode returns four octal digits.
func normalMode(text string) (string, error) {
	if !modePattern.MatchString(text) {
		return "", fmt.Errorf("%q is not an octal mode such as \"0750\"", text)
	}
	if len(text) == 3 {
		text = "0" + text
	}
	return text, nil
}

// normalDigest returns 64 lower-case hex digits.
func normalDigest(text string) (string, error) {
	hex := strings.TrimPrefix(text, "sha256:")
	if !digestPattern.MatchString(hex) {
		return "", fmt.Errorf("%q is not a sha256: 64 lower-case hexadecimal digits are needed", text)
	}
	return hex, nil
}

func checkURL(text string) error {
	parsed, err := url.Parse(text)
	switch {
	case err != nil:
		return fmt.Errorf("not a URL: %w", err)
	case parsed.User != nil:
		return fmt.Errorf("a URL in git must not hold credentials")
	case parsed.Scheme != "https" && parsed.Scheme != "http", parsed.Host == "":
		return fmt.Errorf("%q is not an http or https URL", text)
	}
	return nil
}

package ssh

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/nomad-site/site/internal/plan"
)

// algorithmsByKeyType lists what a key of a type may sign with, in order of
// preference, and without the SHA-1 of plain ssh-rsa.
func algorithmsByKeyType(keyType string) []string {
	if keyType == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return []string{keyType}
}

func defaultHostKeyAlgorithms() []string {
	return []string{
		ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
		ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256,
	}
}

func certificateAlgorithms() []string {
	return []string{
		ssh.CertAlgoED25519v01, ssh.CertAlgoECDSA256v01, ssh.CertAlgoECDSA384v01, ssh.CertAlgoECDSA521v01,
		ssh.CertAlgoRSASHA512v01, ssh.CertAlgoRSASHA256v01,
	}
}

// keychain decides about host keys. It remembers its own verdict, since the
// handshake may wrap or drop it.
type keychain struct {
	host     settings
	explicit []ssh.PublicKey
	fromFile ssh.HostKeyCallback
	known    []knownhosts.KnownKey
	options  Options

	verdict  error
	accepted ssh.PublicKey
}

func newKeychain(target Target, host settings, options Options) (*keychain, error) {
	k := &keychain{host: host, options: options}
	for _, text := range target.HostKeys {
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(text))
		if err != nil {
			return nil, plan.WithHint(fmt.Errorf("host %s: pinned host key %q: %w", host.name, text, err),
				"write it as \"ssh-ed25519 AAAA…\", such as ssh-keyscan prints after the host name")
		}
		k.explicit = append(k.explicit, key)
	}
	var files []string
	for _, path := range host.knownHosts {
		if _, err := os.Stat(path); err == nil && !slices.Contains(files, path) {
			files = append(files, path)
		}
	}
	var err error
	if k.fromFile, err = knownhosts.New(files...); err != nil {
		return nil, plan.WithHint(fmt.Errorf("read pinned host keys: %w", err), "mend or remove that line")
	}

	// The library has no lookup; a key that cannot be known makes it list all that are.
	probe, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a probe key: %w", err)
	}
	probeKey, err := ssh.NewPublicKey(probe)
	if err != nil {
		return nil, fmt.Errorf("make a probe key: %w", err)
	}
	var unknown *knownhosts.KeyError
	if errors.As(k.fromFile(host.keyName(), &net.TCPAddr{}, probeKey), &unknown) {
		k.known = unknown.Want
	}
	return k, nil
}

func (k *keychain) pinned() bool { return len(k.explicit)+len(k.known) > 0 }

// algorithms limits the handshake to keys that are pinned, so that a host with
// several keys shows the one we know.
func (k *keychain) algorithms() []string {
	if !k.pinned() {
		return defaultHostKeyAlgorithms()
	}
	var wanted []string
	for _, key := range k.explicit {
		wanted = append(wanted, algorithmsByKeyType(key.Type())...)
	}
	for _, key := range k.known {
		if isAuthority(key) {
			wanted = append(wanted, certificateAlgorithms()...)
		} else {
			wanted = append(wanted, algorithmsByKeyType(key.Key.Type())...)
		}
	}
	// The strongest first, whatever the order of the files.
	var ordered []string
	for _, algorithm := range append(certificateAlgorithms(), defaultHostKeyAlgorithms()...) {
		if slices.Contains(wanted, algorithm) {
			ordered = append(ordered, algorithm)
		}
	}
	return ordered
}

func isAuthority(key knownhosts.KnownKey) bool {
	content, err := os.ReadFile(key.Filename)
	if err != nil {
		return false
	}
	lines := strings.Split(string(content), "\n")
	return key.Line <= len(lines) && strings.HasPrefix(strings.TrimSpace(lines[key.Line-1]), "@cert-authority")
}

// check is the handshake's callback.
func (k *keychain) check(_ string, remote net.Addr, key ssh.PublicKey) error {
	k.verdict = k.decide(remote, key)
	if k.verdict == nil {
		k.accepted = key
	}
	return k.verdict
}

func (k *keychain) decide(_ net.Addr, key ssh.PublicKey) error {
	// Files first: a revocation there outweighs any pin.
	err := k.fromFile(k.host.keyName(), &net.TCPAddr{}, key)
	var revoked *knownhosts.RevokedError
	if errors.As(err, &revoked) {
		return &HostKeyRevokedError{Host: k.host.name, Presented: fingerprint(key), Place: place(revoked.Revoked)}
	}
	if err == nil {
		return nil
	}
	for _, pin := range k.explicit {
		if string(pin.Marshal()) == string(key.Marshal()) {
			return nil
		}
	}
	if k.pinned() {
		return k.changed(key)
	}
	var unknown *knownhosts.KeyError
	if !errors.As(err, &unknown) {
		return fmt.Errorf("check host key of %s: %w", k.host.name, err)
	}
	if !k.options.AcceptNewHostKey {
		return &HostKeyUnknownError{Host: k.host.name, Address: k.host.address(), Presented: fingerprint(key)}
	}
	return k.record(key)
}

func (k *keychain) changed(key ssh.PublicKey) *HostKeyChangedError {
	failure := &HostKeyChangedError{Host: k.host.name, Address: k.host.address(), Presented: fingerprint(key)}
	for _, pin := range k.explicit {
		failure.Known, failure.Places = append(failure.Known, fingerprint(pin)), append(failure.Places, "site.hcl")
	}
	for _, pin := range k.known {
		failure.Known, failure.Places = append(failure.Known, fingerprint(pin.Key)), append(failure.Places, place(pin))
	}
	return failure
}

// record appends with one write, so that hosts recorded at the same time do
// not overwrite each other.
func (k *keychain) record(key ssh.PublicKey) error {
	path := k.options.RecordTo
	if path == "" {
		return fmt.Errorf("record host key of %s: no known_hosts file was named", k.host.name)
	}
	failed := func(err error) error { return fmt.Errorf("record host key of %s: %w", k.host.name, err) }
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return failed(err)
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return failed(err)
	}
	defer func() { _ = file.Close() }()
	line := knownhosts.Line([]string{knownhosts.Normalize(k.host.keyName())}, key) + "\n"
	if end, err := file.Seek(0, io.SeekEnd); err == nil && end > 0 {
		last := make([]byte, 1)
		if _, err := file.ReadAt(last, end-1); err == nil && last[0] != '\n' {
			line = "\n" + line
		}
	}
	if _, err := file.WriteString(line); err != nil {
		return failed(err)
	}
	if err := file.Sync(); err != nil {
		return failed(err)
	}
	return nil
}

func fingerprint(key ssh.PublicKey) string {
	return key.Type() + " " + ssh.FingerprintSHA256(key)
}

func place(key knownhosts.KnownKey) string {
	return fmt.Sprintf("%s:%d", key.Filename, key.Line)
}

package ssh

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"sync"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/nomad-site/site/internal/secret"
)

const encryptedNotice = "encrypted and not in the agent"

// identity is a key that can sign for the operator.
type identity struct {
	signer ssh.AlgorithmSigner
	// file is empty for a key that only the agent knows.
	file    string
	inAgent bool
}

func (i identity) String() string {
	where := "agent"
	if i.file != "" {
		where = i.file
	}
	return fmt.Sprintf("%s (%s)", where, fingerprint(i.signer.PublicKey()))
}

// identities are all keys of a target, in the order in which they are offered.
type identities struct {
	offered []identity
	// further are agent keys that IdentitiesOnly keeps from being offered.
	further []identity
	// problems name identity files that cannot be used, and why.
	problems []string
	agent    io.Closer
}

func (i *identities) close() {
	if i.agent != nil {
		_ = i.agent.Close()
	}
}

// findIdentities reads files and asks the agent; it decrypts nothing.
func findIdentities(host settings, passphrase func(file string) (secret.Value, error)) *identities {
	found := &identities{}
	var held []identity
	if host.agentSocket != "" {
		connection, err := net.Dial("unix", host.agentSocket)
		if err != nil {
			found.problems = append(found.problems, fmt.Sprintf("agent (%v)", err))
		} else {
			found.agent = connection
			signers, err := agent.NewClient(connection).Signers()
			if err != nil {
				found.problems = append(found.problems, fmt.Sprintf("agent (%v)", err))
			}
			for _, signer := range signers {
				if able, ok := signer.(ssh.AlgorithmSigner); ok {
					held = append(held, identity{signer: able, inAgent: true})
				}
			}
		}
	}
	taken := map[string]bool{}
	var fromFiles []identity
	for _, file := range host.identityFiles {
		one, err := readIdentity(file, held, passphrase)
		switch {
		case errors.Is(err, fs.ErrNotExist) && !host.explicitFiles:
		case err != nil:
			found.problems = append(found.problems, fmt.Sprintf("%s (%v)", file, err))
		case !taken[marshalled(one.signer.PublicKey())]:
			taken[marshalled(one.signer.PublicKey())] = true
			fromFiles = append(fromFiles, one)
		}
	}
	var rest []identity
	for _, one := range held {
		if !taken[marshalled(one.signer.PublicKey())] {
			rest = append(rest, one)
		}
	}
	switch {
	case host.identitiesOnly:
		found.offered, found.further = fromFiles, rest
	case host.explicitFiles:
		// A server counts offers: what was named comes first.
		found.offered = slices.Concat(fromFiles, rest)
	default:
		found.offered = slices.Concat(rest, fromFiles)
	}
	return found
}

func marshalled(key ssh.PublicKey) string { return string(key.Marshal()) }

// readIdentity reads a private key, or a public one whose private half the agent holds.
func readIdentity(file string, held []identity, passphrase func(string) (secret.Value, error)) (identity, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		public, publicErr := readPublic(file + ".pub")
		if one, ok := inAgent(public, held, file); publicErr == nil && ok {
			return one, nil
		}
		return identity{}, reasonOnly(err)
	}
	if public, _, _, _, err := ssh.ParseAuthorizedKey(content); err == nil {
		if one, ok := inAgent(public, held, file); ok {
			return one, nil
		}
		return identity{}, errors.New("a public key, and the agent does not hold its private half")
	}
	signer, err := ssh.ParsePrivateKey(content)
	var locked *ssh.PassphraseMissingError
	if !errors.As(err, &locked) {
		if err != nil {
			return identity{}, err
		}
		able, ok := signer.(ssh.AlgorithmSigner)
		if !ok {
			return identity{}, errors.New("a key type that is not supported")
		}
		return identity{signer: able, file: file}, nil
	}
	public := locked.PublicKey
	if public == nil {
		if public, err = readPublic(file + ".pub"); err != nil {
			public = nil
		}
	}
	if one, ok := inAgent(public, held, file); ok {
		return one, nil
	}
	if passphrase == nil {
		return identity{}, errors.New(encryptedNotice)
	}
	lazy := &lockedSigner{file: file, content: content, public: public, passphrase: passphrase}
	if public == nil {
		// Without the public half it cannot even be offered.
		opened, err := lazy.open()
		if err != nil {
			return identity{}, err
		}
		lazy.public = opened.PublicKey()
	}
	return identity{signer: lazy, file: file}, nil
}

func readPublic(file string) (ssh.PublicKey, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	public, _, _, _, err := ssh.ParseAuthorizedKey(content)
	return public, err
}

func inAgent(public ssh.PublicKey, held []identity, file string) (identity, bool) {
	if public == nil {
		return identity{}, false
	}
	for _, one := range held {
		if bytes.Equal(one.signer.PublicKey().Marshal(), public.Marshal()) {
			return identity{signer: one.signer, file: file, inAgent: true}, true
		}
	}
	return identity{}, false
}

// reasonOnly drops the path, which the message has already.
func reasonOnly(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// lockedSigner asks for the passphrase once, and only when a host accepts the key.
type lockedSigner struct {
	file       string
	content    []byte
	public     ssh.PublicKey
	passphrase func(string) (secret.Value, error)

	mutex  sync.Mutex
	opened ssh.AlgorithmSigner
}

func (l *lockedSigner) open() (ssh.AlgorithmSigner, error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if l.opened != nil {
		return l.opened, nil
	}
	phrase, err := l.passphrase(l.file)
	if err != nil {
		return nil, fmt.Errorf("passphrase of %s: %w", l.file, err)
	}
	signer, err := ssh.ParsePrivateKeyWithPassphrase(l.content, []byte(phrase.Reveal()))
	if err != nil {
		return nil, fmt.Errorf("decrypt %s: %w", l.file, err)
	}
	able, ok := signer.(ssh.AlgorithmSigner)
	if !ok {
		return nil, fmt.Errorf("decrypt %s: a key type that is not supported", l.file)
	}
	l.opened = able
	return able, nil
}

func (l *lockedSigner) PublicKey() ssh.PublicKey { return l.public }

func (l *lockedSigner) Sign(random io.Reader, data []byte) (*ssh.Signature, error) {
	return l.SignWithAlgorithm(random, data, "")
}

func (l *lockedSigner) SignWithAlgorithm(random io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	opened, err := l.open()
	if err != nil {
		return nil, err
	}
	return opened.SignWithAlgorithm(random, data, algorithm)
}

// loginSigner notes which key a host asked a signature of: the client library
// signs only with a key that the server said it would accept.
type loginSigner struct {
	ssh.AlgorithmSigner
	signed func(failed error)
}

// Algorithms implements ssh.MultiAlgorithmSigner: never SHA-1.
func (l *loginSigner) Algorithms() []string {
	keyType := l.PublicKey().Type()
	if certificate, ok := l.PublicKey().(*ssh.Certificate); ok {
		keyType = certificate.Key.Type()
	}
	if keyType == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512}
	}
	return []string{keyType}
}

func (l *loginSigner) SignWithAlgorithm(random io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	signature, err := l.AlgorithmSigner.SignWithAlgorithm(random, data, algorithm)
	l.signed(err)
	return signature, err
}

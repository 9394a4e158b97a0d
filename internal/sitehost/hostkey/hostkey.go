// Package hostkey keeps the key by which this host proves who it is.
package hostkey

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/sitehost/atomicfile"
)

// DefaultPath is where the key lies on a host.
const DefaultPath = "/etc/site/host.key"

// nextSuffix is behind the path of the key that is to follow.
const nextSuffix = ".next"

// Keys are the public halves of the key in use and, while it rotates, of the one
// that is to follow, as PEM.
type Keys struct {
	Current string
	Next    string
}

// Read reads both. It is fs.ErrNotExist where there is no key in use.
func Read(path string) (Keys, error) {
	var keys Keys
	var err error
	if keys.Current, err = Public(path); err != nil {
		return Keys{}, err
	}
	if keys.Next, err = Public(path + nextSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Keys{}, err
	}
	return keys, nil
}

// EnsureNext makes the key that is to follow, where there is none yet: whoever was
// told of one before it was switched to goes on with that one.
func EnsureNext(path string) (Keys, error) {
	if _, err := Public(path); err != nil {
		return Keys{}, err
	}
	if _, err := Ensure(path + nextSuffix); err != nil {
		return Keys{}, err
	}
	return Read(path)
}

// Switch puts the next key in the place of the one in use, which is gone then. It
// is fs.ErrNotExist where there is no next one.
func Switch(path string) (Keys, error) {
	if _, err := Public(path + nextSuffix); err != nil {
		return Keys{}, err
	}
	if err := os.Rename(path+nextSuffix, path); err != nil {
		return Keys{}, fmt.Errorf("switch the host key: %w", err)
	}
	if err := atomicfile.SyncFolder(filepath.Dir(path)); err != nil {
		return Keys{}, fmt.Errorf("switch the host key: %w", err)
	}
	return Read(path)
}

// Ensure makes the key where there is none, and returns its public half as PEM.
// A key that is there is never replaced: others know it.
func Ensure(path string) (string, error) {
	public, err := Public(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return public, err
	}
	if err := create(path); err != nil {
		return "", fmt.Errorf("make the host key: %w", err)
	}
	return Public(path)
}

func create(path string) (err error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	folder := filepath.Dir(path)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	file, err := os.CreateTemp(folder, "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(file.Name())) }()
	err = pem.Encode(file, &pem.Block{Type: "PRIVATE KEY", Bytes: encoded})
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	// A link fails where a rename would replace what someone else made meanwhile.
	if err := os.Link(file.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return atomicfile.SyncFolder(folder)
}

// Public reads the key's public half, as PEM. It is fs.ErrNotExist where there is no key.
func Public(path string) (string, error) {
	private, err := read(path)
	if err != nil {
		return "", fmt.Errorf("host key: %w", err)
	}
	encoded, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		return "", fmt.Errorf("host key: %w", err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: encoded})), nil
}

func read(path string) (ed25519.PrivateKey, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, plan.WithHint(fmt.Errorf("%s has mode %s: others could have read it", path, info.Mode()),
			"remove it, so that the next deploy makes and registers another one")
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(content)
	if block == nil {
		return nil, fmt.Errorf("%s has no PEM block", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	private, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T, want an ed25519 key", path, parsed)
	}
	return private, nil
}

// Private reads the key in use, to sign with.
func Private(path string) (ed25519.PrivateKey, error) {
	private, err := read(path)
	if err != nil {
		return nil, fmt.Errorf("host key: %w", err)
	}
	return private, nil
}

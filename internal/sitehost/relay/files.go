package relay

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"sync"
)

// Files are the site's CA and this host's own certificate and key, as PEM.
type Files struct{ CA, Certificate, Key string }

const readingFiles = "reading the certificates"

// identity is the content of the files.
type identity struct {
	authorities *x509.CertPool
	certificate tls.Certificate
}

func (f Files) read() (*identity, error) {
	authorities, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, fmt.Errorf("read the site's CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authorities) {
		return nil, fmt.Errorf("read the site's CA: %s has no certificate", f.CA)
	}
	certificate, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
	if err != nil {
		return nil, fmt.Errorf("read the host's certificate: %w", err)
	}
	return &identity{authorities: pool, certificate: certificate}, nil
}

// identities reads the files for every handshake: they are renewed while the
// relay runs. They are written one by one, so for a moment key and certificate
// may not fit: then what was read last goes on to hold.
type identities struct {
	files  Files
	states *states

	mutex sync.Mutex
	last  *identity
}

func newIdentities(files Files, states *states) (*identities, error) {
	first, err := files.read()
	if err != nil {
		return nil, err
	}
	states.expect(readingFiles)
	return &identities{files: files, states: states, last: first}, nil
}

func (i *identities) now() *identity {
	read, err := i.files.read()
	i.mutex.Lock()
	defer i.mutex.Unlock()
	if err != nil {
		i.states.fails(readingFiles, err)
		return i.last
	}
	i.states.works(readingFiles)
	i.last = read
	return read
}

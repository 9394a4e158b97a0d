package relay_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/sitehost/relay"
)

const patience = 10 * time.Second

// authority is a site's CA.
type authority struct {
	t           *testing.T
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t: t, certificate: certificate, key: key}
}

// host writes the files that a host of the site has.
func (a *authority) host(name string, until time.Time) relay.Files {
	a.t.Helper()
	folder := a.t.TempDir()
	files := relay.Files{
		CA: filepath.Join(folder, "ca.crt"), Certificate: filepath.Join(folder, "agent.crt"), Key: filepath.Join(folder, "agent.key"),
	}
	a.write(files, name, until)
	return files
}

// write is host in files that are there.
func (a *authority) write(files relay.Files, name string, until time.Time) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until,
		DNSNames: []string{"client.global.nomad", name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.certificate, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	encoded, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for path, block := range map[string]*pem.Block{
		files.CA:          {Type: "CERTIFICATE", Bytes: a.certificate.Raw},
		files.Certificate: {Type: "CERTIFICATE", Bytes: der},
		files.Key:         {Type: "EC PRIVATE KEY", Bytes: encoded},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
}

func hour() time.Time { return time.Now().Add(time.Hour) }

// journal is what an end of the relay logs.
type journal struct {
	mutex sync.Mutex
	text  bytes.Buffer
}

func (j *journal) Write(content []byte) (int, error) {
	j.mutex.Lock()
	defer j.mutex.Unlock()
	return j.text.Write(content)
}

func (j *journal) count(text string) int {
	j.mutex.Lock()
	defer j.mutex.Unlock()
	return strings.Count(j.text.String(), text)
}

// says waits for a line.
func (j *journal) says(t *testing.T, texts ...string) {
	t.Helper()
	for _, text := range texts {
		err := retry.Until(t.Context(), fmt.Sprintf("%q to be logged", text), patience, func(context.Context) error {
			if j.count(text) == 0 {
				return errors.New("it is not")
			}
			return nil
		})
		if err != nil {
			t.Fatalf("%v\n%s", err, j.text.String())
		}
	}
}

func (j *journal) log() *slog.Logger { return slog.New(slog.NewTextHandler(j, nil)) }

func service(t *testing.T, name, address string) relay.Service {
	t.Helper()
	parsed, err := relay.ParseService(name + "=" + address)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// runs runs something until the test ends, and insists that it ends then.
func runs(t *testing.T, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("it ended with %v", err)
				}
			case <-time.After(patience):
				t.Error("it does not end")
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

func serves(t *testing.T, files relay.Files, targets ...relay.Service) (*relay.Server, *journal, func()) {
	t.Helper()
	says := &journal{}
	server, err := relay.NewServer(t.Context(), relay.ServerOptions{
		Common: relay.Common{Files: files, Log: says.log()}, Listen: "127.0.0.1:0", Targets: targets,
	})
	if err != nil {
		t.Fatal(err)
	}
	return server, says, runs(t, server.Run)
}

// connects gives the local address of the service "echo".
func connects(t *testing.T, files relay.Files, to, name, service string) (address string, says *journal) {
	t.Helper()
	says = &journal{}
	local, err := relay.ParseService(service + "=127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	connector, err := relay.NewConnector(t.Context(), relay.ConnectorOptions{
		Common: relay.Common{Files: files, Log: says.log()}, To: to, ServerName: name, Locals: []relay.Service{local},
	})
	if err != nil {
		t.Fatal(err)
	}
	runs(t, connector.Run)
	return connector.Address(service), says
}

// listens is a service, which handles each connection.
func listens(t *testing.T, handle func(*net.TCPConn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = connection.Close() }()
				handle(connection.(*net.TCPConn))
			}()
		}
	}()
	return listener.Addr().String()
}

// echo answers, once it has heard everything, with what it heard.
func echo(connection *net.TCPConn) {
	heard, err := io.ReadAll(connection)
	if err == nil {
		_, _ = connection.Write(heard)
	}
}

// closed is an address where nothing listens.
func closed(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	return listener.Addr().String()
}

func open(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	connection, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = connection.Close() })
	if err := connection.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return connection.(*net.TCPConn)
}

// ask says something, ends its half, and gives the answer.
func ask(connection *net.TCPConn, what []byte) ([]byte, error) {
	if _, err := connection.Write(what); err != nil {
		return nil, err
	}
	if err := connection.CloseWrite(); err != nil {
		return nil, err
	}
	return io.ReadAll(connection)
}

// refused insists that a connection is cut without an answer, and soon.
func refused(t *testing.T, address string) {
	t.Helper()
	begun := time.Now()
	var answer []byte
	connection, err := net.DialTimeout("tcp", address, patience)
	if err == nil { // a reset may come even before
		defer func() { _ = connection.Close() }()
		_ = connection.SetDeadline(time.Now().Add(patience))
		answer, err = ask(connection.(*net.TCPConn), []byte("hello"))
	}
	var timeout net.Error
	if err == nil || errors.As(err, &timeout) && timeout.Timeout() || len(answer) > 0 {
		t.Errorf("got %q, %v", answer, err)
	}
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("it took %s", took)
	}
}

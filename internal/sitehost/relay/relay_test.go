package relay_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/sitehost/relay"
)

func TestAServiceIsReachedWithBothHalvesOfItsConnections(t *testing.T) {
	site := newAuthority(t, "site")
	server, serverSays, _ := serves(t, site.host("alpha", hour()), service(t, "echo", listens(t, echo)))
	address, says := connects(t, site.host("beta", hour()), server.Address(), "alpha", "echo")
	// More than all buffers on the way hold: the end of one half comes before the other's begin.
	large := make([]byte, 8<<20)
	_, _ = rand.Read(large)
	for _, what := range [][]byte{nil, []byte("hello"), large} {
		answer, err := ask(open(t, address), what)
		if err != nil || !bytes.Equal(answer, what) {
			t.Errorf("%d bytes came back as %d, %v", len(what), len(answer), err)
		}
	}
	// Said once, not each time.
	for text, journal := range map[string]*journal{
		"works: service echo":                       says,
		`works: client 127.0.0.1" certificate=beta`: serverSays,
	} {
		if journal.count(text) != 1 {
			t.Errorf("%q is %d times in:\n%s", text, journal.count(text), journal.text.String())
		}
	}
}

func TestTheServiceMayEndItsHalfFirst(t *testing.T) {
	site := newAuthority(t, "site")
	heard := make(chan string, 1)
	server, _, _ := serves(t, site.host("alpha", hour()), service(t, "first", listens(t, func(connection *net.TCPConn) {
		_, _ = connection.Write([]byte("welcome"))
		_ = connection.CloseWrite()
		said, _ := io.ReadAll(connection)
		heard <- string(said)
	})))
	address, _ := connects(t, site.host("beta", hour()), server.Address(), "alpha", "first")
	connection := open(t, address)
	if said, err := io.ReadAll(connection); err != nil || string(said) != "welcome" {
		t.Fatalf("got %q, %v", said, err)
	}
	if _, err := connection.Write([]byte("thank you")); err != nil {
		t.Fatal(err)
	}
	_ = connection.CloseWrite()
	select {
	case said := <-heard:
		if said != "thank you" {
			t.Errorf("the service heard %q", said)
		}
	case <-time.After(patience):
		t.Error("the service did not hear the end")
	}
}

func TestWhatIsCutDoesNotLookLikeAnEnd(t *testing.T) {
	site := newAuthority(t, "site")
	server, _, stop := serves(t, site.host("alpha", hour()), service(t, "cut", listens(t, func(connection *net.TCPConn) {
		said := make([]byte, 4)
		_, _ = io.ReadFull(connection, said)
		_, _ = connection.Write([]byte("half of"))
		if string(said) == "cut!" {
			_ = connection.SetLinger(0) // a reset
			return
		}
		_, _ = io.ReadAll(connection)
	})))
	address, _ := connects(t, site.host("beta", hour()), server.Address(), "alpha", "cut")
	// The relay is gone after the second.
	for _, test := range []struct{ name, say string }{{"the service dies", "cut!"}, {"the relay stops", "stay"}} {
		t.Run(test.name, func(t *testing.T) {
			connection := open(t, address)
			if _, err := connection.Write([]byte(test.say)); err != nil {
				t.Fatal(err)
			}
			if test.say == "stay" {
				if _, err := io.ReadFull(connection, make([]byte, 7)); err != nil {
					t.Fatal(err)
				}
				stop()
			}
			var timeout net.Error
			if _, err := io.ReadAll(connection); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
				t.Errorf("got %v, want a reset", err)
			}
		})
	}
}

func TestAHundredConnectionsAtOnce(t *testing.T) {
	site := newAuthority(t, "site")
	const many = 100
	// None is answered before all are open.
	var all sync.WaitGroup
	all.Add(many)
	server, _, _ := serves(t, site.host("alpha", hour()), service(t, "echo", listens(t, func(connection *net.TCPConn) {
		all.Done()
		all.Wait()
		echo(connection)
	})))
	address, _ := connects(t, site.host("beta", hour()), server.Address(), "alpha", "echo")
	failed := make(chan error, many)
	for number := range many {
		connection := open(t, address)
		go func() {
			want := bytes.Repeat([]byte{byte(number)}, 100_000+number)
			answer, err := ask(connection, want)
			if err == nil && !bytes.Equal(answer, want) {
				err = fmt.Errorf("%d got another's answer, or a part", number)
			}
			failed <- err
		}()
	}
	for range many {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
}

func TestAServerThatIsDownEndsTheConnectionAtOnce(t *testing.T) {
	site := newAuthority(t, "site")
	address, says := connects(t, site.host("beta", hour()), closed(t), "alpha", "echo")
	refused(t, address)
	says.says(t, "fails: service echo", "connection refused")
}

func TestACertificateThatIsReplacedOnDiskIsUsed(t *testing.T) {
	site, next := newAuthority(t, "site"), newAuthority(t, "next")
	serverFiles, clientFiles := site.host("alpha", hour()), site.host("beta", hour())
	server, _, _ := serves(t, serverFiles, service(t, "echo", listens(t, func(connection *net.TCPConn) { _, _ = io.Copy(connection, connection) })))
	address, says := connects(t, clientFiles, server.Address(), "alpha", "echo")
	works := func() {
		t.Helper()
		if answer, err := ask(open(t, address), []byte("hello")); err != nil || string(answer) != "hello" {
			t.Fatalf("got %q, %v", answer, err)
		}
	}
	works()
	stays := open(t, address) // from before
	if _, err := stays.Write([]byte("hel")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stays, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}

	// With another CA at one end only, the ends do not know each other.
	next.write(serverFiles, "alpha", hour())
	refused(t, address)
	next.write(clientFiles, "beta", hour())
	works()
	peer, err := tls.Dial("tcp", server.Address(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"site-relay/echo"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = peer.Close() }()
	if got := peer.ConnectionState().PeerCertificates[0].Issuer.CommonName; got != "next" {
		t.Errorf("the server's certificate is of %q", got)
	}

	// While files are being written, key and certificate do not fit.
	if err := os.WriteFile(clientFiles.Key, []byte("half a key"), 0o600); err != nil {
		t.Fatal(err)
	}
	works()
	works()
	says.says(t, "fails: reading the certificates")
	next.write(clientFiles, "beta", hour())
	works()
	says.says(t, "works: reading the certificates")
	if says.count("fails: reading the certificates") != 1 {
		t.Errorf("not said once:\n%s", says.text.String())
	}

	// Whoever was let in stays.
	if answer, err := ask(stays, []byte("lo")); err != nil || string(answer) != "lo" {
		t.Errorf("got %q, %v", answer, err)
	}
}

func TestACARotatesWithoutAMomentInWhichTheEndsDoNotKnowEachOther(t *testing.T) {
	old, next := newAuthority(t, "site"), newAuthority(t, "site") // of one name, as those of a site may be
	serverFiles, clientFiles := old.host("alpha", hour()), old.host("beta", hour())
	server, _, _ := serves(t, serverFiles, service(t, "echo", listens(t, func(connection *net.TCPConn) { _, _ = io.Copy(connection, connection) })))
	address, _ := connects(t, clientFiles, server.Address(), "alpha", "echo")
	stays := open(t, address)
	if _, err := stays.Write([]byte("hel")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stays, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"the server trusts both", func() { trust(t, serverFiles, next, old) }},
		{"the client trusts both", func() { trust(t, clientFiles, next, old) }},
		{"the client has a certificate by the new CA", func() {
			next.write(clientFiles, "beta", hour())
			trust(t, clientFiles, next, old)
		}},
		{"the server has one too", func() {
			next.write(serverFiles, "alpha", hour())
			trust(t, serverFiles, next, old)
		}},
		{"the server trusts the new CA alone", func() { trust(t, serverFiles, next) }},
		{"the client does, too", func() { trust(t, clientFiles, next) }},
	} {
		step.do()
		if answer, err := ask(open(t, address), []byte("hello")); err != nil || string(answer) != "hello" {
			t.Errorf("%s: got %q, %v", step.name, answer, err)
		}
	}
	old.write(clientFiles, "beta", hour())
	refused(t, address)
	if answer, err := ask(stays, []byte("lo")); err != nil || string(answer) != "lo" {
		t.Errorf("a stream from before got %q, %v", answer, err)
	}
}

// trust writes the certificates of the authorities, and leaves the host's own.
func trust(t *testing.T, files relay.Files, authorities ...*authority) {
	t.Helper()
	var bundle []byte
	for _, each := range authorities {
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: each.certificate.Raw})...)
	}
	if err := os.WriteFile(files.CA, bundle, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestTheServiceManagerIsTold(t *testing.T) {
	site := newAuthority(t, "site")
	told := make(chan string, 4)
	common := relay.Common{
		Files: site.host("alpha", hour()), Log: slog.New(slog.DiscardHandler),
		Notify: func(state string) error { told <- state; return nil },
	}
	server, err := relay.NewServer(t.Context(), relay.ServerOptions{Common: common, Listen: "127.0.0.1:0", Targets: []relay.Service{service(t, "echo", closed(t))}})
	if err != nil {
		t.Fatal(err)
	}
	connector, err := relay.NewConnector(t.Context(), relay.ConnectorOptions{
		Common: common, To: server.Address(), ServerName: "alpha", Locals: []relay.Service{service(t, "echo", "127.0.0.1:0")},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, run := range map[string]func(context.Context) error{"serve": server.Run, "connect": connector.Run} {
		runs(t, run)()
		if first, last := <-told, <-told; first != "READY=1" || last != "STOPPING=1" {
			t.Errorf("%s: told %s, then %s", name, first, last)
		}
	}
}

package relay_test

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/sitehost/relay"
)

func TestOnlyHostsOfTheSiteAreJoined(t *testing.T) {
	site, stranger := newAuthority(t, "site"), newAuthority(t, "stranger")
	expired := time.Now().Add(-time.Hour)
	for name, test := range map[string]struct {
		server, client   relay.Files
		expect, service  string
		atServer, atHost string
	}{
		"a client of another CA is refused": {
			site.host("alpha", hour()), mixed(t, site, stranger, "beta"), "alpha", "echo",
			"unknown authority", "remote error: tls: ",
		},
		"a server of another CA is refused": {
			mixed(t, site, stranger, "alpha"), site.host("beta", hour()), "alpha", "echo",
			"remote error: tls: bad certificate", "unknown authority",
		},
		"another host of the site does not pass for the server": {
			site.host("gamma", hour()), site.host("beta", hour()), "alpha", "echo",
			"remote error: tls: bad certificate", "not alpha",
		},
		"a client whose certificate is over is refused": {
			site.host("alpha", hour()), site.host("beta", expired), "alpha", "echo",
			"has expired", "remote error: tls: ",
		},
		"a service that is not served is refused": {
			site.host("alpha", hour()), site.host("beta", hour()), "alpha", "other",
			"site-relay/other", "remote error: tls: no application protocol",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reached := make(chan struct{}, 1)
			target := listens(t, func(*net.TCPConn) { reached <- struct{}{} })
			server, serverSays, _ := serves(t, test.server, service(t, "echo", target))
			address, says := connects(t, test.client, server.Address(), test.expect, test.service)
			for range 3 {
				refused(t, address)
			}
			serverSays.says(t, "fails: client 127.0.0.1", test.atServer)
			says.says(t, "fails: service "+test.service, test.atHost)
			for _, journal := range []*journal{serverSays, says} {
				if journal.count("fails: ") != 1 {
					t.Errorf("not said once:\n%s", journal.text.String())
				}
			}
			select {
			case <-reached:
				t.Error("the service was reached")
			default:
			}
		})
	}
}

// mixed is a host that trusts the site, but whose certificate is the stranger's.
func mixed(t *testing.T, site, stranger *authority, name string) relay.Files {
	t.Helper()
	files := stranger.host(name, hour())
	files.CA = site.host(name, hour()).CA
	return files
}

func TestAClientThatIsNotOurRelayIsRefused(t *testing.T) {
	site := newAuthority(t, "site")
	files := site.host("beta", hour())
	own, err := tls.LoadX509KeyPair(files.Certificate, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		config *tls.Config
		says   string
	}{
		"without a certificate":  {&tls.Config{NextProtos: []string{"site-relay/echo"}}, "didn't provide a certificate"},
		"without a service":      {&tls.Config{Certificates: []tls.Certificate{own}}, "names no service"},
		"with TLS 1.2":           {&tls.Config{Certificates: []tls.Certificate{own}, NextProtos: []string{"site-relay/echo"}, MaxVersion: tls.VersionTLS12}, "unsupported versions"},
		"with another's service": {&tls.Config{Certificates: []tls.Certificate{own}, NextProtos: []string{"echo", "h2"}}, "unsupported application protocols"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reached := make(chan struct{}, 1)
			target := listens(t, func(*net.TCPConn) { reached <- struct{}{} })
			server, says, _ := serves(t, site.host("alpha", hour()), service(t, "echo", target))
			test.config.InsecureSkipVerify = true
			connection, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", server.Address(), test.config)
			if err == nil {
				defer func() { _ = connection.Close() }()
				_ = connection.SetDeadline(time.Now().Add(patience))
				if read, _ := io.ReadAll(connection); len(read) > 0 {
					t.Errorf("it was told %q", read)
				}
			}
			says.says(t, "fails: client 127.0.0.1", test.says)
			select {
			case <-reached:
				t.Error("the service was reached")
			default:
			}
		})
	}
}

func TestAServiceThatIsDownEndsTheConnectionAtOnceAndIsSaidOnce(t *testing.T) {
	site := newAuthority(t, "site")
	place := closed(t)
	server, serverSays, _ := serves(t, site.host("alpha", hour()), service(t, "echo", place))
	address, says := connects(t, site.host("beta", hour()), server.Address(), "alpha", "echo")
	for range 5 {
		refused(t, address)
	}
	serverSays.says(t, "fails: service echo", "connection refused")
	says.says(t, "alpha cannot reach the service")

	// It comes up, without anyone telling the relay.
	listener, err := net.Listen("tcp", place)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	go func() {
		if connection, err := listener.Accept(); err == nil {
			echo(connection.(*net.TCPConn))
			_ = connection.Close()
		}
	}()
	if answer, err := ask(open(t, address), []byte("hello")); err != nil || string(answer) != "hello" {
		t.Errorf("got %q, %v", answer, err)
	}
	for _, journal := range []*journal{serverSays, says} {
		journal.says(t, "works: service echo")
		if journal.count("fails: service echo") != 1 {
			t.Errorf("not said once:\n%s", journal.text.String())
		}
	}
}

func TestServicesAreOnLoopbackAlone(t *testing.T) {
	for _, address := range []string{"10.0.0.1:8200", "0.0.0.0:8200", "[::]:8200", "localhost:8200", ":8200", "127.0.0.1", "", "[::1%lo]:8200"} {
		_, err := relay.ParseServices([]string{"openbao=" + address})
		var not *relay.NotLoopbackError
		if !errors.As(err, &not) || not.Service != "openbao" || not.Address != address || plan.HintOf(err) == "" {
			t.Errorf("%q: got %v", address, err)
		}
	}
	for _, texts := range [][]string{nil, {"openbao"}, {"=127.0.0.1:8200"}, {"Open Bao=127.0.0.1:8200"}, {"a=127.0.0.1:1", "a=127.0.0.1:2"}} {
		if got, err := relay.ParseServices(texts); err == nil {
			t.Errorf("%q: got %v", texts, got)
		}
	}
	got, err := relay.ParseServices([]string{"openbao=127.0.0.1:8200", "postgresql=[::1]:5432"})
	if err != nil || len(got) != 2 || got[1].Name != "postgresql" || got[1].Address.Port() != 5432 {
		t.Errorf("got %v, %v", got, err)
	}

	site := newAuthority(t, "site")
	common := relay.Common{Files: site.host("beta", hour()), Log: slog.New(slog.DiscardHandler)}
	_, err = relay.NewConnector(t.Context(), relay.ConnectorOptions{
		Common: common, To: "127.0.0.1:1", ServerName: "alpha",
		Locals: []relay.Service{{Name: "echo", Address: netip.MustParseAddrPort("0.0.0.0:0")}},
	})
	var not *relay.NotLoopbackError
	if !errors.As(err, &not) {
		t.Errorf("a connector listens anywhere: %v", err)
	}
}

func TestWhatCannotWorkIsRefusedAtTheStart(t *testing.T) {
	site := newAuthority(t, "site")
	good := site.host("alpha", hour())
	foreign := good
	foreign.Key = site.host("alpha", hour()).Key
	empty := good
	empty.CA = filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(empty.CA, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		files  relay.Files
		listen string
		to     string
		says   string
	}{
		"every address of the host":       {good, "0.0.0.0:7381", "", "not one address"},
		"an address without a port":       {good, "10.0.0.1", "", "not one address"},
		"a name to listen on":             {good, "alpha:7381", "", "not one address"},
		"a name to connect to":            {good, "", "alpha:7381", "not an address"},
		"a key of another certificate":    {foreign, "127.0.0.1:0", "127.0.0.1:1", "private key does not match"},
		"a CA file without a certificate": {empty, "127.0.0.1:0", "127.0.0.1:1", "has no certificate"},
		"a file that is not there":        {relay.Files{CA: good.CA, Certificate: "/nowhere", Key: good.Key}, "127.0.0.1:0", "127.0.0.1:1", "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			common := relay.Common{Files: test.files, Log: slog.New(slog.DiscardHandler)}
			services := []relay.Service{service(t, "echo", "127.0.0.1:0")}
			if test.listen != "" {
				_, err := relay.NewServer(t.Context(), relay.ServerOptions{Common: common, Listen: test.listen, Targets: services})
				if err == nil || !strings.Contains(err.Error(), test.says) {
					t.Errorf("serve: got %v", err)
				}
			}
			if test.to != "" {
				_, err := relay.NewConnector(t.Context(), relay.ConnectorOptions{Common: common, To: test.to, ServerName: "alpha", Locals: services})
				if err == nil || !strings.Contains(err.Error(), test.says) {
					t.Errorf("connect: got %v", err)
				}
			}
		})
	}
}

package dial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

func TestOnlyServicesOfThisHostAreDialled(t *testing.T) {
	for name, dial := range map[string]func() (Address, error){
		"a relative path":             func() (Address, error) { return Unix("run/socket") },
		"a path that is not clean":    func() (Address, error) { return Unix("/run/../socket") },
		"an abstract socket":          func() (Address, error) { return Unix("@socket") },
		"a public address":            func() (Address, error) { return TCP("203.0.113.5:22") },
		"all addresses":               func() (Address, error) { return TCP("0.0.0.0:22") },
		"a name":                      func() (Address, error) { return TCP("localhost:22") },
		"an address without its port": func() (Address, error) { return TCP("127.0.0.1") },
		"an address with a zone":      func() (Address, error) { return TCP("[::1%lo]:22") },
	} {
		if _, err := dial(); err == nil {
			t.Errorf("%s is dialled", name)
		}
	}
}

// service answers one connection.
func service(t *testing.T, network string, answer func(net.Conn)) Address {
	t.Helper()
	where := "127.0.0.1:0"
	if network == "unix" {
		where = filepath.Join(t.TempDir(), "socket")
	}
	listener, err := net.Listen(network, where)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		answer(conn)
	}()
	dial := TCP
	if network == "unix" {
		dial = Unix
	}
	address, err := dial(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func join(t *testing.T, address Address, input io.Reader, output io.Writer) error {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- address.Join(t.Context(), input, output) }()
	select {
	case err := <-ended:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
		return nil
	}
}

func TestBytesGoBothWaysUntilBothHalvesHaveEnded(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			sent := bytes.Repeat([]byte{0, 255, '\n'}, 1<<20)
			address := service(t, network, func(conn net.Conn) {
				received, _ := io.ReadAll(conn) // ends with the client's half
				_, _ = conn.Write(received)
			})
			var output bytes.Buffer
			if err := join(t, address, bytes.NewReader(sent), &output); err != nil || !bytes.Equal(output.Bytes(), sent) {
				t.Errorf("%d bytes, %v", output.Len(), err)
			}
		})
	}
}

func TestTheEndOfTheServiceEndsItThoughTheClientStaysSilent(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			address := service(t, network, func(conn net.Conn) { _, _ = conn.Write([]byte("go away")) })
			input, client := io.Pipe()
			defer func() { _ = client.Close() }()
			var output bytes.Buffer
			start := time.Now()
			if err := join(t, address, input, &output); err != nil || output.String() != "go away" {
				t.Errorf("%q, %v", output.String(), err)
			}
			if took := time.Since(start); network == "unix" && took > lingerLimit/2 {
				t.Errorf("it took %s", took)
			}
		})
	}
}

func TestAServiceThatEndsItsHalfStillReads(t *testing.T) {
	received := make(chan string, 1)
	address := service(t, "unix", func(conn net.Conn) {
		_ = conn.(*net.UnixConn).CloseWrite()
		content, _ := io.ReadAll(conn)
		received <- string(content)
	})
	input, client := io.Pipe()
	output, printed := io.Pipe()
	go func() {
		_, _ = io.ReadAll(output) // the client learns of the end, and then goes on
		_, _ = client.Write([]byte("late"))
		_ = client.Close()
	}()
	if err := join(t, address, input, printed); err != nil {
		t.Error(err)
	}
	if got := <-received; got != "late" {
		t.Errorf("received %q", got)
	}
}

func TestWhatDoesNotListenIsCalledSo(t *testing.T) {
	gone := service(t, "tcp", func(net.Conn) {})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.address = listener.Addr().String()
	_ = listener.Close()
	missing, err := Unix(filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	for name, address := range map[string]Address{"a port": gone, "a socket": missing} {
		err := join(t, address, bytes.NewReader(nil), io.Discard)
		if !errors.Is(err, ErrNothingListens) || plan.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestACancelledContextEndsIt(t *testing.T) {
	address := service(t, "unix", func(conn net.Conn) { _, _ = io.ReadAll(conn) })
	ctx, cancel := context.WithCancel(t.Context())
	input, client := io.Pipe()
	defer func() { _ = client.Close() }()
	ended := make(chan error, 1)
	go func() { ended <- address.Join(ctx, input, io.Discard) }()
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not end")
	}
}

package ssh

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

func TestTunnel(t *testing.T) {
	s := newServer(t, nil)
	conn := s.connect()
	handler := http.HandlerFunc(func(writer http.ResponseWriter, request *http.Request) {
		_, _ = io.WriteString(writer, "hello "+request.URL.Path)
	})
	overTCP := httptest.NewServer(handler)
	t.Cleanup(overTCP.Close)
	socket := filepath.Join(t.TempDir(), "service")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	overUnix := &httptest.Server{Listener: listener, Config: &http.Server{Handler: handler}}
	overUnix.Start()
	t.Cleanup(overUnix.Close)

	get := func(dial func(context.Context, string, string) (net.Conn, error)) (string, error) {
		client := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
		response, err := client.Get("http://" + overTCP.Listener.Addr().String() + "/there")
		if err != nil {
			return "", err
		}
		defer func() { _ = response.Body.Close() }()
		body, err := io.ReadAll(response.Body)
		return string(body), err
	}
	t.Run("an HTTP client reaches a TCP service", func(t *testing.T) {
		if body, err := get(conn.DialContext); err != nil || body != "hello /there" {
			t.Errorf("%q %v", body, err)
		}
	})
	t.Run("an HTTP client reaches a Unix socket", func(t *testing.T) {
		body, err := get(func(ctx context.Context, _, _ string) (net.Conn, error) { return conn.DialContext(ctx, "unix", socket) })
		if err != nil || body != "hello /there" {
			t.Errorf("%q %v", body, err)
		}
	})
	t.Run("a port where nothing listens", func(t *testing.T) {
		_, err := conn.DialContext(t.Context(), "tcp", "127.0.0.1:"+count(freePort(t)))
		if err == nil || plan.HintOf(err) == "" || errors.Is(err, ErrConnectionLost) {
			t.Errorf("%v, hint %q", err, plan.HintOf(err))
		}
	})
	t.Run("a deadline ends a read", func(t *testing.T) {
		tunnel, err := conn.DialContext(t.Context(), "tcp", overTCP.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = tunnel.Close() }()
		_ = tunnel.SetDeadline(time.Now().Add(50 * time.Millisecond))
		err = within(t, 5*time.Second, "read", func() error { _, err := tunnel.Read(make([]byte, 1)); return err })
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
	t.Run("a local port is forwarded until the context ends", func(t *testing.T) {
		local, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- conn.Forward(ctx, local, overTCP.Listener.Addr().String()) }()
		for range 3 {
			body, err := get(func(context.Context, string, string) (net.Conn, error) { return net.Dial("tcp", local.Addr().String()) })
			if err != nil || body != "hello /there" {
				t.Errorf("%q %v", body, err)
			}
		}
		idle, err := net.Dial("tcp", local.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = idle.Close() }()
		cancel()
		if err := within(t, 5*time.Second, "forward", func() error { return <-ended }); err != nil {
			t.Error(err)
		}
	})
}

func TestForwardingForbidden(t *testing.T) {
	s := newServer(t, nil, "AllowTcpForwarding no")
	_, err := s.connect().DialContext(t.Context(), "tcp", s.address())
	if err == nil {
		t.Fatal("no error")
	}
	mustContain(t, plan.HintOf(err), "AllowTcpForwarding")
}

func TestConnectionLost(t *testing.T) {
	s := newServer(t, nil)
	const keepalive = 200 * time.Millisecond
	through := func(t *testing.T) (*Conn, *proxy) {
		s := s.in(t)
		between := s.proxy()
		target := s.target()
		target.Port = between.port
		return s.dial(target, Options{Keepalive: keepalive}), between
	}
	for name, breakIt := range map[string]func(*proxy){
		"a cut connection": (*proxy).cut,
		"a silent peer":    (*proxy).mute,
	} {
		t.Run(name+" ends a Run, a Process and a tunnel", func(t *testing.T) {
			conn, between := through(t)
			running := make(chan error, 1)
			go func() {
				_, err := conn.Run(t.Context(), Command{Args: []string{"sleep", "600"}})
				running <- err
			}()
			process, err := conn.Start(t.Context(), []string{"sh", "-c", "echo ready; exec sleep 600"})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := process.Read(make([]byte, 6)); err != nil {
				t.Fatal(err)
			}
			tunnel, err := conn.DialContext(t.Context(), "tcp", s.address())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tunnel.Read(make([]byte, 256)); err != nil {
				t.Fatal(err)
			}
			breakIt(between)
			for what, action := range map[string]func() error{
				"run":     func() error { return <-running },
				"read":    func() error { _, err := process.Read(make([]byte, 1)); return err },
				"wait":    process.Wait,
				"tunnel":  func() error { _, err := tunnel.Read(make([]byte, 1)); return err },
				"new run": func() error { _, err := conn.Run(t.Context(), Command{Args: []string{"true"}}); return err },
			} {
				if err := within(t, 3*time.Second, what, action); !errors.Is(err, ErrConnectionLost) {
					t.Errorf("%s: %v", what, err)
				} else if plan.HintOf(err) == "" {
					t.Errorf("%s: no hint", what)
				}
			}
			if err := within(t, 3*time.Second, "close", conn.Close); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("a killed sshd child is noticed", func(t *testing.T) {
		conn := s.in(t).connect()
		output, err := conn.Run(t.Context(), Command{Args: []string{"sh", "-c", "cat /proc/$PPID/status"}})
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(`(?m)^Pid:\s+(\d+)$`).FindSubmatch(output)
		if found == nil {
			t.Fatalf("no pid in %q", output)
		}
		pid, err := strconv.Atoi(string(found[1]))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		select {
		case <-conn.Done():
		case <-time.After(3 * time.Second):
			t.Fatal("not noticed")
		}
		if !errors.Is(conn.Err(), ErrConnectionLost) {
			t.Errorf("%v", conn.Err())
		}
	})
	t.Run("a quiet connection stays", func(t *testing.T) {
		conn, _ := through(t)
		if _, err := conn.Run(t.Context(), Command{Args: []string{"sleep", "1.5"}}); err != nil {
			t.Error(err)
		}
	})
}

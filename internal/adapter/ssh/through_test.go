package ssh

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

func TestDialThrough(t *testing.T) {
	s := newServer(t, nil)
	conn := s.connect()
	dial := func(t *testing.T, conn *Conn, args ...string) net.Conn {
		t.Helper()
		through, err := conn.DialThrough(t.Context(), args)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = through.Close() })
		return through
	}
	closeWrite := func(t *testing.T, conn net.Conn) {
		t.Helper()
		if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("bytes go both ways, and either half ends alone", func(t *testing.T) {
		through := dial(t, conn, "sh", "-c", "cat; echo the end")
		input := bytes.Repeat([]byte{0, 1, 2, 255, '\n'}, 1<<18)
		go func() {
			_, _ = through.Write(input)
			closeWrite(t, through)
		}()
		output, err := io.ReadAll(through)
		if want := string(input) + "the end\n"; err != nil || string(output) != want {
			t.Errorf("%d bytes, %v", len(output), err)
		}
		if _, err := through.Write([]byte("x")); err == nil {
			t.Error("a write after the half was ended")
		}
	})
	t.Run("what the command said is in the error", func(t *testing.T) {
		through := dial(t, conn, "sh", "-c", "echo 'error: no such socket' >&2; exit 6")
		_, err := through.Read(make([]byte, 1))
		exit := mustBe[*ExitError](t, err)
		if exit.Code != 6 || !strings.Contains(err.Error(), "no such socket") {
			t.Errorf("%v", err)
		}
		// A first write may still be taken, as with any connection.
		for range 3 {
			_, err = through.Write([]byte("x"))
		}
		_ = mustBe[*ExitError](t, err)
	})
	t.Run("a program that is not there", func(t *testing.T) {
		_, err := dial(t, conn, "/does/not/exist", "--flag").Read(make([]byte, 1))
		mustContain(t, err.Error(), "/does/not/exist")
		_ = mustBe[*ExitError](t, err)
	})
	t.Run("a deadline ends a read, and a later one allows it again", func(t *testing.T) {
		through := dial(t, conn, "cat")
		_ = through.SetDeadline(time.Now().Add(50 * time.Millisecond))
		err := within(t, 5*time.Second, "read", func() error { _, err := through.Read(make([]byte, 1)); return err })
		var timeout net.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%v", err)
		}
		_ = through.SetDeadline(time.Time{})
		if _, err := through.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(through, make([]byte, 1)); err != nil {
			t.Error(err)
		}
	})
	t.Run("a deadline ends a write that nobody reads", func(t *testing.T) {
		through := dial(t, conn, "sleep", "600")
		_ = through.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		err := within(t, 5*time.Second, "write", func() error { _, err := through.Write(make([]byte, 64<<20)); return err })
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if err := within(t, 10*time.Second, "close", through.Close); err != nil {
			t.Error(err)
		}
	})
	t.Run("closing ends a command that does not look at its input", func(t *testing.T) {
		through := dial(t, conn, "sh", "-c", "trap '' HUP; echo $$; sleep 600; true")
		buffer := make([]byte, 32)
		n, err := through.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		pending := make(chan error, 1)
		go func() { _, err := through.Read(make([]byte, 1)); pending <- err }()
		_ = within(t, 10*time.Second, "close", through.Close)
		mustVanish(t, "/proc/"+strings.TrimSpace(string(buffer[:n])))
		if err := within(t, time.Second, "the pending read", func() error { return <-pending }); err == nil {
			t.Error("a read succeeded")
		}
	})
	t.Run("the context bounds the start alone", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		through, err := conn.DialThrough(ctx, []string{"cat"})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = through.Close() }()
		cancel()
		if _, err := through.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(through, make([]byte, 1)); err != nil {
			t.Error(err)
		}
		if _, err := conn.DialThrough(ctx, []string{"cat"}); !errors.Is(err, context.Canceled) {
			t.Errorf("started: %v", err)
		}
	})
	t.Run("its session is free again", func(t *testing.T) {
		for range 2 * maximumSessions {
			through := dial(t, conn, "cat")
			if err := through.Close(); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("a lost connection is called so", func(t *testing.T) {
		s := s.in(t)
		between := s.proxy()
		target := s.target()
		target.Port = between.port
		through := dial(t, s.dial(target, Options{Keepalive: 200 * time.Millisecond}), "cat")
		between.cut()
		err := within(t, 10*time.Second, "read", func() error { _, err := through.Read(make([]byte, 1)); return err })
		if !errors.Is(err, ErrConnectionLost) {
			t.Errorf("%v", err)
		}
	})
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// memory is a store that answers only after some attempts.
type memory struct {
	mutex   sync.Mutex
	refuses int
	rows    []string
	broken  error
}

func (m *memory) answer() error {
	if m.refuses > 0 {
		m.refuses--
		return errors.New("the database system is starting up")
	}
	return m.broken
}

func (m *memory) Ping(context.Context) error {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return m.broken
}

func (m *memory) Start(_ context.Context, sha, alloc string) error {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if err := m.answer(); err != nil {
		return err
	}
	m.rows = append(m.rows, sha+" "+alloc)
	return nil
}

func (m *memory) Rows(context.Context) (int, error) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return len(m.rows), m.broken
}

func (m *memory) Close() {}

func ask(handler http.Handler, path string) *httptest.ResponseRecorder {
	recorder := httptest.NewRecorder()
	handler.ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, path, nil))
	return recorder
}

func TestHealthFollowsTheDatabase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kept := &memory{refuses: 8}
		data := newDatabase(kept)
		handler := newHandler(environment(nil), data)
		if got := ask(handler, "/healthz"); got.Code != http.StatusServiceUnavailable {
			t.Errorf("before it was reached: %d", got.Code)
		}
		begun := time.Now()
		data.start(t.Context(), "abc", "a-1")
		// 0.1 + 0.2 + 0.4 + 0.8 + 1.6 s, then 2 s each: never more.
		if waited := time.Since(begun); waited != 9100*time.Millisecond {
			t.Errorf("waited %s", waited)
		}
		if got := ask(handler, "/healthz"); got.Code != http.StatusOK || got.Body.String() != "ok\n" {
			t.Errorf("after it was reached: %d %q", got.Code, got.Body)
		}
		kept.broken = errors.New("connection refused by 127.0.0.1")
		got := ask(handler, "/healthz")
		if got.Code != http.StatusServiceUnavailable || strings.Contains(got.Body.String(), "127.0.0.1") {
			t.Errorf("when it is gone: %d %q", got.Code, got.Body)
		}
	})
}

func TestOneRowIsWrittenPerStart(t *testing.T) {
	kept := &memory{rows: []string{"earlier"}}
	data := newDatabase(kept)
	data.start(t.Context(), "abc", "a-1")
	if len(kept.rows) != 2 || kept.rows[1] != "abc a-1" {
		t.Errorf("rows are %q", kept.rows)
	}
	handler := newHandler(environment(nil), data)
	for range 2 { // asking writes nothing
		var answer version
		if err := json.Unmarshal(ask(handler, "/version").Body.Bytes(), &answer); err != nil {
			t.Fatal(err)
		}
		if answer.Rows == nil || *answer.Rows != 2 {
			t.Errorf("rows are %v", answer.Rows)
		}
	}
}

func TestTheVersionIsToldWithoutTheDatabaseToo(t *testing.T) {
	for name, data := range map[string]*database{
		"no database is set": nil,
		"it does not answer": newDatabase(&memory{broken: errors.New("no")}),
	} {
		t.Run(name, func(t *testing.T) {
			got := ask(newHandler(environment(map[string]string{shaVariable: "abc"}), data), "/version")
			if got.Code != http.StatusOK || !strings.Contains(got.Body.String(), `"sha":"abc"`) || strings.Contains(got.Body.String(), "rows") {
				t.Errorf("answer %d %q", got.Code, got.Body)
			}
		})
	}
}

func TestItEndsWhileTheDatabaseIsStillDown(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("hidden-word\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := run(ctx, environment(map[string]string{
		"HELLO_LISTEN": "127.0.0.1:0", "DATABASE_URL": "postgres://hello@127.0.0.1:1/hello", "DATABASE_PASSWORD_FILE": password,
	}))
	if err != nil {
		t.Fatal(err)
	}
}

func TestWhatIsWrongWithTheSettingsIsSaidAtOnce(t *testing.T) {
	for name, test := range map[string]struct{ address, password, says string }{
		"the address":       {"postgres://hello@127.0.0.1:port/hello", "", "DATABASE_URL"},
		"the password file": {"postgres://hello@127.0.0.1/hello", "/nowhere/password", "/nowhere/password"},
	} {
		t.Run(name, func(t *testing.T) {
			err := run(t.Context(), environment(map[string]string{
				"HELLO_LISTEN": "127.0.0.1:0", "DATABASE_URL": test.address, "DATABASE_PASSWORD_FILE": test.password,
			}))
			if err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v", err)
			}
		})
	}
}

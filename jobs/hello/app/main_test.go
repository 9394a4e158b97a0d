package main

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

func environment(pairs map[string]string) func(string) string {
	return func(name string) string { return pairs[name] }
}

func TestVersionNamesCommitAndAllocation(t *testing.T) {
	handler := newHandler(environment(map[string]string{"NOMAD_META_site_git_sha": "abc123", "NOMAD_ALLOC_ID": "a-1", "NOMAD_JOB_NAME": "hello"}), nil)
	recorder := httptest.NewRecorder()
	handler.ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/version", nil))
	var got version
	if err := json.Unmarshal(recorder.Body.Bytes(), &got); err != nil {
		t.Fatalf("answer %q: %v", recorder.Body, err)
	}
	if want := (version{SHA: "abc123", Alloc: "a-1", Job: "hello"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestPaths(t *testing.T) {
	handler := newHandler(environment(map[string]string{"NOMAD_META_site_git_sha": "abc123"}), nil)
	for _, tt := range []struct {
		name, method, path string
		status             int
		body               string
	}{
		{"health is ok", http.MethodGet, "/healthz", 200, "ok\n"},
		{"the root greets", http.MethodGet, "/", 200, "hello from abc123\n"},
		{"anything else is not found", http.MethodGet, "/other", 404, ""},
		{"only reading is allowed", http.MethodPost, "/version", 405, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			recorder := httptest.NewRecorder()
			handler.ServeHTTP(recorder, httptest.NewRequest(tt.method, tt.path, nil))
			if recorder.Code != tt.status {
				t.Errorf("status %d, want %d", recorder.Code, tt.status)
			}
			if tt.body != "" && recorder.Body.String() != tt.body {
				t.Errorf("body %q, want %q", recorder.Body, tt.body)
			}
		})
	}
}

func TestListenAddress(t *testing.T) {
	for _, tt := range []struct {
		name string
		env  map[string]string
		want string
	}{
		{"outside of Nomad it is 8080", nil, ":8080"},
		{"under Nomad it is the port http", map[string]string{"NOMAD_PORT_http": "9999"}, ":9999"},
		{"an explicit address wins", map[string]string{"NOMAD_PORT_http": "9999", "HELLO_LISTEN": "127.0.0.1:1"}, "127.0.0.1:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := listenAddress(environment(tt.env)); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestEndsCleanlyWhenTold(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := run(ctx, environment(map[string]string{"HELLO_LISTEN": "127.0.0.1:0"})); err != nil {
		t.Fatal(err)
	}
}

func TestAPortInUseIsAnError(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	if err := run(t.Context(), environment(map[string]string{"HELLO_LISTEN": listener.Addr().String()})); err == nil {
		t.Fatal("no error although the port is in use")
	}
}

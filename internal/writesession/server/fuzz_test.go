package server

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

func seeds(f *testing.F, pattern string) [][]byte {
	f.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		f.Fatalf("no seeds at %s: %v", pattern, err)
	}
	var out [][]byte
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		out = append(out, content)
	}
	return out
}

// FuzzComplete: what the streaming decoder takes is what the whole one takes, and
// what is checked can be laid out.
func FuzzComplete(f *testing.F) {
	for _, seed := range seeds(f, "testdata/complete/*.json") {
		f.Add(seed)
	}
	s := &Server{site: "gamma", log: slog.New(slog.DiscardHandler), index: newIndex(writesession.Layout{Site: "gamma"}, nil)}
	f.Fuzz(func(t *testing.T, body []byte) {
		request, err := decodeComplete(bytes.NewReader(body))
		if err != nil {
			return
		}
		var whole writesession.CompleteRequest
		if err := json.Unmarshal(body, &whole); err != nil {
			t.Fatalf("streamed, but not as a whole: %v", err)
		}
		if len(request.Packs) != len(whole.Packs) || len(request.Blobs) != len(whole.Blobs) ||
			(len(request.Names) > 0 && !reflect.DeepEqual(request.Names, whole.Names)) {
			t.Fatalf("streamed %+v, as a whole %+v", request, whole)
		}
		if s.checkComplete(request) != nil {
			return
		}
		var proofs []proof
		for _, pack := range request.Packs {
			proofs = append(proofs, proof{pack: pack})
		}
		todo, _ := s.layOut(request, proofs)
		for _, record := range todo.records {
			if err := record.Validate(); err != nil {
				t.Fatalf("a record that nobody can read: %v", err)
			}
		}
	})
}

func FuzzCreate(f *testing.F) {
	for _, seed := range seeds(f, "testdata/create/*.json") {
		f.Add(seed)
	}
	s := &Server{site: "gamma"}
	f.Fuzz(func(t *testing.T, body []byte) {
		var request writesession.CreateRequest
		if strictJSON(bytes.NewReader(body), &request) != nil || s.checkCreate(request) != nil {
			return
		}
		layout := writesession.Layout{Site: "gamma"}
		for _, object := range request.Objects {
			digest, err := objectDigest(object)
			if err != nil {
				t.Fatal(err)
			}
			if key := layout.Staged("0", digest); filepath.Clean(key) != key || !strings.HasPrefix(key, "gamma/sessions/0/objects/") {
				t.Fatalf("an upload at %q", key)
			}
		}
	})
}

// FuzzPath: no path reaches a route for another site or a session that is none,
// and every refusal is a problem.
func FuzzPath(f *testing.F) {
	for _, seed := range seeds(f, "testdata/paths/*.txt") {
		f.Add(strings.TrimSpace(string(seed)))
	}
	s := &Server{site: "gamma", log: slog.New(slog.DiscardHandler), metrics: newMetrics("test")}
	handler := s.Handler()
	f.Fuzz(func(t *testing.T, path string) {
		if !strings.HasPrefix(path, "/") {
			return
		}
		request, err := http.NewRequest(http.MethodPut, "http://service"+path, http.NoBody)
		if err != nil {
			return
		}
		recorder := httptest.NewRecorder()
		handler.ServeHTTP(recorder, request)
		if code := recorder.Code; code != http.StatusNotFound && code != http.StatusMethodNotAllowed {
			t.Fatalf("%q: status %d", path, code)
		}
		if recorder.Header().Get("Content-Type") != "application/problem+json" || recorder.Header().Get("Location") != "" {
			t.Fatalf("%q: %v", path, recorder.Header())
		}
	})
}

func FuzzNameKey(f *testing.F) {
	layout := writesession.Layout{Site: "gamma"}
	f.Add(layout.Name("shop", blob.DigestOf(nil)))
	f.Add("gamma/names/../x/" + blob.DigestOf(nil).Hex() + ".json")
	f.Add("gamma/names/shop/x/" + blob.DigestOf(nil).Hex() + ".json")
	f.Fuzz(func(t *testing.T, key string) {
		if artifact, digest, ok := parseNameKey(layout, key); ok && layout.Name(artifact, digest) != key {
			t.Fatalf("%q is of %q and %q", key, artifact, digest)
		}
	})
}

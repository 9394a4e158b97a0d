package server_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
	"github.com/nomad-site/site/internal/writesession/server"
	"github.com/nomad-site/site/internal/writesession/storetest"
)

const base = "/v1/sites/gamma/"

// byName knows operators, jobs, and who is neither.
type byName struct{}

func (byName) Authorize(_ context.Context, bearer secret.Value) (server.Identity, error) {
	switch name := bearer.Reveal(); {
	case strings.HasPrefix(name, "operator"):
		return server.Identity{Subject: name, Kind: server.KindOperator}, nil
	case strings.HasPrefix(name, "job"):
		return server.Identity{Subject: name, Kind: server.KindJob}, nil
	case name == "rotator":
		return server.Identity{}, &server.DeniedError{Status: http.StatusForbidden, Reason: "rotators upload nothing"}
	case name == "unlucky":
		return server.Identity{}, errors.New("the secrets engine is sealed")
	default:
		return server.Identity{}, &server.DeniedError{Status: http.StatusUnauthorized, Reason: "nobody"}
	}
}

func newServer(t testing.TB) (*server.Server, *storetest.Store) {
	t.Helper()
	store := storetest.New(t, storetest.Options{Enforces: true})
	made, err := server.New(server.Options{Site: "gamma", Bucket: store, Authorizer: byName{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return made, store
}

func ask(t testing.TB, handler http.Handler, who, method, path, body string, change ...func(*http.Request)) *httptest.ResponseRecorder {
	t.Helper()
	request := httptest.NewRequestWithContext(t.Context(), method, "http://service"+path, strings.NewReader(body))
	if who != "" {
		request.Header.Set("Authorization", "Bearer "+who)
	}
	request.Header.Set(writesession.IdempotencyHeader, "a-key-of-a-test")
	for _, do := range change {
		do(request)
	}
	recorder := httptest.NewRecorder()
	handler.ServeHTTP(recorder, request)
	return recorder
}

func wantProblem(t testing.TB, answer *httptest.ResponseRecorder, status int, word string) writesession.Problem {
	t.Helper()
	var problem writesession.Problem
	if err := json.Unmarshal(answer.Body.Bytes(), &problem); err != nil || answer.Code != status ||
		problem.Type != writesession.ProblemPrefix+word || answer.Header().Get("Content-Type") != "application/problem+json" {
		t.Errorf("status %d: %.300s, and not %d %s", answer.Code, answer.Body, status, word)
	}
	return problem
}

const create = `{"capability":"artifacts.write","namespace":"gamma","objects":[],"ttl_seconds":60}`

func TestWhoIsNobodyGetsNothing(t *testing.T) {
	made, store := newServer(t)
	for _, test := range []struct {
		name, who, word string
		status          int
	}{
		{"no token", "", writesession.ProblemUnauthorized, http.StatusUnauthorized},
		{"a token that nobody knows", "stranger", writesession.ProblemUnauthorized, http.StatusUnauthorized},
		{"a token without the right", "rotator", writesession.ProblemForbidden, http.StatusForbidden},
		{"a secrets engine that is away", "unlucky", writesession.ProblemInternal, http.StatusServiceUnavailable},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, path := range []string{"write-sessions", "missing", "collect", "write-sessions/" + strings.Repeat("0", 32) + "/complete"} {
				wantProblem(t, ask(t, made.Handler(), test.who, http.MethodPost, base+path, create), test.status, test.word)
			}
			// Another site is not told from this one by who may ask for neither.
			wantProblem(t, ask(t, made.Handler(), test.who, http.MethodPost, "/v1/sites/other/missing", "{}"), test.status, test.word)
		})
	}
	answer := ask(t, made.Handler(), "", http.MethodPost, base+"missing", "{}", func(r *http.Request) {
		r.Header["Authorization"] = []string{"Bearer operator", "Bearer operator"}
	})
	wantProblem(t, answer, http.StatusUnauthorized, writesession.ProblemUnauthorized)
	if counts := store.Counts(); len(counts) > 0 {
		t.Errorf("the store was asked: %v", counts)
	}
}

func TestAJobSeesItsOwnSessionsAndCollectsNothing(t *testing.T) {
	made, _ := newServer(t)
	var session writesession.Session
	answer := ask(t, made.Handler(), "job-a", http.MethodPost, base+"write-sessions", create)
	if err := json.Unmarshal(answer.Body.Bytes(), &session); err != nil || answer.Code != http.StatusCreated || session.Owner != "job/job-a" {
		t.Fatalf("status %d: %s", answer.Code, answer.Body)
	}
	path := base + "write-sessions/" + session.ID
	wantProblem(t, ask(t, made.Handler(), "job-b", http.MethodGet, path, ""), http.StatusForbidden, writesession.ProblemForbidden)
	wantProblem(t, ask(t, made.Handler(), "job-b", http.MethodDelete, path, ""), http.StatusForbidden, writesession.ProblemForbidden)
	wantProblem(t, ask(t, made.Handler(), "job-b", http.MethodPost, path+"/complete", "{}"), http.StatusForbidden, writesession.ProblemForbidden)
	wantProblem(t, ask(t, made.Handler(), "job-a", http.MethodPost, base+"collect", "{}"), http.StatusForbidden, writesession.ProblemForbidden)
	for who, want := range map[string]int{"job-a": 1, "job-b": 0, "operator": 1} {
		var list struct{ Sessions []writesession.Session }
		listed := ask(t, made.Handler(), who, http.MethodGet, base+"write-sessions", "")
		if err := json.Unmarshal(listed.Body.Bytes(), &list); err != nil || len(list.Sessions) != want {
			t.Errorf("%s sees %s, %v", who, listed.Body, err)
		}
	}
	if got := ask(t, made.Handler(), "operator", http.MethodDelete, path, ""); got.Code != http.StatusNoContent {
		t.Errorf("an operator may end it: status %d", got.Code)
	}
}

func TestRequestsThatCannotBeAreRefused(t *testing.T) {
	made, store := newServer(t)
	const id = "write-sessions/0123456789abcdef0123456789abcdef"
	object := func(text string) string {
		return fmt.Sprintf(`{"capability":"artifacts.write","namespace":"gamma","objects":[%s],"ttl_seconds":60}`, text)
	}
	good := strings.Repeat("a", 64)
	pack := func(text string) string { return `{"packs":[` + text + `]}` }
	for _, test := range []struct {
		name, path, body, word string
		status                 int
	}{
		{"no body", "write-sessions", "", "", 400},
		{"no JSON", "write-sessions", "hello", "", 400},
		{"an unknown field", "write-sessions", `{"capability":"artifacts.write","more":1}`, "", 400},
		{"something behind the body", "write-sessions", create + "{}", "", 400},
		{"another capability", "write-sessions", strings.Replace(create, "artifacts.write", "all", 1), "", 400},
		{"another namespace", "write-sessions", strings.Replace(create, "gamma", "delta", 1), writesession.ProblemForbidden, 403},
		{"a namespace that climbs", "write-sessions", strings.Replace(create, "gamma", "gamma/../delta", 1), writesession.ProblemForbidden, 403},
		{"a life that is too short", "write-sessions", strings.Replace(create, ":60", ":59", 1), "", 400},
		{"a life that is too long", "write-sessions", strings.Replace(create, ":60", ":604801", 1), "", 400},
		{"a life that does not fit", "write-sessions", strings.Replace(create, ":60", ":9223372036854775807", 1), "", 400},
		{"a digest that climbs", "write-sessions", object(`{"name":"x","sha256":"../` + good[3:] + `","size":1}`), "", 400},
		{"a digest in capitals", "write-sessions", object(`{"name":"x","sha256":"` + strings.ToUpper(good) + `","size":1}`), "", 400},
		{"an empty object", "write-sessions", object(`{"name":"x","sha256":"` + good + `","size":0}`), "", 400},
		{"a huge object", "write-sessions", object(`{"name":"x","sha256":"` + good + `","size":33554433}`), "", 400},
		{"an object without a name", "write-sessions", object(`{"name":"","sha256":"` + good + `","size":1}`), "", 400},
		{"an object that speaks to terminals", "write-sessions", object(`{"name":"\u001b[2J","sha256":"` + good + `","size":1}`), "", 400},
		{"an object twice", "write-sessions", object(`{"name":"x","sha256":"` + good + `","size":1},{"name":"y","sha256":"` + good + `","size":1}`), "", 400},
		{"a session that is none", "write-sessions/..%2f..%2fblobs/complete", "{}", writesession.ProblemNotFound, 404},
		{"a session that nobody began", id + "/complete", "{}", writesession.ProblemNotFound, 404},
		{"a field twice", id + "/complete", `{"packs":[],"packs":[]}`, "", 400},
		{"packs that are no list", id + "/complete", `{"packs":{}}`, "", 400},
		{"a pack with a gap", id + "/complete", pack(`{"digest":"sha256:` + good + `","size":9,"chunks":[{"digest":"sha256:` + good + `","size":1,"offset":1,"length":8}]}`), "", 400},
		{"a pack with a tail", id + "/complete", pack(`{"digest":"sha256:` + good + `","size":9,"chunks":[{"digest":"sha256:` + good + `","size":1,"offset":0,"length":8}]}`), "", 400},
		{"a chunk that is too big", id + "/complete", pack(`{"digest":"sha256:` + good + `","size":9,"chunks":[{"digest":"sha256:` + good + `","size":524289,"offset":0,"length":9}]}`), "", 400},
		{"a manifest that does not add up", id + "/complete", `{"blobs":[{"version":1,"digest":"sha256:` + good + `","size":5,"chunks":[]}]}`, "", 400},
		{"a name that climbs", id + "/complete", `{"names":[{"artifact":"../other","kind":"file","digest":"sha256:` + good + `","size":1,"platform":false,"created":"2030-01-01T00:00:00Z","blobs":["sha256:` + good + `"]}]}`, "", 400},
		{"a name of the platform", id + "/complete", `{"names":[{"artifact":"nomad","kind":"file","digest":"sha256:` + good + `","size":1,"platform":true,"created":"2030-01-01T00:00:00Z","blobs":["sha256:` + good + `"]}]}`, "", 400},
		{"a digest that is none", "missing", `{"chunks":["sha256:xyz"]}`, "", 400},
		{"something kept that cannot be", "collect", `{"keep":[{"artifact":"../x","digest":"sha256:` + good + `","reason":""}],"dry_run":true}`, "", 400},
	} {
		t.Run(test.name, func(t *testing.T) {
			word := test.word
			if word == "" {
				word = writesession.ProblemBadRequest
			}
			wantProblem(t, ask(t, made.Handler(), "operator", http.MethodPost, base+test.path, test.body), test.status, word)
		})
	}
	if keys := store.Keys(); len(keys) > 0 {
		t.Errorf("something was written: %q", keys)
	}
	for _, key := range []string{"", "short", strings.Repeat("k", 129), "with a space"} {
		answer := ask(t, made.Handler(), "operator", http.MethodPost, base+"write-sessions", create, func(r *http.Request) {
			r.Header.Set(writesession.IdempotencyHeader, key)
		})
		wantProblem(t, answer, http.StatusBadRequest, writesession.ProblemBadRequest)
	}
}

func TestABodyMayBeCompressedAndMayNotExplode(t *testing.T) {
	made, _ := newServer(t)
	pack := func(plain string) string {
		var out bytes.Buffer
		encoder, err := zstd.NewWriter(&out)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(encoder, strings.NewReader(plain))
		if err := errors.Join(err, encoder.Close()); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	coded := func(coding string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set("Content-Encoding", coding) }
	}
	answer := ask(t, made.Handler(), "operator", http.MethodPost, base+"missing", pack("{}"), coded("zstd"))
	if answer.Code != http.StatusOK || answer.Header().Get("Accept-Encoding") != "zstd" {
		t.Errorf("status %d: %s, %v", answer.Code, answer.Body, answer.Header())
	}
	huge := pack(strings.Repeat(" ", writesession.MaxBodyBytes+1) + "{}")
	wantProblem(t, ask(t, made.Handler(), "operator", http.MethodPost, base+"missing", huge, coded("zstd")),
		http.StatusRequestEntityTooLarge, writesession.ProblemTooLarge)
	wantProblem(t, ask(t, made.Handler(), "operator", http.MethodPost, base+"missing", "{}", coded("gzip")),
		http.StatusUnsupportedMediaType, writesession.ProblemBadRequest)
	wantProblem(t, ask(t, made.Handler(), "operator", http.MethodPost, base+"missing", "{}", coded("zstd")),
		http.StatusBadRequest, writesession.ProblemBadRequest)
	long := strings.Repeat(" ", 5<<20) + create
	wantProblem(t, ask(t, made.Handler(), "operator", http.MethodPost, base+"write-sessions", long), http.StatusRequestEntityTooLarge, writesession.ProblemTooLarge)
}

func TestWhatNoRouteIsForIsAProblemToo(t *testing.T) {
	made, _ := newServer(t)
	for path, status := range map[string]int{
		"/": 404, "/v1": 404, "/v2/": 404, "/v1/sites/gamma/": 404, "//v1/sites/gamma/artifacts": 404, "/v1/sites/gamma/../gamma/artifacts": 404,
		"/v1/sites/other/artifacts": 404, "/v1/sites/gamma%2f/artifacts": 404, "/v1/sites/gamma/write-sessions/xyz": 404,
		"/v1/sites/gamma/missing": 405, "/v1/sites/gamma/collect": 405,
	} {
		word := writesession.ProblemNotFound
		if status == http.StatusMethodNotAllowed {
			word = writesession.ProblemBadRequest
		}
		if answer := ask(t, made.Handler(), "operator", http.MethodGet, path, ""); true {
			wantProblem(t, answer, status, word)
			if status == http.StatusMethodNotAllowed && answer.Header().Get("Allow") == "" {
				t.Errorf("%s: no Allow", path)
			}
		}
	}
}

func TestTheDocumentSaysWhatIsServed(t *testing.T) {
	made, _ := newServer(t)
	answer := ask(t, made.Handler(), "", http.MethodGet, "/openapi.json", "")
	var document struct {
		OpenAPI string
		Paths   map[string]map[string]struct {
			OperationID string
			RequestBody struct {
				Content map[string]struct {
					Schema struct {
						Ref string `json:"$ref"`
					}
				}
			}
		}
		Components struct {
			Schemas map[string]struct{ Properties map[string]any }
		}
	}
	if err := json.Unmarshal(answer.Body.Bytes(), &document); err != nil || !strings.HasPrefix(document.OpenAPI, "3.") {
		t.Fatalf("%v: %.100s", err, answer.Body)
	}
	fill := strings.NewReplacer("{site}", "gamma", "{id}", strings.Repeat("0", 32))
	for path, operations := range document.Paths {
		for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE"} {
			_, documented := operations[strings.ToLower(method)]
			code := ask(t, made.Handler(), "", method, fill.Replace(path), "").Code
			if served := code != http.StatusNotFound && code != http.StatusMethodNotAllowed; served != documented {
				t.Errorf("%s %s: documented %v, served %v", method, path, documented, served)
			}
		}
	}
	for _, value := range []any{
		writesession.CreateRequest{}, writesession.AddRequest{}, writesession.Object{}, writesession.ObjectState{}, writesession.Put{},
		writesession.Session{}, writesession.Result{}, writesession.CompleteRequest{}, writesession.Pack{}, writesession.PackedChunk{},
		writesession.Artifact{}, writesession.MissingRequest{}, writesession.MissingResponse{}, writesession.Listing{}, writesession.Listed{},
		writesession.CollectRequest{}, writesession.Collected{}, writesession.Problem{},
	} {
		name := reflect.TypeOf(value).Name()
		want := fieldsOf(reflect.TypeOf(value))
		var got []string
		for field := range document.Components.Schemas[name].Properties {
			got = append(got, field)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: documented %q, and it has %q", name, got, want)
		}
	}
}

// fieldsOf are the JSON names of a struct's fields.
func fieldsOf(kind reflect.Type) []string {
	var out []string
	for i := range kind.NumField() {
		field := kind.Field(i)
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		switch {
		case name == "-":
		case field.Anonymous:
			out = append(out, fieldsOf(field.Type)...)
		default:
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func TestHugeHeadersAndSlowClientsAreCutOff(t *testing.T) {
	made, _ := newServer(t)
	web := made.HTTP()
	web.ReadHeaderTimeout = 100 * time.Millisecond // the real one is a matter of patience only
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = web.Serve(listener) }()
	t.Cleanup(func() { _ = web.Close() })
	talk := func(text string) string {
		connection, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer connection.Close()
		_ = connection.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(connection, text)
		line, err := bufio.NewReader(connection).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			t.Errorf("neither an answer nor the end: %v", err)
		}
		return line
	}
	if got := talk("GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("x", 32<<10) + "\r\n\r\n"); !strings.Contains(got, "431") {
		t.Errorf("a huge header: %q", got)
	}
	if got := talk("GET /healthz HTTP/1.1\r\nHost: x\r\n"); strings.Contains(got, "200") {
		t.Errorf("half a header: %q", got)
	}
	if got := talk("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"); !strings.Contains(got, "200") {
		t.Errorf("the next one: %q", got)
	}
}

func TestNoSignedURLIsStoredOrLogged(t *testing.T) {
	var log bytes.Buffer
	store := storetest.New(t, storetest.Options{Enforces: true})
	made, err := server.New(server.Options{
		Site: "gamma", Bucket: store, Authorizer: byName{}, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	body := `{"capability":"artifacts.write","namespace":"gamma","objects":[{"name":"x","sha256":"` + strings.Repeat("a", 64) + `","size":1}],"ttl_seconds":60}`
	answer := ask(t, made.Handler(), "operator", http.MethodPost, base+"write-sessions", body)
	if !strings.Contains(answer.Body.String(), "X-Amz-Signature") || answer.Header().Get("Cache-Control") != "no-store" {
		t.Errorf("no URL, or one that may be kept: %s, %v", answer.Body, answer.Header())
	}
	for _, key := range store.Keys() {
		if bytes.Contains(store.Content(key), []byte("X-Amz")) || bytes.Contains(store.Content(key), []byte("operator\"}")) {
			t.Errorf("%s holds %s", key, store.Content(key))
		}
	}
	metrics := ask(t, made.Handler(), "", http.MethodGet, "/metrics", "")
	for what, text := range map[string]string{"the log": log.String(), "the metrics": metrics.Body.String()} {
		if strings.Contains(text, "X-Amz") {
			t.Errorf("%s: %s", what, text)
		}
	}
	if !strings.Contains(metrics.Body.String(), `site_object_storage_requests_total{code="201",route="POST /v1/sites/{site}/write-sessions"} 1`) {
		t.Errorf("metrics: %.2000s", metrics.Body)
	}
}

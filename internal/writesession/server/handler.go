package server

import (
	_ "embed"
	"io"
	"net/http"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
)

const (
	maxHeaderBytes = 8 << 10
	// smallBody bounds requests that list no chunks.
	smallBody = 4 << 20
	// completeLimit is how long proving and publishing may take.
	completeLimit = 30 * time.Minute
	maxBearer     = 4 << 10
)

//go:embed openapi.json
var openAPI []byte

var idPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

// answer is what a route gives; body nil with 204.
type answer struct {
	status int
	body   any
}

type route func(w http.ResponseWriter, r *http.Request, who Identity) (answer, error)

// Handler serves the API.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	const site = "/v1/sites/{site}/"
	for pattern, serve := range map[string]route{
		"POST " + site + "write-sessions":               s.create,
		"GET " + site + "write-sessions":                s.listSessions,
		"GET " + site + "write-sessions/{id}":           s.show,
		"DELETE " + site + "write-sessions/{id}":        s.abort,
		"POST " + site + "write-sessions/{id}/objects":  s.add,
		"POST " + site + "write-sessions/{id}/complete": s.complete,
		"POST " + site + "missing":                      s.missing,
		"GET " + site + "artifacts":                     s.listArtifacts,
		"POST " + site + "collect":                      s.collect,
	} {
		mux.Handle(pattern, s.guarded(serve))
	}
	mux.HandleFunc("GET /healthz", s.health)
	mux.Handle("GET /metrics", s.metrics.handler)
	mux.HandleFunc("GET /openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(openAPI)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.dispatch(mux, w, r) })
}

// dispatch answers what no route is for by a problem, and redirects nobody.
func (s *Server) dispatch(mux *http.ServeMux, w http.ResponseWriter, r *http.Request) {
	counted := &statusWriter{ResponseWriter: w}
	start := time.Now()
	pattern := "none"
	defer func() { s.metrics.observe(pattern, counted.status, time.Since(start)) }()
	if r.URL.Path != path.Clean(r.URL.Path) {
		writeProblem(counted, notFound())
		return
	}
	handler, found := mux.Handler(r)
	if found != "" {
		pattern = found
		mux.ServeHTTP(counted, r)
		return
	}
	probe := &discarded{header: http.Header{}}
	handler.ServeHTTP(probe, r)
	if probe.status == http.StatusMethodNotAllowed {
		counted.Header().Set("Allow", probe.header.Get("Allow"))
		writeProblem(counted, refuse(probe.status, writesession.ProblemBadRequest, "%.20q is not allowed here", r.Method))
		return
	}
	writeProblem(counted, notFound())
}

func notFound() *problemError {
	return refuse(http.StatusNotFound, writesession.ProblemNotFound, "there is nothing of that name")
}

// guarded asks who it is before anything else, and turns errors into problems.
func (s *Server) guarded(serve route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reply, err := s.serve(serve, w, r)
		if err == nil {
			if reply.body == nil {
				w.WriteHeader(reply.status)
				return
			}
			writeJSON(w, reply.status, "application/json", reply.body)
			return
		}
		s.noteStore(err)
		problem := problemOf(err)
		if problem.status >= http.StatusInternalServerError {
			s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "status", problem.status, "error", err)
		}
		writeProblem(w, problem)
	})
}

func (s *Server) serve(serve route, w http.ResponseWriter, r *http.Request) (answer, error) {
	who, err := s.whoIs(r)
	if err != nil {
		return answer{}, err
	}
	if r.PathValue("site") != s.site {
		return answer{}, refuse(http.StatusNotFound, writesession.ProblemNotFound, "this service is of site %q", s.site)
	}
	if id := r.PathValue("id"); id != "" && !idPattern.MatchString(id) {
		return answer{}, notFound()
	}
	return serve(w, r, who)
}

func (s *Server) whoIs(r *http.Request) (Identity, error) {
	headers := r.Header.Values("Authorization")
	if len(headers) != 1 {
		return Identity{}, &DeniedError{Status: http.StatusUnauthorized, Reason: "want one Authorization header: Bearer and a token"}
	}
	scheme, token, _ := strings.Cut(headers[0], " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" || len(token) > maxBearer {
		return Identity{}, &DeniedError{Status: http.StatusUnauthorized, Reason: "want one Authorization header: Bearer and a token"}
	}
	who, err := s.auth.Authorize(r.Context(), secret.New(token))
	if err == nil {
		return who, nil
	}
	problem := problemOf(err)
	if problem.word == writesession.ProblemInternal { // nobody can tell now
		s.log.Warn("cannot tell who sends a request", "error", err)
		problem = refuse(http.StatusServiceUnavailable, writesession.ProblemInternal,
			"cannot find out now whose token this is: %s", err)
		problem.retryAfter = defaultRetryAfter
	}
	return Identity{}, problem
}

// health is 200 while the process works: to restart it mends no bucket.
func (s *Server) health(w http.ResponseWriter, r *http.Request) {
	s.lookAgain(r.Context())
	body := struct {
		Status   string `json:"status"`
		Site     string `json:"site"`
		Store    string `json:"store"`
		Enforces bool   `json:"store_enforces_hashes"`
	}{Status: "ok", Site: s.site, Store: "ok", Enforces: s.enforces()}
	if failure := s.storeFailure.Load(); failure != nil {
		body.Status, body.Store = "degraded", *failure
	}
	writeJSON(w, http.StatusOK, "application/json", body)
}

// statusWriter remembers what was answered.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (s *statusWriter) WriteHeader(status int) {
	if s.status == 0 {
		s.status = status
	}
	s.ResponseWriter.WriteHeader(status)
}

func (s *statusWriter) Write(content []byte) (int, error) {
	if s.status == 0 {
		s.status = http.StatusOK
	}
	return s.ResponseWriter.Write(content)
}

// Unwrap lets http.ResponseController reach the connection.
func (s *statusWriter) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// discarded learns what the router would have said.
type discarded struct {
	header http.Header
	status int
}

func (d *discarded) Header() http.Header { return d.header }

func (d *discarded) Write(content []byte) (int, error) { return io.Discard.Write(content) }

func (d *discarded) WriteHeader(status int) { d.status = status }

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/writesession"
)

// maxObjectProblems is how many of them an answer names.
const maxObjectProblems = 100

// defaultRetryAfter is for a store that does not say when it will be back.
const defaultRetryAfter = 2 * time.Second

// problemError is an answer that refuses a request.
type problemError struct {
	status     int
	word       string
	detail     string
	objects    []writesession.ObjectProblem
	retryAfter time.Duration
}

func (e *problemError) Error() string { return e.detail }

func refuse(status int, word, format string, args ...any) *problemError {
	return &problemError{status: status, word: word, detail: fmt.Sprintf(format, args...)}
}

func badRequest(format string, args ...any) *problemError {
	return refuse(http.StatusBadRequest, writesession.ProblemBadRequest, format, args...)
}

func unproven(objects []writesession.ObjectProblem) *problemError {
	e := refuse(http.StatusUnprocessableEntity, writesession.ProblemUnproven,
		"nothing was published: %d of the request's parts are missing or wrong", len(objects))
	e.objects = objects[:min(len(objects), maxObjectProblems)]
	return e
}

// problemOf turns any error into an answer. What it does not know is no business
// of the client's.
func problemOf(err error) *problemError {
	var problem *problemError
	var unavailable *writesession.UnavailableError
	var refused *writesession.DeniedError
	var denied *DeniedError
	var long *http.MaxBytesError
	switch {
	case errors.As(err, &problem):
		return problem
	case errors.As(err, &denied):
		word := writesession.ProblemForbidden
		if denied.Status == http.StatusUnauthorized {
			word = writesession.ProblemUnauthorized
		}
		return refuse(denied.Status, word, "%s", denied.Reason)
	case errors.As(err, &long):
		return refuse(http.StatusRequestEntityTooLarge, writesession.ProblemTooLarge, "the body is longer than %d bytes", long.Limit)
	case errors.As(err, &unavailable):
		out := refuse(http.StatusServiceUnavailable, writesession.ProblemStore, "%s", err)
		out.retryAfter = max(unavailable.RetryAfter, defaultRetryAfter)
		return out
	case errors.As(err, &refused):
		return refuse(http.StatusBadGateway, writesession.ProblemStoreDenied, "%s (%s)", err, plan.HintOf(err))
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		out := refuse(http.StatusServiceUnavailable, writesession.ProblemStore, "the request ended before its answer")
		out.retryAfter = defaultRetryAfter
		return out
	default:
		return refuse(http.StatusInternalServerError, writesession.ProblemInternal, "an error of the service; its log says more")
	}
}

func writeProblem(w http.ResponseWriter, problem *problemError) {
	if problem.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(problem.retryAfter.Seconds()))))
	}
	if problem.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	writeJSON(w, problem.status, "application/problem+json", writesession.Problem{
		Type: writesession.ProblemPrefix + problem.word, Title: http.StatusText(problem.status),
		Status: problem.status, Detail: problem.detail, Objects: problem.objects,
	})
}

func writeJSON(w http.ResponseWriter, status int, kind string, body any) {
	encoded, err := json.Marshal(body)
	if err != nil { // of our own types: cannot be
		status, encoded = http.StatusInternalServerError, []byte("{}")
	}
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Accept-Encoding", zstdCoding)
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(encoded)
}

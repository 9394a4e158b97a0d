package client

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/writesession"
)

// rerun is what to do where what has arrived is kept.
const rerun = "run the same command again: what has arrived is kept; or send with --via=ssh"

// otherVersion is what to do where the two do not understand each other.
const otherVersion = "site and object-storage-service may be of different versions: " +
	"site deploy --only object-storage-service; meanwhile send with --via=ssh"

// strange is an answer of the service that cannot be.
func strange(what, format string, args ...any) error {
	return plan.WithHint(fmt.Errorf("%s: object-storage-service: "+format, append([]any{what}, args...)...), otherVersion)
}

// ProblemError is a refusal of the service.
type ProblemError struct {
	// What was asked.
	What string
	// Type is the word behind writesession.ProblemPrefix; empty where whoever
	// answered is not the service.
	Type    string
	Status  int
	Title   string
	Detail  string
	Objects []writesession.ObjectProblem
}

func (e *ProblemError) Error() string {
	var out strings.Builder
	out.WriteString(e.What + ": object-storage-service: ")
	switch {
	case e.Title != "" && e.Detail != "" && e.Title != e.Detail:
		out.WriteString(e.Title + ": " + e.Detail)
	case e.Detail != "":
		out.WriteString(e.Detail)
	case e.Title != "":
		out.WriteString(e.Title)
	default:
		fmt.Fprintf(&out, "status %d", e.Status)
	}
	const most = 5
	for i, object := range e.Objects {
		if i == most {
			fmt.Fprintf(&out, "; and %d more", len(e.Objects)-most)
			break
		}
		out.WriteString("; " + object.Name + ": " + object.Detail)
	}
	return out.String()
}

// Hint implements plan.Hinter.
func (e *ProblemError) Hint() string {
	switch e.Type {
	case writesession.ProblemUnauthorized:
		return "the login may have run out: run the same command again; site operators list says who may"
	case writesession.ProblemForbidden:
		return "only operators of this site may write to its object store; an operator who may is asked to do it: site operators list"
	case writesession.ProblemStore:
		return "the object store does not answer the service; " + rerun
	case writesession.ProblemStoreDenied:
		return "the object store refuses the service's keys: `site provider doctor` where a provider makes them, else bring good ones with `site secrets import`; meanwhile send with --via=ssh"
	case writesession.ProblemUnproven, writesession.ProblemNotOpen:
		return rerun
	case writesession.ProblemTooLarge:
		return "send it with --via=ssh"
	case writesession.ProblemBadRequest, writesession.ProblemNotFound, writesession.ProblemConflict:
		return otherVersion
	default:
		return "see site logs object-storage-service; meanwhile send with --via=ssh"
	}
}

// passing reports whether asking again may help.
func (e *ProblemError) passing() bool {
	switch e.Status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	case http.StatusBadGateway, http.StatusInternalServerError:
		// A proxy's words, or one bad moment; what the service says of its keys stays true.
		return e.Type != writesession.ProblemStoreDenied
	default:
		return false
	}
}

// problemOf reads an error answer, whoever gave it.
func problemOf(what string, status int, body []byte) *ProblemError {
	out := &ProblemError{What: what, Status: status, Title: http.StatusText(status)}
	var problem writesession.Problem
	if json.Unmarshal(body, &problem) != nil {
		return out
	}
	word, ours := strings.CutPrefix(problem.Type, writesession.ProblemPrefix)
	if !ours {
		return out
	}
	out.Type, out.Title, out.Detail, out.Objects = word, problem.Title, problem.Detail, problem.Objects
	return out
}

// UnreachableError says that the service did not answer.
type UnreachableError struct {
	What string
	Err  error
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("%s: object-storage-service does not answer: %v", e.What, e.Err)
}

// Unwrap gives the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *UnreachableError) Hint() string {
	return "see site status and site logs object-storage-service; " + rerun
}

// UploadError says that the object store did not take an upload. It never holds
// the address, which is signed.
type UploadError struct {
	Pack blob.Digest
	// Host is the object store's.
	Host string
	// Status and Code are the store's answer; 0 and empty where there was none.
	Status int
	Code   string
	Err    error
}

func (e *UploadError) Error() string {
	out := fmt.Sprintf("upload pack %.12s to %s", e.Pack.Hex(), e.Host)
	switch {
	case e.Err != nil:
		return fmt.Sprintf("%s: %v", out, e.Err)
	case e.Code != "":
		return fmt.Sprintf("%s: status %d, %s", out, e.Status, e.Code)
	default:
		return fmt.Sprintf("%s: status %d", out, e.Status)
	}
}

// Unwrap gives the cause.
func (e *UploadError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *UploadError) Hint() string {
	switch {
	case e.Code == "RequestTimeTooSkewed":
		return "the clock of the host that runs object-storage-service is wrong: set it, then run the same command again"
	case e.Status == http.StatusForbidden:
		return "the object store refuses what the service has signed: site provider doctor; meanwhile send with --via=ssh"
	case e.Status == 0:
		return "this computer must reach " + e.Host + " directly; " + rerun
	default:
		return rerun
	}
}

// passing reports whether another attempt may help. A checksum that differs is a
// byte that was changed on the way.
func (e *UploadError) passing() bool {
	switch e.Status {
	case 0, http.StatusTooManyRequests, http.StatusRequestTimeout, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	case http.StatusUnauthorized, http.StatusForbidden:
		// A key that was just made, or just retired: the next address has another.
		return e.Code != "RequestTimeTooSkewed"
	default:
		return e.Code == "BadDigest" || e.Code == "XAmzContentSHA256Mismatch" || e.Code == "IncompleteBody" || e.Code == "RequestTimeout"
	}
}

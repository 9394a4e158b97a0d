package serve

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/sitehost/pull"
)

// maxManifest is the usual bound of registries for an image manifest.
const maxManifest = 4 << 20

// The grammar of every path that is served. A segment never begins or ends with
// a dot and never holds two in a row, so that no path can climb.
const (
	segment = `[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*`
	named   = `(` + segment + `)/(` + segment + `)`
)

var (
	plainPath = regexp.MustCompile(`^/artifacts/` + named + `@sha256:([0-9a-f]{64})$`)
	ociPath   = regexp.MustCompile(`^/v2/` + named + `/(manifests|blobs)/sha256:([0-9a-f]{64})$`)
	tagPath   = regexp.MustCompile(`^/v2/` + named + `/manifests/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	tagsPath  = regexp.MustCompile(`^/v2/` + named + `/tags/list$`)
)

// maxPath bounds what the grammar is matched against.
const maxPath = 1024

// handler answers both dialects.
type handler struct {
	store    reader
	verifier *verifier
	metrics  *metrics
	log      *slog.Logger
	// operators is the path of a JWKS file, or empty.
	operators string
	// puller gives what brings the artifacts that lack; nil: nothing does.
	puller func() (Puller, error)
	// refresh has the keys of the object store read anew; nil: there are none.
	refresh func(context.Context) error
}

// ServeHTTP implements http.Handler.
func (h *handler) ServeHTTP(writer http.ResponseWriter, request *http.Request) {
	counting := &countingWriter{ResponseWriter: writer, status: http.StatusOK}
	dialect := h.answer(counting, request)
	h.metrics.observe(dialect, counting.status, counting.written)
}

// answer returns the dialect for the metrics.
func (h *handler) answer(writer http.ResponseWriter, request *http.Request) string {
	header := writer.Header()
	header.Set("X-Content-Type-Options", "nosniff")
	if !loopbackHost(request.Host) {
		// A page in a browser that rebinds its own name to loopback sends that name.
		http.Error(writer, "this server answers to loopback names only", http.StatusMisdirectedRequest)
		return "refused"
	}
	if request.Method == http.MethodPost && request.URL.Path == RefreshPath && h.refresh != nil {
		h.refreshKeys(writer, request)
		return "refresh"
	}
	if request.Method != http.MethodGet && request.Method != http.MethodHead {
		header.Set("Allow", "GET, HEAD")
		http.Error(writer, "only GET and HEAD are served", http.StatusMethodNotAllowed)
		return "refused"
	}
	path := plainText(request.URL.EscapedPath())
	switch path {
	case "/healthz":
		h.health(writer)
		return "healthz"
	case "/metrics":
		h.metrics.handler.ServeHTTP(writer, request)
		return "metrics"
	}
	if h.operators != "" {
		switch path {
		case "/operators.jwks":
			h.keys(writer, h.operators)
			return "operators"
		case rotatorsPath:
			h.keys(writer, filepath.Join(filepath.Dir(h.operators), rotatorsPath))
			return "operators"
		}
	}
	if match := plainPath.FindStringSubmatch(path); match != nil {
		h.file(writer, request, match[1], match[2], match[3])
		return "file"
	}
	if path == "/v2" || strings.HasPrefix(path, "/v2/") {
		header.Set("Docker-Distribution-Api-Version", "registry/2.0")
		h.oci(writer, request, path)
		return "oci"
	}
	http.Error(writer, "not found", http.StatusNotFound)
	return "unknown"
}

// RefreshPath is where a POST has the keys of the object store read anew. Anybody on
// the host may: it changes nothing, and asks for them once a second at most.
const RefreshPath = "/object-store/refresh"

func (h *handler) refreshKeys(writer http.ResponseWriter, request *http.Request) {
	if err := h.refresh(request.Context()); err != nil {
		http.Error(writer, "the keys of the object store cannot be read: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	writer.WriteHeader(http.StatusNoContent)
}

// plainText undoes the two escapes that correct clients make for a digest's
// marks. Any other stays, and so matches no path: the grammar has no percent.
func plainText(escaped string) string {
	if len(escaped) > maxPath {
		return ""
	}
	return strings.NewReplacer("%3A", ":", "%3a", ":", "%40", "@").Replace(escaped)
}

func loopbackHost(hostPort string) bool {
	host := hostPort
	if name, _, err := net.SplitHostPort(hostPort); err == nil {
		host = name
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	address, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	return err == nil && address.Unmap().IsLoopback()
}

func (h *handler) health(writer http.ResponseWriter) {
	folder, err := h.store.open("blobs")
	// A host that has received nothing yet has a store without blobs.
	if err != nil && !isMissing(err) {
		h.log.Error("the store cannot be read", "error", err)
		http.Error(writer, "the store cannot be read", http.StatusServiceUnavailable)
		return
	}
	if err == nil {
		_ = folder.Close()
	}
	writer.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(writer, "ok\n")
}

// maxKeys bounds the JWKS file.
const maxKeys = 1 << 20

// rotatorsPath is where the keys of operators are who only rotate secrets, and
// the name of their file, beside that of the others.
const rotatorsPath = "/rotators.jwks"

// keys serves operators' public keys (RFC 7517, section 8.5.2 for the type).
func (h *handler) keys(writer http.ResponseWriter, path string) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		h.log.Error("the operators' keys cannot be read", "error", err)
		http.Error(writer, "there are no operators' keys", http.StatusNotFound)
		return
	}
	defer func() { _ = file.Close() }()
	writer.Header().Set("Content-Type", "application/jwk-set+json")
	_, _ = io.Copy(writer, io.LimitReader(file, maxKeys))
}

// file answers the plain dialect.
func (h *handler) file(writer http.ResponseWriter, request *http.Request, site, artifact, hex string) {
	name, err := h.store.name(site, artifact, hex)
	if err == nil && name.Kind != blob.KindFile {
		err = fs.ErrNotExist
	}
	var content *os.File
	if err == nil {
		content, _, err = h.verifier.open(request.Context(), hex)
	}
	if isMissing(err) {
		if err = h.pullFile(request.Context(), writer, site, artifact, hex); err == nil {
			content, _, err = h.verifier.open(request.Context(), hex)
		}
	}
	if err != nil {
		status := h.report(writer, request, hex, err)
		http.Error(writer, explain(status, err), status)
		return
	}
	defer func() { _ = content.Close() }()
	immutable(writer.Header(), hex, "application/octet-stream")
	http.ServeContent(writer, request, "", time.Time{}, content)
}

// oci answers the pull half of the OCI distribution API, by digest only.
func (h *handler) oci(writer http.ResponseWriter, request *http.Request, path string) {
	if path == "/v2/" || path == "/v2" {
		writer.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(writer, "{}")
		return
	}
	if tagPath.MatchString(path) {
		ociError(writer, http.StatusNotFound, "MANIFEST_UNKNOWN", "images are served by digest only, never by tag")
		return
	}
	match := ociPath.FindStringSubmatch(path)
	if match == nil {
		code, message := "UNSUPPORTED", "no such operation: only manifests and blobs by sha256 digest are served"
		if tagsPath.MatchString(path) {
			code, message = "NAME_UNKNOWN", "images are served by digest only: there are no tags"
		}
		ociError(writer, http.StatusNotFound, code, message)
		return
	}
	site, artifact, hex := match[1], match[2], match[4]
	unknown := "BLOB_UNKNOWN"
	if match[3] == "manifests" {
		unknown = "MANIFEST_UNKNOWN"
	}
	content, size, err := h.imagePart(writer, request, match)
	if err != nil {
		status := h.report(writer, request, hex, err)
		if status != http.StatusNotFound {
			unknown = "UNKNOWN"
		}
		if status == http.StatusServiceUnavailable {
			unknown = "UNAVAILABLE"
		}
		ociError(writer, status, unknown, fmt.Sprintf("%s/%s@sha256:%s: %s", site, artifact, hex, explain(status, err)))
		return
	}
	defer func() { _ = content.Close() }()
	writer.Header().Set("Docker-Content-Digest", "sha256:"+hex)
	if match[3] == "blobs" {
		immutable(writer.Header(), hex, "application/octet-stream")
		http.ServeContent(writer, request, "", time.Time{}, content)
		return
	}
	text, mediaType, err := manifest(content, size)
	if err != nil {
		writer.Header().Del("Docker-Content-Digest")
		ociError(writer, http.StatusNotFound, unknown, err.Error())
		return
	}
	immutable(writer.Header(), hex, mediaType)
	http.ServeContent(writer, request, "", time.Time{}, bytes.NewReader(text))
}

// imagePart opens what a path names, proved.
func (h *handler) imagePart(writer http.ResponseWriter, request *http.Request, match []string) (*os.File, int64, error) {
	site, artifact, hex := match[1], match[2], match[4]
	ctx := request.Context()
	listed, err := h.store.lists(site, artifact, hex)
	if err == nil && !listed {
		err = fs.ErrNotExist
	}
	if err == nil {
		content, size, err := h.verifier.open(ctx, hex)
		if !isMissing(err) {
			return content, size, err
		}
	}
	if err != nil && !isMissing(err) {
		return nil, 0, err
	}
	if err := h.pullImagePart(ctx, writer, site, artifact, hex, match[3] == "manifests", listed); err != nil {
		return nil, 0, err
	}
	return h.verifier.open(ctx, hex)
}

// manifest reads an image manifest or index and says its media type.
func manifest(source io.Reader, size int64) ([]byte, string, error) {
	if size > maxManifest {
		return nil, "", errors.New("that blob is no image manifest: it is too long")
	}
	content, err := io.ReadAll(io.LimitReader(source, maxManifest))
	if err != nil {
		return nil, "", fmt.Errorf("read manifest: %w", err)
	}
	var parsed struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Manifests     []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(content, &parsed); err != nil || parsed.SchemaVersion != 2 {
		return nil, "", errors.New("that blob is no image manifest")
	}
	switch {
	case parsed.MediaType != "":
		return content, parsed.MediaType, nil
	case parsed.Manifests != nil: // OCI leaves the field out by choice
		return content, "application/vnd.oci.image.index.v1+json", nil
	default:
		return content, "application/vnd.oci.image.manifest.v1+json", nil
	}
}

func immutable(header http.Header, hex, contentType string) {
	header.Set("Content-Type", contentType)
	header.Set("ETag", `"sha256:`+hex+`"`)
	header.Set("Cache-Control", "public, max-age=31536000, immutable")
}

// report turns an error into a status, and logs what an operator must see.
func (h *handler) report(writer http.ResponseWriter, request *http.Request, hex string, err error) int {
	var corrupt *CorruptError
	var miss *missError
	switch {
	case request.Context().Err() != nil:
		return http.StatusServiceUnavailable // nobody reads it
	case errors.As(err, &miss) && pull.Code(err) == pull.CodeCorrupt:
		h.log.Error("refused what the object store holds", "path", request.URL.Path, "error", miss.err)
		return http.StatusBadGateway
	case errors.As(err, &miss):
		h.log.Warn("cannot pull", "path", request.URL.Path, "error", miss.err)
		writer.Header().Set("Retry-After", retryAfter)
		return http.StatusServiceUnavailable
	case isMissing(err):
		return http.StatusNotFound
	case errors.As(err, &corrupt):
		h.metrics.corrupt.Inc()
		h.log.Error("refused to serve a corrupt blob", "path", request.URL.Path, "digest", corrupt.Digest, "actual", corrupt.Actual)
	default:
		h.log.Error("cannot serve", "path", request.URL.Path, "digest", "sha256:"+hex, "error", err)
	}
	return http.StatusInternalServerError
}

// isMissing counts what is not a plain file of the store as not there: a
// symlink (ELOOP), a folder in a file's place, a file in a folder's.
func isMissing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrInvalid) ||
		errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENOTDIR)
}

func ociError(writer http.ResponseWriter, status int, code, message string) {
	body, err := json.Marshal(map[string]any{"errors": []map[string]any{{"code": code, "message": message, "detail": nil}}})
	if err != nil {
		http.Error(writer, "cannot encode the error", http.StatusInternalServerError)
		return
	}
	writer.Header().Set("Content-Type", "application/json")
	writer.Header().Set("Content-Length", strconv.Itoa(len(body)))
	writer.WriteHeader(status)
	_, _ = writer.Write(body)
}

// countingWriter counts what is answered and keeps the connection's sendfile.
type countingWriter struct {
	http.ResponseWriter
	status  int
	written int64
}

func (w *countingWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(content []byte) (int, error) {
	n, err := w.ResponseWriter.Write(content)
	w.written += int64(n)
	return n, err
}

// ReadFrom implements io.ReaderFrom.
func (w *countingWriter) ReadFrom(source io.Reader) (int64, error) {
	n, err := io.Copy(w.ResponseWriter, source)
	w.written += n
	return n, err
}

// Unwrap serves http.ResponseController.
func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

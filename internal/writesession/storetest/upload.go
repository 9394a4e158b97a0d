package storetest

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// maxUpload bounds what is held in memory for one upload.
const maxUpload = 64 << 20

var errTooOften = errors.New("one write of a key in a second")

// handler serves presigned uploads and nothing else.
func (s *Store) handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPut {
			refuse(w, http.StatusForbidden, "SignatureDoesNotMatch")
			return
		}
		key := r.URL.Path[1:]
		if err := s.begin(r.Context(), Upload, key); err != nil {
			refuseFor(w, err)
			return
		}
		s.upload(w, r, key)
	})
}

func (s *Store) upload(w http.ResponseWriter, r *http.Request, key string) {
	s.mutex.Lock()
	granted, known := s.grants[r.URL.Query().Get("X-Amz-Signature")]
	s.mutex.Unlock()
	switch {
	case !known || granted.key != key || !granted.signed(r.Header):
		refuse(w, http.StatusForbidden, "SignatureDoesNotMatch")
		return
	case s.options.Now().After(granted.expires):
		refuse(w, http.StatusForbidden, "ExpiredToken")
		return
	case s.options.Enforces && r.ContentLength != granted.size:
		refuse(w, http.StatusForbidden, "SignatureDoesNotMatch")
		return
	}
	content, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxUpload))
	if err != nil {
		refuse(w, http.StatusBadRequest, "IncompleteBody")
		return
	}
	if s.options.Enforces && granted.digest.Check(content) != nil {
		refuse(w, http.StatusBadRequest, "XAmzContentSHA256Mismatch")
		return
	}
	if err := s.write(key, content, false); err != nil {
		refuseFor(w, err)
		return
	}
	if err := s.end(Upload, key); err != nil {
		panic(http.ErrAbortHandler) // it is there, and the answer is lost
	}
	found, _ := s.object(key)
	w.Header().Set("ETag", found.etag)
}

// signed says if the headers are those that were signed.
func (g grant) signed(header http.Header) bool {
	for name, value := range g.headers {
		if header.Get(name) != value {
			return false
		}
	}
	return true
}

// refuseFor answers as a store would for which the hook's error is true.
func refuseFor(w http.ResponseWriter, err error) {
	if denied, ok := errors.AsType[*writesession.DeniedError](err); ok {
		refuse(w, http.StatusForbidden, denied.Code)
		return
	}
	status, code := http.StatusServiceUnavailable, "SlowDown"
	if unavailable, ok := errors.AsType[*writesession.UnavailableError](err); ok {
		if unavailable.RetryAfter > 0 {
			w.Header().Set("Retry-After", strconv.Itoa(int((unavailable.RetryAfter+time.Second-1)/time.Second)))
		}
		if errors.Is(err, errTooOften) {
			status = http.StatusTooManyRequests
		}
	}
	refuse(w, status, code)
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, "<Error><Code>%s</Code></Error>", code)
}

// checksum is a digest as S3 writes it in a header.
func checksum(digest blob.Digest) string {
	sum, _ := hex.DecodeString(digest.Hex())
	return base64.StdEncoding.EncodeToString(sum)
}

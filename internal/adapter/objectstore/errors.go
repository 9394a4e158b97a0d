package objectstore

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	smithy "github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/nomad-site/site/internal/writesession"
)

// answerError is an answer that is neither of those of writesession.
type answerError struct {
	what   string
	status int
	code   string
}

func (e *answerError) Error() string {
	return fmt.Sprintf("%s: the object store answers %d %s", e.what, e.status, e.code)
}

// classify turns an error of the SDK into one of those of writesession. The store's
// own message stays out: it may repeat what was signed.
func classify(what string, err error) error {
	if errors.Is(err, writesession.ErrNotFound) || isOurs[*answerError](err) ||
		isOurs[*writesession.UnavailableError](err) || isOurs[*writesession.DeniedError](err) {
		return err // of an upload, which is not the SDK's
	}
	response, answered := errors.AsType[*smithyhttp.ResponseError](err)
	if !answered || response.HTTPStatusCode() == 0 {
		return &writesession.UnavailableError{What: what, Err: cause(err)}
	}
	return answer(what, response.HTTPStatusCode(), codeOf(err), response.Response.Header, err)
}

func isOurs[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// answer is what a status and a code of S3 mean.
func answer(what string, status int, code string, header http.Header, err error) error {
	switch {
	case code == "NoSuchBucket":
		// Not ErrNotFound: nobody must take the objects for removed.
		return &writesession.DeniedError{What: what, Code: code}
	case again(status, code):
		return &writesession.UnavailableError{
			What: what, RetryAfter: retryAfter(header), Err: fmt.Errorf("it answers %d %s", status, code),
		}
	case status == http.StatusForbidden, status == http.StatusUnauthorized:
		return &writesession.DeniedError{What: what, Code: code}
	case status == http.StatusNotFound:
		return fmt.Errorf("%s: %w", what, writesession.ErrNotFound)
	case status >= 200 && status < 300:
		// An answer that cannot be read, or a copy that failed after its header.
		return &writesession.UnavailableError{What: what, Err: cause(err)}
	default:
		return &answerError{what: what, status: status, code: code}
	}
}

// again says if the same request may succeed later.
func again(status int, code string) bool {
	switch code {
	case "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ConditionalRequestConflict", "OperationAborted", "TooManyRequests":
		return true
	}
	return status == http.StatusTooManyRequests || status == http.StatusRequestTimeout ||
		(status >= 500 && status != http.StatusNotImplemented)
}

// mayBeKeys says if other keys might be accepted.
func mayBeKeys(code string) bool { return code != "RequestTimeTooSkewed" && code != "NoSuchBucket" }

// codeOf is the store's word for an error, or that of the status where there is
// no body, as after HEAD.
func codeOf(err error) string {
	if own, ok := errors.AsType[*answerError](err); ok {
		return own.code
	}
	if api, ok := errors.AsType[smithy.APIError](err); ok && api.ErrorCode() != "" && api.ErrorCode() != "UnknownError" {
		return api.ErrorCode()
	}
	if response, ok := errors.AsType[*smithyhttp.ResponseError](err); ok {
		return http.StatusText(response.HTTPStatusCode())
	}
	return ""
}

// cause is the innermost error that still says what happened: the SDK's own
// wrapping repeats the request.
func cause(err error) error {
	if send, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
		return withoutURL(send.Err)
	}
	if operation, ok := errors.AsType[*smithy.OperationError](err); ok {
		return operation.Err
	}
	return err
}

func preconditionFailed(err error) bool {
	own, ok := errors.AsType[*answerError](err)
	return ok && own.status == http.StatusPreconditionFailed
}

func retryAfter(header http.Header) time.Duration {
	seconds, err := strconv.Atoi(header.Get("Retry-After"))
	if err != nil || seconds < 0 || seconds > 3600 {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// sizeOf is the whole object's size, also where only a part of it was asked for.
func sizeOf(out *s3.GetObjectOutput) int64 {
	length := aws.ToInt64(out.ContentLength)
	content := aws.ToString(out.ContentRange)
	for i := len(content) - 1; i >= 0; i-- {
		if content[i] == '/' {
			if size, err := strconv.ParseInt(content[i+1:], 10, 64); err == nil {
				return size
			}
			break
		}
	}
	return length
}

// withoutURL drops the URL that net/http repeats: it may be a presigned one.
func withoutURL(err error) error {
	for {
		with, ok := errors.AsType[*url.Error](err)
		if !ok {
			return err
		}
		err = with.Err
	}
}

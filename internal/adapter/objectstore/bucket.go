// Package objectstore reaches a bucket of any S3 server: Cloudflare R2, the lab's
// versitygw, or another. It asks for nothing that one of them lacks: single PUTs,
// If-None-Match, copies within the bucket by etag, ranges, and lists.
package objectstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/encoding/httpbinding"
	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
)

const (
	// answerWait bounds one attempt of what transfers little; stall is how long a
	// transfer may stand still.
	answerWait = time.Minute
	stall      = 30 * time.Second
	// deletesAtOnce are single deletes: not every store takes them in bulk with
	// the checksum that the SDK sends, and on R2 they are free.
	deletesAtOnce = 8
)

// Options say where the bucket is and who may use it.
type Options struct {
	// Endpoint is the store's URL without the bucket.
	Endpoint string
	Region   string
	Bucket   string
	// PathStyle puts the bucket into the path instead of the host's name.
	PathStyle bool
	// Keys gives the access key. It is asked before each request, so it should
	// remember; with refresh, those it gave last were refused.
	Keys func(ctx context.Context, refresh bool) (id string, key secret.Value, err error)
	// Dial reaches the endpoint through a tunnel; nil dials directly.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// HTTP is used instead of a client of its own; Dial is then not looked at.
	HTTP *http.Client
}

// Bucket is one bucket of an S3 server. Its methods may be called at once.
type Bucket struct {
	options  Options
	endpoint *url.URL
	http     *http.Client
	client   *s3.Client
	pause    func(context.Context, time.Duration) error // another one in tests
}

var _ writesession.Bucket = (*Bucket)(nil)

// New checks the options; it does not connect.
func New(options Options) (*Bucket, error) {
	endpoint, err := url.Parse(options.Endpoint)
	switch {
	case err != nil || endpoint.Host == "" || (endpoint.Scheme != "http" && endpoint.Scheme != "https") ||
		endpoint.User != nil || endpoint.RawQuery != "" || endpoint.Fragment != "":
		return nil, plan.WithHint(fmt.Errorf("the object store's endpoint %q is not an address", options.Endpoint),
			"give it as https://HOST, without the bucket")
	case options.Bucket == "" || options.Region == "":
		return nil, errors.New("the object store's bucket and region must be given")
	case options.Keys == nil:
		return nil, errors.New("the object store's keys must be given")
	}
	b := &Bucket{options: options, endpoint: endpoint, http: options.HTTP, pause: retry.Pause}
	if b.http == nil {
		b.http = newHTTP(options.Dial)
	}
	b.client = s3.New(s3.Options{
		BaseEndpoint: aws.String(endpoint.String()),
		Region:       options.Region,
		UsePathStyle: options.PathStyle,
		HTTPClient:   b.http,
		Retryer:      aws.NopRetryer{}, // the attempts are in call.go
		// A request is signed with the hash of its body; other checksums are
		// not known to every store.
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
	})
	return b, nil
}

func newHTTP(dial func(ctx context.Context, network, address string) (net.Conn, error)) *http.Client {
	if dial == nil {
		dial = (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}).DialContext
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext:           dial,
			TLSHandshakeTimeout:   10 * time.Second,
			ResponseHeaderTimeout: stall,
			MaxIdleConnsPerHost:   32,
			IdleConnTimeout:       time.Minute,
			ForceAttemptHTTP2:     true,
		},
		// No store redirects what was signed.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Get implements writesession.Bucket. The reader gives errors as Get does, and
// must be closed.
func (b *Bucket) Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, writesession.Info, error) {
	input := &s3.GetObjectInput{Bucket: &b.options.Bucket, Key: &key}
	switch {
	case offset < 0 || length < 0:
		return nil, writesession.Info{}, fmt.Errorf("get %s: there is no range %d+%d", key, offset, length)
	case length > 0:
		input.Range = aws.String(fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	case offset > 0:
		input.Range = aws.String(fmt.Sprintf("bytes=%d-", offset))
	}
	var stream *body
	var info writesession.Info
	err := b.call(ctx, "get "+key, 0, func(ctx context.Context, with func(*s3.Options)) error {
		stream = newBody(ctx, "get "+key)
		out, err := b.client.GetObject(stream.ctx, input, with)
		if err != nil {
			return stream.fail(err)
		}
		stream.begin(out.Body)
		info = writesession.Info{Key: key, Size: sizeOf(out), ETag: aws.ToString(out.ETag), Modified: aws.ToTime(out.LastModified)}
		return nil
	})
	if err != nil {
		return nil, writesession.Info{}, err
	}
	return stream, info, nil
}

// Head implements writesession.Bucket. Of a bucket that is not there it says that
// the object is not, since the store gives no reason with that.
func (b *Bucket) Head(ctx context.Context, key string) (writesession.Info, error) {
	var info writesession.Info
	err := b.call(ctx, "head "+key, answerWait, func(ctx context.Context, with func(*s3.Options)) error {
		out, err := b.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &b.options.Bucket, Key: &key}, with)
		if err != nil {
			return err
		}
		info = writesession.Info{Key: key, Size: aws.ToInt64(out.ContentLength), ETag: aws.ToString(out.ETag), Modified: aws.ToTime(out.LastModified)}
		return nil
	})
	if denied, ok := errors.AsType[*writesession.DeniedError](err); ok && denied.Code == http.StatusText(http.StatusForbidden) {
		// The answer to HEAD has no body that would say why.
		if why := b.Check(ctx, key); why != nil {
			return info, why
		}
	}
	return info, err
}

// Put implements writesession.Bucket.
func (b *Bucket) Put(ctx context.Context, key string, content []byte, create bool) error {
	attempts := 0
	err := b.call(ctx, "put "+key, answerWait, func(ctx context.Context, with func(*s3.Options)) error {
		attempts++
		input := &s3.PutObjectInput{Bucket: &b.options.Bucket, Key: &key, Body: bytes.NewReader(content), ContentLength: aws.Int64(int64(len(content)))}
		if create {
			input.IfNoneMatch = aws.String("*")
		}
		_, err := b.client.PutObject(ctx, input, with)
		return err
	})
	switch {
	case !preconditionFailed(err):
		return err
	case attempts > 1 && b.holds(ctx, key, content):
		return nil // the first attempt's answer was lost
	default:
		return fmt.Errorf("put %s: %w", key, writesession.ErrExists)
	}
}

// holds says if exactly content is at key.
func (b *Bucket) holds(ctx context.Context, key string, content []byte) bool {
	stream, info, err := b.Get(ctx, key, 0, 0)
	if err != nil {
		return false
	}
	defer func() { _ = stream.Close() }()
	if info.Size != int64(len(content)) {
		return false
	}
	found, err := io.ReadAll(io.LimitReader(stream, info.Size+1))
	return err == nil && bytes.Equal(found, content)
}

// Copy implements writesession.Bucket.
func (b *Bucket) Copy(ctx context.Context, from, to, etag string) error {
	source := httpbinding.EscapePath(b.options.Bucket+"/"+from, false)
	err := b.call(ctx, "copy to "+to, answerWait, func(ctx context.Context, with func(*s3.Options)) error {
		_, err := b.client.CopyObject(ctx, &s3.CopyObjectInput{
			Bucket: &b.options.Bucket, Key: &to, CopySource: &source, CopySourceIfMatch: &etag,
		}, with)
		return err
	})
	if preconditionFailed(err) {
		return fmt.Errorf("copy %s: %w", from, writesession.ErrChanged)
	}
	return err
}

// Delete implements writesession.Bucket.
func (b *Bucket) Delete(ctx context.Context, keys ...string) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(deletesAtOnce)
	for _, key := range keys {
		group.Go(func() error {
			err := b.call(ctx, "delete "+key, answerWait, func(ctx context.Context, with func(*s3.Options)) error {
				_, err := b.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &b.options.Bucket, Key: &key}, with)
				return err
			})
			if errors.Is(err, writesession.ErrNotFound) {
				return nil
			}
			return err
		})
	}
	return group.Wait()
}

// List implements writesession.Bucket.
func (b *Bucket) List(ctx context.Context, prefix string) iter.Seq2[writesession.Info, error] {
	return func(yield func(writesession.Info, error) bool) {
		input := &s3.ListObjectsV2Input{Bucket: &b.options.Bucket, Prefix: &prefix}
		for {
			var page *s3.ListObjectsV2Output
			err := b.call(ctx, "list "+prefix, answerWait, func(ctx context.Context, with func(*s3.Options)) (err error) {
				page, err = b.client.ListObjectsV2(ctx, input, with)
				return err
			})
			if err != nil {
				yield(writesession.Info{}, err)
				return
			}
			for _, o := range page.Contents {
				info := writesession.Info{Key: aws.ToString(o.Key), Size: aws.ToInt64(o.Size), ETag: aws.ToString(o.ETag), Modified: aws.ToTime(o.LastModified)}
				if !yield(info, nil) {
					return
				}
			}
			if !aws.ToBool(page.IsTruncated) || aws.ToString(page.NextContinuationToken) == "" {
				return
			}
			input.ContinuationToken = page.NextContinuationToken
		}
	}
}

// MakeBucket makes the bucket where it is missing.
func (b *Bucket) MakeBucket(ctx context.Context) error {
	input := &s3.CreateBucketInput{Bucket: &b.options.Bucket}
	if region := b.options.Region; region != "us-east-1" && region != "auto" {
		input.CreateBucketConfiguration = &types.CreateBucketConfiguration{LocationConstraint: types.BucketLocationConstraint(region)}
	}
	err := b.call(ctx, "make the bucket "+b.options.Bucket, answerWait, func(ctx context.Context, with func(*s3.Options)) error {
		_, err := b.client.CreateBucket(ctx, input, with)
		return err
	})
	if code := codeOf(err); code == "BucketAlreadyOwnedByYou" || code == "BucketAlreadyExists" {
		// Whose it is shows at the first list.
		return b.call(ctx, "list the bucket "+b.options.Bucket, answerWait, func(ctx context.Context, with func(*s3.Options)) error {
			_, err := b.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &b.options.Bucket, MaxKeys: aws.Int32(1)}, with)
			return err
		})
	}
	return err
}

// Check proves that the keys may read, by one GET of a key that need not exist.
func (b *Bucket) Check(ctx context.Context, key string) error {
	stream, _, err := b.Get(ctx, key, 0, 1)
	if errors.Is(err, writesession.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return stream.Close()
}

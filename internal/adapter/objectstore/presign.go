package objectstore

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/smithy-go/encoding/httpbinding"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// checksumHeader is what a store may hold the bytes against. It is signed, and so
// is the length. The payload itself is unsigned: a presigned request that names
// its hash otherwise (X-Amz-Content-Sha256) is not verified alike by all stores.
const checksumHeader = "X-Amz-Checksum-Sha256"

const unsignedPayload = "UNSIGNED-PAYLOAD"

// PresignPut implements writesession.Bucket.
func (b *Bucket) PresignPut(ctx context.Context, key string, digest blob.Digest, size int64, ttl time.Duration) (writesession.Put, error) {
	sum, err := hex.DecodeString(digest.Hex())
	if err != nil || !digest.Valid() || size <= 0 || ttl < time.Second || ttl > writesession.MaxTTL {
		return writesession.Put{}, fmt.Errorf("presign an upload to %s: %d bytes for %s are not possible", key, size, ttl)
	}
	return b.presign(ctx, key, map[string]string{checksumHeader: base64.StdEncoding.EncodeToString(sum)}, size, ttl)
}

// presign signs an upload with these headers and a length.
func (b *Bucket) presign(ctx context.Context, key string, headers map[string]string, size int64, ttl time.Duration) (writesession.Put, error) {
	what := "presign an upload to " + key
	keys, err := b.keys(ctx, what, false)
	if err != nil {
		return writesession.Put{}, err
	}
	address := b.address(key)
	address.RawQuery = url.Values{"X-Amz-Expires": {strconv.FormatInt(int64(ttl/time.Second), 10)}}.Encode()
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, address.String(), http.NoBody)
	if err != nil {
		return writesession.Put{}, fmt.Errorf("%s: %w", what, err)
	}
	request.ContentLength = size
	for name, value := range headers {
		request.Header.Set(name, value)
	}
	now := time.Now().UTC()
	asItIs := func(o *v4.SignerOptions) { o.DisableURIPathEscaping, o.DisableHeaderHoisting = true, true }
	signed, _, err := v4.NewSigner().PresignHTTP(ctx, keys, request, unsignedPayload, "s3", b.options.Region, now, asItIs)
	if err != nil {
		return writesession.Put{}, errors.New(what + ": it cannot be signed")
	}
	return writesession.Put{URL: signed, Headers: headers, Expires: now.Truncate(time.Second).Add(ttl)}, nil
}

// address is the URL of an object.
func (b *Bucket) address(key string) *url.URL {
	address := *b.endpoint
	path := key
	if b.options.PathStyle {
		path = b.options.Bucket + "/" + key
	} else {
		address.Host = b.options.Bucket + "." + address.Host
	}
	address = *address.JoinPath("/")
	address.RawPath = address.EscapedPath() + httpbinding.EscapePath(path, false)
	address.Path += path
	return &address
}

var _ aws.CredentialsProvider = fixed{}

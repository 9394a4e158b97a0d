package objectstore

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/nomad-site/site/internal/writesession"
)

// TestWhatTheGatewayEnforces is where docs/decisions has it from. All PUTs are for
// the right bytes; those that send others change one.
func TestWhatTheGatewayEnforces(t *testing.T) {
	g := startGateway(t)
	b := g.bucket(t, g.admin)
	right := []byte("the bytes that were announced")
	wrong := bytes.Replace(right, []byte("b"), []byte("B"), 1)
	longer := append(bytes.Clone(right), '!')
	sum, sumMD5 := sha256.Sum256(right), md5.Sum(right)
	hash := hex.EncodeToString(sum[:])
	checksum := map[string]string{"X-Amz-Checksum-Sha256": base64.StdEncoding.EncodeToString(sum[:])}
	named := map[string]string{"X-Amz-Content-Sha256": hash}
	contentMD5 := map[string]string{"Content-Md5": base64.StdEncoding.EncodeToString(sumMD5[:])}
	for _, test := range []struct {
		name   string
		upload signedPut
		status int
		code   string
	}{
		{
			"presigned, no hash: a wrong byte",
			signedPut{presign: true, payload: unsignedPayload, body: wrong}, 200, "",
		},
		{
			"presigned, no hash: a longer body",
			signedPut{presign: true, payload: unsignedPayload, body: longer}, 403, "SignatureDoesNotMatch",
		},
		{
			"presigned, the payload's hash in the signature: the right bytes",
			signedPut{presign: true, payload: hash, header: named, body: right}, 403, "SignatureDoesNotMatch",
		},
		{
			"presigned, the payload's hash as a signed header: a wrong byte",
			signedPut{presign: true, payload: unsignedPayload, header: named, body: wrong}, 200, "",
		},
		{
			"presigned, a checksum as a signed header: the right bytes",
			signedPut{presign: true, payload: unsignedPayload, header: checksum, body: right}, 200, "",
		},
		{
			"presigned, a checksum as a signed header: a wrong byte",
			signedPut{presign: true, payload: unsignedPayload, header: checksum, body: wrong}, 400, "BadDigest",
		},
		{
			"presigned, a checksum as a signed header: left out",
			signedPut{presign: true, payload: unsignedPayload, header: checksum, leaveOut: true, body: wrong}, 403, "SignatureDoesNotMatch",
		},
		{
			"presigned, a checksum in the query: a wrong byte",
			signedPut{presign: true, hoist: true, payload: unsignedPayload, header: checksum, body: wrong}, 400, "BadDigest",
		},
		{
			"presigned, Content-MD5: a wrong byte",
			signedPut{presign: true, payload: unsignedPayload, header: contentMD5, body: wrong}, 400, "BadDigest",
		},
		{
			"signed, the payload's hash: a wrong byte",
			signedPut{payload: hash, body: wrong}, 400, "XAmzContentSHA256Mismatch",
		},
		{
			"signed, a checksum: a wrong byte",
			signedPut{payload: unsignedPayload, header: checksum, body: wrong}, 400, "BadDigest",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			const key = "gamma/sessions/enforce/objects/a"
			test.upload.announced = int64(len(right))
			status, code := test.upload.send(t, b, g.admin, key)
			if status != test.status || code != test.code {
				t.Errorf("got %d %s, want %d %s", status, code, test.status, test.code)
			}
			_, err := b.Head(t.Context(), key)
			if stored := err == nil; stored != (test.status == 200) || (!stored && !errors.Is(err, writesession.ErrNotFound)) {
				t.Errorf("after status %d: %v", status, err)
			}
			if err := b.Delete(t.Context(), key); err != nil {
				t.Error(err)
			}
		})
	}
}

// signedPut is one PUT, signed without the SDK's care.
type signedPut struct {
	presign, hoist bool
	payload        string // what is signed of the body
	header         map[string]string
	leaveOut       bool // the header is signed and not sent
	announced      int64
	body           []byte
}

func (p signedPut) send(t *testing.T, b *Bucket, user account, key string) (int, string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, b.address(key).String(), http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	request.ContentLength = p.announced
	for name, value := range p.header {
		request.Header.Set(name, value)
	}
	keys := aws.Credentials{AccessKeyID: user.Access, SecretAccessKey: user.Secret}
	if p.presign {
		p.presignOnto(t, request, keys)
	} else {
		request.Header.Set("X-Amz-Content-Sha256", p.payload)
		err = v4.NewSigner().SignHTTP(t.Context(), keys, request, p.payload, "s3", testRegion, time.Now(),
			func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true })
		if err != nil {
			t.Fatal(err)
		}
	}
	request.Body, request.ContentLength = io.NopCloser(bytes.NewReader(p.body)), int64(len(p.body))
	response, err := b.http.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	said, _ := io.ReadAll(response.Body)
	var answer struct{ Code string }
	_ = xml.Unmarshal(said, &answer)
	return response.StatusCode, answer.Code
}

func (p signedPut) presignOnto(t *testing.T, request *http.Request, keys aws.Credentials) {
	t.Helper()
	query := request.URL.Query()
	query.Set("X-Amz-Expires", "300")
	request.URL.RawQuery = query.Encode()
	signed, header, err := v4.NewSigner().PresignHTTP(t.Context(), keys, request, p.payload, "s3", testRegion, time.Now(), func(o *v4.SignerOptions) {
		o.DisableURIPathEscaping = true
		o.DisableHeaderHoisting = !p.hoist
	})
	if err != nil {
		t.Fatal(err)
	}
	again, err := http.NewRequestWithContext(t.Context(), http.MethodPut, signed, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	request.URL, request.Header = again.URL, header
	if p.leaveOut {
		for name := range p.header {
			request.Header.Del(name)
		}
	}
}

package cloudflarefake

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

const gatewayWait = 20 * time.Second

// Gateway makes the provider's keys real on a versitygw that has accounts
// (--iam-dir): its method Keys is for Options.Keys. A bucket is made with its first key.
type Gateway struct {
	// Endpoint is the URL of the S3 API; its admin API answers there too.
	Endpoint string
	Region   string
	// AccessKeyID and SecretAccessKey are the root account's.
	AccessKeyID, SecretAccessKey string

	mutex   sync.Mutex
	writers map[string]map[string]bool // who has a bucket, and whether they write
	errs    []error
}

// Err is what failed so far: whoever gets a key learns of it only by that.
func (g *Gateway) Err() error {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	return errors.Join(g.errs...)
}

// Keys adds an account, or removes it.
func (g *Gateway) Keys(id, secret, bucket string, write, remove bool) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), gatewayWait)
	defer cancel()
	if g.writers == nil {
		g.writers = map[string]map[string]bool{}
	}
	if g.writers[bucket] == nil {
		g.writers[bucket] = map[string]bool{}
	}
	var err error
	if remove {
		delete(g.writers[bucket], id)
		err = errors.Join(g.grant(ctx, bucket), g.request(ctx, http.MethodPatch, "/delete-user?access="+id, nil))
	} else {
		g.writers[bucket][id] = write
		err = errors.Join(g.request(ctx, http.MethodPut, "/"+bucket, nil), g.add(ctx, id, secret), g.grant(ctx, bucket))
	}
	if err != nil {
		g.errs = append(g.errs, fmt.Errorf("key %s of bucket %s: %w", id, bucket, err))
	}
}

func (g *Gateway) add(ctx context.Context, id, secret string) error {
	content, err := xml.Marshal(struct {
		XMLName xml.Name `xml:"Account"`
		Access  string
		Secret  string
		Role    string
	}{Access: id, Secret: secret, Role: "user"})
	if err != nil {
		return err
	}
	return g.request(ctx, http.MethodPatch, "/create-user", content)
}

// grant writes the bucket's policy anew, for whoever has a key of it.
func (g *Gateway) grant(ctx context.Context, bucket string) error {
	var all, writers []string
	for _, id := range slices.Sorted(maps.Keys(g.writers[bucket])) {
		all = append(all, id)
		if g.writers[bucket][id] {
			writers = append(writers, id)
		}
	}
	if all == nil {
		return g.request(ctx, http.MethodDelete, "/"+bucket+"?policy=", nil)
	}
	statement := func(who []string, resource string, actions ...string) map[string]any {
		return map[string]any{
			"Effect": "Allow", "Principal": map[string]any{"AWS": who},
			"Action": actions, "Resource": "arn:aws:s3:::" + resource,
		}
	}
	statements := []any{statement(all, bucket, "s3:ListBucket"), statement(all, bucket+"/*", "s3:GetObject")}
	if writers != nil {
		statements = append(statements, statement(writers, bucket+"/*", "s3:PutObject", "s3:DeleteObject"))
	}
	content, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": statements})
	if err != nil {
		return err
	}
	return g.request(ctx, http.MethodPut, "/"+bucket+"?policy=", content)
}

// request signs and sends; what is there already is no error.
func (g *Gateway) request(ctx context.Context, method, path string, body []byte) error {
	request, err := http.NewRequestWithContext(ctx, method, g.Endpoint+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	sum := sha256.Sum256(body)
	digest := hex.EncodeToString(sum[:])
	request.Header.Set("X-Amz-Content-Sha256", digest)
	credentials := aws.Credentials{AccessKeyID: g.AccessKeyID, SecretAccessKey: g.SecretAccessKey}
	if err := v4.NewSigner().SignHTTP(ctx, credentials, request, digest, "s3", g.Region, time.Now()); err != nil {
		return fmt.Errorf("sign: %w", err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	said, err := io.ReadAll(io.LimitReader(response.Body, maxBody))
	if err != nil {
		return err
	}
	if response.StatusCode >= http.StatusMultipleChoices && response.StatusCode != http.StatusConflict {
		return fmt.Errorf("%s %s: %s: %s", method, request.URL.Path, response.Status, said)
	}
	return nil
}

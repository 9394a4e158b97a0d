package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/feature/s3/manager"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession/client"
)

// childVariable has the order of a child of this program: uploads run in one, so
// that the memory is theirs alone.
const childVariable = "SITE_BENCH_CHILD"

const (
	storeRegion = "us-east-1"
	benchBucket = "bench-artifacts"
	benchToken  = "s.bench"
)

// order is what a child uploads, and where to.
type order struct {
	// API is that of the service; without one the SDK uploads.
	API, Endpoint, ID, Key, File string
}

// upload is what a child has done.
type upload struct {
	Seconds float64
	// Sent is the time until the last byte had gone, the digest of the file included.
	Sent float64
	// Requests to the store, and those to the service.
	Requests, Asked int64
	// Bytes that were written to connections, all included.
	Bytes int64
	// peak is the largest resident memory of the child.
	peak int64
}

// runUpload has a child upload a file.
func runUpload(what order) (upload, error) {
	program, err := os.Executable()
	if err != nil {
		return upload{}, err
	}
	encoded, err := json.Marshal(what)
	if err != nil {
		return upload{}, err
	}
	child := exec.Command(program)
	child.Env = append(os.Environ(), childVariable+"="+string(encoded))
	ran, err := measured(child)
	if err != nil {
		return upload{}, err
	}
	done := upload{peak: ran.peak}
	return done, json.Unmarshal([]byte(ran.output), &done)
}

func runChild() int {
	var what order
	err := json.Unmarshal([]byte(os.Getenv(childVariable)), &what)
	var done upload
	if err == nil {
		done, err = what.run(context.Background())
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(done)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "upload:", err)
		return 1
	}
	return 0
}

func (o order) run(ctx context.Context) (upload, error) {
	var done upload
	var bytes, requests, asked atomic.Int64
	store := &http.Client{Transport: &counting{Transport: transport(&bytes), requests: &requests}}
	api := &http.Client{Transport: &counting{Transport: transport(&bytes), requests: &asked}}
	start := time.Now()
	var err error
	if o.API == "" {
		err = o.bySDK(ctx, store)
	} else {
		err = o.bySession(ctx, store, api, func() { done.Sent = time.Since(start).Seconds() })
	}
	done.Seconds = time.Since(start).Seconds()
	done.Bytes, done.Requests, done.Asked = bytes.Load(), requests.Load(), asked.Load()
	return done, err
}

// bySession is what `site artifacts push` does with a file.
func (o order) bySession(ctx context.Context, store, api *http.Client, sent func()) error {
	made, err := client.New(client.Options{
		BaseURL: o.API, Site: labName, HTTP: api, Store: store,
		Token: func(context.Context) (secret.Value, error) { return secret.New(benchToken), nil },
	})
	if err != nil {
		return err
	}
	source, err := blob.HashFile(o.File)
	if err != nil {
		return err
	}
	_, err = made.Push(ctx, offerOf(source), client.PushOptions{Progress: func(done, total int64) {
		if done == total {
			sent()
		}
	}})
	return err
}

// offerOf is a file as an artifact.
func offerOf(source blob.Source) blob.Offer {
	return blob.Offer{Blobs: []blob.Offered{{Source: source}}, Names: []blob.Name{{
		Site: labName, Artifact: component, Kind: blob.KindFile, Digest: source.Digest(), Size: source.Size(), Blobs: []blob.Digest{source.Digest()},
	}}}
}

// bySDK is the transfer manager as it comes, with its own settings.
func (o order) bySDK(ctx context.Context, store *http.Client) error {
	file, err := os.Open(o.File)
	if err != nil {
		return err
	}
	defer file.Close()
	made := s3.New(s3.Options{
		BaseEndpoint: &o.Endpoint, Region: storeRegion, UsePathStyle: true, HTTPClient: store,
		Credentials: credentials.NewStaticCredentialsProvider(o.ID, o.Key, ""),
	})
	bucket, key := benchBucket, "sdk/"+filepath.Base(o.File)
	//nolint:staticcheck // It is the one that people use; its successor is not 1.0 yet.
	_, err = manager.NewUploader(made).Upload(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: file})
	return err
}

// counting counts requests, attempts that failed included.
type counting struct {
	*http.Transport
	requests *atomic.Int64
}

func (c *counting) RoundTrip(request *http.Request) (*http.Response, error) {
	c.requests.Add(1)
	return c.Transport.RoundTrip(request)
}

// transport counts what is written. It is otherwise the one that uploads use by
// default, and no worse than the SDK's own.
func transport(written *atomic.Int64) *http.Transport {
	const connections = 32
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	return &http.Transport{
		Protocols: protocols, MaxIdleConnsPerHost: connections,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &countedConn{Conn: conn, written: written}, nil
		},
	}
}

type countedConn struct {
	net.Conn
	written *atomic.Int64
}

func (c *countedConn) Write(content []byte) (int, error) {
	n, err := c.Conn.Write(content)
	c.written.Add(int64(n))
	return n, err
}

// Package pulltest has what tests pull from: an object store with the keys of one
// site, and the OpenBao that gives them to a host.
package pulltest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	signer "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/writesession"
)

// Site is the one whose artifacts the store has.
const Site = "lab"

const (
	region     = "auto"
	bucketName = "lab-artifacts"
	// perPack is small, so that little data lies in several packs.
	perPack = 512 << 10
)

// Bucket is an object store that reads a map, for those whose signature is right.
type Bucket struct {
	*httptest.Server

	mutex sync.Mutex
	// Objects and Keys are changed while no request runs.
	Objects map[string][]byte
	Keys    map[string]string
	// gets are the requests that were let in, by key.
	gets map[string]int
	sent int
	// Fault may answer instead; true: it did.
	Fault func(writer http.ResponseWriter, key string) bool
	// Cut says after how many bytes the connection breaks; 0: it does not.
	Cut func(key string) int
}

// NewBucket starts one; its key pair is id-1 and key-1.
func NewBucket(t testing.TB) *Bucket {
	t.Helper()
	b := &Bucket{Objects: map[string][]byte{}, Keys: map[string]string{"id-1": "key-1"}, gets: map[string]int{}}
	b.Server = httptest.NewServer(b)
	t.Cleanup(b.Close)
	return b
}

// Config is what a host is told of it.
func (b *Bucket) Config() host.ObjectStore {
	return host.ObjectStore{Site: Site, Host: "lab-1", Endpoint: b.URL, Region: region, Bucket: bucketName, PathStyle: true}
}

// Error answers as a store does.
func Error(writer http.ResponseWriter, status int, code string) {
	writer.WriteHeader(status)
	_, _ = fmt.Fprintf(writer, "<?xml version=\"1.0\"?><Error><Code>%s</Code></Error>", code)
}

// ServeHTTP implements http.Handler.
func (b *Bucket) ServeHTTP(writer http.ResponseWriter, request *http.Request) {
	b.mutex.Lock()
	code := b.refuses(request)
	key, found := strings.CutPrefix(request.URL.Path, "/"+bucketName+"/")
	content, there := b.Objects[key]
	fault, cut := b.Fault, 0
	if b.Cut != nil && there {
		cut = b.Cut(key)
	}
	if code == "" {
		b.gets[key]++
	}
	b.mutex.Unlock()
	switch {
	case fault != nil && fault(writer, key):
	case code != "":
		Error(writer, http.StatusForbidden, code)
	case !found:
		Error(writer, http.StatusNotFound, "NoSuchBucket")
	case !there:
		Error(writer, http.StatusNotFound, "NoSuchKey")
	default:
		counted := &countingResponse{ResponseWriter: writer, cut: cut}
		http.ServeContent(counted, request, "", time.Time{}, bytes.NewReader(content))
		b.mutex.Lock()
		b.sent += counted.written
		b.mutex.Unlock()
	}
}

type countingResponse struct {
	http.ResponseWriter
	written, cut int
}

func (c *countingResponse) Write(content []byte) (int, error) {
	if c.cut > 0 && c.written+len(content) > c.cut {
		_, _ = c.ResponseWriter.Write(content[:c.cut-c.written])
		_ = http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	n, err := c.ResponseWriter.Write(content)
	c.written += n
	return n, err
}

// refuses signs again what was signed, and compares.
func (b *Bucket) refuses(request *http.Request) string {
	authorization := request.Header.Get("Authorization")
	_, rest, _ := strings.Cut(authorization, "Credential=")
	id, _, _ := strings.Cut(rest, "/")
	key, known := b.Keys[id]
	if !known {
		return "InvalidAccessKeyId"
	}
	at, err := time.Parse("20060102T150405Z", request.Header.Get("X-Amz-Date"))
	if err != nil {
		return "AccessDenied"
	}
	_, rest, _ = strings.Cut(authorization, "SignedHeaders=")
	signed, _, _ := strings.Cut(rest, ",")
	again := &http.Request{Method: request.Method, URL: request.URL, Host: request.Host, Header: http.Header{}}
	for _, name := range strings.Split(signed, ";") {
		if value := request.Header.Get(name); value != "" {
			again.Header.Set(name, value)
		}
	}
	s := signer.NewSigner(func(o *signer.SignerOptions) { o.DisableURIPathEscaping = true })
	credentials := aws.Credentials{AccessKeyID: id, SecretAccessKey: key}
	if err := s.SignHTTP(request.Context(), credentials, again, request.Header.Get("X-Amz-Content-Sha256"), "s3", region, at); err != nil {
		return "AccessDenied"
	}
	if again.Header.Get("Authorization") != authorization {
		return "SignatureDoesNotMatch"
	}
	return ""
}

// Put has an object there.
func (b *Bucket) Put(key string, content []byte) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.Objects[key] = content
}

// Sent is how many bytes of objects went out.
func (b *Bucket) Sent() int {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.sent
}

// Gets counts the requests that were let in, by key.
func (b *Bucket) Gets() map[string]int {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return maps.Clone(b.gets)
}

// Requests counts those of a kind, such as "packs".
func (b *Bucket) Requests(kind string) int {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	count := 0
	for key, n := range b.gets {
		if strings.HasPrefix(key, Site+"/"+kind+"/") {
			count += n
		}
	}
	return count
}

// Publish has the contents in the bucket as the blobs of one name, the first of
// which names it.
func (b *Bucket) Publish(t testing.TB, artifact, kind string, contents ...[]byte) blob.Name {
	t.Helper()
	name := blob.Name{Kind: kind, Created: time.Now().UTC()}
	for _, content := range contents {
		record := b.Store(t, content)
		encoded, err := record.Encode()
		must(t, err)
		b.Put(writesession.Layout{Site: Site}.Blob(record.Manifest.Digest), encoded)
		name.Blobs = append(name.Blobs, record.Manifest.Digest)
		name.Size += record.Manifest.Size
	}
	name.Digest = name.Blobs[0]
	encoded, err := json.Marshal(writesession.Artifact{Artifact: artifact, Name: name})
	must(t, err)
	b.Put(writesession.Layout{Site: Site}.Name(artifact, name.Digest), encoded)
	name.Site, name.Artifact = Site, artifact
	return name
}

// Store puts the packs of one blob there.
func (b *Bucket) Store(t testing.TB, content []byte) writesession.Record {
	t.Helper()
	manifest, err := blob.Chunk(bytes.NewReader(content))
	must(t, err)
	packer, err := blob.NewPacker(1)
	must(t, err)
	defer packer.Close()
	record := writesession.Record{Version: writesession.RecordVersion, Manifest: manifest}
	var pack []byte
	flush := func() {
		if len(pack) > 0 {
			digest := blob.DigestOf(pack)
			record.Packs = append(record.Packs, digest)
			b.Put(writesession.Layout{Site: Site}.Pack(digest), pack)
			pack = nil
		}
	}
	var offset int64
	for _, chunk := range manifest.Chunks {
		if len(pack) >= perPack {
			flush()
		}
		before := len(pack)
		pack, err = packer.Pack(chunk.Digest, content[offset:offset+chunk.Size], pack)
		must(t, err)
		record.Places = append(record.Places, writesession.Place{Pack: len(record.Packs), Offset: int64(before), Length: int64(len(pack) - before)})
		offset += chunk.Size
	}
	flush()
	return record
}

// Random gives the same bytes for the same seed; nothing compresses them.
func Random(seed byte, size int) []byte {
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(content)
	return content
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

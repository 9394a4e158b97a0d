package objectstore

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/testneeds"
)

const (
	testRegion = "us-east-1"
	testBucket = "gamma-artifacts"
)

// account is one user of a gateway.
type account struct {
	Access string `json:"access"`
	Secret string `json:"secret"`
	Role   string `json:"role"`
}

func newAccount(name string) account {
	return account{Access: name + rand.Text()[:8], Secret: rand.Text(), Role: "user"}
}

func (a account) keys(context.Context, bool) (string, secret.Value, error) {
	return a.Access, secret.New(a.Secret), nil
}

// gateway is a versitygw with one bucket: admin may write there, proxy may read.
type gateway struct {
	address string
	folder  string
	flags   []string
	command *exec.Cmd
	root    account
	admin   account
	proxy   account
	mutex   sync.Mutex
	users   map[string]account
}

// startGateway starts one that ends with the test.
func startGateway(t testing.TB, flags ...string) *gateway {
	t.Helper()
	g := &gateway{
		flags: flags, folder: t.TempDir(), address: freeAddress(t), users: map[string]account{},
		root: newAccount("root"), admin: newAccount("admin"), proxy: newAccount("proxy"),
	}
	for _, folder := range []string{"data", "sidecar", "accounts"} {
		if err := os.Mkdir(filepath.Join(g.folder, folder), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	g.allow(t, g.admin)
	g.allow(t, g.proxy)
	g.start(t)
	t.Cleanup(func() { g.stop(t) })
	if err := g.bucket(t, g.root).MakeBucket(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.grant(t, g.admin.Access, g.proxy.Access)
	return g
}

// start runs the program, once more after a stop.
func (g *gateway) start(t testing.TB) {
	t.Helper()
	var logs bytes.Buffer
	g.command = exec.Command(testneeds.Tool(t, "versitygw"), slices.Concat([]string{"--port", g.address, "--region", testRegion, "--quiet",
		"--iam-dir", filepath.Join(g.folder, "accounts"), "--iam-cache-disable"}, g.flags,
		[]string{"posix", "--sidecar", filepath.Join(g.folder, "sidecar"), filepath.Join(g.folder, "data")})...)
	g.command.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+g.root.Access, "ROOT_SECRET_KEY="+g.root.Secret)
	g.command.Stdout, g.command.Stderr = &logs, &logs
	g.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := g.command.Start(); err != nil {
		t.Fatal(err)
	}
	err := retry.Until(t.Context(), "versitygw", 20*time.Second, func(ctx context.Context) error {
		connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", g.address)
		if err != nil {
			return err
		}
		return connection.Close()
	})
	if err != nil {
		g.stop(t)
		t.Fatalf("%v: %s", err, logs.String())
	}
}

func (g *gateway) stop(t testing.TB) {
	t.Helper()
	if g.command == nil {
		return
	}
	_ = g.command.Process.Kill()
	_ = g.command.Wait()
	g.command = nil
}

// allow adds a user, or changes their key.
func (g *gateway) allow(t testing.TB, user account) {
	t.Helper()
	g.mutex.Lock()
	defer g.mutex.Unlock()
	g.users[user.Access] = user
	g.writeUsers(t)
}

// forget removes a user.
func (g *gateway) forget(t testing.TB, user account) {
	t.Helper()
	g.mutex.Lock()
	defer g.mutex.Unlock()
	delete(g.users, user.Access)
	g.writeUsers(t)
}

func (g *gateway) writeUsers(t testing.TB) {
	t.Helper()
	content, err := json.Marshal(map[string]any{"accessAccounts": g.users})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(g.folder, "accounts", "users.json")
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// grant says who may write and who may only read the bucket.
func (g *gateway) grant(t testing.TB, writer, reader string) {
	t.Helper()
	policy := fmt.Sprintf(`{"Version":"2012-10-17","Statement":[
		{"Effect":"Allow","Principal":{"AWS":[%q]},"Action":["s3:GetObject","s3:PutObject","s3:DeleteObject"],"Resource":"arn:aws:s3:::%[3]s/*"},
		{"Effect":"Allow","Principal":{"AWS":[%[1]q,%[2]q]},"Action":["s3:ListBucket"],"Resource":"arn:aws:s3:::%[3]s"},
		{"Effect":"Allow","Principal":{"AWS":[%[2]q]},"Action":["s3:GetObject"],"Resource":"arn:aws:s3:::%[3]s/*"}]}`, writer, reader, testBucket)
	b := g.bucket(t, g.root)
	err := b.call(t.Context(), "grant", answerWait, func(ctx context.Context, with func(*s3.Options)) error {
		_, err := b.client.PutBucketPolicy(ctx, &s3.PutBucketPolicyInput{Bucket: &b.options.Bucket, Policy: &policy}, with)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// bucket is a client of its own for a user. change may alter its options.
func (g *gateway) bucket(t testing.TB, user account, change ...func(*Options)) *Bucket {
	t.Helper()
	options := Options{Endpoint: "http://" + g.address, Region: testRegion, Bucket: testBucket, PathStyle: true, Keys: user.keys}
	for _, c := range change {
		c(&options)
	}
	b, err := New(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.http.CloseIdleConnections)
	return b
}

// through makes requests pass f, which may answer instead of the gateway.
func through(f func(*http.Request, http.RoundTripper) (*http.Response, error)) func(*Options) {
	inner := newHTTP(nil).Transport
	return func(o *Options) {
		o.HTTP = &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) { return f(r, inner) })}
	}
}

func freeAddress(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	return listener.Addr().String()
}

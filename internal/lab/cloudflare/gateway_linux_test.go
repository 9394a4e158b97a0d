package cloudflarefake_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	cloudflarefake "github.com/nomad-site/site/internal/lab/cloudflare"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/testneeds"
)

const (
	rootID     = "root-of-the-gateway"
	rootSecret = "secret-of-the-gateway"
)

// versitygw starts one with accounts, as the lab does.
func versitygw(t *testing.T) *cloudflarefake.Gateway {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	var logs bytes.Buffer
	command := exec.Command(testneeds.Tool(t, "versitygw"), "--port", address, "--region", "us-east-1", "--quiet",
		"--iam-dir", t.TempDir(), "posix", "--sidecar", t.TempDir(), t.TempDir())
	command.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+rootID, "ROOT_SECRET_KEY="+rootSecret)
	command.Stdout, command.Stderr = &logs, &logs
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = command.Process.Kill(); _ = command.Wait() })
	err = retry.Until(t.Context(), "versitygw", 20*time.Second, func(ctx context.Context) error {
		connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return connection.Close()
	})
	if err != nil {
		t.Fatalf("%v: %s", err, logs.String())
	}
	return &cloudflarefake.Gateway{Endpoint: "http://" + address, Region: "us-east-1", AccessKeyID: rootID, SecretAccessKey: rootSecret}
}

// answer is what the gateway says to a key: 200, or the code of its error.
func answer(t *testing.T, g *cloudflarefake.Gateway, id, value, method, path, body string) string {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, g.Endpoint+path, bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	hash := func(text string) string {
		sum := sha256.Sum256([]byte(text))
		return hex.EncodeToString(sum[:])
	}
	request.Header.Set("X-Amz-Content-Sha256", hash(body))
	// The secret access key of a token is the hash of its value.
	credentials := aws.Credentials{AccessKeyID: id, SecretAccessKey: hash(value)}
	if err := v4.NewSigner().SignHTTP(t.Context(), credentials, request, hash(body), "s3", g.Region, time.Now()); err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusOK {
		return "200"
	}
	var failed struct{ Code string }
	if err := xml.NewDecoder(response.Body).Decode(&failed); err != nil {
		t.Fatal(err)
	}
	return failed.Code
}

func TestKeysAreRealOnAGateway(t *testing.T) {
	gateway := versitygw(t)
	fake := serve(t, cloudflarefake.Options{Keys: gateway.Keys})
	_, admin := fake.Admin("admin")
	mint := func(name, bucket string, groups ...string) (id, value string) {
		made := ask(t, fake, admin, "POST", tokensPath, keyBody(name, bucket, groups...))
		return made.field(t, "id"), made.field(t, "value")
	}
	writerID, writer := mint("writer", "gamma-artifacts", itemRead, itemWrite)
	readerID, reader := mint("reader", "gamma-artifacts", itemRead)
	otherID, other := mint("other", "beta-artifacts", itemRead, itemWrite)
	if err := gateway.Err(); err != nil {
		t.Fatal(err)
	}
	const object = "/gamma-artifacts/gamma/probe"
	check := func(what, id, value, method, path, want string) {
		t.Helper()
		if got := answer(t, gateway, id, value, method, path, "hello"); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	check("the writer writes", writerID, writer, "PUT", object, "200")
	check("the reader reads", readerID, reader, "GET", object, "200")
	check("the reader lists", readerID, reader, "GET", "/gamma-artifacts?list-type=2", "200")
	check("the reader writes", readerID, reader, "PUT", object, "AccessDenied")
	check("the reader deletes", readerID, reader, "DELETE", object, "AccessDenied")
	check("another site's key reads", otherID, other, "GET", object, "AccessDenied")
	check("a key of another bucket", writerID, writer, "GET", "/beta-artifacts?list-type=2", "AccessDenied")
	check("a wrong secret", readerID, writer, "GET", object, "SignatureDoesNotMatch")

	ask(t, fake, admin, "DELETE", tokensPath+"/"+writerID, "")
	check("a revoked key", writerID, writer, "GET", object, "InvalidAccessKeyId")
	check("the other key of the bucket", readerID, reader, "GET", object, "200")
	ask(t, fake, admin, "DELETE", tokensPath+"/"+readerID, "")
	check("the last revoked key", readerID, reader, "GET", object, "InvalidAccessKeyId")
	if err := gateway.Err(); err != nil {
		t.Error(fmt.Errorf("the gateway: %w", err))
	}
}

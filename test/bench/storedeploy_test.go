//go:build linux

package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/nomad-site/site/internal/adapter/objectstore"
	"github.com/nomad-site/site/internal/lab"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/testneeds"
)

// storeBlock declares the store where the meter stands before it.
const storeBlock = `object_store {
    endpoint = %q
    region   = %q
    bucket   = %q
  }

  `

// addStore gives the site OpenBao and an object store, which is the lab's, behind a meter.
func (f *fixture) addStore(b *testing.B) (*meter, error) {
	ctx, cancel := context.WithTimeout(b.Context(), limit)
	defer cancel()
	if err := f.lab.Up(ctx, lab.Options{Versitygw: testneeds.Tool(b, "versitygw")}); err != nil {
		return nil, err
	}
	account, err := f.storeAccount(ctx)
	if err != nil {
		return nil, err
	}
	m, err := f.meteredStore(account.Endpoint)
	if err != nil {
		return nil, err
	}
	b.Cleanup(func() { _ = m.server.Close() })
	if err := makeBenchBucket(ctx, account); err != nil {
		return nil, err
	}
	// OpenBao first: secrets can be imported where there is one.
	if err := f.activateAndDeploy("", site.OpenBaoComponent); err != nil {
		return nil, err
	}
	if err := f.activate(fmt.Sprintf(storeBlock, m.url, account.Region, benchBucket), site.ObjectStorageComponent); err != nil {
		return nil, err
	}
	if err := f.commitJob("an object store"); err != nil {
		return nil, err
	}
	if err := f.importStoreKeys(account); err != nil {
		return nil, err
	}
	for range 2 { // the run that brings the service up may send by SSH
		if _, err := f.runSite("deploy", "--site", labName); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (f *fixture) activateAndDeploy(block string, components ...string) error {
	if err := f.activate(block, components...); err != nil {
		return err
	}
	if err := f.commitJob(strings.Join(components, " and ")); err != nil {
		return err
	}
	_, err := f.runSite("deploy", "--site", labName, "--root-token-file", "site.root-token")
	return err
}

// storeAccount is the store's own: who may what is none of the benchmarks' business.
func (f *fixture) storeAccount(ctx context.Context) (lab.StoreCredentials, error) {
	var account lab.StoreCredentials
	status, err := f.lab.Status(ctx)
	if err != nil {
		return account, err
	}
	content, err := os.ReadFile(status.Store.Credentials)
	if err != nil {
		return account, err
	}
	return account, json.Unmarshal(content, &account)
}

func makeBenchBucket(ctx context.Context, account lab.StoreCredentials) error {
	bucket, err := objectstore.New(objectstore.Options{
		Endpoint: account.Endpoint, Region: account.Region, Bucket: benchBucket, PathStyle: true,
		Keys: func(context.Context, bool) (string, secret.Value, error) {
			return account.AccessKeyID, secret.New(account.SecretAccessKey), nil
		},
	})
	if err != nil {
		return err
	}
	return retry.Until(ctx, "the lab's store", 20*time.Second, bucket.MakeBucket)
}

// importStoreKeys gives the service and the hosts the same pair.
func (f *fixture) importStoreKeys(account lab.StoreCredentials) error {
	folder, err := os.MkdirTemp(f.temp, "keys-")
	if err != nil {
		return err
	}
	for name, value := range map[string]string{
		site.StoreAdminID: account.AccessKeyID, site.StoreAdminSecret: account.SecretAccessKey,
		site.StoreProxyID: account.AccessKeyID, site.StoreProxySecret: account.SecretAccessKey,
	} {
		if err := os.WriteFile(filepath.Join(folder, site.ObjectStorageComponent+"."+name), []byte(value), 0o600); err != nil {
			return err
		}
	}
	_, err = f.runSite("secrets", "import", "--site", labName, "--from-folder", folder)
	return err
}

// meteredStore passes all on as it is: signatures hold for the meter's address.
func (f *fixture) meteredStore(endpoint string) (*meter, error) {
	const connections = 32
	target, err := url.Parse(endpoint)
	if err != nil {
		return nil, err
	}
	return f.startMeter(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host
		},
		Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: connections},
		ErrorLog:  slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	})
}

// podmanRegistry pushes to a registry, and has the host pull.
func podmanRegistry(address string) rival {
	name := address + "/bench:latest"
	return rival{name: "podman push, podman pull", load: "podman tag " + name + " " + imageTag, stored: true, transfer: func(f *fixture) error {
		if _, err := f.do(f.podman("push", "-q", "--tls-verify=false", imageTag, name)...); err != nil {
			return err
		}
		_, err := f.do("ssh", "-F", f.lab.SSHConfig(), host, "podman pull -q --tls-verify=false "+name)
		return err
	}}
}

// passed is a run with what has passed a meter during it.
type passed struct {
	run
	passage
	transfer float64
}

// uplink is all that left this machine or came to it: SSH, which is what the host
// carried without the bytes of the meter, and what was asked from here.
func (p passed) uplink() int64 {
	return p.wire - p.bytes[fromHost] - p.bytes[fromService] + p.bytes[fromHere]
}

// through measures a way to bring app.tar to the host and run it.
func (m *meter) through(deploy func() (transfer float64, running run, err error)) (passed, error) {
	before := m.read()
	transfer, running, err := deploy()
	return passed{run: running, passage: m.read().since(before), transfer: transfer}, err
}

// deployThroughStore counts as the transfer that the store gets it, and the host.
func (f *fixture) deployThroughStore() (float64, run, error) {
	done, err := f.runSite("deploy", "--site", labName, "--json")
	if err != nil {
		return 0, done, err
	}
	for _, event := range done.events {
		if event.Type == plan.StepDone && event.Step == "uploads" && event.Applied {
			return event.Seconds + done.step("pulls"), done, nil
		}
	}
	return 0, done, fmt.Errorf("nothing went through the store: %s", done.said)
}

func (f *fixture) deployRival(r rival) (float64, run, error) {
	transfer, running, err := f.deploy(r)
	return transfer.seconds, running, err
}

func BenchmarkOneLineChangeThroughTheStore(b *testing.B) {
	f := use(b)
	store, err := f.addStore(b)
	if err != nil {
		b.Fatal(err)
	}
	blobs := filepath.Join(f.temp, "registry")
	if err := os.Mkdir(blobs, 0o755); err != nil {
		b.Fatal(err)
	}
	hub, err := f.startMeter(registry.New(registry.WithBlobHandler(registry.NewDiskBlobHandler(blobs)), registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelError))))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = hub.server.Close() })
	peer := podmanRegistry(hub.address)
	// Both begin with an image that nobody has seen, and none finds the other's layers.
	const seed = 300
	ours := &picture{seed: seed, baseLine: "the first image in the store", appLine: "the first image in the store"}
	theirs := &picture{seed: seed, baseLine: "the first image in the registry", appLine: "the first image in the registry"}
	first, err := f.oneEach(b, store, hub, peer, ours, theirs)
	if err != nil {
		b.Fatal(err)
	}
	f.reportPassage(b, "a whole fresh image", []passed{first[0]}, []passed{first[1]})
	for _, change := range []struct {
		name string
		make func(p *picture, line string)
	}{
		{"a line in a text of the 180 MB base layer", func(p *picture, line string) { p.baseLine = line }},
		{"a line in a text of the 15 MB app layer", func(p *picture, line string) { p.appLine = line }},
	} {
		var mine, others []passed
		for repetition := range repetitions() {
			again := strings.Repeat(", again", repetition)
			change.make(ours, "the store gets a change"+again)
			change.make(theirs, "the registry gets a change"+again)
			both, err := f.oneEach(b, store, hub, peer, ours, theirs)
			if err != nil {
				b.Fatal(err)
			}
			mine, others = append(mine, both[0]), append(others, both[1])
		}
		f.reportPassage(b, change.name, mine, others)
	}
	if err := f.forget(); err != nil {
		b.Fatal(err)
	}
}

// oneEach deploys site's image through the store, and the peer's through the registry.
func (f *fixture) oneEach(b *testing.B, store, hub *meter, peer rival, ours, theirs *picture) (both [2]passed, err error) {
	b.Helper()
	if err := f.prepare(b, rival{}, *ours); err != nil {
		return both, err
	}
	if both[0], err = store.through(f.deployThroughStore); err != nil {
		return both, err
	}
	if err := f.prepare(b, peer, *theirs); err != nil {
		return both, err
	}
	both[1], err = hub.through(func() (float64, run, error) { return f.deployRival(peer) })
	return both, err
}

func (f *fixture) reportPassage(b *testing.B, what string, mine, others []passed) {
	b.Helper()
	_, siteHost, err := f.siteHostMemory()
	if err != nil {
		b.Fatal(err)
	}
	service, err := f.serviceMemory()
	if err != nil {
		b.Fatal(err)
	}
	figures := func(runs []passed) (uplink int64, transfer, running float64) {
		return median(runs, passed.uplink), median(runs, func(p passed) float64 { return p.transfer }), median(runs, func(p passed) float64 { return p.seconds })
	}
	requests := func(runs []passed, who string) string {
		return fmt.Sprint(median(runs, func(p passed) int { return p.requests[who] }))
	}
	carried := func(runs []passed, who string) string {
		return inBytes(median(runs, func(p passed) int64 { return p.bytes[who] }))
	}
	ourUplink, ourTransfer, ourTime := figures(mine)
	uplink, transfer, running := figures(others)
	report.table("The 195 MB image through a store: "+what, "", "bytes on the uplink", "times site's", "of it to the store", "requests from here", "of the service", "of the host", "bytes to the host",
		"transfer", "times site's", "until the container runs", "times site's", "peak of site", "of the service so far", "of site-host so far")
	report.row("site deploy --via=store", inBytes(ourUplink), "1", carried(mine, fromHere), requests(mine, fromHere), requests(mine, fromService), requests(mine, fromHost), carried(mine, fromHost),
		inSeconds(ourTransfer), "1", inSeconds(ourTime), "1", inBytes(highest(mine, func(p passed) int64 { return p.peak })), inBytes(service), inBytes(siteHost))
	for _, event := range mine[0].events {
		if event.Type == plan.StepDone && event.Seconds >= 0.2 {
			report.row("of it: the step "+event.Step, "", "", "", "", "", "", "", "", "", inSeconds(median(mine, func(p passed) float64 { return p.step(event.Step) })), "", "", "", "")
		}
	}
	report.row("podman push, podman pull", inBytes(uplink), times(float64(uplink), float64(ourUplink)), carried(others, fromHere), requests(others, fromHere), "", requests(others, fromHost), carried(others, fromHost),
		inSeconds(transfer), times(transfer, ourTransfer), inSeconds(running), times(running, ourTime), "", "", "")
	words := strings.Fields(what)
	b.ReportMetric(float64(uplink)/float64(ourUplink), "registry/store-uplink-"+words[len(words)-2])
	b.ReportMetric(running/ourTime, "registry/store-time-"+words[len(words)-2])
}

// serviceMemory is the peak of the service since it was started.
func (f *fixture) serviceMemory() (int64, error) {
	text, err := f.onHost(`sed -n 's/^VmHWM:\s*\([0-9]*\) kB/\1/p' /proc/$(pgrep -o -x object-storage-)/status`)
	if err != nil {
		return 0, err
	}
	var peak int64
	if _, err := fmt.Sscan(text, &peak); err != nil {
		return 0, fmt.Errorf("read the memory of the service %q: %w", text, err)
	}
	return peak << 10, nil
}

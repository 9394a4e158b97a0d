//go:build linux

package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/nomad-site/site/internal/blob"
	hostdocument "github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/hostkey"
	"github.com/nomad-site/site/internal/sitehost/pull/pulltest"
	"github.com/nomad-site/site/internal/writesession/client"
)

// freshMegabytes is how much fresh data is uploaded; less is for whoever works on
// these benchmarks.
func freshMegabytes() int64 {
	if n, err := strconv.ParseInt(os.Getenv("SITE_BENCH_FRESH_MB"), 10, 64); err == nil && n > 0 {
		return n
	}
	return 1 << 10
}

// random writes a file that nothing was ever like.
func random(path string, size int64) error {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rand.Uint32())
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := io.Copy(file, io.LimitReader(rand.NewChaCha8(seed), size)); err != nil {
		return err
	}
	// What was written here must not have to be written while others write theirs.
	if err := file.Sync(); err != nil {
		return err
	}
	return file.Close()
}

// uploaded is one upload both ways, of the same file to the same store.
type uploaded struct {
	ours, sdk upload
	// service is the peak of the service; its requests to the store are those that
	// neither upload has made.
	service         int64
	serviceRequests int
}

// uploadBothWays starts a store of its own; turn says who begins.
func uploadBothWays(b *testing.B, folder string, built programs, size int64, turn int) uploaded {
	b.Helper()
	file := filepath.Join(folder, "fresh")
	if err := random(file, size); err != nil {
		b.Fatal(err)
	}
	u := startUploads(b, folder, built)
	before, err := u.requests()
	if err != nil {
		b.Fatal(err)
	}
	var done uploaded
	both := []func() error{
		func() (err error) { done.ours, err = runUpload(order{API: u.api, File: file}); return err },
		func() (err error) {
			done.sdk, err = runUpload(order{Endpoint: u.endpoint, ID: u.id, Key: u.key, File: file})
			return err
		},
	}
	for i := range both {
		if err := both[(i+turn)%len(both)](); err != nil {
			b.Fatal(err)
		}
		if output, err := exec.Command("sync").CombinedOutput(); err != nil {
			b.Fatalf("sync: %v: %s", err, output)
		}
	}
	after, err := u.requests()
	if err != nil {
		b.Fatal(err)
	}
	done.serviceRequests = after - before - int(done.ours.Requests+done.sdk.Requests)
	if done.service, err = peakOf(u.service); err != nil {
		b.Fatal(err)
	}
	if err := u.drop(); err != nil {
		b.Fatal(err)
	}
	return done
}

// BenchmarkUploadOfFreshData needs neither root nor a lab.
func BenchmarkUploadOfFreshData(b *testing.B) {
	folder := bigFolder(b)
	built := programs{folder: folder}
	report.table("Fresh random data into an object store, until it is proven and visible", "", "time", "times the SDK's", "of it until the last byte was sent",
		"requests to the store", "to the service", "bytes sent", "peak of the uploader", "peak of the service", "requests of the service to the store")
	for _, size := range []int64{freshMegabytes() / 16, freshMegabytes()} {
		var runs []uploaded
		for repetition := range repetitions() {
			runs = append(runs, uploadBothWays(b, folder, built, size<<20, repetition))
		}
		ours, sdk := median(runs, func(u uploaded) float64 { return u.ours.Seconds }), median(runs, func(u uploaded) float64 { return u.sdk.Seconds })
		count := func(figure func(uploaded) int64) string { return fmt.Sprint(median(runs, figure)) }
		report.row(fmt.Sprintf("%d MiB, a write session", size), inSeconds(ours), times(ours, sdk), inSeconds(median(runs, func(u uploaded) float64 { return u.ours.Sent })),
			count(func(u uploaded) int64 { return u.ours.Requests }), count(func(u uploaded) int64 { return u.ours.Asked }),
			inBytes(median(runs, func(u uploaded) int64 { return u.ours.Bytes })), inBytes(highest(runs, func(u uploaded) int64 { return u.ours.peak })),
			inBytes(highest(runs, func(u uploaded) int64 { return u.service })), count(func(u uploaded) int64 { return int64(u.serviceRequests) }))
		report.row(fmt.Sprintf("%d MiB, the SDK's transfer manager", size), inSeconds(sdk), "1", "",
			count(func(u uploaded) int64 { return u.sdk.Requests }), "",
			inBytes(median(runs, func(u uploaded) int64 { return u.sdk.Bytes })), inBytes(highest(runs, func(u uploaded) int64 { return u.sdk.peak })), "", "")
		b.ReportMetric(ours/sdk, fmt.Sprintf("session/sdk-time-%dMiB", size))
		b.ReportMetric(inMiB(highest(runs, func(u uploaded) int64 { return u.ours.peak })), fmt.Sprintf("client-MiB-%dMiB", size))
		b.ReportMetric(inMiB(highest(runs, func(u uploaded) int64 { return u.service })), fmt.Sprintf("service-MiB-%dMiB", size))
	}
}

// puller is a host that pulls: a process with a store, a key and an OpenBao of its own.
type puller struct {
	program, folder, config, key string
	openBao                      *pulltest.OpenBao
	pulls                        int
}

func newPuller(b *testing.B, u *uploads, program, folder string) *puller {
	b.Helper()
	made, err := os.MkdirTemp(folder, "host-")
	if err != nil {
		b.Fatal(err)
	}
	p := &puller{program: program, folder: made, config: filepath.Join(made, "object-store.json"), key: filepath.Join(made, "host.key")}
	public, err := hostkey.Ensure(p.key)
	if err != nil {
		b.Fatal(err)
	}
	// The name is the one that this OpenBao knows.
	config, err := json.Marshal(hostdocument.ObjectStore{Site: labName, Host: "lab-1", Endpoint: u.endpoint, Region: storeRegion, Bucket: benchBucket, PathStyle: true})
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(p.config, config, 0o600); err != nil {
		b.Fatal(err)
	}
	p.openBao = pulltest.NewOpenBao(b, public)
	p.openBao.Values = map[string]string{site.StoreProxyID + " v1": u.id, site.StoreProxySecret + " v1": u.key}
	return p
}

// pulled is what one host has pulled.
type pulled struct {
	run
	requests, bytes int64
}

// pull brings an artifact to a host that has nothing.
func (p *puller) pull(digest blob.Digest) (pulled, error) {
	p.pulls++
	folder := filepath.Join(p.folder, fmt.Sprint("store-", p.pulls))
	wants, err := json.Marshal([]map[string]string{{"artifact": component, "digest": string(digest)}})
	if err != nil {
		return pulled{}, err
	}
	command := exec.Command(p.program, "pull", "--store", folder, "--object-store", p.config, "--host-key", p.key, "--openbao", p.openBao.URL)
	command.Stdin = bytes.NewReader(wants)
	ran, err := measured(command)
	if err != nil {
		return pulled{}, err
	}
	var said struct {
		Result *struct {
			Names, Requests int64
			Bytes           int64 `json:"bytes_received"`
		}
	}
	lines := bytes.Split(bytes.TrimSpace([]byte(ran.output)), []byte("\n"))
	if err := json.Unmarshal(lines[len(lines)-1], &said); err != nil || said.Result == nil || said.Result.Names != 1 {
		return pulled{}, fmt.Errorf("site-host pull says %q: %w", lines[len(lines)-1], err)
	}
	return pulled{run: ran, requests: said.Result.Requests, bytes: said.Result.Bytes}, os.RemoveAll(folder)
}

// pullAtOnce gives what each of the hosts did.
func pullAtOnce(pullers []*puller, digest blob.Digest) ([]pulled, error) {
	done, errs := make([]pulled, len(pullers)), make([]error, len(pullers))
	var group sync.WaitGroup
	for i, one := range pullers {
		group.Go(func() { done[i], errs[i] = one.pull(digest) })
	}
	group.Wait()
	return done, errors.Join(errs...)
}

// pushPicture has an image that shares nothing with others in the store.
func (u *uploads) pushPicture(b *testing.B, program string, seed uint64) blob.Source {
	b.Helper()
	file := filepath.Join(u.folder, fmt.Sprintf("image-%d.tar", seed))
	p := picture{base: 180e6, assets: 9e6, seed: seed, program: program}
	if n := freshMegabytes(); n < 1<<10 {
		p.base = n * 1e6
	}
	if err := p.archive(file); err != nil {
		b.Fatal(err)
	}
	source, err := blob.HashFile(file)
	if err != nil {
		b.Fatal(err)
	}
	made, err := client.New(client.Options{
		BaseURL: u.api, Site: labName, HTTP: http.DefaultClient, Store: &http.Client{},
		Token: func(context.Context) (secret.Value, error) { return secret.New(benchToken), nil },
	})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := made.Push(b.Context(), offerOf(source), client.PushOptions{}); err != nil {
		b.Fatal(err)
	}
	if output, err := exec.Command("sync").CombinedOutput(); err != nil {
		b.Fatalf("sync: %v: %s", err, output)
	}
	return source
}

// BenchmarkThreeHostsPullAtOnce needs neither root nor a lab: its hosts are
// processes of this machine, which share its processors and its disk.
func BenchmarkThreeHostsPullAtOnce(b *testing.B) {
	const hosts = 3
	folder := bigFolder(b)
	built := programs{folder: folder}
	u := startUploads(b, folder, built)
	application, err := (&fixture{temp: folder, programs: map[string]string{}}).program("")
	if err != nil {
		b.Fatal(err)
	}
	var pullers []*puller
	for range hosts {
		pullers = append(pullers, newPuller(b, u, built.build(b, "site-host"), folder))
	}
	var alone, together []pulled
	var size int64
	for repetition := range repetitions() {
		source := u.pushPicture(b, application, uint64(200+repetition))
		size = source.Size()
		for i := range 2 {
			if (i+repetition)%2 == 0 {
				done, err := pullAtOnce(pullers[:1], source.Digest())
				if err != nil {
					b.Fatal(err)
				}
				alone = append(alone, done...)
				continue
			}
			done, err := pullAtOnce(pullers, source.Digest())
			if err != nil {
				b.Fatal(err)
			}
			slowest := done[0]
			for _, one := range done[1:] {
				slowest.seconds, slowest.peak = max(slowest.seconds, one.seconds), max(slowest.peak, one.peak)
				slowest.requests, slowest.bytes = slowest.requests+one.requests, slowest.bytes+one.bytes
			}
			together = append(together, slowest)
		}
	}
	one, three := median(alone, func(p pulled) float64 { return p.seconds }), median(together, func(p pulled) float64 { return p.seconds })
	report.table(fmt.Sprintf("A fresh image of %s from the bucket, by processes of this machine", inBytes(size)), "", "time of the slowest", "times one alone", "requests", "bytes received", "peak of site-host, the largest")
	for _, each := range []struct {
		name string
		runs []pulled
	}{{"one site-host pull", alone}, {"three at once", together}} {
		time := median(each.runs, func(p pulled) float64 { return p.seconds })
		report.row(each.name, inSeconds(time), times(time, one), fmt.Sprint(median(each.runs, func(p pulled) int64 { return p.requests })),
			inBytes(median(each.runs, func(p pulled) int64 { return p.bytes })), inBytes(highest(each.runs, func(p pulled) int64 { return p.peak })))
	}
	b.ReportMetric(three/one, "three-processes/one-time")
	b.ReportMetric(inMiB(highest(together, func(p pulled) int64 { return p.peak })), "site-host-process-MiB")
}

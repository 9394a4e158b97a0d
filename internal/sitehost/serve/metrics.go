package serve

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// storeSizeAge is how old the figures of the store may be: counting reads the folder.
const storeSizeAge = 15 * time.Second

type metrics struct {
	handler  http.Handler
	requests *prometheus.CounterVec
	bytes    *prometheus.CounterVec
	corrupt  prometheus.Counter
}

func newMetrics(root, version string, more ...prometheus.Collector) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "site_host_requests_total", Help: "Requests answered, by dialect and status.",
		}, []string{"dialect", "code"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "site_host_response_bytes_total", Help: "Bytes of bodies sent, by dialect.",
		}, []string{"dialect"}),
		corrupt: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "site_host_corrupt_blob_requests_total", Help: "Requests refused because the blob's bytes do not have its digest.",
		}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "site_host_build_info", Help: "Always 1; the version is its label.",
		ConstLabels: prometheus.Labels{"version": version},
	})
	build.Set(1)
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.requests, m.bytes, m.corrupt, build, newStoreSize(root),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	registry.MustRegister(more...)
	m.handler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	return m
}

func (m *metrics) observe(dialect string, status int, written int64) {
	m.requests.WithLabelValues(dialect, strconv.Itoa(status)).Inc()
	m.bytes.WithLabelValues(dialect).Add(float64(written))
}

// storeSize counts the blobs when it is asked, at most every storeSizeAge.
type storeSize struct {
	folder       string
	bytes, blobs *prometheus.Desc

	mutex    sync.Mutex
	counted  time.Time
	byteSum  float64
	blobsSum float64
}

func newStoreSize(root string) *storeSize {
	return &storeSize{
		folder: filepath.Join(root, "blobs", "sha256"),
		bytes:  prometheus.NewDesc("site_host_store_bytes", "Bytes of the whole blobs in the store.", nil, nil),
		blobs:  prometheus.NewDesc("site_host_store_blobs", "Whole blobs in the store.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (s *storeSize) Describe(descriptions chan<- *prometheus.Desc) {
	descriptions <- s.bytes
	descriptions <- s.blobs
}

// Collect implements prometheus.Collector.
func (s *storeSize) Collect(values chan<- prometheus.Metric) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if time.Since(s.counted) > storeSizeAge {
		entries, err := os.ReadDir(s.folder)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			values <- prometheus.NewInvalidMetric(s.bytes, err)
			return
		}
		s.byteSum, s.blobsSum = 0, 0
		for _, each := range entries {
			// A blob removed meanwhile is none.
			if info, err := each.Info(); err == nil && info.Mode().IsRegular() && len(each.Name()) == 64 {
				s.byteSum += float64(info.Size())
				s.blobsSum++
			}
		}
		s.counted = time.Now()
	}
	values <- prometheus.MustNewConstMetric(s.bytes, prometheus.GaugeValue, s.byteSum)
	values <- prometheus.MustNewConstMetric(s.blobs, prometheus.GaugeValue, s.blobsSum)
}

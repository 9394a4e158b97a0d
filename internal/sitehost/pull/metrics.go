package pull

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	pulled prometheus.Counter
	plain  prometheus.Counter
	errors *prometheus.CounterVec
	of     []prometheus.Collector
}

func newMetrics(bucket *bucket) *metrics {
	m := &metrics{
		pulled: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "site_host_pulled_blobs_total", Help: "Blobs that came from the object store.",
		}),
		plain: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "site_host_pulled_plain_bytes_total", Help: "Bytes of chunks that came from the object store, uncompressed.",
		}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "site_host_pull_errors_total", Help: "Pulls that failed, by the reason.",
		}, []string{"reason"}),
	}
	m.of = []prometheus.Collector{
		m.pulled, m.plain, m.errors,
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "site_host_object_store_requests_total", Help: "Requests to the object store.",
		}, func() float64 { return float64(bucket.requests.Load()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "site_host_object_store_received_bytes_total", Help: "Bytes of bodies that came from the object store.",
		}, func() float64 { return float64(bucket.received.Load()) }),
	}
	for _, code := range []string{CodeUnreachable, CodeDenied, CodeNoKeys, CodeNotFound, CodeCorrupt, CodeNoSpace, CodeInternal} {
		m.errors.WithLabelValues(code)
	}
	return m
}

// failed does not count what nobody waits for any more.
func (m *metrics) failed(ctx context.Context, err error) {
	if ctx.Err() == nil {
		m.errors.WithLabelValues(Code(err)).Inc()
	}
}

// Describe implements prometheus.Collector.
func (p *Puller) Describe(descriptions chan<- *prometheus.Desc) {
	for _, each := range p.metrics.of {
		each.Describe(descriptions)
	}
}

// Collect implements prometheus.Collector.
func (p *Puller) Collect(values chan<- prometheus.Metric) {
	for _, each := range p.metrics.of {
		each.Collect(values)
	}
}

// Traffic is how many requests were made and how many bytes of bodies came.
func (p *Puller) Traffic() (requests, bytes int64) {
	return p.bucket.requests.Load(), p.bucket.received.Load()
}

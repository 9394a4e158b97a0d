package server

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

type metrics struct {
	handler   http.Handler
	requests  *prometheus.CounterVec
	seconds   *prometheus.HistogramVec
	readBack  prometheus.Counter
	published *prometheus.CounterVec
	unproven  prometheus.Counter
	ended     *prometheus.CounterVec
	open      prometheus.Gauge
}

func newMetrics(version string) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "site_object_storage_requests_total", Help: "Requests answered, by route and status.",
		}, []string{"route", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "site_object_storage_request_seconds", Help: "How long requests took, by route.",
			Buckets: []float64{0.01, 0.05, 0.2, 1, 5, 20, 60, 300},
		}, []string{"route"}),
		readBack: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "site_object_storage_read_back_bytes_total", Help: "Stored bytes that were read back to be proven.",
		}),
		published: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "site_object_storage_published_total", Help: "What became visible, by kind: pack, blob, name.",
		}, []string{"kind"}),
		unproven: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "site_object_storage_unproven_total", Help: "Parts of requests that were missing or wrong.",
		}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "site_object_storage_sessions_ended_total", Help: "Sessions that ended, by state.",
		}, []string{"state"}),
		open: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "site_object_storage_sessions_open", Help: "Sessions that were open at the last sweep.",
		}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "site_object_storage_build_info", Help: "Always 1; the version is its label.",
		ConstLabels: prometheus.Labels{"version": version},
	})
	build.Set(1)
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.requests, m.seconds, m.readBack, m.published, m.unproven, m.ended, m.open, build,
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewGoCollector())
	m.handler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	return m
}

func (m *metrics) observe(route string, status int, took time.Duration) {
	m.requests.WithLabelValues(route, strconv.Itoa(status)).Inc()
	m.seconds.WithLabelValues(route).Observe(took.Seconds())
}

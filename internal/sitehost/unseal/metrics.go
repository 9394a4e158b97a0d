package unseal

import "github.com/prometheus/client_golang/prometheus"

// The metrics are made when they are asked for.
func descriptions() (unseals, state *prometheus.Desc) {
	return prometheus.NewDesc("site_host_unseals_total", "How often the secrets server was unsealed.", nil, nil),
		prometheus.NewDesc("site_host_secrets_server_state", "1 for the state that the last look at the secrets server found.", []string{"state"}, nil)
}

// Describe implements prometheus.Collector.
func (u *Unsealer) Describe(into chan<- *prometheus.Desc) {
	unseals, state := descriptions()
	into <- unseals
	into <- state
}

// Collect implements prometheus.Collector.
func (u *Unsealer) Collect(into chan<- prometheus.Metric) {
	u.mutex.Lock()
	count, last := u.unseals, u.state
	u.mutex.Unlock()
	unseals, state := descriptions()
	into <- prometheus.MustNewConstMetric(unseals, prometheus.CounterValue, float64(count))
	for _, each := range []State{NoKey, BadKeyFile, Unreachable, NotInitialized, Sealed, Unsealed} {
		value := 0.0
		if each == last {
			value = 1
		}
		into <- prometheus.MustNewConstMetric(state, prometheus.GaugeValue, value, string(each))
	}
}

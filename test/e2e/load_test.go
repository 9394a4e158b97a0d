package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	// leastRate is what counts as load, in requests a second.
	leastRate = 200
	// askedRate is a little more, for what a busy machine leaves out.
	askedRate = 230
	// askers are so many that one that waits for an answer holds up nobody else.
	askers = 24
	// lookupPause is between two looks into the catalogue. A job must answer for longer
	// than that after it was taken out of it.
	lookupPause = 500 * time.Millisecond
)

// loadOptions say who is asked what.
type loadOptions struct {
	// addresses is where the application is, if it stays where it is. Otherwise it is
	// found by the name of its service in Nomad's catalogue, as a load balancer would.
	addresses []string
	service   string
	// ask sends one request to an address; nil asks for the rows of jobs/hello.
	ask func(ctx context.Context, client *http.Client, address string) error
}

// steadyLoad is requests at a constant rate, until it is stopped.
type steadyLoad struct {
	options  loadOptions
	client   *http.Client
	balancer *balancer
	begun    time.Time
	end      context.CancelFunc
	done     sync.WaitGroup

	mutex sync.Mutex
	now   loadCounts
}

// loadCounts is what became of requests.
type loadCounts struct {
	requests, failures int
	took, slowest      time.Duration
	// answered is how often, by address.
	answered map[string]int
	// said are the first failures.
	said []string
}

// saidFailures bounds how many failures are told.
const saidFailures = 10

func (c loadCounts) rate() float64 { return float64(c.requests) / c.took.Seconds() }

func (c loadCounts) String() string {
	return fmt.Sprintf("%d requests, %d failures, %s, %.0f a second, answered by %d addresses, the slowest in %s",
		c.requests, c.failures, c.took.Round(100*time.Millisecond), c.rate(), len(c.answered), c.slowest.Round(time.Millisecond))
}

// since is what was counted after before.
func (c loadCounts) since(before loadCounts) loadCounts {
	c.requests -= before.requests
	c.failures -= before.failures
	c.took -= before.took
	c.said = c.said[len(before.said):]
	c.answered = maps.Clone(c.answered)
	for address, count := range before.answered {
		if c.answered[address] -= count; c.answered[address] == 0 {
			delete(c.answered, address)
		}
	}
	return c
}

// isWhole insists that nothing failed, and that it was a load.
func (c loadCounts) isWhole(t *testing.T) {
	t.Helper()
	if c.failures > 0 {
		t.Errorf("%d of %d requests failed, the first of them:\n%s", c.failures, c.requests, strings.Join(c.said, "\n"))
	}
	if wanted := int(leastRate * c.took.Seconds()); c.requests < wanted {
		t.Errorf("%d requests in %s are too few: want %d", c.requests, c.took.Round(time.Millisecond), wanted)
	}
}

// underLoad asks an application at a constant rate until stop or the end of t.
func (s *testSite) underLoad(t *testing.T, options loadOptions) *steadyLoad {
	t.Helper()
	if options.ask == nil {
		options.ask = askForRows
	}
	reused := &http.Transport{MaxIdleConnsPerHost: askers, IdleConnTimeout: 30 * time.Second}
	l := &steadyLoad{
		options: options, balancer: &balancer{ready: options.addresses}, now: loadCounts{answered: map[string]int{}},
		client: &http.Client{Timeout: 5 * time.Second, Transport: reused},
	}
	if options.service != "" {
		l.balancer = s.in(t).balance(options.service)
	}
	ctx, cancel := context.WithCancel(t.Context())
	l.end, l.begun = cancel, time.Now()
	t.Cleanup(func() { l.stop() })
	for number := range askers {
		l.done.Go(func() { l.keepAsking(ctx, number) })
	}
	return l
}

// keepAsking sends every so many-th request of a schedule. One that is late is sent at once.
func (l *steadyLoad) keepAsking(ctx context.Context, number int) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ; ; number += askers {
		timer.Reset(time.Until(l.begun.Add(time.Duration(number) * time.Second / askedRate)))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		address := l.balancer.pick()
		begun := time.Now()
		// What was sent is waited for, also when the load ends.
		err := l.options.ask(context.WithoutCancel(ctx), l.client, address)
		l.count(address, begun, err)
	}
}

func (l *steadyLoad) count(address string, begun time.Time, err error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	took := time.Since(begun)
	l.now.requests++
	l.now.slowest = max(l.now.slowest, took)
	if err == nil {
		l.now.answered[address]++
		return
	}
	l.now.failures++
	if len(l.now.said) < saidFailures {
		l.now.said = append(l.now.said, fmt.Sprintf("after %s, at %s, in %s: %v",
			begun.Sub(l.begun).Round(time.Millisecond), address, took.Round(time.Millisecond), err))
	}
}

// counts is what became of the requests so far.
func (l *steadyLoad) counts() loadCounts {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	now := l.now
	now.took, now.answered, now.said = time.Since(l.begun), maps.Clone(l.now.answered), slices.Clone(l.now.said)
	return now
}

// stop ends the load and tells what became of it.
func (l *steadyLoad) stop() loadCounts {
	now := l.counts() // before waiting for the last answers, which is not load
	l.end()
	l.done.Wait()
	l.client.CloseIdleConnections()
	took := now.took
	now = l.counts()
	now.took = took
	return now
}

// askForRows asks an application of jobs/hello for the rows of its table.
func askForRows(ctx context.Context, client *http.Client, address string) error {
	content, err := httpGet(ctx, client, address, "/version", nil)
	if err != nil {
		return err
	}
	var says answer
	if err := json.Unmarshal([]byte(content), &says); err != nil {
		return fmt.Errorf("answer %q: %w", content, err)
	}
	if says.Rows == 0 {
		return fmt.Errorf("its database did not answer: %s", content)
	}
	return nil
}

// httpGet is the page at an address; any answer but a good one is an error.
func httpGet(ctx context.Context, client *http.Client, address, path string, header http.Header) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return "", err
	}
	maps.Copy(request.Header, header)
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, response.Status, strings.TrimSpace(string(content)))
	}
	return string(content), err
}

// balancer spreads requests over a service in Nomad's catalogue as a load balancer
// does: what is gone from there is not asked any more, and what is new is asked as
// soon as it says that it is healthy. Nomad lists an allocation that is not, too.
type balancer struct {
	client *http.Client
	path   string
	header http.Header

	mutex sync.Mutex
	ready []string
}

// balance asks Nomad through the host's sshd, until the test ends.
func (s *testSite) balance(service string) *balancer {
	s.t.Helper()
	token, err := s.managementToken()
	if err != nil {
		s.t.Fatal(err)
	}
	// The catalogue is reached through the host, applications as by everybody.
	nomad := s.dialHost(s.labKey().signer)
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		if address == nomadAddress {
			return nomad.DialContext(ctx, network, address)
		}
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}
	b := &balancer{
		client: &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 1}},
		path:   "/v1/service/" + service, header: http.Header{"X-Nomad-Token": {token}},
	}
	s.until("service "+service+" to be found", time.Minute, func() error { return b.look(s.t.Context()) })
	ctx, cancel := context.WithCancel(s.t.Context())
	var following sync.WaitGroup
	following.Go(func() { b.follow(ctx) })
	s.t.Cleanup(func() { cancel(); following.Wait() })
	return b
}

const nomadAddress = "127.0.0.1:4646"

// pick is anybody who is healthy, or empty: turns would bring the same pairs together
// where one request leads to another.
func (b *balancer) pick() string {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if len(b.ready) == 0 {
		return ""
	}
	return b.ready[rand.IntN(len(b.ready))]
}

// follow looks into the catalogue again and again. While it cannot be asked, what
// was last found counts.
func (b *balancer) follow(ctx context.Context) {
	ticker := time.NewTicker(lookupPause)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			_ = b.look(ctx)
		}
	}
}

func (b *balancer) look(ctx context.Context) error {
	found, err := b.catalogue(ctx)
	if err != nil {
		return err
	}
	b.mutex.Lock()
	known := slices.DeleteFunc(slices.Clone(b.ready), func(address string) bool { return !slices.Contains(found, address) })
	b.ready = slices.Clone(known) // at once, before anybody is waited for
	b.mutex.Unlock()
	for _, address := range found {
		if slices.Contains(known, address) {
			continue
		}
		short, cancel := context.WithTimeout(ctx, lookupPause)
		if _, err := httpGet(short, b.client, address, "/healthz", nil); err == nil {
			known = append(known, address)
		}
		cancel()
	}
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.ready = known
	if len(known) == 0 {
		return errors.New("the catalogue names nobody who is healthy")
	}
	return nil
}

// catalogue is where Nomad says that the service is.
func (b *balancer) catalogue(ctx context.Context) ([]string, error) {
	content, err := httpGet(ctx, b.client, nomadAddress, b.path, b.header)
	if err != nil {
		return nil, err
	}
	var registered []struct {
		Address string
		Port    int
	}
	if err := json.Unmarshal([]byte(content), &registered); err != nil {
		return nil, fmt.Errorf("the catalogue says %q: %w", content, err)
	}
	var found []string
	for _, one := range registered {
		found = append(found, net.JoinHostPort(one.Address, strconv.Itoa(one.Port)))
	}
	return found, nil
}

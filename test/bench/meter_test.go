package bench

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
)

// Who may ask a metered server. The host's site-host and podman are one: both
// pull, and no benchmark has both.
const (
	fromHere    = "here"
	fromHost    = "host"
	fromService = "service"
)

// meter is a server on the lab's bridge that counts what passes it.
type meter struct {
	url, address string
	host         string // the address of the one host
	server       *http.Server

	mutex    sync.Mutex
	conns    []*metered
	requests map[string]int
}

// metered is a connection; who is known with its first request.
type metered struct {
	net.Conn
	who   atomic.Value
	bytes atomic.Int64
}

func (m *metered) Read(content []byte) (int, error) {
	n, err := m.Conn.Read(content)
	m.bytes.Add(int64(n))
	return n, err
}

func (m *metered) Write(content []byte) (int, error) {
	n, err := m.Conn.Write(content)
	m.bytes.Add(int64(n))
	return n, err
}

type meteredListener struct {
	net.Listener
	meter *meter
}

func (l meteredListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	counted := &metered{Conn: conn}
	l.meter.mutex.Lock()
	l.meter.conns = append(l.meter.conns, counted)
	l.meter.mutex.Unlock()
	return counted, nil
}

type connKey struct{}

// startMeter serves what is to be counted, where the machine and the host reach it
// at the same address.
func (f *fixture) startMeter(handler http.Handler) (*meter, error) {
	gateway := net.ParseIP(f.address).To4()
	if gateway == nil {
		return nil, errors.New("the host has no IPv4 address: " + f.address)
	}
	gateway[3] = 1
	listener, err := net.Listen("tcp", net.JoinHostPort(gateway.String(), "0"))
	if err != nil {
		return nil, err
	}
	m := &meter{address: listener.Addr().String(), url: "http://" + listener.Addr().String(), host: f.address, requests: map[string]int{}}
	m.server = &http.Server{
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			m.count(r)
			handler.ServeHTTP(w, r)
		}),
	}
	go func() { _ = m.server.Serve(meteredListener{listener, m}) }()
	return m, nil
}

func (m *meter) count(request *http.Request) {
	who := fromHere
	if remote, _, _ := net.SplitHostPort(request.RemoteAddr); remote == m.host {
		who = fromHost
		if strings.Contains(request.UserAgent(), "aws-sdk-go") {
			who = fromService
		}
	}
	if conn, ok := request.Context().Value(connKey{}).(*metered); ok {
		conn.who.Store(who)
	}
	m.mutex.Lock()
	defer m.mutex.Unlock()
	m.requests[who]++
}

// passage is what has passed a meter, by who asked.
type passage struct {
	requests map[string]int
	bytes    map[string]int64
}

func (m *meter) read() passage {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	now := passage{map[string]int{}, map[string]int64{}}
	for who, n := range m.requests {
		now.requests[who] = n
	}
	for _, conn := range m.conns {
		if who, ok := conn.who.Load().(string); ok {
			now.bytes[who] += conn.bytes.Load()
		}
	}
	return now
}

// since is what has passed after another reading.
func (p passage) since(before passage) passage {
	passed := passage{map[string]int{}, map[string]int64{}}
	for who, n := range p.requests {
		passed.requests[who] = n - before.requests[who]
	}
	for who, n := range p.bytes {
		passed.bytes[who] = n - before.bytes[who]
	}
	return passed
}

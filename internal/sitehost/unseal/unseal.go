// Package unseal keeps the host's secrets server unsealed after reboots and
// restarts, with a key that lies on the host. It needs neither Nomad nor a token.
package unseal

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"
)

// DefaultAddress is where OpenBao's API listens on a host.
const DefaultAddress = "http://127.0.0.1:8200"

const (
	// pollSealed is the pause while the server is sealed or not there yet.
	pollSealed = 2 * time.Second
	// pollSettled is the pause where nothing changes by itself soon.
	pollSettled = 10 * time.Second
	// requestLimit bounds one request; unsealing opens the whole storage.
	requestLimit = 30 * time.Second
	maxAnswer    = 64 << 10
)

// State is what the last look found.
type State string

// The states.
const (
	NoKey          State = "no_key"
	BadKeyFile     State = "bad_key_file"
	Unreachable    State = "unreachable"
	NotInitialized State = "not_initialized"
	Sealed         State = "sealed" // and the key on the host does not open it
	Unsealed       State = "unsealed"
)

// Options say which server to unseal, and with what.
type Options struct {
	// Address is the server's URL, on loopback: the key goes nowhere else.
	Address string
	// KeyFile holds the unseal key, or two of which one fits, a line each; it belongs
	// to the user who runs this, alone.
	KeyFile string
	Log     *slog.Logger
}

// NotLoopbackError says that the key would leave the host.
type NotLoopbackError struct{ Address string }

func (e *NotLoopbackError) Error() string {
	return fmt.Sprintf("refuse to unseal %q: it is not a URL with a loopback address", e.Address)
}

// Hint implements plan.Hinter.
func (e *NotLoopbackError) Hint() string { return "use " + DefaultAddress }

// Unsealer watches one server.
type Unsealer struct {
	options Options
	client  *http.Client
	pause   func(State) time.Duration

	mutex   sync.Mutex
	state   State
	unseals int
}

// New checks the address; it asks nothing yet.
func New(options Options) (*Unsealer, error) {
	parsed, err := url.Parse(options.Address)
	if err != nil {
		return nil, &NotLoopbackError{Address: options.Address}
	}
	address, err := netip.ParseAddrPort(parsed.Host)
	if err != nil || !address.Addr().Unmap().IsLoopback() || address.Addr().Zone() != "" || parsed.Scheme != "http" || parsed.User != nil {
		return nil, &NotLoopbackError{Address: options.Address}
	}
	options.Address = "http://" + parsed.Host
	return &Unsealer{options: options, pause: pause, client: &http.Client{
		Timeout: requestLimit,
		// No proxy of the environment, and no idle connection between looks.
		Transport: &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: maxAnswer},
		// A standby redirects to the active server: the key must not follow.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Run looks after the server until ctx ends. No failure ends it.
func (u *Unsealer) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		state, err := u.look(ctx)
		if ctx.Err() != nil {
			return
		}
		u.record(state, err)
		timer.Reset(u.pause(state))
	}
}

func pause(state State) time.Duration {
	switch state {
	case Unsealed, Sealed: // a key that does not fit now hardly fits in two seconds
		return pollSettled
	}
	return pollSealed
}

// record logs changes alone: the state may stay for months.
func (u *Unsealer) record(state State, err error) {
	u.mutex.Lock()
	defer u.mutex.Unlock()
	if state == u.state {
		return
	}
	u.state = state
	log := u.options.Log.With("server", u.options.Address, "state", string(state))
	switch {
	case state == BadKeyFile || state == Sealed:
		log.Error("cannot unseal", "error", err)
	case err != nil:
		log.Info("looked after the secrets server", "reason", err.Error())
	default:
		log.Info("looked after the secrets server")
	}
}

// look asks for the state and unseals where that is needed.
func (u *Unsealer) look(ctx context.Context) (State, error) {
	if err := checkKeyFile(u.options.KeyFile); errors.Is(err, fs.ErrNotExist) {
		return NoKey, nil // nothing to do here: not even a request
	} else if err != nil {
		return BadKeyFile, err
	}
	status, err := u.status(ctx)
	switch {
	case err != nil:
		return Unreachable, err
	case !status.Initialized:
		return NotInitialized, nil
	case !status.Sealed:
		return Unsealed, nil
	case status.Type != "" && status.Type != "shamir":
		return Sealed, fmt.Errorf("its seal is %q, which takes no key of ours", status.Type)
	}
	keys, err := readKeys(u.options.KeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return NoKey, nil
	}
	if err != nil {
		return BadKeyFile, err
	}
	state, err := u.tryKeys(ctx, keys)
	if state != Unsealed {
		return state, err
	}
	u.mutex.Lock()
	u.unseals++
	u.mutex.Unlock()
	return Unsealed, nil
}

// tryKeys gives the server one key after the other until it is open. That one of
// them is refused is no news while another one opens it.
func (u *Unsealer) tryKeys(ctx context.Context, keys []string) (State, error) {
	var refusals []error
	for _, key := range keys {
		status, err := u.unseal(ctx, key)
		switch {
		case errors.As(err, new(*refusedError)):
			refusals = append(refusals, err)
		case err != nil:
			return Unreachable, err
		case status.Sealed:
			refusals = append(refusals, errors.New("the key was taken, but more than one is needed"))
		default:
			return Unsealed, nil
		}
	}
	return Sealed, errors.Join(refusals...)
}

type sealStatus struct {
	Type        string `json:"type"`
	Initialized bool   `json:"initialized"`
	Sealed      bool   `json:"sealed"`
}

// refusedError is an answer of the server that says no.
type refusedError struct {
	code int
	said string
}

func (e *refusedError) Error() string {
	if e.said == "" {
		return fmt.Sprintf("answer %d", e.code)
	}
	return fmt.Sprintf("answer %d: %s", e.code, e.said)
}

func (u *Unsealer) status(ctx context.Context) (sealStatus, error) {
	return u.ask(ctx, http.MethodGet, "/v1/sys/seal-status", nil)
}

func (u *Unsealer) unseal(ctx context.Context, key string) (sealStatus, error) {
	body, err := json.Marshal(map[string]string{"key": key})
	if err != nil {
		return sealStatus{}, fmt.Errorf("unseal: %w", err)
	}
	defer clear(body)
	status, err := u.ask(ctx, http.MethodPut, "/v1/sys/unseal", body)
	var refused *refusedError
	if errors.As(err, &refused) {
		// What a server says about a key could repeat it.
		refused.said = strings.ReplaceAll(refused.said, key, "[redacted]")
	}
	return status, err
}

func (u *Unsealer) ask(ctx context.Context, method, path string, body []byte) (sealStatus, error) {
	request, err := http.NewRequestWithContext(ctx, method, u.options.Address+path, bytes.NewReader(body))
	if err != nil {
		return sealStatus{}, fmt.Errorf("ask the server: %w", err)
	}
	response, err := u.client.Do(request)
	if err != nil {
		return sealStatus{}, fmt.Errorf("ask the server: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return sealStatus{}, fmt.Errorf("read the server's answer: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		var said struct{ Errors []string }
		_ = json.Unmarshal(content, &said) // whatever else it says is not shown
		return sealStatus{}, &refusedError{code: response.StatusCode, said: strings.Join(said.Errors, "; ")}
	}
	var status sealStatus
	if err := json.Unmarshal(content, &status); err != nil {
		return sealStatus{}, fmt.Errorf("read the server's answer: %w", err)
	}
	return status, nil
}

package pull

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"

	engine "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/hostkey"
)

const (
	// DefaultInterval is how often the keys are asked for again.
	DefaultInterval = time.Minute

	openBaoLimit = 10 * time.Second
	maxAnswer    = 1 << 20
	loginTTL     = 2 * time.Minute
	// freshFor is how long keys that were just read are not read again: many
	// requests may be refused at once.
	freshFor = time.Second
)

// NotLoopbackError says that the host would log in elsewhere than on itself.
type NotLoopbackError struct{ Address string }

func (e *NotLoopbackError) Error() string {
	return fmt.Sprintf("refuse to log in at %q: it is not a URL with a loopback address", e.Address)
}

// Hint implements plan.Hinter.
func (e *NotLoopbackError) Hint() string { return "use http://127.0.0.1:8200" }

// OpenBaoOptions say where the keys are, and as whom to ask for them.
type OpenBaoOptions struct {
	// Address is OpenBao's URL, on loopback.
	Address string
	// HostKey is the file of the key by which the host logs in, as Host.
	HostKey string
	Host    string
	// Interval is DefaultInterval but in tests.
	Interval time.Duration
	Log      *slog.Logger
}

// OpenBao reads the keys by the host's own login, and has them in memory alone.
type OpenBao struct {
	options OpenBaoOptions
	client  *http.Client
	flights singleflight.Group

	mutex   sync.Mutex
	token   secret.Value
	expires time.Time
	held    pair
	tried   time.Time
	// halves counts looks at which only one half had changed.
	halves  int
	failing string
}

// pair is what is read of the two secrets.
type pair struct {
	id, key                     secret.Value
	idGeneration, keyGeneration int
	read                        time.Time
}

func (p pair) known() bool { return p.idGeneration > 0 }

// generation is the older of both: a half that was not switched yet counts.
func (p pair) generation() int { return min(p.idGeneration, p.keyGeneration) }

// NewOpenBao checks the options; it asks nothing yet.
func NewOpenBao(options OpenBaoOptions) (*OpenBao, error) {
	parsed, err := url.Parse(options.Address)
	if err != nil {
		return nil, &NotLoopbackError{Address: options.Address}
	}
	address, err := netip.ParseAddrPort(parsed.Host)
	if err != nil || !address.Addr().Unmap().IsLoopback() || address.Addr().Zone() != "" || parsed.Scheme != "http" || parsed.User != nil {
		return nil, &NotLoopbackError{Address: options.Address}
	}
	options.Address = "http://" + parsed.Host
	if options.Interval <= 0 {
		options.Interval = DefaultInterval
	}
	if options.Log == nil {
		options.Log = slog.New(slog.DiscardHandler)
	}
	return &OpenBao{options: options, client: &http.Client{
		Timeout:       openBaoLimit,
		Transport:     &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Run asks for the keys again and again until ctx ends. No failure ends it.
func (o *OpenBao) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		err := o.refresh(ctx, false)
		if ctx.Err() != nil {
			return
		}
		o.report(err)
		timer.Reset(o.options.Interval)
	}
}

// Refresh asks for the keys now: whoever rotates them waits for it.
func (o *OpenBao) Refresh(ctx context.Context) error {
	err := o.refresh(ctx, false)
	if ctx.Err() == nil {
		o.report(err)
	}
	return err
}

// report logs changes alone: OpenBao may be away for days.
func (o *OpenBao) report(err error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text == o.failing {
		return
	}
	o.failing = text
	if err != nil {
		o.options.Log.Warn("cannot read the keys of the object store", "reason", text, "generation", o.held.generation())
		return
	}
	o.options.Log.Info("the keys of the object store are read", "generation", o.held.generation())
}

// Keys implements KeySource. While OpenBao is away, the keys in memory stay.
func (o *OpenBao) Keys(ctx context.Context, refresh bool) (id string, key secret.Value, generation int, err error) {
	o.mutex.Lock()
	held := o.held
	o.mutex.Unlock()
	if !held.known() || refresh {
		err = o.refresh(ctx, refresh)
		o.mutex.Lock()
		held = o.held
		o.mutex.Unlock()
	}
	if !held.known() {
		return "", secret.Value{}, 0, &NoKeysError{Err: err}
	}
	return held.id.Reveal(), held.key, held.generation(), nil
}

// Generation is that of the keys in use, 0 where there are none.
func (o *OpenBao) Generation() int {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.held.generation()
}

func (o *OpenBao) refresh(ctx context.Context, refused bool) error {
	result := o.flights.DoChan("read", func() (any, error) {
		// Who asks first must not end it for the others.
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*openBaoLimit)
		defer cancel()
		return nil, o.read(limited, refused)
	})
	select {
	case got := <-result:
		return got.Err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// read looks which generations are active, and reads those that are new.
func (o *OpenBao) read(ctx context.Context, refused bool) error {
	o.mutex.Lock()
	held, fresh := o.held, time.Since(o.tried) < freshFor
	o.mutex.Unlock()
	if held.known() && fresh {
		return nil
	}
	defer func() {
		o.mutex.Lock()
		o.tried = time.Now()
		o.mutex.Unlock()
	}()
	next := pair{read: time.Now()}
	id, err := o.generations(ctx, site.StoreProxyID)
	if err != nil {
		return err
	}
	key, err := o.generations(ctx, site.StoreProxySecret)
	if err != nil {
		return err
	}
	next.idGeneration, next.keyGeneration = id.beside(key), key.beside(id)
	if o.halfway(held, next, refused) {
		return nil
	}
	next.id, next.key = held.id, held.key
	if next.idGeneration != held.idGeneration {
		if next.id, err = o.value(ctx, site.StoreProxyID, next.idGeneration); err != nil {
			return err
		}
	}
	if next.keyGeneration != held.keyGeneration {
		if next.key, err = o.value(ctx, site.StoreProxySecret, next.keyGeneration); err != nil {
			return err
		}
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.held = next
	return nil
}

// halfway reports whether a rotation has switched one half and not the other yet:
// an id with another's key opens nothing. Keys that were put by hand stay so, and
// are taken at the next look.
func (o *OpenBao) halfway(held, next pair, refused bool) bool {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	one := (held.idGeneration == next.idGeneration) != (held.keyGeneration == next.keyGeneration)
	if !held.known() || refused || !one {
		o.halves = 0
		return false
	}
	o.halves++
	return o.halves == 1
}

// generations are what is known of one half; see reconcile/secret.Rotation.
type generations struct{ active, candidate, retiring int }

// beside is the generation that goes with the other half: where a rotation was cut
// short between the two, both are read as they were before.
func (g generations) beside(other generations) int {
	if g.candidate == 0 && g.retiring > 0 && other.candidate > 0 {
		return g.retiring
	}
	return g.active
}

func (o *OpenBao) generations(ctx context.Context, name string) (generations, error) {
	var metadata struct {
		Data struct {
			CurrentVersion int `json:"current_version"`
			CustomMetadata struct {
				Active    string `json:"active"`
				Candidate string `json:"candidate"`
				Retiring  string `json:"retiring"`
			} `json:"custom_metadata"`
		} `json:"data"`
	}
	if err := o.ask(ctx, "/v1/"+site.SecretMount+"/metadata/"+kvPath(name), &metadata); err != nil {
		return generations{}, err
	}
	number := func(text string) int {
		found, err := strconv.Atoi(text)
		if err != nil || found < 0 {
			return 0
		}
		return found
	}
	custom := metadata.Data.CustomMetadata
	found := generations{active: number(custom.Active), candidate: number(custom.Candidate), retiring: number(custom.Retiring)}
	if found.active == 0 {
		found.active = metadata.Data.CurrentVersion
	}
	if found.active <= 0 {
		return generations{}, fmt.Errorf("secret %s has no value", kvPath(name))
	}
	return found, nil
}

func (o *OpenBao) value(ctx context.Context, name string, generation int) (secret.Value, error) {
	var version struct {
		Data struct {
			Data map[string]any `json:"data"`
		} `json:"data"`
	}
	path := fmt.Sprintf("/v1/%s/data/%s?version=%d", site.SecretMount, kvPath(name), generation)
	if err := o.ask(ctx, path, &version); err != nil {
		return secret.Value{}, err
	}
	text, ok := version.Data.Data[site.SecretField].(string)
	if !ok || text == "" {
		return secret.Value{}, fmt.Errorf("generation %d of secret %s has no text in its field %q", generation, kvPath(name), site.SecretField)
	}
	return secret.New(text), nil
}

func kvPath(name string) string { return site.ObjectStorageComponent + "/" + name }

// ask reads with the host's token; one that is refused is replaced once.
func (o *OpenBao) ask(ctx context.Context, path string, into any) error {
	for again := false; ; again = true {
		token, err := o.login(ctx, again)
		if err != nil {
			return err
		}
		err = o.call(ctx, http.MethodGet, path, token, nil, into)
		var status *statusError
		if again || !errors.As(err, &status) || status.code != http.StatusForbidden {
			return err
		}
	}
}

func (o *OpenBao) login(ctx context.Context, anew bool) (secret.Value, error) {
	o.mutex.Lock()
	token, expires := o.token, o.expires
	o.mutex.Unlock()
	if !anew && time.Now().Before(expires) {
		return token, nil
	}
	signed, err := o.identity()
	if err != nil {
		return secret.Value{}, err
	}
	body, err := json.Marshal(map[string]string{"role": engine.HostRole, "jwt": signed.Reveal()})
	if err != nil {
		return secret.Value{}, errors.New("encode the host's login")
	}
	var answer struct {
		Auth struct {
			Token string `json:"client_token"`
			TTL   int    `json:"lease_duration"`
		} `json:"auth"`
	}
	if err := o.call(ctx, http.MethodPost, "/v1/auth/"+engine.HostsMount+"/login", secret.Value{}, body, &answer); err != nil {
		return secret.Value{}, err
	}
	if answer.Auth.Token == "" {
		return secret.Value{}, errors.New("log in to OpenBao: it gave no token")
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.token = secret.New(answer.Auth.Token)
	// Well before it ends, so that no request meets its end.
	o.expires = time.Now().Add(time.Duration(answer.Auth.TTL) * time.Second * 3 / 4)
	return o.token, nil
}

// identity is the JWT by which OpenBao's mount for hosts knows this one.
func (o *OpenBao) identity() (secret.Value, error) {
	private, err := hostkey.Private(o.options.HostKey)
	if err != nil {
		return secret.Value{}, err
	}
	nonce := make([]byte, 16)
	if _, err := rand.Read(nonce); err != nil {
		return secret.Value{}, fmt.Errorf("make a token id: %w", err)
	}
	now := time.Now()
	claims, err := json.Marshal(map[string]any{
		"iss": engine.HostIssuer, "aud": []string{engine.Audience}, "sub": o.options.Host, "host": o.options.Host,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(loginTTL).Unix(), "jti": hex.EncodeToString(nonce),
	})
	if err != nil {
		return secret.Value{}, fmt.Errorf("encode token claims: %w", err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg":"EdDSA","typ":"JWT"}`)) + "." + encode(claims)
	return secret.New(signed + "." + encode(ed25519.Sign(private, []byte(signed)))), nil
}

// statusError is what OpenBao answers. Its text is not kept: it may repeat what
// was sent.
type statusError struct {
	code int
	path string
}

func (e *statusError) Error() string {
	switch e.code {
	case http.StatusServiceUnavailable:
		return "OpenBao is sealed"
	case http.StatusNotFound:
		return "OpenBao has nothing at " + e.path
	}
	return fmt.Sprintf("OpenBao answers %s with status %d", e.path, e.code)
}

func (o *OpenBao) call(ctx context.Context, method, path string, token secret.Value, body []byte, into any) error {
	request, err := http.NewRequestWithContext(ctx, method, o.options.Address+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("ask OpenBao: %w", err)
	}
	if value := token.Reveal(); value != "" {
		request.Header.Set("X-Vault-Token", value)
	}
	request.Header.Set("X-Vault-Request", "true")
	response, err := o.client.Do(request)
	if err != nil {
		return fmt.Errorf("ask OpenBao: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return &statusError{code: response.StatusCode, path: request.URL.Path}
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, maxAnswer)).Decode(into); err != nil {
		return fmt.Errorf("ask OpenBao for %s: its answer is not JSON", request.URL.Path)
	}
	return nil
}

// GenerationMetric is the gauge of the generation in use.
const GenerationMetric = "site_host_object_store_key_generation"

// Collectors are the metrics of the keys.
func (o *OpenBao) Collectors() []prometheus.Collector {
	return []prometheus.Collector{
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: GenerationMetric, Help: "Generation of the object store's keys in use; 0: none.",
		}, func() float64 { return float64(o.Generation()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "site_host_object_store_keys_read_timestamp_seconds", Help: "When the keys were last read; 0: never.",
		}, func() float64 {
			o.mutex.Lock()
			defer o.mutex.Unlock()
			if !o.held.known() {
				return 0
			}
			return float64(o.held.read.Unix())
		}),
	}
}

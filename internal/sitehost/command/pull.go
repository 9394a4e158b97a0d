package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/sitehost/collect"
	"github.com/nomad-site/site/internal/sitehost/hostkey"
	"github.com/nomad-site/site/internal/sitehost/pull"
	"github.com/nomad-site/site/internal/sitehost/serve"
	"github.com/nomad-site/site/internal/sitehost/unseal"
)

const (
	// maxWants bounds the list of artifacts on standard input.
	maxWants = 16 << 20
	// progressEvery bounds the lines of progress.
	progressEvery = 100 * time.Millisecond
)

// pullSettings say from where artifacts are pulled, and as whom.
type pullSettings struct {
	store, config, hostKey, openBao string
}

func (s *pullSettings) flags(command *cobra.Command, config string) {
	command.Flags().StringVar(&s.config, "object-store", config, "file that says where the site's object store is")
	command.Flags().StringVar(&s.hostKey, "host-key", hostkey.DefaultPath, "file of the key by which the host logs in to OpenBao")
}

// readObjectStore is fs.ErrNotExist where the site has none.
func readObjectStore(path string) (host.ObjectStore, error) {
	var config host.ObjectStore
	content, err := os.ReadFile(path)
	if err != nil {
		return config, fmt.Errorf("object store: %w", err)
	}
	if err := json.Unmarshal(content, &config); err != nil {
		return config, plan.WithHint(fmt.Errorf("object store: %s: %w", path, err), "deploy again: it is written by site")
	}
	if config.Site == "" || config.Host == "" {
		return config, plan.WithHint(fmt.Errorf("object store: %s names no site or no host", path), "deploy again: it is written by site")
	}
	return config, nil
}

// keys gives the source of the keys.
func (s *pullSettings) keys(config host.ObjectStore, log *slog.Logger) (*pull.OpenBao, error) {
	return pull.NewOpenBao(pull.OpenBaoOptions{Address: s.openBao, HostKey: s.hostKey, Host: config.Host, Log: log})
}

func newPuller(config host.ObjectStore, store *blob.Store, keys pull.KeySource, log *slog.Logger) (*pull.Puller, error) {
	return pull.New(pull.Options{Config: config, Store: store, Keys: keys, Log: log, MakeRoom: collect.Room(store)})
}

func pullCommand(options Options) *cobra.Command {
	var settings pullSettings
	command := &cobra.Command{
		Use: "pull", Short: "Pull artifacts from the site's object store", Args: cobra.NoArgs,
		Long: "Reads a JSON list of {\"artifact\", \"digest\"} on standard input and has each in the store, published under its\n" +
			"name. Prints lines of JSON: {\"done\", \"total\"} in bytes, and at the end {\"result\"} or {\"error\"} with a code:\n" +
			"unreachable, denied, no_keys, not_found, corrupt, no_space or internal.",
		RunE: func(command *cobra.Command, _ []string) error { return runPull(command.Context(), options, settings) },
	}
	command.Flags().StringVar(&settings.store, "store", serve.DefaultStore, "folder of the store")
	command.Flags().StringVar(&settings.openBao, "openbao", unseal.DefaultAddress, "URL of OpenBao, on loopback")
	settings.flags(command, host.ObjectStorePath)
	return command
}

// pullResult is what a pull brought.
type pullResult struct {
	Names         int   `json:"names"`
	Requests      int64 `json:"requests"`
	BytesReceived int64 `json:"bytes_received"`
	KeyGeneration int   `json:"key_generation"`
}

// pullFailure is why it did not.
type pullFailure struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

func runPull(ctx context.Context, options Options, settings pullSettings) error {
	wants, err := readWants(options.Stdin)
	if err != nil {
		return err
	}
	result, err := fetch(ctx, options, settings, wants)
	if err != nil {
		failure := pullFailure{Code: pull.Code(err), Message: err.Error(), Hint: plan.HintOf(err)}
		return errors.Join(err, options.print(map[string]pullFailure{"error": failure}))
	}
	return options.print(map[string]pullResult{"result": result})
}

func readWants(input io.Reader) ([]pull.Want, error) {
	decoder := json.NewDecoder(io.LimitReader(input, maxWants))
	decoder.DisallowUnknownFields()
	var wants []pull.Want
	if err := decoder.Decode(&wants); err != nil {
		return nil, fmt.Errorf("read what to pull: %w", err)
	}
	for _, want := range wants {
		if want.Artifact == "" || !want.Digest.Valid() {
			return nil, fmt.Errorf("read what to pull: %.100q at %.100q is no artifact", want.Artifact, string(want.Digest))
		}
	}
	return wants, nil
}

func fetch(ctx context.Context, options Options, settings pullSettings, wants []pull.Want) (result pullResult, err error) {
	config, err := readObjectStore(settings.config)
	if err != nil {
		return result, err
	}
	store, err := blob.OpenStore(settings.store)
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	log := slog.New(slog.NewTextHandler(options.Stderr, nil))
	keys, err := settings.keys(config, log)
	if err != nil {
		return result, err
	}
	puller, err := newPuller(config, store, keys, log)
	if err != nil {
		return result, err
	}
	defer puller.Close()
	if err := puller.Fetch(ctx, wants, printProgress(options)); err != nil {
		return result, err
	}
	requests, received := puller.Traffic()
	return pullResult{Names: len(wants), Requests: requests, BytesReceived: received, KeyGeneration: keys.Generation()}, nil
}

// printProgress prints not every chunk, but always the first and the last.
func printProgress(options Options) func(done, total int64) {
	var mutex sync.Mutex
	var last time.Time
	return func(done, total int64) {
		mutex.Lock()
		defer mutex.Unlock()
		if done < total && time.Since(last) < progressEvery {
			return
		}
		last = time.Now()
		// Whoever no longer reads is found out by the result.
		_ = options.print(struct {
			Done  int64 `json:"done"`
			Total int64 `json:"total"`
		}{done, total})
	}
}

// background pulls for the server. What it needs may come later than the server,
// which serves what is there all the same.
type background struct {
	settings pullSettings
	config   host.ObjectStore
	keys     *pull.OpenBao
	log      *slog.Logger
	// broken is why nothing can be pulled until the server is started anew.
	broken error

	mutex  sync.Mutex
	store  *blob.Store
	puller *pull.Puller
}

// newBackground is nil where the site has no object store.
func newBackground(settings pullSettings, log *slog.Logger) (*background, error) {
	if settings.config == "" {
		return nil, nil
	}
	b := &background{settings: settings, log: log}
	config, err := readObjectStore(settings.config)
	if errors.Is(err, fs.ErrNotExist) {
		log.Info("the site has no object store", "file", settings.config)
		return nil, nil
	}
	if err != nil {
		// All that is on the host is served in spite of it.
		log.Error("nothing is pulled", "error", err)
		b.broken = err
	}
	b.config = config
	b.keys, err = settings.keys(config, log)
	return b, err
}

// get opens the store where that was not done yet.
func (b *background) get() (serve.Puller, error) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if b.broken != nil {
		return nil, b.broken
	}
	if b.puller != nil {
		return b.puller, nil
	}
	store, err := blob.OpenStore(b.settings.store)
	if err != nil {
		return nil, err
	}
	puller, err := newPuller(b.config, store, b.keys, b.log)
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	b.store, b.puller = store, puller
	return puller, nil
}

// run keeps the keys new until ctx ends, and then ends what is pulled.
func (b *background) run(ctx context.Context) {
	if b.broken == nil {
		b.keys.Run(ctx)
	}
	<-ctx.Done()
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if b.puller != nil {
		b.puller.Close()
		_ = b.store.Close()
	}
}

// Describe implements prometheus.Collector: what is counted depends on whether the
// store could be opened already.
func (b *background) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (b *background) Collect(values chan<- prometheus.Metric) {
	for _, each := range b.keys.Collectors() {
		each.Collect(values)
	}
	b.mutex.Lock()
	puller := b.puller
	b.mutex.Unlock()
	if puller != nil {
		puller.Collect(values)
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/adapter/objectstore"
	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/writesession"
	"github.com/nomad-site/site/internal/writesession/server"
	"github.com/nomad-site/site/internal/writesession/server/access"
)

const (
	// memoryLimit is below that of the job; GOMEMLIMIT of the environment beats it.
	memoryLimit = 96 << 20
	// drainLimit is less than the job's kill_timeout.
	drainLimit = 15 * time.Second
	probeLimit = time.Minute
	// The pauses between probes of a store that does not answer.
	firstPause = time.Second
	mostPause  = time.Minute
)

// serve runs until ctx ends, then lets running requests finish for a while.
func serve(ctx context.Context, config config, log *slog.Logger, ready func(net.Addr)) error {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	keys := &keyFile{path: config.keysFile}
	bucket, err := objectstore.New(objectstore.Options{
		Endpoint: config.endpoint, Region: config.region, Bucket: config.bucket, PathStyle: config.pathStyle, Keys: keys.keys,
	})
	if err != nil {
		return err
	}
	operators, err := access.NewOperators(config.openBao, reconcile.OperatorPolicy, reconcile.UploaderPolicy)
	if err != nil {
		return err
	}
	var enforces atomic.Bool
	sessions, err := server.New(server.Options{
		Site: config.site, Bucket: bucket, Log: log, Version: version, Enforces: enforces.Load,
		Authorizer: access.Either{
			Operators: operators, Jobs: access.NewJobs(access.JobOptions{KeysURL: config.jwks, Allowed: config.jobs}),
		},
	})
	if err != nil {
		return err
	}
	var listen net.ListenConfig
	listener, err := listen.Listen(ctx, "tcp", config.listen.String())
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	log.Info("serving write sessions", "site", config.site, "address", listener.Addr().String(),
		"endpoint", config.endpoint, "bucket", config.bucket, "version", version)
	if ready != nil {
		ready(listener.Addr())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return serveHTTP(ctx, sessions.HTTP(), listener, log) })
	group.Go(func() error { return untilEnd(ctx, sessions.Run(ctx)) })
	group.Go(func() error {
		probe(ctx, bucket, writesession.Layout{Site: config.site}, &enforces, log)
		return nil
	})
	return group.Wait()
}

// untilEnd: to be told to stop is no error.
func untilEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func serveHTTP(ctx context.Context, web *http.Server, listener net.Listener, log *slog.Logger) error {
	served := make(chan error, 1)
	go func() { served <- web.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve write sessions: %w", err)
	case <-ctx.Done():
	}
	log.Info("stopping")
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
	defer cancel()
	err := web.Shutdown(drain)
	if errors.Is(err, context.DeadlineExceeded) {
		log.Warn("cut running requests to stop in time; who sent them tries again")
		err = web.Close()
	}
	if serveErr := <-served; !errors.Is(serveErr, http.ErrServerClosed) {
		err = errors.Join(err, serveErr)
	}
	if err != nil {
		return fmt.Errorf("stop serving: %w", err)
	}
	return nil
}

// probe finds out once what the store enforces; until then nothing is taken for
// granted, which costs a second upload at most.
func probe(ctx context.Context, bucket *objectstore.Bucket, layout writesession.Layout, enforces *atomic.Bool, log *slog.Logger) {
	for pause := firstPause; ; pause = min(2*pause, mostPause) {
		limited, cancel := context.WithTimeout(ctx, probeLimit)
		found, err := bucket.Probe(limited, layout.Site+"/probes/")
		cancel()
		if err == nil {
			enforces.Store(found)
			log.Info("the object store was probed", "enforces_hashes", found)
			return
		}
		if ctx.Err() == nil {
			log.Warn("cannot probe the object store yet", "error", err, "again_in", pause.String())
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

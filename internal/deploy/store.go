package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/artifact"
	"github.com/nomad-site/site/internal/reconcile/host"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/writesession/client"
)

// The ways by which the components' artifacts travel to hosts.
const (
	// ViaSSH sends them to each host.
	ViaSSH = "ssh"
	// ViaStore sends them once to the object store, from where each host pulls.
	ViaStore = "store"
)

// transport is by which way this run brings the components' artifacts: decided once.
func (s *session) transport(ctx context.Context) (string, error) {
	if s.via != "" {
		return s.via, nil
	}
	via, err := s.chooseTransport(ctx)
	if err == nil {
		s.via = via
	}
	return via, err
}

// chooseTransport takes the store where the site has one that works. One that was
// never brought up is no reason to fail, since it comes with a deploy; one that is
// broken is, because whoever declared it counts on it.
func (s *session) chooseTransport(ctx context.Context) (string, error) {
	asked := s.options.Via == ViaStore
	switch {
	case s.options.Via == ViaSSH:
		return ViaSSH, nil
	case s.site.ObjectStore == nil && asked:
		return "", plan.WithHint(fmt.Errorf("site %q has no object store", s.site.Name),
			"declare object_store in sites/%s/site.hcl, or leave --via=store out", s.site.Name)
	case s.site.ObjectStore == nil:
		return ViaSSH, nil
	case s.nomad == nil && !asked: // a bare host
		return ViaSSH, nil
	case s.nomad == nil:
		return "", s.noStoreYet()
	}
	registered, stable, err := s.nomad.Standing(ctx, site.ObjectStorageComponent)
	switch {
	case err != nil:
		return "", err
	case !registered && asked:
		return "", s.noStoreYet()
	case !registered:
		return ViaSSH, nil
	}
	err = s.openStore(ctx)
	if err != nil && !stable && !asked && ctx.Err() == nil {
		// It never was healthy: this run may be what mends it.
		s.options.Warn(fmt.Sprintf("artifacts travel by SSH: %v", err))
		return ViaSSH, nil
	}
	return ViaStore, err
}

func (s *session) noStoreYet() error {
	return plan.WithHint(fmt.Errorf("site %q has no %s running yet", s.site.Name, site.ObjectStorageComponent),
		"deploy once with --via=ssh, which brings it up")
}

// serviceLimit bounds how long the service may take to answer.
const serviceLimit = 20 * time.Second

// openStore reaches the service that hands out uploads.
func (s *session) openStore(ctx context.Context) error {
	if s.store != nil {
		return nil
	}
	base, api := s.site.ObjectStore.ServiceURL, &http.Client{}
	if base == "" {
		base = fmt.Sprintf("http://%s", net.JoinHostPort("127.0.0.1", fmt.Sprint(site.ObjectStoragePort)))
		api.Transport = &http.Transport{DialContext: s.servers()[0].conn.DialContext, MaxIdleConnsPerHost: 8}
	}
	token := &uploadToken{session: s}
	service, err := client.New(client.Options{BaseURL: base, Site: s.site.Name, HTTP: api, Store: &http.Client{}, Token: token.get})
	if err != nil {
		return err
	}
	s.onClose(api.CloseIdleConnections)
	// It may just be starting, as after a reboot of its host.
	err = retry.Until(ctx, site.ObjectStorageComponent+" to answer", min(serviceLimit, s.left()), func(ctx context.Context) error {
		err := service.Healthy(ctx)
		var unreachable *client.UnreachableError
		if err != nil && !errors.As(err, &unreachable) {
			return retry.Permanent(err)
		}
		return err
	})
	if err != nil {
		return withoutStore(plan.WithHint(fmt.Errorf("%s does not answer: %w", site.ObjectStorageComponent, err),
			"see `site status` and `site logs %s`", site.ObjectStorageComponent))
	}
	s.store = service
	return nil
}

// uploadTokenAge is after how long an upload logs in again: tokens live ten minutes.
const uploadTokenAge = 8 * time.Minute

// uploadToken shows the service who we are. It is good for nothing else, so that
// the service never sees what could change the site.
type uploadToken struct {
	session *session
	mutex   sync.Mutex
	token   secret.Value
	since   time.Time
}

func (u *uploadToken) get(ctx context.Context) (secret.Value, error) {
	u.mutex.Lock()
	defer u.mutex.Unlock()
	if !u.token.IsZero() && time.Since(u.since) < uploadTokenAge {
		return u.token, nil
	}
	token, err := u.session.logInToUpload(ctx)
	if err != nil {
		return secret.Value{}, withoutStore(err)
	}
	u.token, u.since = token, time.Now()
	return token, nil
}

func (s *session) logInToUpload(ctx context.Context) (secret.Value, error) {
	bao, health, err := s.dialOpenBao(ctx)
	if err != nil {
		return secret.Value{}, err
	}
	if health.Sealed {
		if err := s.awaitUnsealed(ctx, bao); err != nil {
			return secret.Value{}, err
		}
	}
	signer, operator, err := s.operatorKey()
	if err != nil {
		return secret.Value{}, err
	}
	signed, err := nomad.SignJWTFor(signer, operator, nomad.Audience, s.purpose(), loginTokenTTL)
	if err != nil {
		return secret.Value{}, err
	}
	token, _, err := bao.Login(ctx, catalogue.OperatorsMount, catalogue.UploaderRole, signed)
	if err != nil {
		return secret.Value{}, fmt.Errorf("log in to OpenBao for uploads, as operator %s: %w", operator, err)
	}
	logged, err := bao.WithToken(token)
	if err != nil {
		return secret.Value{}, err
	}
	s.temporary.hold("the token for uploads", logged.RevokeSelf)
	return token, nil
}

// withoutStore says that any trouble with the store can be gone round.
func withoutStore(err error) error {
	const way = "`--via=ssh` deploys without the store"
	if err == nil || strings.Contains(plan.HintOf(err), way) {
		return err
	}
	if hint := plan.HintOf(err); hint != "" {
		return plan.WithHint(err, "%s; %s", hint, way)
	}
	return plan.WithHint(err, "%s", way)
}

// componentShipments are the artifacts of the components that travel this way.
func (s *session) componentShipments(ctx context.Context, way string) ([]shipment, error) {
	via, err := s.transport(ctx)
	if err != nil {
		return nil, err
	}
	var shipments []shipment
	for _, component := range s.site.Components {
		travels := via
		if component.BySSH() {
			travels = ViaSSH
		}
		if travels != way {
			continue
		}
		for _, built := range s.built[component.Name] {
			one, err := s.shipBuilt(component, built)
			if err != nil {
				return nil, err
			}
			shipments = append(shipments, one)
		}
	}
	return shipments, nil
}

// uploadArtifacts brings to the object store, once, what it lacks.
func (s *session) uploadArtifacts() plan.Step {
	return &plan.Reconciler[[]shipment, []artifact.Actual]{
		Title:  "uploads",
		Desire: func(ctx context.Context) ([]shipment, error) { return s.storeShipments(ctx) },
		Observe: func(ctx context.Context, desired []shipment) ([]artifact.Actual, error) {
			if len(desired) == 0 {
				return nil, nil
			}
			missing, err := s.store.Missing(ctx, joinOffers(desired))
			if err != nil {
				return nil, withoutStore(err)
			}
			return lackingOf(desired, missing), nil
		},
		Diff: func(desired []shipment, actual []artifact.Actual) []plan.Change {
			return artifact.Diff("", wanted(desired), actual)
		},
		Converge: func(ctx context.Context, desired []shipment, _ []artifact.Actual, _ []plan.Change, progress plan.Progress) error {
			start := time.Now()
			result, err := s.store.Push(ctx, joinOffers(desired), client.PushOptions{
				Progress: func(done, total int64) { progress.Bytes("to the store", done, total) },
			})
			if err != nil {
				return withoutStore(err)
			}
			progress.Message("sent %d of %d chunks in %d packs, %d bytes on the wire, %d requests, %s",
				result.Chunks, result.Chunks+result.ChunksDeduped, result.Packs, result.BytesWire, result.Requests, time.Since(start).Round(time.Millisecond))
			return nil
		},
	}
}

// fillStore brings to a store what travelled by SSH because its service came up
// only with this run.
func (s *session) fillStore() plan.Step {
	step := s.uploadArtifacts()
	return where{renamed{step, "first uploads"}, func() bool {
		if s.site.ObjectStore == nil || s.options.Via != "" || s.via != ViaSSH || s.options.DryRun {
			return false
		}
		s.via = "" // to be decided anew
		return true
	}}
}

func (s *session) storeShipments(ctx context.Context) ([]shipment, error) {
	if s.site.ObjectStore == nil {
		return nil, nil
	}
	if err := s.needSiteHost(); err != nil {
		return nil, err
	}
	return s.componentShipments(ctx, ViaStore)
}

// pullArtifacts has every host pull what it lacks from the object store, before
// any job waits for it.
func (s *session) pullArtifacts() plan.Step {
	return s.bringStep("pulls", s.jobHosts, s.storeShipments, s.pull)
}

// want names one artifact to site-host.
type want struct {
	Artifact string      `json:"artifact"`
	Digest   blob.Digest `json:"digest"`
}

// pulling is one line of what `site-host pull` says.
type pulling struct {
	Done  int64 `json:"done"`
	Total int64 `json:"total"`
}

// pull has one host fetch the shipments.
func (s *session) pull(ctx context.Context, h *remoteHost, shipments []shipment, progress plan.Progress) error {
	wants := make([]want, len(shipments))
	for i, one := range shipments {
		wants[i] = want{Artifact: one.offer.Names[0].Artifact, Digest: one.offer.Names[0].Digest}
	}
	process, err := h.conn.Start(ctx, []string{host.SiteHostPath, "pull", "--store", host.StorePath})
	if err != nil {
		return err
	}
	err = json.NewEncoder(process).Encode(wants)
	if err == nil {
		err = process.CloseWrite()
	}
	if err == nil {
		err = followPull(process, func(done, total int64) { progress.Bytes("pulled by "+h.Name, done, total) })
	}
	if ended := process.Wait(); ended != nil {
		return withoutStore(fmt.Errorf("host %s pulls from the store: %w", h.Name, ended))
	}
	return err
}

func followPull(output io.Reader, report func(done, total int64)) error {
	decoder := json.NewDecoder(output)
	for {
		var line pulling
		err := decoder.Decode(&line)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read the progress of a pull: %w", err)
		case line.Total > 0:
			report(line.Done, line.Total)
		}
	}
}

// jobHosts are those that run jobs.
func (s *session) jobHosts() []*remoteHost {
	return slices.DeleteFunc(slices.Clone(s.hosts), func(h *remoteHost) bool { return !h.Client })
}

package deploy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/plan"
)

// Exported says what ExportArtifact wrote.
type Exported struct {
	Artifact string      `json:"artifact"`
	Digest   blob.Digest `json:"digest"`
	Bytes    int64       `json:"bytes"`
	// Host is the one that served it.
	Host string `json:"host"`
}

// ExportArtifact writes one blob back as it was: a file, or any blob of an image by
// its own digest. It comes from a host, which pulls what it lacks, and is proven here.
func ExportArtifact(ctx context.Context, options Options, name string, digest blob.Digest, into io.Writer) (Exported, error) {
	exported := Exported{Artifact: name, Digest: digest}
	s, err := read(ctx, options)
	if err != nil {
		return exported, err
	}
	defer s.close()
	h := s.servers()[0]
	exported.Host = h.Name
	transport := &http.Transport{DialContext: h.conn.DialContext}
	defer transport.CloseIdleConnections()
	through := &http.Client{Transport: transport}
	found, err := s.exportOne(ctx, through, name, digest, into, &exported)
	if err == nil && !found && s.site.ObjectStore != nil {
		// A blob of an image that the host has no more: it pulls the image first.
		if err = s.pullOwner(ctx, through, name, digest, exported); err == nil {
			found, err = s.exportOne(ctx, through, name, digest, into, &exported)
		}
	}
	if err != nil || found {
		return exported, err
	}
	return exported, plan.WithHint(fmt.Errorf("host %s has no artifact %s@%s", h.Name, name, digest), "see `site artifacts ls`")
}

// exportOne tries all that site-host serves a digest as.
func (s *session) exportOne(ctx context.Context, through *http.Client, name string, digest blob.Digest, into io.Writer, exported *Exported) (bool, error) {
	var problem error // such as a store that is away, which the host may not need
	for _, path := range []string{
		fmt.Sprintf("/artifacts/%s/%s@%s", s.site.Name, name, digest),
		fmt.Sprintf("/v2/%s/%s/manifests/%s", s.site.Name, name, digest),
		fmt.Sprintf("/v2/%s/%s/blobs/%s", s.site.Name, name, digest),
	} {
		found, err := exportFrom(ctx, through, path, digest, into, exported)
		if found || errors.Is(err, errPartial) {
			return found, err
		}
		if err != nil {
			problem = err
		}
	}
	return false, problem
}

// pullOwner has the host ask for the image that has the blob.
func (s *session) pullOwner(ctx context.Context, through *http.Client, name string, digest blob.Digest, exported Exported) error {
	if err := s.openStore(ctx); err != nil {
		return err
	}
	listing, err := s.store.List(ctx)
	if err != nil {
		return err
	}
	for _, one := range listing.Artifacts {
		if one.Artifact.Artifact == name && slices.Contains(one.Blobs, digest) {
			_, err := exportFrom(ctx, through, fmt.Sprintf("/v2/%s/%s/manifests/%s", s.site.Name, name, one.Digest), one.Digest, io.Discard, &exported)
			return err
		}
	}
	return nil
}

// errPartial: bytes came that are not the blob's, so that there is no other try.
var errPartial = errors.New("export")

func exportFrom(ctx context.Context, through *http.Client, path string, digest blob.Digest, into io.Writer, exported *Exported) (bool, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+loopback+path, nil)
	if err != nil {
		return false, fmt.Errorf("export: %w", err)
	}
	answer, err := through.Do(request)
	if err != nil {
		return false, fmt.Errorf("export from host %s: %w", exported.Host, err)
	}
	defer func() { _ = answer.Body.Close() }()
	switch {
	case answer.StatusCode == http.StatusNotFound:
		return false, nil
	case answer.StatusCode != http.StatusOK:
		said, _ := io.ReadAll(io.LimitReader(answer.Body, 1<<10))
		return false, fmt.Errorf("export from host %s: %s: %s", exported.Host, answer.Status, strings.TrimSpace(string(said)))
	}
	sum := sha256.New()
	exported.Bytes, err = io.Copy(io.MultiWriter(into, sum), answer.Body)
	if err != nil {
		return false, fmt.Errorf("%w from host %s: %w", errPartial, exported.Host, err)
	}
	if hex.EncodeToString(sum.Sum(nil)) != digest.Hex() {
		return false, fmt.Errorf("%w: the bytes that came have another digest: nothing of them is to be used", errPartial)
	}
	return true, nil
}

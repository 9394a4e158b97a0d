package client

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

const (
	// sameKeys are how many sessions of the same content are found again by their
	// keys; ended ones are forgotten after a day.
	sameKeys = 8
	// slowest is the uplink for which a session lasts long enough.
	slowest = 64 << 10
	// leftOver is how long a session must last to be taken up again.
	leftOver = 5 * time.Minute
)

// open begins the session, or takes up the one that a Push of the same content has
// left behind.
func (p *pushing) open(ctx context.Context) error {
	request := writesession.CreateRequest{
		Capability: writesession.Capability, Namespace: p.client.options.Site,
		Objects: []writesession.Object{}, TTLSeconds: int64(p.ttl().Seconds()),
	}
	content, err := p.identity(request)
	if err != nil {
		return err
	}
	for attempt := 0; ; attempt++ {
		key := content + "-" + strconv.Itoa(attempt)
		if attempt >= sameKeys {
			key = content[:16] + "-" + rand.Text()
		}
		session, created, err := p.create(ctx, key, request)
		if ended(err) && attempt < sameKeys {
			continue
		}
		if err != nil {
			return err
		}
		p.id = session.ID
		switch {
		case created:
			return nil
		case session.State != writesession.Open:
		case time.Until(session.Expires) > leftOver:
			return nil
		default:
			p.abort(ctx)
		}
		if attempt > sameKeys {
			return strange("begin a write session", "it gives a used session for a new key")
		}
	}
}

// ended reports that the key is of a session that was aborted or ran out.
func ended(err error) bool {
	var problem *ProblemError
	return errors.As(err, &problem) && problem.Type == writesession.ProblemNotOpen
}

func (p *pushing) create(ctx context.Context, key string, request writesession.CreateRequest) (writesession.Session, bool, error) {
	var session writesession.Session
	status, sent, err := p.client.do(ctx, call{
		what: "begin a write session", method: http.MethodPost, path: p.client.site("/write-sessions"),
		header: http.Header{http.CanonicalHeaderKey(writesession.IdempotencyHeader): {key}}, body: request, into: &session,
	})
	p.count.sent(sent)
	if err == nil && session.ID == "" {
		err = strange("begin a write session", "an answer without an id")
	}
	return session, status == http.StatusCreated, err
}

// ttl is an hour, or as long as a slow uplink needs.
func (p *pushing) ttl() time.Duration {
	return min(max(writesession.DefaultTTL, time.Duration(p.group.size/slowest)*time.Second), writesession.MaxTTL)
}

// identity is the same for the same content, so that its session is found again.
func (p *pushing) identity(request writesession.CreateRequest) (string, error) {
	var blobs []blob.Digest
	for _, offered := range p.group.blobs {
		blobs = append(blobs, offered.Source.Digest())
	}
	var names []string
	for _, name := range p.group.names {
		names = append(names, name.String())
	}
	encoded, err := json.Marshal([]any{request, blobs, names})
	if err != nil {
		return "", fmt.Errorf("begin a write session: %w", err)
	}
	sum := sha256.Sum256(encoded)
	return hex.EncodeToString(sum[:20]), nil
}

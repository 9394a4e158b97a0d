package server

import (
	"context"
	"errors"
	"time"

	"github.com/nomad-site/site/internal/writesession"
)

// keepEnded is how long an ended session can be asked for.
const keepEnded = 24 * time.Hour

// Sweep ends the sessions that expired, and removes what ended long ago. It goes
// on behind a session that it cannot sweep.
func (s *Server) Sweep(ctx context.Context) error {
	found, err := s.eachSession(ctx)
	s.noteStore(err)
	if err != nil {
		return err
	}
	open := 0
	var errs []error
	for _, one := range found {
		stillOpen, err := s.sweepOne(ctx, one)
		if stillOpen {
			open++
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	s.metrics.open.Set(float64(open))
	return errors.Join(errs...)
}

func (s *Server) sweepOne(ctx context.Context, one *sessionKeys) (open bool, err error) {
	unlock, err := s.sessions.lock(ctx, one.id)
	if err != nil {
		return false, err
	}
	defer unlock()
	if !one.begun {
		return false, s.removeRest(ctx, one)
	}
	document, end, err := s.read(ctx, one.id)
	var gone *problemError
	if errors.As(err, &gone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if s.stateOf(document, end) == writesession.Open {
		return true, nil
	}
	if end == nil {
		if end, err = s.end(ctx, one.id, endDocument{State: writesession.Expired}); err != nil {
			return false, err
		}
		s.log.Info("a write session expired", "session", one.id, "owner", document.Owner)
	}
	if len(one.staged) > 0 {
		if err := s.bucket.Delete(ctx, one.staged...); err != nil {
			return false, err
		}
	}
	// Until it expires an upload may come, and the same key must find its session.
	if now := s.now(); now.Sub(end.Ended) < keepEnded || now.Sub(document.Expires) < keepEnded {
		return false, nil
	}
	// In this order: what begins a session is gone before what says that it ended.
	if err := s.bucket.Delete(ctx, s.layout.Session(one.id)); err != nil {
		return false, err
	}
	return false, s.removeRest(ctx, one)
}

// removeRest removes what lies where no session is: the end of one that was
// removed, or an upload that came too late.
func (s *Server) removeRest(ctx context.Context, one *sessionKeys) error {
	keys := append(append([]string{}, one.staged...), one.others...)
	if one.hasEnd || one.begun {
		keys = append(keys, s.layout.End(one.id))
	}
	if len(keys) == 0 {
		return nil
	}
	return s.bucket.Delete(ctx, keys...)
}

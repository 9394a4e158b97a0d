package relay

import (
	"log/slog"
	"sync"
)

// maxStates bounds what strangers can make the relay remember, and log.
const maxStates = 1024

// states logs when something begins to work or to fail, and not each time.
type states struct {
	log   *slog.Logger
	mutex sync.Mutex
	known map[string]bool
}

func newStates(log *slog.Logger) *states { return &states{log: log, known: map[string]bool{}} }

// expect takes something for working: it is logged only once it does not.
func (s *states) expect(what string) { s.changes(what, true) }

func (s *states) works(what string, args ...any) {
	if s.changes(what, true) {
		s.log.Info("works: "+what, args...)
	}
}

func (s *states) fails(what string, err error) {
	if s.changes(what, false) {
		s.log.Warn("fails: "+what, "error", err)
	}
}

func (s *states) changes(what string, works bool) bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	before, seen := s.known[what]
	if seen && before == works || !seen && len(s.known) >= maxStates {
		return false
	}
	s.known[what] = works
	return true
}

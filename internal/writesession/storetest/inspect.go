package storetest

import (
	"bytes"
	"maps"
	"slices"
	"time"
)

// Fail sets what is asked before each operation: with an error nothing happens
// but that. Of Copy the key is the target, of List the prefix. An upload is
// answered with status 503, or 403 for a *writesession.DeniedError. nil ends it.
func (s *Store) Fail(hook func(operation, key string) error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.before = hook
}

// FailAfter is Fail for an answer that is lost: what was asked for has happened.
func (s *Store) FailAfter(hook func(operation, key string) error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.after = hook
}

// Writes says how often each key was written, removed ones too.
func (s *Store) Writes() map[string]int {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return maps.Clone(s.writes)
}

// Hot are the keys that were to be written twice within a second: R2 refuses that.
func (s *Store) Hot() []string {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return slices.Sorted(maps.Keys(s.hot))
}

// Counts says how often each operation was asked for.
func (s *Store) Counts() map[string]int {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return maps.Clone(s.counts)
}

// Keys are those of all objects, sorted.
func (s *Store) Keys() []string {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return slices.Sorted(maps.Keys(s.objects))
}

// Content is a copy of an object's bytes, nil where there is none.
func (s *Store) Content(key string) []byte {
	found, _ := s.object(key)
	return bytes.Clone(found.content)
}

// Set puts an object there as if it always had been; it counts as no write.
func (s *Store) Set(key string, content []byte) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.objects[key] = newObject(content, s.options.Now())
}

// Corrupt changes one byte of an object, and nothing else that one could see.
func (s *Store) Corrupt(key string) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	found, exists := s.objects[key]
	if !exists || len(found.content) == 0 {
		panic("storetest: nothing to corrupt at " + key)
	}
	content := bytes.Clone(found.content)
	content[len(content)/2] ^= 1
	s.objects[key] = object{content: content, etag: found.etag, modified: found.modified}
}

// Age moves an object's time back.
func (s *Store) Age(key string, by time.Duration) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if found, exists := s.objects[key]; exists {
		found.modified = found.modified.Add(-by)
		s.objects[key] = found
	}
}

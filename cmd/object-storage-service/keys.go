package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
)

// keyFile is the file in which the job's template writes the store's access key: its
// id on one line, the secret on the next. One file, so that a new id never stands
// beside an old secret. It is read again when it changes, and when the store refuses
// what is in it.
type keyFile struct {
	path string

	mutex sync.Mutex
	id    string
	key   secret.Value
	seen  stamp
}

// stamp tells one version of a file from another.
type stamp struct {
	size     int64
	modified time.Time
}

// keys implements objectstore.Options.Keys.
func (k *keyFile) keys(_ context.Context, refresh bool) (string, secret.Value, error) {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	info, err := os.Stat(k.path)
	if err != nil {
		return "", secret.Value{}, noKeys(err)
	}
	now := stamp{size: info.Size(), modified: info.ModTime()}
	if !refresh && now == k.seen && k.id != "" {
		return k.id, k.key, nil
	}
	id, key, err := readKeys(k.path)
	if err != nil {
		return "", secret.Value{}, noKeys(err)
	}
	k.id, k.key, k.seen = id, key, now
	return k.id, k.key, nil
}

func readKeys(path string) (id string, key secret.Value, err error) {
	const longest = 8 << 10
	content, err := os.ReadFile(path)
	if err != nil {
		return "", secret.Value{}, err
	}
	fields := strings.Fields(string(content))
	if len(fields) != 2 || len(content) > longest {
		return "", secret.Value{}, errors.New(path + " does not hold both halves of an access key")
	}
	return fields[0], secret.New(fields[1]), nil
}

// noKeys says so as if the store had: there is nothing that trying again would mend.
func noKeys(err error) error {
	return fmt.Errorf("%w: %w", &writesession.DeniedError{What: "read the store's keys", Code: "NoKeys"}, err)
}

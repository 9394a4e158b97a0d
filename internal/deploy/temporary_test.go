package deploy

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestEverythingTemporaryIsReleasedOnceLatestFirst(t *testing.T) {
	var held registry
	var released []string
	hold := func(name string, err error) *temporary {
		return held.hold(name, func(ctx context.Context) error {
			if ctx.Err() != nil {
				t.Errorf("%s is released with a context that has ended", name)
			}
			released = append(released, name)
			return err
		})
	}
	hold("connection", nil)
	token := hold("token", nil)
	hold("lock", errors.New("the host is gone"))

	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := token.let(cancelled); err != nil {
		t.Fatal(err)
	}
	var failures []string
	held.close(func(err error) { failures = append(failures, err.Error()) })
	held.close(func(err error) { t.Errorf("released twice: %v", err) })
	if want := []string{"token", "lock", "connection"}; !slices.Equal(released, want) {
		t.Errorf("released %v, want %v", released, want)
	}
	if len(failures) != 1 || !strings.Contains(failures[0], "release lock: the host is gone") {
		t.Errorf("failures %q, want the one of the lock", failures)
	}
}

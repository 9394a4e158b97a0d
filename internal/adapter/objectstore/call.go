package objectstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/cenkalti/backoff/v5"

	"github.com/nomad-site/site/internal/writesession"
)

// attempts of one request: about 3 s apart from first to last, since R2 takes one
// write of a key in a second.
const (
	attempts     = 5
	firstPause   = 300 * time.Millisecond
	longestPause = 5 * time.Second
)

// request is one attempt, to be made with the keys that with brings.
type request func(ctx context.Context, with func(*s3.Options)) error

// call runs one request until it is answered: again, a few times, while the store
// is unavailable, and once more when the keys were refused and there are new ones.
// Each attempt has limit, if that is not 0.
func (b *Bucket) call(ctx context.Context, what string, limit time.Duration, do request) error {
	pauses := &backoff.ExponentialBackOff{InitialInterval: firstPause, Multiplier: 2, RandomizationFactor: 0.5, MaxInterval: longestPause}
	pauses.Reset()
	keys, err := b.keys(ctx, what, false)
	if err != nil {
		return err
	}
	refreshed := false
	for attempt := 1; ; attempt++ {
		err := b.once(ctx, what, limit, keys, do)
		if err == nil || ctx.Err() != nil {
			return err
		}
		var unavailable *writesession.UnavailableError
		var denied *writesession.DeniedError
		switch {
		case errors.As(err, &denied) && !refreshed && mayBeKeys(denied.Code):
			refreshed = true
			attempt--
			var keysErr error
			if keys, keysErr = b.newer(ctx, what, keys); keysErr != nil {
				return errors.Join(err, keysErr)
			}
		case errors.As(err, &unavailable) && attempt < attempts:
			if pauseErr := b.pause(ctx, max(pauses.NextBackOff(), min(unavailable.RetryAfter, longestPause))); pauseErr != nil {
				return fmt.Errorf("%s: %w", what, pauseErr)
			}
		default:
			return err
		}
	}
}

func (b *Bucket) once(ctx context.Context, what string, limit time.Duration, keys aws.Credentials, do request) error {
	attempt := ctx
	if limit > 0 {
		var cancel context.CancelFunc
		attempt, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	err := do(attempt, func(o *s3.Options) { o.Credentials = fixed(keys) })
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
	return classify(what, err)
}

// keys asks for the access key.
func (b *Bucket) keys(ctx context.Context, what string, refresh bool) (aws.Credentials, error) {
	id, key, err := b.options.Keys(ctx, refresh)
	switch {
	case err != nil && ctx.Err() != nil:
		return aws.Credentials{}, fmt.Errorf("%s: %w", what, context.Cause(ctx))
	case err != nil:
		return aws.Credentials{}, &writesession.UnavailableError{What: what, Err: fmt.Errorf("get its keys: %w", err)}
	case id == "" || key.Reveal() == "":
		return aws.Credentials{}, &writesession.DeniedError{What: what, Code: "there are no keys yet"}
	}
	return aws.Credentials{AccessKeyID: id, SecretAccessKey: key.Reveal()}, nil
}

// newer gives the keys that others have got since, or asks for a refresh.
func (b *Bucket) newer(ctx context.Context, what string, refused aws.Credentials) (aws.Credentials, error) {
	keys, err := b.keys(ctx, what, false)
	if err == nil && (keys.AccessKeyID != refused.AccessKeyID || keys.SecretAccessKey != refused.SecretAccessKey) {
		return keys, nil
	}
	return b.keys(ctx, what, true)
}

// fixed are the keys of one request.
type fixed aws.Credentials

// Retrieve implements aws.CredentialsProvider.
func (f fixed) Retrieve(context.Context) (aws.Credentials, error) { return aws.Credentials(f), nil }

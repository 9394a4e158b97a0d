package openbao

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
)

// The products that speak this API.
const (
	OpenBao = "openbao"
	Vault   = "vault"
)

// activeLimit bounds how long an unsealed engine may take to become active.
const activeLimit = time.Minute

// Health is the state of the engine, which it tells without a token.
type Health struct {
	Initialized bool
	Sealed      bool
	// Active engines answer requests; an unsealed one needs a moment to become active.
	Active bool
	// Product is OpenBao or Vault, by what it answers.
	Product string
	Version string
	// Cluster is what the engine was called when it was initialised: one that was
	// initialised again is another. Empty while it is sealed.
	Cluster string
}

// Health asks the engine how it is.
func (c *Client) Health(ctx context.Context) (Health, error) {
	// Any state answers with 200: what counts is in the body.
	answer, err := c.api.Logical().ReadRawWithDataWithContext(ctx, "sys/health", map[string][]string{
		"uninitcode": {"200"}, "sealedcode": {"200"}, "standbycode": {"200"},
	})
	if err != nil {
		return Health{}, describe(err, nil, "ask the secrets engine for its health")
	}
	defer func() { _ = answer.Body.Close() }()
	var body map[string]any
	if err := answer.DecodeJSON(&body); err != nil {
		return Health{}, fmt.Errorf("read the secrets engine's health: %w", err)
	}
	flag := func(field string) bool { value, _ := body[field].(bool); return value }
	health := Health{Initialized: flag("initialized"), Sealed: flag("sealed"), Version: text(body, "version"), Product: product(body), Cluster: text(body, "cluster_id")}
	health.Active = health.Initialized && !health.Sealed && !flag("standby")
	return health, nil
}

// product tells the two apart: OpenBao began to count at 2 and never had the
// fields that Vault came to answer with.
func product(health map[string]any) string {
	for _, field := range []string{"enterprise", "echo_duration_ms", "clock_skew_ms"} {
		if _, answered := health[field]; answered {
			return Vault
		}
	}
	version := text(health, "version")
	if strings.HasPrefix(version, "0.") || strings.HasPrefix(version, "1.") {
		return Vault
	}
	return OpenBao
}

// InitializedError says that the engine was initialised before, so that its
// keys are known to whoever did it.
type InitializedError struct{}

func (*InitializedError) Error() string { return "the secrets engine is initialised already" }

// Hint implements plan.Hinter.
func (*InitializedError) Hint() string {
	return "its unseal key is in the site's init.age; see that the newest one is in git"
}

// Initialize makes the engine's storage, with one unseal key. The answer
// exists once: the caller keeps the key before doing anything else.
func (c *Client) Initialize(ctx context.Context) (unsealKey, rootToken secret.Value, err error) {
	health, err := c.Health(ctx)
	if err != nil {
		return secret.Value{}, secret.Value{}, err
	}
	if health.Initialized {
		return secret.Value{}, secret.Value{}, &InitializedError{}
	}
	answer, err := c.api.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		return secret.Value{}, secret.Value{}, describe(err, nil, "initialise the secrets engine")
	}
	if len(answer.KeysB64) != 1 || answer.RootToken == "" {
		return secret.Value{}, secret.Value{}, fmt.Errorf("initialise the secrets engine: it answered with %d keys, not one", len(answer.KeysB64))
	}
	return secret.New(answer.KeysB64[0]), secret.New(answer.RootToken), nil
}

// WrongKeyError says that the engine was not made with this unseal key.
type WrongKeyError struct{ Err error }

func (e *WrongKeyError) Error() string { return fmt.Sprintf("wrong unseal key: %v", e.Err) }
func (e *WrongKeyError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (*WrongKeyError) Hint() string {
	return "the storage was made with another init.age: take the one of the commit that initialised it"
}

// NotInitializedError says that there is nothing to unseal yet.
type NotInitializedError struct{}

func (*NotInitializedError) Error() string { return "the secrets engine is not initialised" }

// Hint implements plan.Hinter.
func (*NotInitializedError) Hint() string { return "deploy the site: it initialises the engine" }

// Unseal opens the storage and waits until the engine answers requests. It
// does nothing to an engine that is unsealed.
func (c *Client) Unseal(ctx context.Context, key secret.Value) error {
	health, err := c.Health(ctx)
	if err != nil {
		return err
	}
	if !health.Initialized {
		return &NotInitializedError{}
	}
	if health.Sealed {
		status, err := c.api.Sys().UnsealWithContext(ctx, key.Reveal())
		switch err := describe(err, []secret.Value{key}, "unseal the secrets engine"); {
		case wrongKey(err):
			return &WrongKeyError{Err: err}
		case err != nil:
			return err
		case status.Sealed:
			return plan.WithHint(fmt.Errorf("unseal the secrets engine: still sealed after 1 of %d keys", status.T),
				"site works with one unseal key; rekey the engine to one share")
		}
	}
	return retry.Until(ctx, "the secrets engine to become active", activeLimit, func(ctx context.Context) error {
		health, err := c.Health(ctx)
		switch {
		case err != nil:
			return err
		case !health.Active:
			return errors.New("it is unsealed and not active yet")
		}
		return nil
	})
}

// wrongKey tells a key that does not fit from other refusals. Only an
// engine's answer counts; one with a broken storage answers with 500 too.
func wrongKey(err error) bool {
	var refused *ResponseError
	if !errors.As(err, &refused) {
		return false
	}
	for _, sign := range []string{
		"invalid key", "message authentication failed", "must be a valid hex or base64", "shorter than minimum", "longer than maximum",
		"key verification failed", "incorrect key shares supplied",
	} {
		if strings.Contains(refused.Reason, sign) {
			return true
		}
	}
	return false
}

// NoRootError says that the product makes no root token from the unseal key.
type NoRootError struct{ Err error }

func (e *NoRootError) Error() string {
	return fmt.Sprintf("the secrets engine makes no root token from its unseal key: %v", e.Err)
}
func (e *NoRootError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (*NoRootError) Hint() string {
	return "OpenBao has this off: set disable_unauthed_generate_root_endpoints = false in its listener for as long as the recovery takes"
}

// GenerateRoot makes a root token with the unseal key, for a recovery. The
// caller revokes it.
func (c *Client) GenerateRoot(ctx context.Context, unsealKey secret.Value) (secret.Value, error) {
	const doing = "make a root token from the unseal key"
	sys := c.api.Sys()
	attempt, err := sys.GenerateRootInitWithContext(ctx, "", "")
	if err != nil && strings.Contains(err.Error(), "already in progress") {
		// A run of ours that was cut short: whoever has the key is us.
		if err := sys.GenerateRootCancelWithContext(ctx); err != nil {
			return secret.Value{}, describe(err, nil, "cancel an attempt to %s", doing)
		}
		attempt, err = sys.GenerateRootInitWithContext(ctx, "", "")
	}
	if err := describe(err, nil, "%s", doing); err != nil {
		switch statusOf(err) {
		case http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed:
			return secret.Value{}, &NoRootError{Err: err}
		}
		return secret.Value{}, err
	}
	token, err := c.finishRoot(ctx, attempt, unsealKey)
	if err != nil {
		// The attempt would block the next one.
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		return secret.Value{}, errors.Join(err, describe(sys.GenerateRootCancelWithContext(stop), nil, "cancel the attempt to %s", doing))
	}
	return token, nil
}

func (c *Client) finishRoot(ctx context.Context, attempt *api.GenerateRootStatusResponse, unsealKey secret.Value) (secret.Value, error) {
	const doing = "make a root token from the unseal key"
	done, err := c.api.Sys().GenerateRootUpdateWithContext(ctx, unsealKey.Reveal(), attempt.Nonce)
	if err := describe(err, []secret.Value{unsealKey}, doing); err != nil {
		if wrongKey(err) || strings.Contains(err.Error(), "root generation aborted") {
			return secret.Value{}, &WrongKeyError{Err: err}
		}
		return secret.Value{}, err
	}
	encoded := done.EncodedToken
	if encoded == "" {
		encoded = done.EncodedRootToken
	}
	masked, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(encoded, "="))
	if err != nil || !done.Complete || len(masked) != len(attempt.OTP) {
		return secret.Value{}, fmt.Errorf("%s: the secrets engine's answer does not fit its one-time password", doing)
	}
	for i := range masked {
		masked[i] ^= attempt.OTP[i]
	}
	return secret.New(string(masked)), nil
}

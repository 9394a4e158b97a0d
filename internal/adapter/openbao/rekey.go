package openbao

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/hashicorp/vault/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

// Rekeyer changes the engine's unseal key in two steps, so that the new key can
// be kept safe before it counts.
type Rekeyer interface {
	// Begin makes a new key that is not in force yet; the nonce is for Confirm.
	// One that was begun before is in the way: Cancel it first.
	Begin(ctx context.Context, current secret.Value) (newKey secret.Value, nonce string, err error)
	// Confirm puts the new key in force.
	Confirm(ctx context.Context, newKey secret.Value, nonce string) error
	// Cancel drops one that was begun, by whomever; none is fine.
	Cancel(ctx context.Context) error
}

// Rekeyer gives the way in which the product changes its unseal key.
func (c *Client) Rekeyer(health Health) Rekeyer {
	if health.Product == OpenBao && rotatesRoot(health.Version) {
		return &rekeyer{client: c, endpoints: rotateEndpoints{c}}
	}
	return &rekeyer{client: c, endpoints: rekeyEndpoints{c.api.Sys()}}
}

// rotatesRoot reports whether a release of OpenBao has sys/rotate/root/init:
// they came with 2.4, and from 2.5 on the older ones are switched off.
func rotatesRoot(version string) bool {
	numbers := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(numbers) < 2 {
		return true
	}
	major, majorErr := strconv.Atoi(numbers[0])
	minor, minorErr := strconv.Atoi(numbers[1])
	if majorErr != nil || minorErr != nil {
		return true
	}
	return major > 2 || major == 2 && minor >= 4
}

// rekeyAnswer is what any of the endpoints answers with.
type rekeyAnswer struct {
	started, complete, verifies bool
	nonce, verificationNonce    string
	keys                        []string
}

// rekeyEndpointSet are the endpoints of one product; both ask for the same
// things in the same order.
type rekeyEndpointSet interface {
	status(ctx context.Context) (rekeyAnswer, error)
	start(ctx context.Context) (rekeyAnswer, error)
	update(ctx context.Context, key secret.Value, nonce string) (rekeyAnswer, error)
	verify(ctx context.Context, key secret.Value, nonce string) (rekeyAnswer, error)
	cancel(ctx context.Context, nonce string) error
}

type rekeyer struct {
	client    *Client
	endpoints rekeyEndpointSet

	mutex sync.Mutex
	// nonce is that of the rekey that was begun here: who has it may cancel at once.
	nonce string
}

// Begin implements Rekeyer.
func (r *rekeyer) Begin(ctx context.Context, current secret.Value) (newKey secret.Value, nonce string, err error) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	started, err := r.endpoints.start(ctx)
	if err != nil {
		return secret.Value{}, "", r.describe(err, current, "begin to change the unseal key")
	}
	r.nonce = started.nonce
	newKey, nonce, err = r.begun(ctx, current, started)
	if err != nil {
		// Whatever was wrong, nothing stays half done; if this fails too, the
		// next Cancel says so.
		_ = r.endpoints.cancel(context.WithoutCancel(ctx), r.nonce)
		return secret.Value{}, "", err
	}
	return newKey, nonce, nil
}

func (r *rekeyer) begun(ctx context.Context, current secret.Value, started rekeyAnswer) (secret.Value, string, error) {
	if !started.verifies {
		// The new key would be in force before anybody has kept it.
		return secret.Value{}, "", errors.New("begin to change the unseal key: the secrets engine would not wait until the new key is confirmed")
	}
	answer, err := r.endpoints.update(ctx, current, started.nonce)
	if err = r.describe(err, current, "prove the unseal key in order to change it"); wrongKey(err) {
		return secret.Value{}, "", &WrongKeyError{Err: err}
	}
	switch {
	case err != nil:
		return secret.Value{}, "", err
	case !answer.complete:
		return secret.Value{}, "", plan.WithHint(errors.New("change the unseal key: the secrets engine wants more than one key"),
			"site works with one unseal key; rekey the engine to one share")
	case len(answer.keys) != 1 || answer.verificationNonce == "":
		return secret.Value{}, "", fmt.Errorf("change the unseal key: the secrets engine answered with %d keys, not with one to confirm", len(answer.keys))
	}
	return secret.New(answer.keys[0]), answer.verificationNonce, nil
}

// Confirm implements Rekeyer.
func (r *rekeyer) Confirm(ctx context.Context, newKey secret.Value, nonce string) error {
	const doing = "put the new unseal key in force"
	answer, err := r.endpoints.verify(ctx, newKey, nonce)
	if err = r.describe(err, newKey, doing); wrongKey(err) {
		return &WrongKeyError{Err: err}
	}
	if err == nil && !answer.complete {
		return errors.New(doing + ": the secrets engine wants more than one key")
	}
	return err
}

// Cancel implements Rekeyer.
func (r *rekeyer) Cancel(ctx context.Context) error {
	const doing = "cancel a change of the unseal key"
	r.mutex.Lock()
	defer r.mutex.Unlock()
	status, err := r.endpoints.status(ctx)
	if err != nil {
		return r.describe(err, secret.Value{}, doing)
	}
	if !status.started {
		return nil
	}
	nonce := status.nonce
	if nonce == "" {
		nonce = r.nonce
	}
	err = r.describe(r.endpoints.cancel(ctx, nonce), secret.Value{}, doing)
	if statusOf(err) == http.StatusBadRequest {
		return plan.WithHint(err, "newer releases of Vault let only those cancel who began it, for ten minutes: wait that long, then run this again")
	}
	return err
}

func (r *rekeyer) describe(err error, key secret.Value, doing string) error {
	return describe(err, []secret.Value{key, r.client.token}, "%s", doing)
}

// rekeyEndpoints are sys/rekey/*: of Vault, and of OpenBao before 2.4. They
// take no token; the unseal key is the proof.
type rekeyEndpoints struct{ sys *api.Sys }

func (e rekeyEndpoints) status(ctx context.Context) (rekeyAnswer, error) {
	return rekeyStatus(e.sys.RekeyStatusWithContext(ctx))
}

func (e rekeyEndpoints) start(ctx context.Context) (rekeyAnswer, error) {
	return rekeyStatus(e.sys.RekeyInitWithContext(ctx, &api.RekeyInitRequest{
		SecretShares: 1, SecretThreshold: 1, StoredShares: 1, RequireVerification: true,
	}))
}

func rekeyStatus(status *api.RekeyStatusResponse, err error) (rekeyAnswer, error) {
	if err != nil || status == nil {
		return rekeyAnswer{}, err
	}
	return rekeyAnswer{started: status.Started, verifies: status.VerificationRequired, nonce: status.Nonce}, nil
}

func (e rekeyEndpoints) update(ctx context.Context, key secret.Value, nonce string) (rekeyAnswer, error) {
	answer, err := e.sys.RekeyUpdateWithContext(ctx, key.Reveal(), nonce)
	if err != nil || answer == nil {
		return rekeyAnswer{}, err
	}
	return rekeyAnswer{complete: answer.Complete, keys: answer.KeysB64, verificationNonce: answer.VerificationNonce}, nil
}

func (e rekeyEndpoints) verify(ctx context.Context, key secret.Value, nonce string) (rekeyAnswer, error) {
	answer, err := e.sys.RekeyVerificationUpdateWithContext(ctx, key.Reveal(), nonce)
	if err != nil || answer == nil {
		return rekeyAnswer{}, err
	}
	return rekeyAnswer{complete: answer.Complete}, nil
}

func (e rekeyEndpoints) cancel(ctx context.Context, nonce string) error {
	return e.sys.RekeyCancelWithContextWithNonce(ctx, nonce)
}

// rotateEndpoints are sys/rotate/root/*, which OpenBao has since 2.4: the same
// steps for those with a token that may.
type rotateEndpoints struct{ client *Client }

const rotateRoot = "sys/rotate/root/"

func (e rotateEndpoints) status(ctx context.Context) (rekeyAnswer, error) {
	answer, err := e.client.api.Logical().ReadWithContext(ctx, rotateRoot+"init")
	return rotateAnswer(answer), err
}

func (e rotateEndpoints) start(ctx context.Context) (rekeyAnswer, error) {
	return e.write(ctx, "init", map[string]any{"secret_shares": 1, "secret_threshold": 1, "require_verification": true})
}

func (e rotateEndpoints) update(ctx context.Context, key secret.Value, nonce string) (rekeyAnswer, error) {
	return e.write(ctx, "update", map[string]any{"key": key.Reveal(), "nonce": nonce})
}

func (e rotateEndpoints) verify(ctx context.Context, key secret.Value, nonce string) (rekeyAnswer, error) {
	return e.write(ctx, "verify", map[string]any{"key": key.Reveal(), "nonce": nonce})
}

func (e rotateEndpoints) cancel(ctx context.Context, _ string) error {
	_, err := e.client.api.Logical().DeleteWithContext(ctx, rotateRoot+"init")
	return err
}

func (e rotateEndpoints) write(ctx context.Context, step string, document map[string]any) (rekeyAnswer, error) {
	answer, err := e.client.api.Logical().WriteWithContext(ctx, rotateRoot+step, document)
	return rotateAnswer(answer), err
}

func rotateAnswer(answer *api.Secret) rekeyAnswer {
	if answer == nil {
		return rekeyAnswer{}
	}
	flag := func(field string) bool { value, _ := answer.Data[field].(bool); return value }
	read := rekeyAnswer{
		started: flag("started"), complete: flag("complete"), verifies: flag("verification_required"),
		nonce: text(answer.Data, "nonce"), verificationNonce: text(answer.Data, "verification_nonce"),
	}
	keys, _ := answer.Data["keys_base64"].([]any)
	for _, key := range keys {
		if key, ok := key.(string); ok {
			read.keys = append(read.keys, key)
		}
	}
	return read
}

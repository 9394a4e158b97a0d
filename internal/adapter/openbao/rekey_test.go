package openbao

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

// rotatingBao is as strict as OpenBao's documentation of sys/rotate/root/*,
// which the pinned server does not have: an engine with one unseal key, whose
// sys/rekey/* is switched off.
type rotatingBao struct {
	mutex sync.Mutex
	// key is the one in force; made counts those that were made.
	key  string
	made int
	// token is what may call; without is how it ignores require_verification.
	token              string
	withoutVerifying   bool
	nonce, verifyNonce string
	candidate          string
	asked              []string
}

func keyNumber(number int) string {
	return base64.StdEncoding.EncodeToString([]byte(fmt.Sprintf("unseal-key-%021d", number)))
}

func (b *rotatingBao) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	path := strings.TrimPrefix(request.URL.Path, "/v1/")
	b.asked = append(b.asked, request.Method+" "+path)
	step, rotates := strings.CutPrefix(path, "sys/rotate/root/")
	if !rotates {
		refusing(http.StatusNotFound, "unsupported path")(w, request)
		return
	}
	if request.Header.Get("X-Vault-Token") != b.token {
		refusing(http.StatusForbidden, "permission denied")(w, request)
		return
	}
	data, reason := b.answer(request, step)
	switch {
	case reason != "" && strings.HasPrefix(reason, "failed to"):
		refusing(http.StatusInternalServerError, reason)(w, request)
	case reason != "":
		refusing(http.StatusBadRequest, reason)(w, request)
	case data == nil:
		w.WriteHeader(http.StatusNoContent)
	default:
		_ = json.NewEncoder(w).Encode(map[string]any{"request_id": "1", "data": data, "wrap_info": nil, "warnings": nil, "auth": nil})
	}
}

func (b *rotatingBao) answer(request *http.Request, step string) (data map[string]any, reason string) {
	var sent struct {
		Shares    int    `json:"secret_shares"`
		Threshold int    `json:"secret_threshold"`
		Verify    bool   `json:"require_verification"`
		Key       string `json:"key"`
		Nonce     string `json:"nonce"`
	}
	writes := request.Method == http.MethodPut || request.Method == http.MethodPost
	if writes {
		decoder := json.NewDecoder(request.Body)
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&sent); err != nil {
			return nil, "malformed request: " + err.Error()
		}
	}
	switch {
	case step == "init" && request.Method == http.MethodGet:
		return b.status(), ""
	case step == "init" && request.Method == http.MethodDelete:
		b.nonce, b.verifyNonce, b.candidate = "", "", ""
		return nil, ""
	case step == "init" && writes:
		switch {
		case b.nonce != "":
			return nil, "rotation already in progress"
		case sent.Shares != 1 || sent.Threshold != 1:
			return nil, "invalid rotate seal configuration"
		}
		b.made++
		b.nonce = fmt.Sprintf("nonce-%d", b.made)
		b.withoutVerifying = b.withoutVerifying || !sent.Verify
		return b.status(), ""
	case step == "update" && writes:
		return b.update(sent.Key, sent.Nonce)
	case step == "verify" && writes:
		return b.verify(sent.Key, sent.Nonce)
	}
	return nil, "unsupported operation"
}

func (b *rotatingBao) status() map[string]any {
	status := map[string]any{"namespace": "root", "started": b.nonce != "", "t": 0, "n": 0, "seal_threshold": 1}
	if b.nonce != "" {
		status["nonce"], status["t"], status["n"], status["progress"] = b.nonce, 1, 1, 0
		status["verification_required"], status["verification_nonce"] = !b.withoutVerifying, b.verifyNonce
	}
	return status
}

func (b *rotatingBao) update(key, nonce string) (map[string]any, string) {
	raw, err := base64.StdEncoding.DecodeString(key)
	switch {
	case key == "" || nonce == "":
		return nil, "missing required field"
	case err != nil:
		return nil, "'key' must be a valid hex or base64 string"
	case b.nonce == "":
		return nil, "no rotation in progress"
	case b.verifyNonce != "":
		return nil, "rotation already finished; verification must be performed"
	case nonce != b.nonce:
		return nil, "incorrect nonce supplied"
	case len(raw) < 32:
		return nil, "key is shorter than minimum 32 bytes"
	case key != b.key:
		return nil, "failed to read root key: cipher: message authentication failed"
	}
	b.candidate, b.verifyNonce = keyNumber(b.made), "verify-"+b.nonce
	return map[string]any{
		"namespace": "root", "complete": true, "nonce": nonce, "backup": false, "pgp_fingerprints": nil,
		"verification_required": true, "verification_nonce": b.verifyNonce, "keys": []string{"hex"}, "keys_base64": []string{b.candidate},
	}, ""
}

func (b *rotatingBao) verify(key, nonce string) (map[string]any, string) {
	switch {
	case key == "" || nonce == "":
		return nil, "missing required field"
	case b.nonce == "":
		return nil, "no rotation in progress"
	case b.verifyNonce == "":
		return nil, "no rotation verification in progress"
	case nonce != b.verifyNonce:
		return nil, "incorrect nonce supplied"
	case key != b.candidate:
		return nil, "rotation verification failed; incorrect key shares supplied"
	}
	b.key, b.nonce, b.verifyNonce, b.candidate = key, "", "", ""
	return map[string]any{"namespace": "root", "complete": true, "nonce": nonce}, ""
}

func TestANewerOpenBaoChangesItsUnsealKeyForThoseWithAToken(t *testing.T) {
	bao := &rotatingBao{key: keyNumber(0), token: "a-token"}
	client := answering(t, bao.ServeHTTP)
	ctx := t.Context()
	rekeyer := client.Rekeyer(Health{Product: OpenBao, Version: "2.5.1"})
	old := secret.New(keyNumber(0))
	var wrong *WrongKeyError
	for name, key := range map[string]string{"another key": keyNumber(77), "half a key": keyNumber(0)[:20], "no key at all": "not base64!"} {
		if _, _, err := rekeyer.Begin(ctx, secret.New(key)); !errors.As(err, &wrong) || strings.Contains(err.Error(), key) {
			t.Errorf("%s: %v", name, err)
		}
		if bao.nonce != "" {
			t.Errorf("%s: something stays begun", name)
		}
	}
	if _, _, err := rekeyer.Begin(ctx, old); err != nil {
		t.Fatal(err)
	}
	again := client.Rekeyer(Health{Product: OpenBao, Version: "2.5.1"})
	if _, _, err := again.Begin(ctx, old); err == nil || bao.candidate == "" {
		t.Errorf("a second one is begun over the first: %v", err)
	}
	if err := again.Cancel(ctx); err != nil || bao.nonce != "" {
		t.Fatalf("another run cancels: %v", err)
	}
	if err := again.Cancel(ctx); err != nil {
		t.Errorf("cancelling when nothing was begun: %v", err)
	}
	newKey, nonce, err := again.Begin(ctx, old)
	if err != nil || bao.key != old.Reveal() {
		t.Fatalf("the new key is in force before it was confirmed: %v", err)
	}
	if err := again.Confirm(ctx, old, nonce); !errors.As(err, &wrong) {
		t.Errorf("confirmed with the old key: %v", err)
	}
	if err := again.Confirm(ctx, newKey, nonce); err != nil || bao.key != newKey.Reveal() {
		t.Fatalf("confirm: %v", err)
	}
	if err := again.Confirm(ctx, newKey, nonce); err == nil || strings.Contains(err.Error(), newKey.Reveal()) {
		t.Errorf("confirmed twice: %v", err)
	}
	for _, asked := range bao.asked {
		if strings.Contains(asked, "sys/rekey") || strings.HasSuffix(asked, "sys/rotate/root") {
			t.Errorf("asked %s", asked)
		}
	}
}

func TestTheEndpointsAreThoseOfTheProductAndItsRelease(t *testing.T) {
	for _, test := range []struct{ product, version, want string }{
		{Vault, "1.14.1", "GET sys/rekey/init"}, {Vault, "2.5.0", "GET sys/rekey/init"},
		{OpenBao, "2.0.0", "GET sys/rekey/init"}, {OpenBao, "2.3.2+build", "GET sys/rekey/init"},
		{OpenBao, "2.4.0", "GET sys/rotate/root/init"}, {OpenBao, "v2.10.0-beta1", "GET sys/rotate/root/init"},
		{OpenBao, "3.0.0", "GET sys/rotate/root/init"}, {OpenBao, "", "GET sys/rotate/root/init"}, {OpenBao, "main-branch", "GET sys/rotate/root/init"},
	} {
		bao := &rotatingBao{token: "a-token"}
		client := answering(t, bao.ServeHTTP)
		_ = client.Rekeyer(Health{Product: test.product, Version: test.version}).Cancel(t.Context())
		if !slices.Equal(bao.asked, []string{test.want}) {
			t.Errorf("%s %s was asked %q", test.product, test.version, bao.asked)
		}
	}
}

func TestNoKeyIsMadeThatWouldBeInForceAtOnce(t *testing.T) {
	bao := &rotatingBao{key: keyNumber(0), token: "a-token", withoutVerifying: true}
	client := answering(t, bao.ServeHTTP)
	_, _, err := client.Rekeyer(Health{Product: OpenBao, Version: "2.5.0"}).Begin(t.Context(), secret.New(keyNumber(0)))
	if err == nil || bao.nonce != "" || bao.key != keyNumber(0) || bao.candidate != "" {
		t.Errorf("begun without verification: %v", err)
	}
	if slices.Contains(bao.asked, "PUT sys/rotate/root/update") || slices.Contains(bao.asked, "POST sys/rotate/root/update") {
		t.Error("the key was shown although nothing would have waited for its confirmation")
	}
}

func TestATokenThatMayNotChangeTheKeyIsHintedAt(t *testing.T) {
	bao := &rotatingBao{key: keyNumber(0), token: "another-token"}
	client := answering(t, bao.ServeHTTP)
	rekeyer := client.Rekeyer(Health{Product: OpenBao, Version: "2.5.0"})
	_, _, begun := rekeyer.Begin(t.Context(), secret.New(keyNumber(0)))
	for name, err := range map[string]error{"begin": begun, "cancel": rekeyer.Cancel(t.Context())} {
		if statusOf(err) != http.StatusForbidden || plan.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Newer releases of Vault let for ten minutes only those cancel a rekey who
// name its nonce; this one does not even show it.
func TestWhoBeganMayCancelAtOnceAndOthersAreToldToWait(t *testing.T) {
	started := false
	client := answering(t, func(w http.ResponseWriter, request *http.Request) {
		var sent map[string]any
		_ = json.NewDecoder(request.Body).Decode(&sent)
		switch request.Method + " " + request.URL.Path {
		case "GET /v1/sys/rekey/init":
			_ = json.NewEncoder(w).Encode(map[string]any{"started": started})
		case "PUT /v1/sys/rekey/init":
			started = true
			_ = json.NewEncoder(w).Encode(map[string]any{"started": true, "nonce": "the-nonce", "verification_required": true})
		case "PUT /v1/sys/rekey/update":
			_ = json.NewEncoder(w).Encode(map[string]any{"complete": true, "keys_base64": []string{"new"}, "verification_nonce": "verify"})
		case "DELETE /v1/sys/rekey/init":
			if sent["nonce"] != "the-nonce" {
				refusing(http.StatusBadRequest, "invalid request")(w, request)
				return
			}
			started = false
			w.WriteHeader(http.StatusNoContent)
		default:
			refusing(http.StatusNotFound, "unsupported path")(w, request)
		}
	})
	health := Health{Product: Vault, Version: "1.21.0"}
	mine, theirs := client.Rekeyer(health), client.Rekeyer(health)
	if _, _, err := mine.Begin(t.Context(), secret.New("old")); err != nil {
		t.Fatal(err)
	}
	if err := theirs.Cancel(t.Context()); err == nil || !strings.Contains(plan.HintOf(err), "ten minutes") {
		t.Errorf("another run cancels: %v (hint %q)", err, plan.HintOf(err))
	}
	if err := mine.Cancel(t.Context()); err != nil || started {
		t.Errorf("whoever began cannot cancel: %v", err)
	}
}

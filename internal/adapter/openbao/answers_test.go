package openbao

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// Answers of products that the tests do not run: what their documentation and
// users' reports say that they are.

func answering(t *testing.T, handler http.HandlerFunc) *Client {
	t.Helper()
	fake := httptest.NewServer(handler)
	t.Cleanup(fake.Close)
	client, err := New(Options{Address: fake.URL, Token: secret.New("a-token")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

func refusing(status int, reason string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(map[string]any{"errors": []string{reason}})
	}
}

func TestTheProductIsKnownByItsAnswers(t *testing.T) {
	for body, want := range map[string]string{
		`{"initialized":true,"version":"1.14.1","replication_dr_mode":"disabled"}`:   Vault,
		`{"initialized":true,"version":"1.21.0","enterprise":false}`:                 Vault,
		`{"initialized":true,"version":"2.0.0","clock_skew_ms":0}`:                   Vault,
		`{"initialized":true,"version":"2.4.1","replication_dr_mode":"disabled"}`:    OpenBao,
		`{"initialized":true,"sealed":false,"standby":true,"version":"2.6.1+build"}`: OpenBao,
	} {
		client := answering(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) })
		if health, err := client.Health(t.Context()); err != nil || health.Product != want || !health.Initialized {
			t.Errorf("%s: %+v, %v", body, health, err)
		}
	}
}

func TestAnAuditDeviceThatTheAPIMayNotMakeIsHintedAt(t *testing.T) {
	client := answering(t, refusing(400, "cannot enable audit device via API; use declarative, config-based audit device management instead"))
	want := reconcile.Engine{Audit: []reconcile.AuditDevice{{Path: "file", Type: "file"}}}
	err := client.ApplyEngine(t.Context(), want, reconcile.EngineState{}, reconcile.DiffEngine(want, reconcile.EngineState{}), nil)
	var byFile *AuditByFileError
	if !errors.As(err, &byFile) || !strings.Contains(plan.HintOf(err), `audit "file" "file"`) {
		t.Errorf("%v (hint %q)", err, plan.HintOf(err))
	}
}

func TestRootTokensAreNotMadeWhereThatIsOff(t *testing.T) {
	for _, status := range []int{400, 403, 404, 405} {
		client := answering(t, refusing(status, "unsupported path"))
		_, err := client.GenerateRoot(t.Context(), secret.New("key"))
		var off *NoRootError
		if !errors.As(err, &off) || !strings.Contains(plan.HintOf(err), "disable_unauthed_generate_root_endpoints") {
			t.Errorf("%d: %v (hint %q)", status, err, plan.HintOf(err))
		}
	}
}

func TestAnAnswerThatRepeatsASecretDoesNotShowIt(t *testing.T) {
	client := answering(t, func(w http.ResponseWriter, request *http.Request) {
		var sent map[string]any
		_ = json.NewDecoder(request.Body).Decode(&sent)
		raw, _ := json.Marshal(sent)
		refusing(400, fmt.Sprintf("what is %s, or %v, of ", raw, sent)+request.Header.Get("X-Vault-Token"))(w, request)
	})
	const planted = "planted\n\"1234"
	entry := site.Secret{Component: "shop", Name: "password"}
	_, written := client.Write(t.Context(), entry, secret.New(planted), 0, nil)
	_, _, login := client.Login(t.Context(), "operators", "operator", secret.New(planted))
	for _, err := range []error{written, login} {
		if err == nil || strings.Contains(err.Error(), "1234") || strings.Contains(err.Error(), "a-token") || !strings.Contains(err.Error(), "[redacted]") {
			t.Errorf("%v", err)
		}
	}
}

func TestATokenFollowsNoRedirect(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, request *http.Request) {
		t.Errorf("%s %s was sent to another address", request.Method, request.URL)
	}))
	t.Cleanup(elsewhere.Close)
	client := answering(t, func(w http.ResponseWriter, request *http.Request) {
		http.Redirect(w, request, elsewhere.URL+request.URL.Path, http.StatusTemporaryRedirect)
	})
	_, err := client.Write(t.Context(), site.Secret{Component: "shop", Name: "password"}, secret.New("x"), 0, nil)
	if err == nil || !strings.Contains(err.Error(), "redirects") {
		t.Errorf("write: %v", err)
	}
}

func TestAFailedWriteIsNotSentAgain(t *testing.T) {
	requests := 0
	client := answering(t, func(w http.ResponseWriter, request *http.Request) {
		requests++
		refusing(http.StatusInternalServerError, "broken")(w, request)
	})
	if _, err := client.Write(t.Context(), site.Secret{Component: "shop", Name: "password"}, secret.New("x"), 0, nil); err == nil || requests != 1 {
		t.Errorf("%d requests, %v", requests, err)
	}
}

func TestWhatAnEntrysMetadataMeans(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for name, test := range map[string]struct {
		metadata        string
		exists, deleted bool
	}{
		"nothing":                         {`{}`, false, false},
		"metadata without a version":      {`{"current_version":0,"versions":{}}`, false, false},
		"a value":                         {`{"current_version":2,"versions":{"2":{"deletion_time":"","destroyed":false}}}`, true, false},
		"deleted":                         {`{"current_version":1,"versions":{"1":{"deletion_time":"2026-02-28T00:00:00Z"}}}`, true, true},
		"deleted by a clock before ours":  {`{"current_version":1,"versions":{"1":{"deletion_time":"2026-03-01T12:10:00Z"}}}`, true, true},
		"to be deleted in a month":        {`{"current_version":1,"versions":{"1":{"deletion_time":"2026-04-01T00:00:00Z"}}}`, true, false},
		"destroyed":                       {`{"current_version":1,"versions":{"1":{"deletion_time":"","destroyed":true}}}`, true, true},
		"the newest version is forgotten": {`{"current_version":9,"versions":{"1":{}}}`, true, true},
	} {
		decoder := json.NewDecoder(strings.NewReader(test.metadata))
		decoder.UseNumber()
		var metadata map[string]any
		if err := decoder.Decode(&metadata); err != nil {
			t.Fatal(err)
		}
		if state := entryState(site.Secret{Component: "shop", Name: "password"}, metadata, now); state.Exists != test.exists || state.Deleted != test.deleted {
			t.Errorf("%s: %+v", name, state)
		}
	}
}

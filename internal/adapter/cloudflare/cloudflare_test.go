package cloudflare_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/adapter/cloudflare"
	cloudflarefake "github.com/nomad-site/site/internal/lab/cloudflare"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

const (
	bucketName = "gamma-artifacts"
	someToken  = "a-token-that-nobody-has-ever-been-given-0"
)

func provider(t *testing.T, options cloudflarefake.Options) *cloudflarefake.Fake {
	t.Helper()
	fake, err := cloudflarefake.Serve(t.Context(), "127.0.0.1:0", options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = fake.Close() })
	return fake
}

func client(t *testing.T, fake *cloudflarefake.Fake, token string, edit ...func(*cloudflare.Options)) *cloudflare.Client {
	t.Helper()
	options := cloudflare.Options{
		AccountID: cloudflarefake.AccountID, API: fake.URL(), Token: secret.New(token), Patience: 2 * time.Second,
	}
	for _, one := range edit {
		one(&options)
	}
	made, err := cloudflare.New(options)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// pair is a provider and a client with what a site needs.
func pair(t *testing.T, options cloudflarefake.Options) (*cloudflarefake.Fake, *cloudflare.Client) {
	t.Helper()
	fake := provider(t, options)
	_, value := fake.Admin("pair a")
	return fake, client(t, fake, value)
}

// mustHint: what users see has a way out, and no secret in it.
func mustHint(t *testing.T, err error, secrets ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if plan.HintOf(err) == "" {
		t.Errorf("no hint: %v", err)
	}
	for _, one := range secrets {
		if strings.Contains(err.Error()+plan.HintOf(err), one) {
			t.Errorf("a secret is in the error: %v", err)
		}
	}
}

func TestOptionsThatCannotWorkAreRefusedBeforeAnythingIsAsked(t *testing.T) {
	good := cloudflare.Options{AccountID: cloudflarefake.AccountID, Token: secret.New(someToken)}
	for _, test := range []struct {
		name string
		edit func(*cloudflare.Options)
		want string
	}{
		{"nothing is wrong", func(*cloudflare.Options) {}, ""},
		{"no account", func(o *cloudflare.Options) { o.AccountID = "" }, "account id"},
		{"an account by its name", func(o *cloudflare.Options) { o.AccountID = "gamma" }, "account id"},
		{"an account that is a path", func(o *cloudflare.Options) { o.AccountID = "../../../accounts/00000000000000" }, "account id"},
		{"no such jurisdiction", func(o *cloudflare.Options) { o.Jurisdiction = "mars" }, "jurisdiction"},
		{"no URL", func(o *cloudflare.Options) { o.API = "api.cloudflare.com" }, "no URL"},
		{"unencrypted to the internet", func(o *cloudflare.Options) { o.API = "http://api.cloudflare.com/client/v4" }, "unencrypted"},
		{"unencrypted to who says to be near", func(o *cloudflare.Options) { o.API = "http://127.0.0.1.example.com" }, "unencrypted"},
		{"unencrypted in a lab", func(o *cloudflare.Options) { o.API = "http://10.77.0.9:7391/client/v4" }, ""},
		{"no token", func(o *cloudflare.Options) { o.Token = secret.Value{} }, "empty"},
		{"a token of two lines", func(o *cloudflare.Options) { o.Token = secret.New(someToken + "\nmore") }, "characters"},
	} {
		t.Run(test.name, func(t *testing.T) {
			options := good
			test.edit(&options)
			_, err := cloudflare.New(options)
			if test.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			mustHint(t, err, someToken)
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("error: %v", err)
			}
		})
	}
}

func TestVerifySaysWhoTheTokenIs(t *testing.T) {
	fake := provider(t, cloudflarefake.Options{})
	id, value := fake.Admin("pair a")
	expires := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	if err := fake.Change(id, "active", expires); err != nil {
		t.Fatal(err)
	}
	got, until, err := client(t, fake, value).Verify(t.Context())
	if err != nil || got != id || !until.Equal(expires) {
		t.Errorf("got %s until %s, %v", got, until, err)
	}
}

func TestVerifySaysWhyATokenIsNotTaken(t *testing.T) {
	fake := provider(t, cloudflarefake.Options{})
	expiredID, expired := fake.Admin("expired")
	disabledID, disabled := fake.Admin("disabled")
	elsewhereID, elsewhere := fake.Admin("elsewhere")
	_, personal := fake.Person("laptop")
	_, good := fake.Admin("good")
	for _, err := range []error{
		fake.Change(expiredID, "active", time.Now().Add(-time.Hour)), fake.Change(disabledID, "disabled", time.Time{}),
		fake.Restrict(elsewhereID, "192.0.2.0/24"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	other := "00000000000000000000000000000bad"
	for _, test := range []struct {
		name, token, account string
		want                 []string
		kind                 any
	}{
		{"nobody's", someToken, "", []string{"Invalid API Token", cloudflarefake.AccountID}, new(*cloudflare.TokenError)},
		{"no token at all", "short", "", []string{"Invalid request headers"}, new(*cloudflare.TokenError)},
		{"expired", expired, "", []string{"Invalid API Token"}, new(*cloudflare.TokenError)},
		{"disabled", disabled, "", []string{"it is disabled"}, new(*cloudflare.TokenError)},
		{"a person's", personal, "", []string{"a person's", "not account"}, new(*cloudflare.TokenError)},
		{"of another account", good, other, []string{cloudflare.TokensWrite, other}, new(*cloudflare.DeniedError)},
		{"used from elsewhere", elsewhere, "", []string{"from location: 127.0.0.1"}, new(*cloudflare.DeniedError)},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := client(t, fake, test.token, func(o *cloudflare.Options) {
				if test.account != "" {
					o.AccountID = test.account
				}
			})
			_, _, err := c.Verify(t.Context())
			mustHint(t, err, test.token)
			if !errors.As(err, test.kind) {
				t.Errorf("kind: %T", err)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is not in: %v", want, err)
				}
			}
		})
	}
}

func TestEachMissingPermissionIsNamedAndNothingIsChanged(t *testing.T) {
	account := `{"com.cloudflare.api.account.` + cloudflarefake.AccountID + `":"*"}`
	both := []string{cloudflare.TokensWrite, cloudflare.StorageWrite}
	items := []string{cloudflare.BucketItemRead, cloudflare.BucketItemWrite}
	for _, test := range []struct {
		name     string
		policies func(*cloudflarefake.Fake) []cloudflarefake.Policy
		disabled bool
		missing  []string
	}{
		{"has both", func(f *cloudflarefake.Fake) []cloudflarefake.Policy { return []cloudflarefake.Policy{f.Allow(both...)} }, false, nil},
		{"has both on all accounts", func(f *cloudflarefake.Fake) []cloudflarefake.Policy {
			return []cloudflarefake.Policy{f.Policy("allow", `{"com.cloudflare.api.account.*":"*"}`, both...)}
		}, false, nil},
		{"may not touch R2", func(f *cloudflarefake.Fake) []cloudflarefake.Policy {
			return []cloudflarefake.Policy{f.Allow(cloudflare.TokensWrite)}
		}, false, []string{cloudflare.StorageWrite}},
		{"may only read R2", func(f *cloudflarefake.Fake) []cloudflarefake.Policy {
			return []cloudflarefake.Policy{f.Allow(cloudflare.TokensWrite, "Workers R2 Storage Read")}
		}, false, []string{cloudflare.StorageWrite}},
		{"may only read tokens", func(f *cloudflarefake.Fake) []cloudflarefake.Policy {
			return []cloudflarefake.Policy{f.Allow("Account API Tokens Read", cloudflare.StorageWrite)}
		}, false, []string{cloudflare.TokensWrite}},
		{"may not see tokens", func(f *cloudflarefake.Fake) []cloudflarefake.Policy {
			return []cloudflarefake.Policy{f.Allow(cloudflare.StorageWrite)}
		}, false, append(slices.Clone(both), items...)},
		{"is denied R2", func(f *cloudflarefake.Fake) []cloudflarefake.Policy {
			return []cloudflarefake.Policy{f.Allow(append(slices.Clone(both), "Workers R2 Storage Read")...), f.Policy("deny", account, cloudflare.StorageWrite)}
		}, false, []string{cloudflare.StorageWrite}},
		{"has it within the account, not on it", func(f *cloudflarefake.Fake) []cloudflarefake.Policy {
			nested := `{"com.cloudflare.api.account.` + cloudflarefake.AccountID + `":{"com.cloudflare.api.account.zone.*":"*"}}`
			return []cloudflarefake.Policy{f.Allow(cloudflare.TokensWrite), f.Policy("allow", nested, cloudflare.StorageWrite)}
		}, false, []string{cloudflare.StorageWrite}},
		{"has both and R2 is not enabled", func(f *cloudflarefake.Fake) []cloudflarefake.Policy {
			return []cloudflarefake.Policy{f.Allow(both...)}
		}, true, []string{cloudflare.StorageWrite}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fake := provider(t, cloudflarefake.Options{R2Disabled: test.disabled})
			_, value := fake.Make("pair a", test.policies(fake)...)
			checkPermissions(t, client(t, fake, value), append(slices.Clone(both), items...), test.missing)
			for _, call := range fake.Calls() {
				if call.Method != http.MethodGet {
					t.Errorf("changes something: %+v", call)
				}
			}
		})
	}
}

// checkPermissions: these are tested, those are missing, and an error names each.
func checkPermissions(t *testing.T, c *cloudflare.Client, want, wantMissing []string) {
	t.Helper()
	permissions, err := c.Permissions(t.Context(), bucketName)
	if err != nil {
		t.Fatal(err)
	}
	var missing, names []string
	for _, permission := range permissions {
		names = append(names, permission.Name)
		if permission.Why == "" {
			t.Errorf("%s: no reason", permission.Name)
		}
		if !permission.Allowed {
			missing = append(missing, permission.Name)
		}
	}
	if !slices.Equal(names, want) {
		t.Errorf("tested: %v", names)
	}
	if !slices.Equal(missing, wantMissing) {
		t.Errorf("missing %v, want %v: %+v", missing, wantMissing, permissions)
	}
	missingErr := c.Missing(permissions)
	if (missingErr != nil) != (wantMissing != nil) {
		t.Fatalf("error: %v", missingErr)
	}
	for _, name := range wantMissing {
		if !strings.Contains(missingErr.Error(), name) || !strings.Contains(missingErr.Error(), cloudflarefake.AccountID) {
			t.Errorf("error: %v", missingErr)
		}
	}
}

func TestWhatThePermissionsSayIsWhatTheProviderDoes(t *testing.T) {
	fake := provider(t, cloudflarefake.Options{})
	_, value := fake.Admin("half", "Account API Tokens Read", "Workers R2 Storage Read")
	c := client(t, fake, value)
	_, mintErr := c.MintStoreKey(t.Context(), "site/gamma/proxy/1", bucketName, false)
	_, bucketErr := c.EnsureBucket(t.Context(), bucketName)
	for permission, err := range map[string]error{cloudflare.TokensWrite: mintErr, cloudflare.StorageWrite: bucketErr} {
		var denied *cloudflare.DeniedError
		mustHint(t, err, value)
		if !errors.As(err, &denied) || denied.Permission != permission || denied.Account != cloudflarefake.AccountID {
			t.Errorf("%s: %v", permission, err)
		}
		if !strings.Contains(err.Error(), permission) || !strings.Contains(err.Error(), cloudflarefake.AccountID) {
			t.Errorf("permission and account are not named: %v", err)
		}
	}
}

func TestABucketIsMadeOnce(t *testing.T) {
	fake, c := pair(t, cloudflarefake.Options{})
	for _, want := range []bool{true, false} {
		if created, err := c.EnsureBucket(t.Context(), bucketName); err != nil || created != want {
			t.Errorf("created: %v, want %v, %v", created, want, err)
		}
	}
	if all := fake.Buckets(); len(all) != 1 || all[0].Name != bucketName || all[0].Jurisdiction != "default" {
		t.Errorf("buckets: %+v", all)
	}
}

func TestABucketIsMadeInItsJurisdiction(t *testing.T) {
	fake := provider(t, cloudflarefake.Options{})
	_, value := fake.Admin("pair a")
	c := client(t, fake, value, func(o *cloudflare.Options) { o.Jurisdiction = "eu" })
	for _, want := range []bool{true, false} {
		if created, err := c.EnsureBucket(t.Context(), bucketName); err != nil || created != want {
			t.Errorf("created: %v, want %v, %v", created, want, err)
		}
	}
	if all := fake.Buckets(); len(all) != 1 || all[0].Jurisdiction != "eu" {
		t.Errorf("buckets: %+v", all)
	}
	minted, err := c.MintStoreKey(t.Context(), "site/gamma/proxy/1", bucketName, false)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"com.cloudflare.edge.r2.bucket.` + cloudflarefake.AccountID + `_eu_` + bucketName + `":"*"}`
	if got := fake.PoliciesOf(minted.TokenID); len(got) != 1 || string(got[0].Resources) != want {
		t.Errorf("policies: %s", got)
	}
}

func TestABucketWhoseCreationWasNotAnsweredIsThere(t *testing.T) {
	fake, c := pair(t, cloudflarefake.Options{})
	fake.FailCall(2, cloudflarefake.Fault{Done: true}) // the first looks it up
	if created, err := c.EnsureBucket(t.Context(), bucketName); err != nil || !created {
		t.Errorf("created: %v, %v", created, err)
	}
	if len(fake.Buckets()) != 1 {
		t.Errorf("buckets: %+v", fake.Buckets())
	}
}

func TestR2ThatIsNotEnabledIsSaid(t *testing.T) {
	_, c := pair(t, cloudflarefake.Options{R2Disabled: true})
	_, err := c.EnsureBucket(t.Context(), bucketName)
	mustHint(t, err)
	if !strings.Contains(err.Error(), "R2 is not enabled") || !strings.Contains(plan.HintOf(err), "enable R2") {
		t.Errorf("%v; %s", err, plan.HintOf(err))
	}
}

func TestAStoreKeyIsScopedToItsBucket(t *testing.T) {
	for _, write := range []bool{false, true} {
		t.Run(fmt.Sprintf("write is %v", write), func(t *testing.T) {
			fake, c := pair(t, cloudflarefake.Options{})
			minted, err := c.MintStoreKey(t.Context(), "site/gamma/proxy/7", bucketName, write)
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256([]byte(minted.Value.Reveal()))
			key := cloudflarefake.Key{ID: minted.TokenID, Secret: hex.EncodeToString(sum[:]), Bucket: bucketName, Write: write}
			if minted.SecretAccessKey.Reveal() != key.Secret || minted.Name != "site/gamma/proxy/7" {
				t.Errorf("minted %s: the secret is not the value's SHA-256", minted.Name)
			}
			if keys := fake.Keys(); len(keys) != 1 || keys[0] != key {
				t.Errorf("keys: %+v", keys)
			}
			policies := fake.PoliciesOf(minted.TokenID)
			names := map[string]bool{}
			for _, group := range policies[0].Groups {
				names[group.Name] = true
			}
			if len(policies) != 1 || !names[cloudflare.BucketItemRead] || names[cloudflare.BucketItemWrite] != write || len(names) > 2 {
				t.Errorf("policies: %+v", policies)
			}
			if text := fmt.Sprintf("%+v", minted); strings.Contains(text, key.Secret) || strings.Contains(text, minted.Value.Reveal()) {
				t.Error("a minted key prints its secret")
			}
			// The key opens the store and nothing of the API.
			_, err = client(t, fake, minted.Value.Reveal()).Tokens(t.Context(), "")
			mustHint(t, err, minted.Value.Reveal())
		})
	}
}

func TestAnAdminMintsItsLike(t *testing.T) {
	fake := provider(t, cloudflarefake.Options{})
	nested := `{"com.cloudflare.api.account.` + cloudflarefake.AccountID + `":{"com.cloudflare.api.account.zone.*":"*"}}`
	id, value := fake.Make("pair a", fake.Allow(cloudflare.TokensWrite, cloudflare.StorageWrite),
		fake.Policy("deny", nested, "Account Settings Read"))
	if err := fake.Change(id, "active", time.Now().Add(90*24*time.Hour).UTC().Truncate(time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := fake.Restrict(id, "127.0.0.0/8"); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(30 * 24 * time.Hour)
	c := client(t, fake, value, func(o *cloudflare.Options) { o.Now = func() time.Time { return later } })
	minted, err := c.MintAdmin(t.Context(), "site/gamma/admin-b/2")
	if err != nil {
		t.Fatal(err)
	}
	plain := func(policies []cloudflarefake.Policy) string {
		for i := range policies {
			policies[i].ID = ""
		}
		content, err := json.Marshal(policies)
		if err != nil {
			t.Fatal(err)
		}
		return string(content)
	}
	if got, want := plain(fake.PoliciesOf(minted.TokenID)), plain(fake.PoliciesOf(id)); got != want {
		t.Errorf("policies %s, want %s", got, want)
	}
	if got, want := fake.ConditionOf(minted.TokenID), fake.ConditionOf(id); got != want || want == "" {
		t.Errorf("filter %s, want %s", got, want)
	}
	if life := fake.Expires(minted.TokenID).Sub(later); life < 89*24*time.Hour || life > 91*24*time.Hour {
		t.Errorf("it lives for %s", life)
	}
	peer := client(t, fake, minted.Value.Reveal())
	if permissions, err := peer.Permissions(t.Context(), bucketName); err != nil || peer.Missing(permissions) != nil {
		t.Errorf("permissions: %+v, %v", permissions, err)
	}
	if err := peer.Revoke(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	_, _, err = c.Verify(t.Context())
	mustHint(t, err, value)
}

func TestAllPagesOfTokensAreRead(t *testing.T) {
	for _, test := range []struct{ tokens, page int }{{0, 50}, {49, 50}, {50, 50}, {120, 50}, {31, 10}} {
		t.Run(fmt.Sprintf("%d by %d", test.tokens, test.page), func(t *testing.T) {
			fake, c := pair(t, cloudflarefake.Options{PageSize: test.page})
			for i := range test.tokens {
				fake.Make(fmt.Sprintf("site/gamma/proxy/%d", i+1), fake.Allow(cloudflare.StorageWrite))
			}
			found, err := c.Tokens(t.Context(), "site/gamma/")
			if err != nil || len(found) != test.tokens {
				t.Errorf("found %d, %v", len(found), err)
			}
			for _, token := range found {
				if token.Issued.IsZero() || token.Status != "active" || token.ID == "" {
					t.Errorf("token: %+v", token)
				}
			}
		})
	}
}

func TestWhatIsRevokedIsGone(t *testing.T) {
	fake, c := pair(t, cloudflarefake.Options{})
	minted, err := c.MintStoreKey(t.Context(), "site/gamma/proxy/7", bucketName, false)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is gone already
		if err := c.Revoke(t.Context(), minted.TokenID); err != nil {
			t.Fatal(err)
		}
	}
	if keys := fake.Keys(); len(keys) != 0 {
		t.Errorf("keys: %+v", keys)
	}
	mustHint(t, c.Revoke(t.Context(), "../../tokens"))
}

func TestATokenThatIsThereIsNotTakenForGone(t *testing.T) {
	fake, c := pair(t, cloudflarefake.Options{})
	minted, err := c.MintStoreKey(t.Context(), "site/gamma/proxy/7", bucketName, false)
	if err != nil {
		t.Fatal(err)
	}
	fake.Fail(func(call cloudflarefake.Call) *cloudflarefake.Fault {
		if call.Method == http.MethodDelete {
			return &cloudflarefake.Fault{Status: http.StatusNotFound, Body: "<html>nothing here</html>"}
		}
		return nil
	})
	mustHint(t, c.Revoke(t.Context(), minted.TokenID))
}

// faults are what a creation may meet, and whether it is done nevertheless.
func faults() map[string]cloudflarefake.Fault {
	page := "<html>bad gateway</html>"
	return map[string]cloudflarefake.Fault{
		"the connection ends before it":      {},
		"the connection ends after it":       {Done: true},
		"503 before it":                      {Status: 503, Code: 10001, Message: "try later"},
		"502 of a proxy after it":            {Status: 502, Body: page, Done: true},
		"500 after it":                       {Status: 500, Code: 10001, Message: "internal", Done: true},
		"an answer that is no JSON":          {Status: 200, Body: page, Done: true},
		"an answer without a token":          {Status: 200, Done: true},
		"429 that asks for a second, before": {Status: 429, Code: 971, Message: "slow down", RetryAfter: 1},
	}
}

func TestACreationThatWasNotAnsweredLeavesNoOrphan(t *testing.T) {
	for name, fault := range faults() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fake, c := pair(t, cloudflarefake.Options{})
			fake.Make("site/gamma/proxy/7", fake.Allow(cloudflare.StorageWrite)) // an older run's; whose it is, others decide
			failed := 0
			fake.Fail(func(call cloudflarefake.Call) *cloudflarefake.Fault {
				if call.Method == http.MethodPost && failed == 0 {
					failed++
					return &fault
				}
				return nil
			})
			minted, err := c.MintStoreKey(t.Context(), "site/gamma/proxy/7", bucketName, true)
			if err != nil {
				t.Fatal(err)
			}
			if names := fake.TokenNames(); !slices.Equal(names, []string{"pair a", "site/gamma/proxy/7", "site/gamma/proxy/7"}) {
				t.Errorf("tokens: %v", names)
			}
			if keys := fake.Keys(); len(keys) != 1 || keys[0].ID != minted.TokenID {
				t.Errorf("keys: %+v", keys)
			}
		})
	}
}

func TestAnEndedCreationLeavesNoOrphan(t *testing.T) {
	for name, fault := range map[string]*cloudflarefake.Fault{"answered": nil, "not answered": {Done: true}} {
		t.Run(name, func(t *testing.T) {
			fake, c := pair(t, cloudflarefake.Options{})
			ctx, cancel := context.WithCancelCause(t.Context())
			interrupted := errors.New("interrupted")
			fake.Fail(func(call cloudflarefake.Call) *cloudflarefake.Fault {
				if call.Method != http.MethodPost {
					return nil
				}
				cancel(interrupted)
				return fault
			})
			_, err := c.MintStoreKey(ctx, "site/gamma/proxy/7", bucketName, true)
			if !errors.Is(err, interrupted) {
				t.Errorf("error: %v", err)
			}
			if names := fake.TokenNames(); !slices.Equal(names, []string{"pair a"}) {
				t.Errorf("tokens: %v", names)
			}
			if calls := fake.Calls(); !slices.ContainsFunc(calls, func(c cloudflarefake.Call) bool { return c.Method == http.MethodDelete }) {
				t.Errorf("nothing was made that could be taken back: %+v", calls)
			}
		})
	}
}

func TestAnOrphanThatCannotBeTakenBackIsNamed(t *testing.T) {
	fake, c := pair(t, cloudflarefake.Options{})
	minting := false
	fake.Fail(func(call cloudflarefake.Call) *cloudflarefake.Fault {
		minting = minting || call.Method == http.MethodPost
		if minting {
			return &cloudflarefake.Fault{Status: 503, Code: 10001, Message: "try later", Done: true}
		}
		return nil
	})
	_, err := c.MintStoreKey(t.Context(), "site/gamma/proxy/7", bucketName, true)
	mustHint(t, err)
	if !strings.Contains(err.Error(), `take back token "site/gamma/proxy/7", which may have been made`) {
		t.Errorf("error: %v", err)
	}
}

func TestEachAnswerThatIsLostOnceChangesNothing(t *testing.T) {
	// Each call of a whole round, one after the other, is answered with 503.
	for number := 1; ; number++ {
		fake, c := pair(t, cloudflarefake.Options{})
		fake.FailCall(number, cloudflarefake.Fault{Status: 503, Code: 10001, Message: "try later", Done: true})
		if _, err := c.EnsureBucket(t.Context(), bucketName); err != nil {
			t.Fatalf("call %d: %v", number, err)
		}
		minted, err := c.MintStoreKey(t.Context(), "site/gamma/proxy/7", bucketName, false)
		if err != nil {
			t.Fatalf("call %d: %v", number, err)
		}
		admin, err := c.MintAdmin(t.Context(), "site/gamma/admin-b/2")
		if err != nil {
			t.Fatalf("call %d: %v", number, err)
		}
		if err := c.Revoke(t.Context(), minted.TokenID); err != nil {
			t.Fatalf("call %d: %v", number, err)
		}
		if names := fake.TokenNames(); !slices.Equal(names, []string{"pair a", admin.Name}) {
			t.Errorf("call %d: tokens: %v", number, names)
		}
		if number >= len(fake.Calls()) {
			break // the round is over before the fault
		}
	}
}

func TestAProviderThatIsAwayIsAskedForAWhileOnly(t *testing.T) {
	fake := provider(t, cloudflarefake.Options{})
	_, value := fake.Admin("pair a")
	c := client(t, fake, value, func(o *cloudflare.Options) { o.Patience = 300 * time.Millisecond })
	fake.Fail(func(cloudflarefake.Call) *cloudflarefake.Fault {
		return &cloudflarefake.Fault{Status: 502, Body: "<html>bad gateway</html>"}
	})
	_, _, err := c.Verify(t.Context())
	var unavailable *cloudflare.UnavailableError
	mustHint(t, err, value)
	if !errors.As(err, &unavailable) || !strings.Contains(err.Error(), "Bad Gateway (502)") {
		t.Errorf("error: %v", err)
	}
	if calls := len(fake.Calls()); calls < 2 || calls > 6 {
		t.Errorf("calls: %d", calls)
	}
}

func TestWhatIsWrongIsNotAskedTwice(t *testing.T) {
	fake := provider(t, cloudflarefake.Options{})
	_, value := fake.Admin("half", cloudflare.StorageWrite)
	_, err := client(t, fake, value).Tokens(t.Context(), "")
	mustHint(t, err, value)
	if calls := fake.Calls(); len(calls) != 1 {
		t.Errorf("calls: %+v", calls)
	}
}

func TestALimitThatLastsLongerThanPatienceIsSaidAtOnce(t *testing.T) {
	fake := provider(t, cloudflarefake.Options{RateLimit: 2})
	_, value := fake.Admin("pair a")
	c := client(t, fake, value, func(o *cloudflare.Options) { o.Patience = 20 * time.Second })
	var unavailable *cloudflare.UnavailableError
	begun := time.Now()
	for number := 1; number <= 3; number++ {
		_, _, err := c.Verify(t.Context())
		if (err != nil) != (number == 3) {
			t.Fatalf("call %d: %v", number, err)
		}
		if err != nil && (!errors.As(err, &unavailable) || unavailable.RetryAfter < 4*time.Minute) {
			t.Errorf("error: %v", err)
		}
	}
	if calls, took := fake.Calls(), time.Since(begun); len(calls) != 3 || took > 10*time.Second {
		t.Errorf("after %s: %+v", took, calls)
	}
}

func TestAFreshTokenIsAwaited(t *testing.T) {
	fake, c := pair(t, cloudflarefake.Options{SettleCalls: 4})
	minted, err := c.MintAdmin(t.Context(), "site/gamma/admin-b/2")
	if err != nil {
		t.Fatal(err)
	}
	fresh := client(t, fake, minted.Value.Reveal())
	if _, err := fresh.Tokens(t.Context(), ""); err == nil {
		t.Error("the fake knows a fresh token at once")
	}
	id, err := fresh.Await(t.Context(), 10*time.Second)
	if err != nil || id != minted.TokenID {
		t.Fatalf("got %s, %v", id, err)
	}
	if _, err := fresh.Tokens(t.Context(), ""); err != nil {
		t.Error(err)
	}
	_, err = client(t, fake, someToken).Await(t.Context(), 300*time.Millisecond)
	mustHint(t, err, someToken)
}

func TestATokenIsKnownEverywhereWhenNobodyRefusesItAnyMore(t *testing.T) {
	fake, c := pair(t, cloudflarefake.Options{})
	known := 0
	fake.Fail(func(call cloudflarefake.Call) *cloudflarefake.Fault {
		if strings.HasPrefix(call.Path, "/user/") {
			return nil
		}
		if known++; known == 2 || known == 5 { // as if other machines of the provider answered
			return &cloudflarefake.Fault{Status: http.StatusUnauthorized, Code: 1000, Message: "Invalid API Token"}
		}
		return nil
	})
	if _, err := c.Await(t.Context(), 10*time.Second); err != nil || known != 8 {
		t.Errorf("after %d calls: %v", known, err)
	}
}

func TestATokenThatTheProviderRepeatsIsMasked(t *testing.T) {
	fake := provider(t, cloudflarefake.Options{})
	_, value := fake.Admin("pair a")
	for _, status := range []int{400, 401, 403, 404, 409, 500} {
		fake.Fail(func(cloudflarefake.Call) *cloudflarefake.Fault {
			return &cloudflarefake.Fault{Status: status, Code: 1, Message: "no such token: " + value}
		})
		c := client(t, fake, value, func(o *cloudflare.Options) { o.Patience = 50 * time.Millisecond })
		_, err := c.Tokens(t.Context(), "")
		mustHint(t, err, value)
		if !strings.Contains(err.Error(), "[redacted]") {
			t.Errorf("%d: %v", status, err)
		}
	}
}

func TestTheEnvironmentOfOtherToolsIsNotRead(t *testing.T) {
	for _, name := range []string{"CLOUDFLARE_API_TOKEN", "CLOUDFLARE_API_KEY", "CLOUDFLARE_EMAIL", "CLOUDFLARE_API_USER_SERVICE_KEY"} {
		t.Setenv(name, someToken)
	}
	t.Setenv("CLOUDFLARE_BASE_URL", "http://127.0.0.1:1")
	fake := provider(t, cloudflarefake.Options{})
	id, value := fake.Admin("pair a")
	var sent http.Header
	c := client(t, fake, value, func(o *cloudflare.Options) {
		o.HTTP = &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			sent = r.Header.Clone()
			return http.DefaultTransport.RoundTrip(r)
		})}
	})
	if got, _, err := c.Verify(t.Context()); err != nil || got != id {
		t.Fatalf("got %s, %v", got, err)
	}
	for name, values := range sent {
		if slices.Contains(values, someToken) {
			t.Errorf("header %s has what is in the environment", name)
		}
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestARedirectIsNotFollowed(t *testing.T) {
	other := provider(t, cloudflarefake.Options{})
	_, value := other.Admin("pair a")
	front := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, strings.TrimSuffix(other.URL(), "/client/v4")+r.URL.Path, http.StatusTemporaryRedirect)
	})
	c := client(t, other, value, func(o *cloudflare.Options) {
		server := httptest.NewServer(front)
		t.Cleanup(server.Close)
		o.API = server.URL + "/client/v4"
		o.Patience = 50 * time.Millisecond
	})
	_, _, err := c.Verify(t.Context())
	mustHint(t, err, value)
	if calls := other.Calls(); len(calls) != 0 {
		t.Errorf("calls: %+v", calls)
	}
}

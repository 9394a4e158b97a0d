package cloudflarefake_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cloudflarefake "github.com/nomad-site/site/internal/lab/cloudflare"
	"github.com/nomad-site/site/internal/retry"
)

const (
	tokensPath  = "/accounts/" + cloudflarefake.AccountID + "/tokens"
	bucketsPath = "/accounts/" + cloudflarefake.AccountID + "/r2/buckets"
	itemRead    = "6a018a9f2fc74eb6b293b0c548f38b39"
	itemWrite   = "2efd5506f9c8494dacb1fa10a3e7d5b6"
)

// keyBody is the creation of a key as R2's documentation has it.
func keyBody(name, bucket string, groups ...string) string {
	list := make([]string, 0, len(groups))
	for _, group := range groups {
		list = append(list, `{"id":"`+group+`"}`)
	}
	return `{"name":"` + name + `","policies":[{"effect":"allow","permission_groups":[` + strings.Join(list, ",") +
		`],"resources":{"com.cloudflare.edge.r2.bucket.` + cloudflarefake.AccountID + `_default_` + bucket + `":"*"}}]}`
}

type reply struct {
	status  int
	Success bool `json:"success"`
	Errors  []struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"errors"`
	Result json.RawMessage `json:"result"`
	Info   map[string]int  `json:"result_info"`
}

func (r reply) field(t *testing.T, name string) string {
	t.Helper()
	var fields map[string]any
	if err := json.Unmarshal(r.Result, &fields); err != nil {
		t.Fatalf("%v: %s", err, r.Result)
	}
	return fmt.Sprint(fields[name])
}

func ask(t *testing.T, fake *cloudflarefake.Fake, token, method, path, body string) reply {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, fake.URL()+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	answered := reply{status: response.StatusCode}
	if err := json.Unmarshal(content, &answered); err != nil {
		t.Fatalf("%v: %s", err, content)
	}
	return answered
}

func serve(t *testing.T, options cloudflarefake.Options) *cloudflarefake.Fake {
	t.Helper()
	fake, err := cloudflarefake.Serve(t.Context(), "127.0.0.1:0", options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = fake.Close() })
	return fake
}

func TestWhatIsWrongIsAnsweredAsTheProviderDoes(t *testing.T) {
	fake := serve(t, cloudflarefake.Options{})
	_, admin := fake.Admin("admin")
	_, reader := fake.Admin("reader", "Account API Tokens Read", "Workers R2 Storage Read")
	unknownField := strings.Replace(keyBody("x", "b-1", itemRead), `"name"`, `"ttl":3600,"name"`, 1)
	onAccount := strings.Replace(keyBody("x", "b-1", itemRead), `com.cloudflare.edge.r2.bucket.`+cloudflarefake.AccountID+`_default_b-1`,
		"com.cloudflare.api.account."+cloudflarefake.AccountID, 1)
	for _, test := range []struct {
		name, token, method, path, body string
		status, code                    int
	}{
		{"no token", "", "GET", tokensPath, "", 400, 9106},
		{"no real token", "x", "GET", tokensPath, "", 400, 6003},
		{"an unknown token", strings.Repeat("x", 40), "GET", tokensPath, "", 401, 1000},
		{"another account", admin, "GET", "/accounts/00000000000000000000000000000bad/tokens", "", 403, 9109},
		{"no such place", admin, "GET", "/zones", "", 404, 7003},
		{"a token that only reads makes one", reader, "POST", tokensPath, keyBody("x", "b-1", itemRead), 403, 9109},
		{"a token that only reads makes a bucket", reader, "POST", bucketsPath, `{"name":"b-1"}`, 403, 10000},
		{"an unknown field", admin, "POST", tokensPath, unknownField, 400, 1001},
		{"no name", admin, "POST", tokensPath, keyBody("", "b-1", itemRead), 400, 1001},
		{"a long name", admin, "POST", tokensPath, keyBody(strings.Repeat("x", 121), "b-1", itemRead), 400, 1001},
		{"no permission", admin, "POST", tokensPath, keyBody("x", "b-1"), 400, 1001},
		{"an unknown permission", admin, "POST", tokensPath, keyBody("x", "b-1", "0123"), 400, 1001},
		{"a bucket's permission on the account", admin, "POST", tokensPath, onAccount, 400, 1001},
		{"a token that is not there", admin, "DELETE", tokensPath + "/00000000000000000000000000000000", "", 404, 1003},
		{"a page too large", admin, "GET", tokensPath + "?per_page=51", "", 400, 1001},
		{"a bucket's bad name", admin, "POST", bucketsPath, `{"name":"B_1"}`, 400, 10005},
		{"a bucket that is not there", admin, "GET", bucketsPath + "/b-1", "", 404, 10006},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := ask(t, fake, test.token, test.method, test.path, test.body)
			if got.status != test.status || got.Success || len(got.Errors) != 1 || got.Errors[0].Code != test.code {
				t.Errorf("got %d %+v, want %d and %d", got.status, got.Errors, test.status, test.code)
			}
		})
	}
	if names := fake.TokenNames(); len(names) != 2 || len(fake.Buckets()) != 0 {
		t.Errorf("something was made: %v, %v", names, fake.Buckets())
	}
}

func TestATokensValueIsShownOnce(t *testing.T) {
	fake := serve(t, cloudflarefake.Options{})
	_, admin := fake.Admin("admin")
	made := ask(t, fake, admin, "POST", tokensPath, keyBody("one", "b-1", itemRead))
	value := made.field(t, "value")
	if made.status != 200 || len(value) < 40 {
		t.Fatalf("made: %+v", made)
	}
	for _, path := range []string{tokensPath, tokensPath + "/" + made.field(t, "id")} {
		got := ask(t, fake, admin, "GET", path, "")
		if shown := string(got.Result); got.status != 200 || strings.Contains(shown, value) || strings.Contains(shown, admin) {
			t.Errorf("%s shows a value, or nothing: %s", path, got.Result)
		}
	}
}

// gateway is what Options.Keys is told.
type gateway struct {
	mutex sync.Mutex
	valid map[string]string // id to secret, bucket and whether it writes
	told  []string
}

func (g *gateway) keys(id, secret, bucket string, write, remove bool) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	g.told = append(g.told, fmt.Sprintf("%s %s remove=%v", id, bucket, remove))
	if remove {
		delete(g.valid, id)
		return
	}
	g.valid[id] = fmt.Sprintf("%s %s write=%v", secret, bucket, write)
}

func (g *gateway) has(id string) string {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	return g.valid[id]
}

func TestTheGatewayIsToldOfEachKeyAndItsEnd(t *testing.T) {
	real := &gateway{valid: map[string]string{}}
	fake := serve(t, cloudflarefake.Options{Keys: real.keys})
	_, admin := fake.Admin("admin")
	made := ask(t, fake, admin, "POST", tokensPath, keyBody("one", "b-1", itemRead, itemWrite))
	id := made.field(t, "id")
	key := fake.Keys()
	if len(key) != 1 || real.has(id) != key[0].Secret+" b-1 write=true" {
		t.Errorf("keys %+v, told %v", key, real.told)
	}
	before := real.has(id)
	if rolled := ask(t, fake, admin, "PUT", tokensPath+"/"+id+"/value", "{}"); rolled.status != 200 {
		t.Errorf("rolled: %+v", rolled)
	}
	if after := real.has(id); after == before || after == "" {
		t.Error("a rolled token has its old secret still")
	}
	if gone := ask(t, fake, admin, "DELETE", tokensPath+"/"+id, ""); gone.status != 200 || real.has(id) != "" {
		t.Errorf("it is still there: %+v", real.told)
	}
	if len(real.told) != 4 {
		t.Errorf("told: %v", real.told)
	}
}

func TestAFreshKeyIsRealOnlyAfterAWhile(t *testing.T) {
	real := &gateway{valid: map[string]string{}}
	fake := serve(t, cloudflarefake.Options{Keys: real.keys, SettleTime: 150 * time.Millisecond})
	_, admin := fake.Admin("admin")
	made := ask(t, fake, admin, "POST", tokensPath, keyBody("one", "b-1", itemRead))
	gone := ask(t, fake, admin, "POST", tokensPath, keyBody("two", "b-1", itemRead))
	if real.has(made.field(t, "id")) != "" || len(fake.Keys()) != 0 {
		t.Error("a fresh key is real at once")
	}
	if got := ask(t, fake, made.field(t, "value"), "GET", tokensPath+"/verify", ""); got.status != 401 {
		t.Errorf("a fresh token is known at once: %d", got.status)
	}
	ask(t, fake, admin, "DELETE", tokensPath+"/"+gone.field(t, "id"), "")
	err := retry.Until(t.Context(), "the key", 5*time.Second, func(context.Context) error {
		if real.has(made.field(t, "id")) == "" || ask(t, fake, made.field(t, "value"), "GET", tokensPath+"/verify", "").status != 200 {
			return errors.New("not yet")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if len(real.told) != 1 {
		t.Errorf("a key that was revoked meanwhile became real: %v", real.told)
	}
}

func TestTheStateOutlivesTheProcess(t *testing.T) {
	file := filepath.Join(t.TempDir(), "provider.json")
	first := serve(t, cloudflarefake.Options{State: file})
	_, admin := first.Admin("admin")
	ask(t, first, admin, "POST", bucketsPath, `{"name":"b-1"}`)
	made := ask(t, first, admin, "POST", tokensPath, keyBody("one", "b-1", itemRead))
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("file: %v, %v", info, err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	real := &gateway{valid: map[string]string{}}
	second := serve(t, cloudflarefake.Options{State: file, Keys: real.keys})
	if got := ask(t, second, admin, "GET", bucketsPath+"/b-1", ""); got.status != 200 {
		t.Errorf("the bucket: %+v", got)
	}
	if !slices.Equal(second.TokenNames(), []string{"admin", "one"}) || real.has(made.field(t, "id")) == "" {
		t.Errorf("tokens %v, told %v", second.TokenNames(), real.told)
	}
	if _, err := cloudflarefake.New(cloudflarefake.Options{State: t.TempDir()}); err == nil {
		t.Error("a state that cannot be read is taken for none")
	}
}

func TestTheLimitIsThatOfFiveMinutes(t *testing.T) {
	now := time.Now()
	var mutex sync.Mutex
	fake := serve(t, cloudflarefake.Options{RateLimit: 2, Now: func() time.Time {
		mutex.Lock()
		defer mutex.Unlock()
		return now
	}})
	_, admin := fake.Admin("admin")
	for number, want := range []int{200, 200, 429, 429} {
		if got := ask(t, fake, admin, "GET", tokensPath, ""); got.status != want {
			t.Errorf("call %d: %d", number+1, got.status)
		}
	}
	mutex.Lock()
	now = now.Add(5 * time.Minute)
	mutex.Unlock()
	if got := ask(t, fake, admin, "GET", tokensPath, ""); got.status != 200 {
		t.Errorf("after five minutes: %d", got.status)
	}
}

func TestCallsAreRecordedWithoutSecrets(t *testing.T) {
	fake := serve(t, cloudflarefake.Options{})
	id, admin := fake.Admin("admin")
	ask(t, fake, admin, "GET", tokensPath+"?page=1", "")
	ask(t, fake, strings.Repeat("x", 40), "GET", tokensPath, "")
	want := []cloudflarefake.Call{
		{Number: 1, Method: "GET", Path: tokensPath + "?page=1", TokenID: id, Status: 200},
		{Number: 2, Method: "GET", Path: tokensPath, Status: 401},
	}
	if calls := fake.Calls(); !slices.Equal(calls, want) {
		t.Errorf("calls: %+v", calls)
	}
}

func TestManyAskAtOnce(t *testing.T) {
	fake := serve(t, cloudflarefake.Options{Keys: func(string, string, string, bool, bool) {}})
	_, admin := fake.Admin("admin")
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			made := ask(t, fake, admin, "POST", tokensPath, keyBody(fmt.Sprintf("key %d", i), "b-1", itemRead))
			if i%2 == 0 {
				ask(t, fake, admin, "DELETE", tokensPath+"/"+made.field(t, "id"), "")
			}
		})
	}
	all.Wait()
	if listed := ask(t, fake, admin, "GET", tokensPath+"?per_page=50", ""); listed.Info["total_count"] != 11 || len(fake.Keys()) != 10 {
		t.Errorf("listed: %+v, keys %d", listed.Info, len(fake.Keys()))
	}
}

// Package cloudflarefake is the provider's API as its documentation has it, for
// tests and the lab: tokens of an account, permission groups and R2 buckets, with
// the provider's paths, envelope, codes, pages and limits
// (developers.cloudflare.com/api). It gives nothing away that the provider would
// not: the value of a token is in the answer to its creation and nowhere else.
package cloudflarefake

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// AccountID is the account's where the options name none.
const AccountID = "00000000000000000000000000000acc"

// basePath is that of the provider's API.
const basePath = "/client/v4"

// Options of the fake.
type Options struct {
	// AccountID is the one account there is. Default: AccountID.
	AccountID string
	// Keys is told of each S3 key of a bucket that becomes valid, or no longer is,
	// before the request that did it is answered.
	Keys func(id, secret, bucket string, write, remove bool)
	// SettleCalls answers the first calls of a fresh token with 401 and 403 by turns.
	SettleCalls int
	// SettleTime is how long a fresh token, and its S3 key, are not yet known.
	SettleTime time.Duration
	// RateLimit is how many requests there may be in five minutes; 0: any number.
	// The provider's is 1200.
	RateLimit int
	// PageSize is the most tokens of a page. Default: the provider's 50.
	PageSize int
	// R2Disabled: nobody subscribed to R2 yet.
	R2Disabled bool
	// State is a file in which tokens and buckets outlive the process; empty: none.
	State string
	Now   func() time.Time
}

// Fake is the provider.
type Fake struct {
	options  Options
	server   *http.Server
	listener net.Listener

	mutex   sync.Mutex
	state   state
	calls   []Call
	faults  map[int]Fault
	decide  func(Call) *Fault
	window  time.Time // when the five minutes of RateLimit began
	counted int
	timers  []*time.Timer
}

// state is what outlives the process.
type state struct {
	Tokens  []*token `json:"tokens"`
	Buckets []Bucket `json:"buckets"`
}

type token struct {
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	Value     string            `json:"value"`
	Status    string            `json:"status"`
	Issued    time.Time         `json:"issued_on"`
	Expires   time.Time         `json:"expires_on"`
	NotBefore time.Time         `json:"not_before"`
	Known     time.Time         `json:"known_from"` // SettleTime after it was made
	Policies  []Policy          `json:"policies"`
	Condition *json.RawMessage  `json:"condition,omitempty"`
	Person    bool              `json:"person,omitempty"`
	settles   int               // how many more calls do not know it
	known     map[string]string // the S3 keys that Keys was told of: bucket to secret
}

// Policy is one of a token's.
type Policy struct {
	ID        string          `json:"id,omitempty"`
	Effect    string          `json:"effect"`
	Groups    []Group         `json:"permission_groups"`
	Resources json.RawMessage `json:"resources"`
}

// Group is a permission.
type Group struct {
	ID   string          `json:"id"`
	Name string          `json:"name,omitempty"`
	Meta json.RawMessage `json:"meta,omitempty"`
}

// Bucket is one of R2's. Its name is unique in its jurisdiction.
type Bucket struct {
	Name         string    `json:"name"`
	Jurisdiction string    `json:"jurisdiction"`
	Created      time.Time `json:"creation_date"`
}

// Key is an S3 key.
type Key struct {
	ID, Secret, Bucket string
	Write              bool
}

// Call is a request that was answered, or was not.
type Call struct {
	// Number counts from 1.
	Number int
	Method string
	// Path is below /client/v4, with the query.
	Path string
	// TokenID is that of the token it came with; empty if there is no such.
	TokenID string
	Status  int
}

// Fault is what a call gets in place of its answer.
type Fault struct {
	// Status of the answer; 0: the connection ends without one.
	Status  int
	Code    int
	Message string
	// RetryAfter is in seconds.
	RetryAfter int
	// Body replaces the envelope, such as the page of a proxy.
	Body string
	// Done: what was asked for is done nevertheless.
	Done bool
}

// New makes a provider with one account, and in it what Options.State holds.
func New(options Options) (*Fake, error) {
	if options.AccountID == "" {
		options.AccountID = AccountID
	}
	if options.Now == nil {
		options.Now = time.Now
	}
	if options.PageSize == 0 {
		options.PageSize = 50
	}
	f := &Fake{options: options, faults: map[int]Fault{}}
	if options.State == "" {
		return f, nil
	}
	content, err := os.ReadFile(options.State)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err == nil {
		err = json.Unmarshal(content, &f.state)
	}
	if err != nil {
		return nil, fmt.Errorf("read the provider's state: %w", err)
	}
	for _, kept := range f.state.Tokens {
		f.tell(kept)
	}
	return f, nil
}

// Serve answers at the address, such as 127.0.0.1:0, until ctx ends or Close.
func Serve(ctx context.Context, address string, options Options) (*Fake, error) {
	f, err := New(options)
	if err != nil {
		return nil, err
	}
	if f.listener, err = (&net.ListenConfig{}).Listen(ctx, "tcp", address); err != nil {
		return nil, fmt.Errorf("serve the provider's API: %w", err)
	}
	f.server = &http.Server{Handler: f, ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { _ = f.Close() })
	go func() { _ = f.server.Serve(f.listener) }() // ends with Close
	return f, nil
}

// URL is that of the API, for field `api` of site.hcl; empty without Serve.
func (f *Fake) URL() string {
	if f.listener == nil {
		return ""
	}
	return "http://" + f.listener.Addr().String() + basePath
}

// Close ends it at once, whoever still asks.
func (f *Fake) Close() error {
	f.mutex.Lock()
	for _, timer := range f.timers {
		timer.Stop()
	}
	f.timers = nil
	f.mutex.Unlock()
	if f.server == nil {
		return nil
	}
	return f.server.Close()
}

// Admin makes a token as a person does in the dashboard, with what a site needs:
// permissions by name on the account, or the usual ones.
func (f *Fake) Admin(name string, permissions ...string) (id, value string) {
	if len(permissions) == 0 {
		permissions = []string{tokensWrite, storageWrite}
	}
	return f.add(&token{Name: name, Policies: []Policy{f.Allow(permissions...)}})
}

// Make makes a token of these policies.
func (f *Fake) Make(name string, policies ...Policy) (id, value string) {
	return f.add(&token{Name: name, Policies: policies})
}

// Person makes a token that is a person's and not the account's.
func (f *Fake) Person(name string) (id, value string) {
	return f.add(&token{Name: name, Person: true, Policies: []Policy{f.Allow(tokensWrite, storageWrite)}})
}

// Change edits a token as a person does in the dashboard.
func (f *Fake) Change(id string, status string, expires time.Time, policies ...Policy) error {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	found := f.byID(id)
	if found == nil {
		return fmt.Errorf("there is no token %s", id)
	}
	found.Status, found.Expires = status, expires
	if len(policies) > 0 {
		found.Policies = f.named(policies)
	}
	return f.save()
}

// Restrict lets a token in from these addresses only, in CIDR notation.
func (f *Fake) Restrict(id string, in ...string) error {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	found := f.byID(id)
	if found == nil {
		return fmt.Errorf("there is no token %s", id)
	}
	content, err := json.Marshal(map[string]any{"request_ip": map[string]any{"in": in}})
	if err != nil {
		return err
	}
	found.Condition = (*json.RawMessage)(&content)
	return f.save()
}

// Allow is a policy with these permissions, by name, on the account.
func (f *Fake) Allow(permissions ...string) Policy {
	return f.Policy("allow", `{"com.cloudflare.api.account.`+f.options.AccountID+`":"*"}`, permissions...)
}

// Policy is one with these permissions, by name, on resources in JSON.
func (f *Fake) Policy(effect, resources string, permissions ...string) Policy {
	policy := Policy{Effect: effect, Resources: json.RawMessage(resources)}
	for _, known := range groups() {
		if slices.Contains(permissions, known.Name) {
			policy.Groups = append(policy.Groups, Group{ID: known.ID, Name: known.Name})
		}
	}
	return policy
}

// add is for tokens that have settled.
func (f *Fake) add(made *token) (id, value string) {
	f.mutex.Lock()
	f.issue(made)
	made.settles, made.Known = 0, time.Time{}
	_ = f.save() // a lab without its file is one that forgets
	f.mutex.Unlock()
	f.tell(made)
	return made.ID, made.Value
}

// issue gives a token its id and value.
func (f *Fake) issue(made *token) {
	made.ID, made.Value = random(16), valueOf()
	made.Status, made.Issued = "active", f.options.Now().UTC().Truncate(time.Second)
	made.Policies = f.named(made.Policies)
	made.settles, made.Known = f.options.SettleCalls, f.options.Now().Add(f.options.SettleTime)
	f.state.Tokens = append(f.state.Tokens, made)
}

// named gives policies their ids and groups their names, as answers have them.
func (f *Fake) named(policies []Policy) []Policy {
	policies = slices.Clone(policies)
	for i := range policies {
		policies[i].ID = random(16)
		policies[i].Groups = slices.Clone(policies[i].Groups)
		for j, group := range policies[i].Groups {
			policies[i].Groups[j].Name = groupByID(group.ID).Name
		}
	}
	return policies
}

// byID is for those who hold the mutex.
func (f *Fake) byID(id string) *token {
	for _, token := range f.state.Tokens {
		if token.ID == id {
			return token
		}
	}
	return nil
}

func (f *Fake) isGood(t *token) bool {
	now := f.options.Now()
	return t.Status == "active" && (t.Expires.IsZero() || now.Before(t.Expires)) && !now.Before(t.NotBefore)
}

func (f *Fake) isFresh(t *token) bool { return f.options.Now().Before(t.Known) }

// tell makes a token's S3 keys real, once they have settled.
func (f *Fake) tell(made *token) {
	if f.options.Keys == nil {
		return
	}
	wait := made.Known.Sub(f.options.Now())
	if wait <= 0 {
		f.tellNow(made)
		return
	}
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.timers = append(f.timers, time.AfterFunc(wait, func() {
		f.mutex.Lock()
		still := f.byID(made.ID) == made
		f.mutex.Unlock()
		if still {
			f.tellNow(made)
		}
	}))
}

func (f *Fake) tellNow(made *token) {
	f.mutex.Lock()
	keys := keysOf(made, f.options.AccountID)
	made.known = map[string]string{}
	for _, key := range keys {
		made.known[key.Bucket] = key.Secret
	}
	f.mutex.Unlock()
	for _, key := range keys {
		f.options.Keys(key.ID, key.Secret, key.Bucket, key.Write, false)
	}
}

// untell ends them.
func (f *Fake) untell(gone *token) {
	f.mutex.Lock()
	known := gone.known
	gone.known = nil
	f.mutex.Unlock()
	for bucket, secret := range known {
		f.options.Keys(gone.ID, secret, bucket, false, true)
	}
}

// keysOf are the S3 keys that a token is: one for each bucket in its policies.
func keysOf(t *token, account string) []Key {
	sum := sha256.Sum256([]byte(t.Value))
	var keys []Key
	for _, policy := range t.Policies {
		var resources map[string]string
		if policy.Effect != "allow" || json.Unmarshal(policy.Resources, &resources) != nil {
			continue
		}
		may := func(name string) bool {
			return slices.ContainsFunc(policy.Groups, func(g Group) bool { return g.Name == name })
		}
		for resource := range resources {
			rest, ok := strings.CutPrefix(resource, "com.cloudflare.edge.r2.bucket."+account+"_")
			_, bucket, named := strings.Cut(rest, "_")
			if ok && named && (may(itemRead) || may(itemWrite)) {
				keys = append(keys, Key{ID: t.ID, Secret: hex.EncodeToString(sum[:]), Bucket: bucket, Write: may(itemWrite)})
			}
		}
	}
	return keys
}

// save is for those who hold the mutex.
func (f *Fake) save() error {
	if f.options.State == "" {
		return nil
	}
	content, err := json.Marshal(f.state)
	if err != nil {
		return fmt.Errorf("keep the provider's state: %w", err)
	}
	next := filepath.Join(filepath.Dir(f.options.State), "."+filepath.Base(f.options.State)+".next")
	if err := os.WriteFile(next, content, 0o600); err != nil {
		return fmt.Errorf("keep the provider's state: %w", err)
	}
	if err := os.Rename(next, f.options.State); err != nil {
		return fmt.Errorf("keep the provider's state: %w", err)
	}
	return nil
}

func random(bytes int) string {
	content := make([]byte, bytes)
	_, _ = rand.Read(content) // never fails
	return hex.EncodeToString(content)
}

// valueOf is a token's value: 40 characters that headers may have.
func valueOf() string { return rand.Text()[:26] + "-_" + rand.Text()[:12] }

package cloudflarefake

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The provider's codes.
const (
	codeInvalidToken = 1000
	codeBadRequest   = 1001
	codeNoToken      = 1003
	codeNoRoute      = 7003
	codeForbidden    = 9109
	codeNoHeader     = 9106
	codeBadHeaders   = 6003
	codeThrottled    = 971
	codeR2Forbidden  = 10000
	codeBucketExists = 10004
	codeBadBucket    = 10005
	codeNoBucket     = 10006
	codeR2Disabled   = 10042
	codeInternal     = 10001
)

const window = 5 * time.Minute

// Permissions, by the provider's names.
const (
	tokensRead   = "Account API Tokens Read"
	tokensWrite  = "Account API Tokens Write"
	storageRead  = "Workers R2 Storage Read"
	storageWrite = "Workers R2 Storage Write"
	itemRead     = "Workers R2 Storage Bucket Item Read"
	itemWrite    = "Workers R2 Storage Bucket Item Write"
)

// The scopes of permissions.
const (
	accountScope = "com.cloudflare.api.account"
	bucketScope  = "com.cloudflare.edge.r2.bucket"
)

// permissionGroup is one of the list. The ids of R2's are the documented ones.
type permissionGroup struct {
	ID     string   `json:"id"`
	Name   string   `json:"name"`
	Scopes []string `json:"scopes"`
}

func groups() []permissionGroup {
	account, bucket := []string{accountScope}, []string{bucketScope}
	return []permissionGroup{
		{"c1fde68c7bcc44588cbb6ddbc16d6480", "Account Settings Read", account},
		{"00000000000000000000000000000a01", tokensRead, account},
		{"00000000000000000000000000000a02", tokensWrite, account},
		{"b4992e1108244f5d8bfbd5744320c2e1", storageRead, account},
		{"bf7481a1826f439697cb59a20b22293e", storageWrite, account},
		{"6a018a9f2fc74eb6b293b0c548f38b39", itemRead, bucket},
		{"2efd5506f9c8494dacb1fa10a3e7d5b6", itemWrite, bucket},
	}
}

func groupByID(id string) permissionGroup {
	for _, group := range groups() {
		if group.ID == id {
			return group
		}
	}
	return permissionGroup{}
}

// answer is what a handler comes to.
type answer struct {
	status     int
	result     any
	info       any // result_info
	message    string
	code       int
	retryAfter int
	body       string // in place of the envelope
	drop       bool
}

func refuse(status, code int, format string, args ...any) answer {
	return answer{status: status, code: code, message: fmt.Sprintf(format, args...)}
}

func ok(result any) answer { return answer{status: http.StatusOK, result: result} }

// said is an error or message of the envelope.
type said struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

type envelope struct {
	Success  bool   `json:"success"`
	Errors   []said `json:"errors"`
	Messages []any  `json:"messages"`
	Result   any    `json:"result"`
	Info     any    `json:"result_info,omitempty"`
}

func (a answer) write(w http.ResponseWriter) {
	if a.drop {
		panic(http.ErrAbortHandler) // the connection ends, and that is what net/http has for it
	}
	if a.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(a.retryAfter))
	}
	if a.body != "" {
		w.Header().Set("Content-Type", "text/html; charset=UTF-8")
		w.WriteHeader(a.status)
		_, _ = w.Write([]byte(a.body))
		return
	}
	content := envelope{Success: a.status < http.StatusBadRequest, Errors: []said{}, Messages: []any{}, Result: a.result, Info: a.info}
	if !content.Success {
		content.Errors = append(content.Errors, said{a.code, a.message})
	} else if a.message != "" {
		content.Messages = append(content.Messages, said{a.code, a.message})
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(a.status)
	_ = json.NewEncoder(w).Encode(content)
}

// readBody takes no field that is not documented.
func readBody(r *http.Request, into any) error {
	decoder := json.NewDecoder(io.LimitReader(r.Body, maxBody))
	decoder.DisallowUnknownFields()
	return decoder.Decode(into)
}

// ServeHTTP implements http.Handler.
func (f *Fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path, below := strings.CutPrefix(r.URL.Path, basePath)
	call, fault := f.begin(r)
	var result answer
	switch {
	case !below:
		result = answer{status: http.StatusNotFound, body: "<html>not found</html>"}
	case fault != nil && !fault.Done:
	default:
		result = f.route(r, path)
	}
	if fault != nil {
		result = answer{
			status: fault.Status, code: fault.Code, message: fault.Message,
			retryAfter: fault.RetryAfter, body: fault.Body, drop: fault.Status == 0,
		}
	}
	f.mutex.Lock()
	f.calls[call.Number-1].Status = result.status
	f.mutex.Unlock()
	result.write(w)
}

// begin records the call and says what is to go wrong with it.
func (f *Fake) begin(r *http.Request) (Call, *Fault) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	call := Call{Number: len(f.calls) + 1, Method: r.Method, Path: strings.TrimPrefix(r.URL.RequestURI(), basePath)}
	if sender := f.sender(r); sender != nil {
		call.TokenID = sender.ID
	}
	f.calls = append(f.calls, call)
	if fault, found := f.faults[call.Number]; found {
		return call, &fault
	}
	if f.decide != nil {
		return call, f.decide(call)
	}
	return call, nil
}

// sender is for those who hold the mutex.
func (f *Fake) sender(r *http.Request) *token {
	value, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	for _, token := range f.state.Tokens {
		if token.Value == value {
			return token
		}
	}
	return nil
}

// route finds who answers, and whether the sender may ask.
func (f *Fake) route(r *http.Request, path string) answer {
	if limited := f.throttle(); limited != nil {
		return *limited
	}
	parts := strings.Split(strings.Trim(path, "/"), "/")
	if r.Method == http.MethodGet && slices.Equal(parts, []string{"user", "tokens", "verify"}) {
		return f.verify(r, true)
	}
	if len(parts) < 3 || parts[0] != "accounts" {
		return refuse(http.StatusNotFound, codeNoRoute, "Could not route to %s, perhaps your object identifier is invalid?", path)
	}
	inAccount := parts[2:]
	if parts[1] != f.options.AccountID {
		return refuse(http.StatusForbidden, codeForbidden, "Unauthorized to access requested resource")
	}
	switch {
	case inAccount[0] == "tokens":
		return f.routeTokens(r, inAccount[1:])
	case len(inAccount) >= 2 && inAccount[0] == "r2" && inAccount[1] == "buckets":
		return f.routeBuckets(r, inAccount[2:])
	default:
		return refuse(http.StatusNotFound, codeNoRoute, "Could not route to %s, perhaps your object identifier is invalid?", path)
	}
}

func (f *Fake) throttle() *answer {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	now := f.options.Now()
	if now.Sub(f.window) >= window {
		f.window, f.counted = now, 0
	}
	if f.counted++; f.options.RateLimit == 0 || f.counted <= f.options.RateLimit {
		return nil
	}
	limited := refuse(http.StatusTooManyRequests, codeThrottled, "Please wait and consider throttling your request speed")
	limited.retryAfter = int(f.window.Add(window).Sub(now).Seconds()) + 1
	return &limited
}

// authenticate finds the sender's token, or says why it is none.
func (f *Fake) authenticate(r *http.Request, refused int) (*token, *answer) {
	header := r.Header.Get("Authorization")
	value, bearer := strings.CutPrefix(header, "Bearer ")
	if header == "" {
		no := refuse(http.StatusBadRequest, codeNoHeader, "Missing X-Auth-Key, X-Auth-Email or Authorization headers")
		return nil, &no
	}
	if !bearer || len(value) < 20 {
		no := refuse(http.StatusBadRequest, codeBadHeaders, "Invalid request headers")
		return nil, &no
	}
	f.mutex.Lock()
	defer f.mutex.Unlock()
	unknown := refuse(http.StatusUnauthorized, codeInvalidToken, "Invalid API Token")
	sender := f.sender(r)
	if sender == nil || !f.isGood(sender) {
		return nil, &unknown
	}
	if sender.settles > 0 || f.isFresh(sender) {
		sender.settles = max(0, sender.settles-1)
		if sender.settles%2 == 0 {
			return nil, &unknown
		}
		no := refuse(http.StatusForbidden, refused, "Authentication error")
		return nil, &no
	}
	if !admits(sender.Condition, r.RemoteAddr) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		no := refuse(http.StatusForbidden, codeForbidden, "Cannot use the access token from location: %s", host)
		return nil, &no
	}
	return sender, nil
}

// admits applies a token's filter of addresses.
func admits(condition *json.RawMessage, remote string) bool {
	if condition == nil {
		return true
	}
	var filter struct {
		RequestIP struct {
			In    []netip.Prefix `json:"in"`
			NotIn []netip.Prefix `json:"not_in"`
		} `json:"request_ip"`
	}
	address, err := netip.ParseAddrPort(remote)
	if err != nil || json.Unmarshal(*condition, &filter) != nil {
		return false
	}
	has := func(prefixes []netip.Prefix) bool {
		return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(address.Addr().Unmap()) })
	}
	return (len(filter.RequestIP.In) == 0 || has(filter.RequestIP.In)) && !has(filter.RequestIP.NotIn)
}

// allow is authenticate for who has one of the permissions on the account.
func (f *Fake) allow(r *http.Request, refused int, message string, permissions ...string) *answer {
	sender, no := f.authenticate(r, refused)
	if no != nil {
		return no
	}
	if !sender.Person && f.may(sender, permissions) {
		return nil
	}
	denied := refuse(http.StatusForbidden, refused, "%s", message)
	return &denied
}

// may: one policy allows one of them, and none denies it.
func (f *Fake) may(sender *token, permissions []string) bool {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	for _, permission := range permissions {
		allowed, denied := false, false
		for _, policy := range sender.Policies {
			has := slices.ContainsFunc(policy.Groups, func(g Group) bool { return g.Name == permission })
			if !has || !f.onAccount(policy) {
				continue
			}
			allowed = allowed || policy.Effect == "allow"
			denied = denied || policy.Effect == "deny"
		}
		if allowed && !denied {
			return true
		}
	}
	return false
}

func (f *Fake) onAccount(policy Policy) bool {
	var resources map[string]string
	if json.Unmarshal(policy.Resources, &resources) != nil {
		return false
	}
	return resources[accountScope+"."+f.options.AccountID] == "*" || resources[accountScope+".*"] == "*"
}

package cloudflarefake

import (
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	maxBody      = 1 << 20
	maxName      = 120
	maxTokens    = 500 // of an account
	smallestPage = 5
	defaultPage  = 20
)

const forbidden = "Unauthorized to access requested resource"

func (f *Fake) routeTokens(r *http.Request, rest []string) answer {
	target := strings.Join(rest, "/")
	if r.Method == http.MethodGet && target == "verify" {
		return f.verify(r, false)
	}
	permissions := []string{tokensWrite}
	if r.Method == http.MethodGet {
		permissions = append(permissions, tokensRead)
	}
	if no := f.allow(r, codeForbidden, forbidden, permissions...); no != nil {
		return *no
	}
	switch {
	case r.Method == http.MethodGet && target == "permission_groups":
		return f.listGroups(r)
	case r.Method == http.MethodGet && target == "":
		return f.listTokens(r)
	case r.Method == http.MethodPost && target == "":
		return f.createToken(r)
	case r.Method == http.MethodGet && len(rest) == 1:
		return f.getToken(rest[0])
	case r.Method == http.MethodDelete && len(rest) == 1:
		return f.deleteToken(rest[0])
	case r.Method == http.MethodPut && len(rest) == 2 && rest[1] == "value":
		return f.rollToken(rest[0])
	default:
		return refuse(http.StatusMethodNotAllowed, codeInvalidToken, "Method not allowed for this URI.")
	}
}

// verify is for everybody: of the account, or of persons.
func (f *Fake) verify(r *http.Request, person bool) answer {
	f.mutex.Lock()
	known := f.sender(r)
	f.mutex.Unlock()
	if known != nil && known.Person == person && known.Status == "disabled" {
		return ok(f.verified(known))
	}
	sender, no := f.authenticate(r, codeForbidden)
	if no != nil {
		return *no
	}
	if sender.Person != person {
		return refuse(http.StatusUnauthorized, codeInvalidToken, "Invalid API Token")
	}
	verified := ok(f.verified(sender))
	verified.code, verified.message = 10000, "This API Token is valid and active"
	return verified
}

func (f *Fake) verified(of *token) map[string]any {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	result := map[string]any{"id": of.ID, "status": of.Status}
	if !of.Expires.IsZero() {
		result["expires_on"] = of.Expires
	}
	return result
}

func (f *Fake) listGroups(r *http.Request) answer {
	name, scope := r.URL.Query().Get("name"), r.URL.Query().Get("scope")
	found := []permissionGroup{}
	for _, group := range groups() {
		if strings.Contains(group.Name, name) && (scope == "" || slices.Contains(group.Scopes, scope)) {
			found = append(found, group)
		}
	}
	return ok(found)
}

// view is a token as everybody may see it, who may.
func view(t *token) map[string]any {
	result := map[string]any{
		"id": t.ID, "name": t.Name, "status": t.Status, "policies": t.Policies,
		"issued_on": t.Issued, "modified_on": t.Issued,
	}
	if !t.Expires.IsZero() {
		result["expires_on"] = t.Expires
	}
	if t.Condition != nil {
		result["condition"] = t.Condition
	}
	return result
}

func (f *Fake) listTokens(r *http.Request) answer {
	number := func(name string, least, most, otherwise int) (int, bool) {
		text := r.URL.Query().Get(name)
		if text == "" {
			return otherwise, true
		}
		value, err := strconv.Atoi(text)
		return value, err == nil && value >= least && value <= most
	}
	page, good := number("page", 1, 1<<20, 1)
	size, fine := number("per_page", smallestPage, 50, defaultPage)
	if !good || !fine {
		return refuse(http.StatusBadRequest, codeBadRequest, "page or per_page is out of range")
	}
	size = min(size, f.options.PageSize)
	f.mutex.Lock()
	defer f.mutex.Unlock()
	var all []*token
	for _, token := range f.state.Tokens {
		if !token.Person {
			all = append(all, token)
		}
	}
	from := min((page-1)*size, len(all))
	shown := []any{}
	for _, token := range all[from:min(from+size, len(all))] {
		shown = append(shown, view(token))
	}
	listed := ok(shown)
	listed.info = map[string]int{"page": page, "per_page": size, "count": len(shown), "total_count": len(all)}
	return listed
}

func (f *Fake) getToken(id string) answer {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	found := f.byID(id)
	if found == nil || found.Person {
		return refuse(http.StatusNotFound, codeNoToken, "API Token not found")
	}
	return ok(view(found))
}

// wanted is the body of a creation.
type wanted struct {
	Name      string           `json:"name"`
	Policies  []Policy         `json:"policies"`
	Condition *json.RawMessage `json:"condition"`
	ExpiresOn string           `json:"expires_on"`
	NotBefore string           `json:"not_before"`
}

func (f *Fake) createToken(r *http.Request) answer {
	var body wanted
	if err := readBody(r, &body); err != nil {
		return refuse(http.StatusBadRequest, codeBadRequest, "the body is not as documented: %v", err)
	}
	made := &token{Name: body.Name, Policies: body.Policies, Condition: body.Condition}
	if problem := f.check(body, made); problem != "" {
		return refuse(http.StatusBadRequest, codeBadRequest, "%s", problem)
	}
	f.mutex.Lock()
	if len(f.state.Tokens) >= maxTokens {
		f.mutex.Unlock()
		return refuse(http.StatusBadRequest, codeBadRequest, "the account has as many tokens as it may")
	}
	f.issue(made)
	err := f.save()
	result := view(made)
	result["value"] = made.Value
	f.mutex.Unlock()
	if err != nil {
		return refuse(http.StatusInternalServerError, codeInternal, "%v", err)
	}
	f.tell(made)
	return ok(result)
}

// check is what the provider refuses.
func (f *Fake) check(body wanted, made *token) (problem string) {
	if body.Name == "" || len(body.Name) > maxName {
		return "the name has 1 to 120 characters"
	}
	if len(body.Policies) == 0 {
		return "there are no policies"
	}
	for _, policy := range body.Policies {
		if problem := f.checkPolicy(policy); problem != "" {
			return problem
		}
	}
	for _, date := range []struct {
		text string
		into *time.Time
	}{{body.ExpiresOn, &made.Expires}, {body.NotBefore, &made.NotBefore}} {
		if date.text == "" {
			continue
		}
		parsed, err := time.Parse("2006-01-02T15:04:05Z", date.text)
		if err != nil {
			return "a date is not of the form 2020-01-01T00:00:00Z"
		}
		*date.into = parsed
	}
	if !made.Expires.IsZero() && !made.Expires.After(f.options.Now()) {
		return "it expires in the past"
	}
	return ""
}

func (f *Fake) checkPolicy(policy Policy) (problem string) {
	var plain map[string]string
	var nested map[string]map[string]string
	if json.Unmarshal(policy.Resources, &plain) != nil && json.Unmarshal(policy.Resources, &nested) != nil {
		return "resources are no map of names"
	}
	switch {
	case policy.Effect != "allow" && policy.Effect != "deny":
		return "the effect is neither allow nor deny"
	case len(plain)+len(nested) == 0 || len(policy.Groups) == 0:
		return "a policy has resources and permission groups"
	}
	for _, group := range policy.Groups {
		known := groupByID(group.ID)
		if known.ID == "" {
			return "there is no permission group " + group.ID
		}
		for name := range plain {
			if !f.fits(name, known.Scopes) {
				return "permission " + known.Name + " is not for resource " + name
			}
		}
	}
	return ""
}

// fits: a permission is for resources of its scope, in this account.
func (f *Fake) fits(resource string, scopes []string) bool {
	account := f.options.AccountID
	for _, scope := range scopes {
		if scope == accountScope && (resource == accountScope+"."+account || resource == accountScope+".*") {
			return true
		}
		rest, isBucket := strings.CutPrefix(resource, bucketScope+"."+account+"_")
		jurisdiction, bucket, named := strings.Cut(rest, "_")
		if scope == bucketScope && isBucket && named && slices.Contains(jurisdictions(), jurisdiction) && isBucketName(bucket) {
			return true
		}
	}
	return false
}

func (f *Fake) deleteToken(id string) answer {
	f.mutex.Lock()
	gone := f.byID(id)
	if gone == nil || gone.Person {
		f.mutex.Unlock()
		return refuse(http.StatusNotFound, codeNoToken, "API Token not found")
	}
	f.state.Tokens = slices.DeleteFunc(f.state.Tokens, func(t *token) bool { return t == gone })
	err := f.save()
	f.mutex.Unlock()
	if err != nil {
		return refuse(http.StatusInternalServerError, codeInternal, "%v", err)
	}
	f.untell(gone)
	return ok(map[string]string{"id": id})
}

// rollToken gives a token another value; the old one dies at once.
func (f *Fake) rollToken(id string) answer {
	f.mutex.Lock()
	found := f.byID(id)
	f.mutex.Unlock()
	if found == nil || found.Person {
		return refuse(http.StatusNotFound, codeNoToken, "API Token not found")
	}
	f.untell(found)
	f.mutex.Lock()
	found.Value = valueOf()
	value, err := found.Value, f.save()
	f.mutex.Unlock()
	if err != nil {
		return refuse(http.StatusInternalServerError, codeInternal, "%v", err)
	}
	f.tell(found)
	return ok(value)
}

package cloudflare

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	sdk "github.com/cloudflare/cloudflare-go/v6"
)

// The provider's codes that someone decides on. The first are those of R2
// (developers.cloudflare.com/r2/api/error-codes).
const (
	codeBucketExists = 10004
	codeNoSuchBucket = 10006
	codeR2Disabled   = 10042
	codeBadHeaders   = 6003 // what is sent as a token cannot be one
)

// DeniedError is a provider that knows the token and refuses it this: one
// permission, on one account.
type DeniedError struct {
	// What was tried.
	What string
	// Permission is the provider's name of what is missing; several are joined by ", ".
	Permission string
	Account    string
	// Code and Message are the provider's; 0 where nothing was refused yet.
	Code    int64
	Message string
}

func (e *DeniedError) Error() string {
	if e.Code == codeR2Disabled {
		return fmt.Sprintf("%s: R2 is not enabled on account %s", e.What, e.Account)
	}
	said := ""
	if e.Code != 0 || e.Message != "" {
		said = fmt.Sprintf(": %s (403, code %d)", e.Message, e.Code)
	}
	return fmt.Sprintf("%s: the token lacks permission %q on account %s%s", e.What, e.Permission, e.Account, said)
}

// Hint implements plan.Hinter.
func (e *DeniedError) Hint() string {
	switch {
	case e.Code == codeR2Disabled:
		return "enable R2 in the account's dashboard: it asks for a subscription, once"
	case strings.Contains(e.Message, "location"):
		return "the token may be used from some addresses only: add this machine's to it, or take the filter away"
	default:
		return "give it in the account's dashboard, Manage Account > Account API Tokens, to both tokens of the pair;" +
			" look at cloudflare.account_id in site.hcl too. site provider doctor shows each permission"
	}
}

// TokenError is a token that the provider does not take at all.
type TokenError struct {
	What    string
	Account string
	// Reason is the provider's, or what its status means.
	Reason string
	// Personal: it is good, but a person's and not the account's.
	Personal bool
}

func (e *TokenError) Error() string {
	if e.Personal {
		return fmt.Sprintf("%s: the token is a person's, not account %s's own", e.What, e.Account)
	}
	return fmt.Sprintf("%s: account %s does not take the token: %s", e.What, e.Account, e.Reason)
}

// Hint implements plan.Hinter.
func (e *TokenError) Hint() string {
	if e.Personal {
		return "make it in the account's dashboard under Manage Account > Account API Tokens: it outlives whoever made it"
	}
	return "look at cloudflare.account_id in site.hcl, and whether the token was revoked or has expired;" +
		" site provider import-admin-pair takes a new pair"
}

// UnavailableError is a provider that does not answer, or answers that it cannot now.
type UnavailableError struct {
	What string
	// RetryAfter is what the provider asks for; 0 if it did not say.
	RetryAfter time.Duration
	// Unsure: what was asked for may have been done.
	Unsure bool
	Err    error
}

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("%s: the provider's API is unavailable: %v", e.What, e.Err)
}

// Unwrap gives the cause.
func (e *UnavailableError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *UnavailableError) Hint() string {
	if e.RetryAfter > 0 {
		return fmt.Sprintf("run it again in %s; nothing that runs needs the provider's API", e.RetryAfter)
	}
	return "run it again; nothing that runs needs the provider's API (www.cloudflarestatus.com)"
}

// RefusedError is any other answer that is not what was asked for.
type RefusedError struct {
	What    string
	Status  int
	Code    int64
	Message string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("%s: the provider refuses it: %s (%d, code %d)", e.What, e.Message, e.Status, e.Code)
}

// Hint implements plan.Hinter.
func (e *RefusedError) Hint() string {
	return "site provider doctor tests everything that the provider has to allow"
}

// isCode reports whether the provider gave this code, whatever the status.
func isCode(err error, code int64) bool {
	var refused *RefusedError
	return errors.As(err, &refused) && refused.Code == code
}

// isGone is for what is not there (any more).
func isGone(err error) bool {
	var refused *RefusedError
	return errors.As(err, &refused) && refused.Status == http.StatusNotFound
}

// explain makes of the SDK's error one of the above. Messages are the provider's
// words; should they repeat the token, it is masked.
func (c *Client) explain(r request, seen *exchange, err error) error {
	var code int64
	message := http.StatusText(seen.status)
	var answered *sdk.Error
	if errors.As(err, &answered) && len(answered.Errors) > 0 {
		code, message = answered.Errors[0].Code, c.messages(answered)
	}
	switch {
	case seen.status == 0: // no answer; the error names the URL, in which there is no secret
		return &UnavailableError{What: r.what, Unsure: true, Err: errors.New(c.mask(err.Error()))}
	case seen.status < http.StatusMultipleChoices:
		return &UnavailableError{What: r.what, Unsure: true, Err: errors.New("its answer cannot be read")}
	case seen.status == http.StatusTooManyRequests:
		return &UnavailableError{What: r.what, RetryAfter: seen.retryAfter, Err: errors.New("too many requests (429)")}
	case seen.status >= http.StatusInternalServerError, seen.status == http.StatusRequestTimeout:
		return &UnavailableError{
			What: r.what, RetryAfter: seen.retryAfter, Unsure: true,
			Err: fmt.Errorf("%s (%d)", message, seen.status),
		}
	case seen.status == http.StatusUnauthorized, code == codeBadHeaders:
		return &TokenError{What: r.what, Account: c.options.AccountID, Reason: fmt.Sprintf("%s (%d, code %d)", message, seen.status, code)}
	case seen.status == http.StatusForbidden:
		return &DeniedError{What: r.what, Permission: r.permission, Account: c.options.AccountID, Code: code, Message: message}
	default:
		return &RefusedError{What: r.what, Status: seen.status, Code: code, Message: message}
	}
}

func (c *Client) messages(answered *sdk.Error) string {
	var all []string
	for _, one := range answered.Errors {
		all = append(all, one.Message)
	}
	return c.mask(strings.Join(all, "; "))
}

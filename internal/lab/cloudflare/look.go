package cloudflarefake

import (
	"slices"
	"time"
)

// Calls are those so far.
func (f *Fake) Calls() []Call {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	return slices.Clone(f.calls)
}

// FailCall gives the call with this number a fault; the next is len(Calls())+1.
func (f *Fake) FailCall(number int, fault Fault) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.faults[number] = fault
}

// Fail asks decide about every call; nil is none, and Fail(nil) the end of it.
func (f *Fake) Fail(decide func(Call) *Fault) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.decide = decide
}

// TokenNames are those of all tokens, in the order in which they were made.
func (f *Fake) TokenNames() []string {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	names := []string{}
	for _, token := range f.state.Tokens {
		names = append(names, token.Name)
	}
	return names
}

// PoliciesOf are a token's.
func (f *Fake) PoliciesOf(id string) []Policy {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	if found := f.byID(id); found != nil {
		return slices.Clone(found.Policies)
	}
	return nil
}

// ConditionOf is a token's filter, in JSON; empty: none.
func (f *Fake) ConditionOf(id string) string {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	if found := f.byID(id); found != nil && found.Condition != nil {
		return string(*found.Condition)
	}
	return ""
}

// Expires is when a token does; zero: never, or there is none.
func (f *Fake) Expires(id string) time.Time {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	if found := f.byID(id); found != nil {
		return found.Expires
	}
	return time.Time{}
}

// Buckets are all that there are.
func (f *Fake) Buckets() []Bucket {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	return slices.Clone(f.state.Buckets)
}

// Keys are the S3 keys of buckets that are valid now.
func (f *Fake) Keys() []Key {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	var keys []Key
	for _, one := range f.state.Tokens {
		if f.isGood(one) && !f.isFresh(one) {
			keys = append(keys, keysOf(one, f.options.AccountID)...)
		}
	}
	return keys
}

package access

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession/server"
)

// Audience is what a job's identity must be for.
const Audience = "object-storage-service"

const (
	keysAge = 5 * time.Minute
	// keysPause is how soon keys are asked for again for one that is unknown.
	keysPause = 5 * time.Second
	maxKeys   = 1 << 20
	leeway    = 30 * time.Second
	// namespace is the one in which a site's jobs run.
	namespace = "default"
)

// JobOptions say which jobs may.
type JobOptions struct {
	// KeysURL is where Nomad publishes the keys of its workload identities.
	KeysURL string
	// Allowed are the jobs that may upload.
	Allowed []string
	HTTP    *http.Client
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Jobs knows Nomad's workload identities.
type Jobs struct {
	options JobOptions

	mutex   sync.Mutex
	keys    jose.JSONWebKeySet
	fetched time.Time
}

// NewJobs makes one; it asks Nomad nothing yet.
func NewJobs(options JobOptions) *Jobs {
	if options.Now == nil {
		options.Now = time.Now
	}
	if options.HTTP == nil {
		options.HTTP = &http.Client{Timeout: lookupLimit, Transport: &http.Transport{Proxy: nil}}
	}
	return &Jobs{options: options}
}

// jobClaims are those of Nomad's identities that we look at.
type jobClaims struct {
	Namespace string `json:"nomad_namespace"`
	Job       string `json:"nomad_job_id"`
}

func unknown(format string, args ...any) error {
	return &server.DeniedError{Status: http.StatusUnauthorized, Reason: "the identity is refused: " + fmt.Sprintf(format, args...)}
}

// Authorize implements server.Authorizer.
func (j *Jobs) Authorize(ctx context.Context, bearer secret.Value) (server.Identity, error) {
	token, err := jwt.ParseSigned(bearer.Reveal(), []jose.SignatureAlgorithm{jose.RS256, jose.EdDSA})
	if err != nil || len(token.Headers) != 1 {
		return server.Identity{}, unknown("it is no JWT signed by RS256 or EdDSA")
	}
	key, err := j.key(ctx, token.Headers[0].KeyID)
	if err != nil {
		return server.Identity{}, err
	}
	var standard jwt.Claims
	var nomad jobClaims
	if err := token.Claims(key, &standard, &nomad); err != nil {
		return server.Identity{}, unknown("its signature is not Nomad's")
	}
	if standard.Expiry == nil {
		return server.Identity{}, unknown("it never expires: give its identity block a ttl")
	}
	expected := jwt.Expected{AnyAudience: jwt.Audience{Audience}, Time: j.options.Now()}
	if err := standard.ValidateWithLeeway(expected, leeway); err != nil {
		return server.Identity{}, unknown("%v", err)
	}
	if nomad.Namespace != namespace || nomad.Job == "" || !slices.Contains(j.options.Allowed, nomad.Job) {
		return server.Identity{}, &server.DeniedError{
			Status: http.StatusForbidden,
			Reason: fmt.Sprintf("job %q of namespace %q is not among those that may upload", nomad.Job, nomad.Namespace),
		}
	}
	return server.Identity{Subject: nomad.Job, Kind: server.KindJob}, nil
}

// key finds the public key of an identity. Nomad rotates them: one that is
// unknown is asked for, but not by every request.
func (j *Jobs) key(ctx context.Context, id string) (any, error) {
	j.mutex.Lock()
	defer j.mutex.Unlock()
	age := j.options.Now().Sub(j.fetched)
	found := j.keys.Key(id)
	if age > keysAge || (len(found) == 0 && age > keysPause) {
		keys, err := j.fetch(ctx)
		if err != nil && len(found) == 0 {
			return nil, err
		}
		if err == nil {
			j.keys, j.fetched = keys, j.options.Now()
			found = j.keys.Key(id)
		}
	}
	if len(found) != 1 || !found[0].IsPublic() {
		return nil, unknown("Nomad has no key of that id")
	}
	return found[0].Key, nil
}

func (j *Jobs) fetch(ctx context.Context) (jose.JSONWebKeySet, error) {
	var keys jose.JSONWebKeySet
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, j.options.KeysURL, http.NoBody)
	if err != nil {
		return keys, fmt.Errorf("read Nomad's keys: %w", err)
	}
	response, err := j.options.HTTP.Do(request)
	if err != nil {
		return keys, fmt.Errorf("read Nomad's keys: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return keys, fmt.Errorf("read Nomad's keys: status %d", response.StatusCode)
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, maxKeys)).Decode(&keys); err != nil {
		return keys, fmt.Errorf("read Nomad's keys: %w", err)
	}
	return keys, nil
}

// Either tells by its form what a bearer is: a JWT is a job's.
type Either struct {
	Operators server.Authorizer
	Jobs      server.Authorizer
}

// Authorize implements server.Authorizer.
func (e Either) Authorize(ctx context.Context, bearer secret.Value) (server.Identity, error) {
	const jwtDots = 2
	token := bearer.Reveal()
	for _, c := range token {
		if c <= ' ' || c > '~' { // it becomes a header
			return server.Identity{}, &server.DeniedError{Status: http.StatusUnauthorized, Reason: "the token has characters that no token has"}
		}
	}
	who := e.Operators
	if strings.Count(token, ".") == jwtDots && strings.HasPrefix(token, "eyJ") {
		who = e.Jobs
	}
	if who == nil {
		return server.Identity{}, errors.New("nobody knows such tokens")
	}
	return who.Authorize(ctx, bearer)
}

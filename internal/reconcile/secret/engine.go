// Package secret holds the pure half of converging the secrets engine and the
// catalogue of secrets: the desired states, what was observed, and the diffs.
// It never sees the value of a secret, except where it generates one.
package secret

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/nomad-site/site/internal/site"
)

// The names of what the site owns in the engine.
const (
	// OperatorsMount is where operators log in with a JWT signed by their SSH key.
	OperatorsMount = "operators"
	// RotatorsMount is where operators that only rotate log in. A mount of their
	// own: any key that a mount takes may speak for any name that one of its
	// roles takes.
	RotatorsMount = "rotators"
	// HostsMount is where the hosts' own keys log in.
	HostsMount = "hosts"
	// JobsMount is where the workload identities of Nomad log in.
	JobsMount = "jwt-nomad"

	// OperatorRole, RotatorRole and HostRole are the roles of their mounts.
	OperatorRole = "operator"
	RotatorRole  = "rotator"
	// UploaderRole is by which an operator shows the object-storage-service who it
	// is: with a token that can do nothing else.
	UploaderRole = "uploader"
	HostRole     = "host"

	// The policies, and the prefix of the jobs'.
	OperatorPolicy  = "site-operator"
	HostPolicy      = "site-host"
	RotatorPolicy   = "site-rotator"
	UploaderPolicy  = "site-uploader"
	JobPolicyPrefix = "job-"

	// Audience is what tokens of operators and hosts are for; the issuers are
	// who they say made them.
	Audience       = "site"
	OperatorIssuer = "site-operator"
	HostIssuer     = "site-host"
	// JobAudience is what Nomad's workload identities for Vault are for.
	JobAudience = "vault.io"

	// OperatorClaim and PurposeClaim become metadata of an operator's token.
	OperatorClaim = "operator"
	PurposeClaim  = "purpose"

	// JobsKeysURL is where Nomad publishes the keys of its workload identities.
	JobsKeysURL = "http://127.0.0.1:4646/.well-known/jwks.json"
	// AuditPath is the audit device, AuditFile where it writes.
	AuditPath = "file"
	AuditFile = "/var/log/openbao/audit.log"
)

// The lives of tokens, in seconds.
const (
	operatorTTL    = 10 * 60
	operatorMaxTTL = 30 * 60
	hostTTL        = 60 * 60
	jobPeriod      = 30 * 60
)

// MaxVersions is how many versions of a secret the engine keeps, but for entries
// that ask for more.
const MaxVersions = 10

// Operator is one who may log in.
type Operator struct {
	Name string
	// PublicKeyPEM is the public half of the SSH key, as PKIX in PEM.
	PublicKeyPEM string
	// Rights is what the operator may do: site.RightsDeploy, which it is when
	// nobody says, or site.RightsRotate.
	Rights string
}

// Settings are fields of one of the engine's documents in their JSON form:
// strings, integers, booleans, lists of strings and maps. Desired ones name
// every field that decides on access, so that one that was set by hand differs.
type Settings map[string]any

// AuditDevice is one place that the engine tells every request.
type AuditDevice struct {
	Path    string
	Type    string
	Options Settings
}

// Mount is a secrets engine or an auth method at its path.
type Mount struct {
	Path string
	Type string
	// Tune is what the engine keeps about the mount itself.
	Tune Settings
	// Config is the mount's own configuration.
	Config Settings
}

// Role is a role of an auth method.
type Role struct {
	Mount    string
	Name     string
	Settings Settings
}

// Target is how reports call the role: "jwt-nomad/shop".
func (r Role) Target() string { return r.Mount + "/" + r.Name }

// Engine is the desired state of the engine itself.
type Engine struct {
	Audit    []AuditDevice
	Mounts   []Mount
	Auth     []Mount
	Policies map[string]string
	Roles    []Role
}

// EngineState is what was observed of it.
type EngineState struct {
	// Audit, Mounts and Auth hold all by path without slashes at the end;
	// the configuration was read of those that are wanted.
	Audit  map[string]AuditDevice
	Mounts map[string]Mount
	Auth   map[string]Mount
	// Policies holds all by name; the text was read of those that are wanted.
	Policies map[string]string
	// Roles of our auth methods, all by Target; settings as with policies.
	Roles map[string]Role
}

// DesiredEngine derives the engine's state from the site. There is one policy
// and one role per job, with what its jobspec reads and what it produces, and
// nothing else.
func DesiredEngine(s *site.Site, operators []Operator, hostKeysPEM []string) Engine {
	engine := Engine{
		Audit: []AuditDevice{{
			Path: AuditPath, Type: "file",
			Options: Settings{"file_path": AuditFile, "log_raw": ""}, // raw is with values in the clear
		}},
		Mounts: []Mount{{
			Path: site.SecretMount, Type: "kv",
			Tune:   tune("secrets of the site's components", Settings{"version": "2"}),
			Config: Settings{"max_versions": MaxVersions, "cas_required": false, "delete_version_after": "0s"},
		}},
		Policies: map[string]string{OperatorPolicy: operatorPolicy()},
	}
	engine.addOperators(operators)
	if s.ObjectStore != nil {
		engine.addUploaders(operators)
	}
	if len(hostKeysPEM) > 0 { // the engine takes no auth method without a key
		engine.Policies[HostPolicy] = hostPolicy(s)
		engine.addAuth(HostsMount, "hosts of the site, by their own key", jwtConfig(Settings{
			"jwt_validation_pubkeys": tidyPEM(hostKeysPEM), "bound_issuer": HostIssuer, "default_role": HostRole,
			"jwt_supported_algs": []string{"EdDSA"},
		}))
		engine.addRole(HostsMount, HostRole, Settings{
			"bound_audiences": []string{Audience},
			"user_claim":      "host",
			"claim_mappings":  map[string]any{"host": "host"},
			"token_policies":  []string{HostPolicy},
			"token_ttl":       hostTTL, "token_max_ttl": hostTTL,
		})
	}
	engine.addAuth(JobsMount, "jobs, by the workload identity that Nomad signs", jwtConfig(Settings{
		"jwks_url": JobsKeysURL, "default_role": "nomad-workloads",
		"jwt_supported_algs": []string{"RS256", "EdDSA"},
	}))
	engine.addJobs(s)
	return engine
}

// addOperators lets operators in by their SSH keys, those that only rotate at a
// mount that gives away less.
func (e *Engine) addOperators(operators []Operator) {
	var rotators []Operator
	operators = slices.DeleteFunc(slices.Clone(operators), func(operator Operator) bool {
		if operator.Rights == site.RightsRotate {
			rotators = append(rotators, operator)
		}
		return operator.Rights == site.RightsRotate
	})
	e.addLogin(site.RightsDeploy, OperatorPolicy, "operators of the site, by SSH key", operators)
	if len(rotators) > 0 { // the engine takes no auth method without a key
		e.Policies[RotatorPolicy] = rotatorPolicy()
		e.addLogin(site.RightsRotate, RotatorPolicy, "operators of the site that only rotate secrets, by SSH key", rotators)
	}
}

// OperatorLogin gives the mount and the role where an operator with these
// rights logs in.
func OperatorLogin(rights string) (mount, role string) {
	if rights == site.RightsRotate {
		return RotatorsMount, RotatorRole
	}
	return OperatorsMount, OperatorRole
}

func (e *Engine) addLogin(rights, policy, description string, operators []Operator) {
	mount, role := OperatorLogin(rights)
	var names, keys []string
	for _, operator := range operators {
		names = append(names, operator.Name)
		keys = append(keys, operator.PublicKeyPEM)
	}
	e.addAuth(mount, description, jwtConfig(Settings{
		"jwt_validation_pubkeys": tidyPEM(keys), "bound_issuer": OperatorIssuer, "default_role": role,
		"jwt_supported_algs": []string{"EdDSA", "RS256", "ES256", "ES384", "ES512"},
	}))
	e.addRole(mount, role, operatorRole(names, policy))
}

func operatorRole(names []string, policy string) Settings {
	return Settings{
		"bound_audiences": []string{Audience},
		// A token may not speak for someone who was never declared.
		"bound_claims":   map[string]any{OperatorClaim: sortedUnique(names)},
		"user_claim":     OperatorClaim,
		"claim_mappings": map[string]any{OperatorClaim: OperatorClaim, PurposeClaim: PurposeClaim},
		"token_policies": []string{policy},
		"token_ttl":      operatorTTL, "token_max_ttl": operatorMaxTTL,
	}
}

// addUploaders lets those who deploy show the object-storage-service who they are
// without giving it a token that could do more.
func (e *Engine) addUploaders(operators []Operator) {
	var names []string
	for _, operator := range operators {
		if operator.Rights != site.RightsRotate {
			names = append(names, operator.Name)
		}
	}
	e.Policies[UploaderPolicy] = uploaderPolicy()
	e.addRole(OperatorsMount, UploaderRole, operatorRole(names, UploaderPolicy))
}

func (e *Engine) addJobs(s *site.Site) {
	byName := map[string]site.Secret{}
	for _, one := range s.Secrets() {
		byName[one.FullName()] = one
	}
	for _, component := range s.Components {
		produces := s.Produces(component.Name)
		if len(component.Reads) == 0 && len(produces) == 0 {
			continue
		}
		rules := rules{}
		for _, read := range component.Reads {
			// Reads of names that no catalogue has are refused when the site is loaded.
			if one, known := byName[read.Secret]; known {
				rules.allow(dataPath(one), "read")
			}
		}
		for _, one := range produces {
			rules.allow(dataPath(one), "create", "update")
			rules.allow(metadataPath(one), "read")
		}
		policy := JobPolicyPrefix + component.Name
		e.Policies[policy] = rules.text("What job " + component.Name + " reads and produces; made by site, changes are undone.")
		e.addRole(JobsMount, component.Name, Settings{
			"bound_audiences": []string{JobAudience},
			"bound_claims":    map[string]any{"nomad_job_id": component.Name, "nomad_namespace": "default"},
			"user_claim":      "nomad_job_id",
			"claim_mappings": map[string]any{
				"nomad_job_id": "nomad_job_id", "nomad_task": "nomad_task", "nomad_namespace": "nomad_namespace",
			},
			"token_policies": []string{policy},
			"token_period":   jobPeriod, // renewed by Nomad for as long as the task runs
		})
	}
}

func dataPath(s site.Secret) string     { return site.SecretMount + "/data/" + s.KVPath() }
func metadataPath(s site.Secret) string { return site.SecretMount + "/metadata/" + s.KVPath() }

func (e *Engine) addAuth(path, description string, config Settings) {
	e.Auth = append(e.Auth, Mount{Path: path, Type: "jwt", Tune: tune(description, nil), Config: config})
}

func (e *Engine) addRole(mount, name string, settings Settings) {
	// Every field that widens who gets in or what they get is named, with
	// the value that it has when nobody set it.
	whole := Settings{
		"role_type": "jwt", "bound_claims_type": "string", "bound_subject": "", "groups_claim": "",
		"bound_claims": map[string]any{}, "claim_mappings": map[string]any{}, "user_claim_json_pointer": false,
		"expiration_leeway": 0, "not_before_leeway": 0, "clock_skew_leeway": 0, "verbose_oidc_logging": false,
		"token_ttl": 0, "token_max_ttl": 0, "token_explicit_max_ttl": 0, "token_period": 0, "token_num_uses": 0,
		"token_no_default_policy": false, "token_bound_cidrs": []string{}, "token_type": "service",
	}
	for field, value := range settings {
		whole[field] = value
	}
	e.Roles = append(e.Roles, Role{Mount: mount, Name: name, Settings: whole})
}

func jwtConfig(settings Settings) Settings {
	whole := Settings{
		"jwt_validation_pubkeys": []string{}, "jwks_url": "", "jwks_ca_pem": "", "bound_issuer": "",
		"oidc_discovery_url": "", "oidc_discovery_ca_pem": "", "oidc_client_id": "", "default_role": "",
	}
	for field, value := range settings {
		whole[field] = value
	}
	return whole
}

func tune(description string, options Settings) Settings {
	whole := Settings{"description": description, "default_lease_ttl": 0, "max_lease_ttl": 0, "listing_visibility": "",
		// Values in the clear in the audit log.
		"audit_non_hmac_request_keys": []string{}, "audit_non_hmac_response_keys": []string{},
	}
	if options != nil {
		whole["options"] = map[string]any(options)
	}
	return whole
}

// rules are the paths of a policy with their capabilities.
type rules map[string][]string

func (r rules) allow(path string, capabilities ...string) {
	r[path] = sortedUnique(append(r[path], capabilities...))
}

func (r rules) text(comment string) string {
	paths := make([]string, 0, len(r))
	for path := range r {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	var text strings.Builder
	fmt.Fprintf(&text, "# %s\n", comment)
	for _, path := range paths {
		quoted := make([]string, len(r[path]))
		for i, capability := range r[path] {
			quoted[i] = strconv.Quote(capability)
		}
		fmt.Fprintf(&text, "path %q { capabilities = [%s] }\n", path, strings.Join(quoted, ", "))
	}
	return text.String()
}

func sortedUnique(words []string) []string {
	sorted := slices.Clone(words)
	slices.Sort(sorted)
	return slices.Compact(sorted)
}

// tidyPEM gives each key once, without the whitespace in which copies differ.
func tidyPEM(keys []string) []string {
	tidied := make([]string, 0, len(keys))
	for _, key := range keys {
		var lines []string
		for line := range strings.Lines(key) {
			if line = strings.TrimSpace(line); line != "" {
				lines = append(lines, line)
			}
		}
		tidied = append(tidied, strings.Join(lines, "\n"))
	}
	return sortedUnique(tidied)
}

package nomad

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/job"
)

// Jobspec is a component's job file.
type Jobspec struct {
	// Path is only named in errors.
	Path    string
	Content []byte
}

// variableBlocks finds where a jobspec declares its own variables.
func variableBlocks(jobspec Jobspec) (map[string]hcl.Pos, error) {
	file, diagnostics := hclsyntax.ParseConfig(jobspec.Content, jobspec.Path, hcl.InitialPos)
	if diagnostics.HasErrors() {
		return nil, fmt.Errorf("read jobspec: %w", diagnostics)
	}
	body, ok := file.Body.(*hclsyntax.Body)
	if !ok {
		return nil, fmt.Errorf("read jobspec %s: not native HCL", jobspec.Path)
	}
	blocks := map[string]hcl.Pos{}
	for _, block := range body.Blocks {
		switch {
		case block.Type == "variable" && len(block.Labels) == 1:
			blocks[block.Labels[0]] = block.TypeRange.Start
		case block.Type == "variables":
			for name, attribute := range block.Body.Attributes {
				blocks[name] = attribute.NameRange.Start
			}
		}
	}
	return blocks, nil
}

// SpecError is a jobspec that Nomad does not accept; its text begins with path
// and line where Nomad said them.
type SpecError struct {
	Path    string
	Reasons []string
}

func (e *SpecError) Error() string { return strings.Join(e.Reasons, "\n") }

// Hint implements plan.Hinter.
func (e *SpecError) Hint() string { return "correct " + e.Path }

// Parse lets the server parse and canonicalize a jobspec, with variables as
// the content of a variables file.
func (c *Client) Parse(ctx context.Context, jobspec Jobspec, variablesHCL string) (*api.Job, error) {
	var parsed api.Job
	// The typed call takes no context.
	request := &api.JobsParseRequest{JobHCL: string(jobspec.Content), Variables: variablesHCL, Canonicalize: true}
	if _, err := c.api.Raw().Write("/v1/jobs/parse", request, &parsed, c.write(ctx)); err != nil {
		if status := statusOf(err); status == http.StatusBadRequest || status == http.StatusInternalServerError {
			return nil, specError(jobspec, err)
		}
		return nil, describe(err, "parse %s", jobspec.Path)
	}
	return &parsed, nil
}

func specError(jobspec Jobspec, err error) error {
	path := jobspec.Path
	var unexpected api.UnexpectedResponseError
	if !errors.As(err, &unexpected) {
		return fmt.Errorf("%s: %w", path, err)
	}
	result := &SpecError{Path: path}
	for line := range strings.Lines(unexpected.Body()) {
		line = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "*"))
		line = strings.TrimPrefix(line, "Failed to parse job: ")
		if line == "" || strings.HasSuffix(line, "error occurred:") || strings.HasSuffix(line, "errors occurred:") ||
			strings.Contains(line, "error parsing job HCL") {
			continue
		}
		line = strings.TrimPrefix(line, "<nil>: ")
		switch {
		case strings.Contains(line, "input.hcl:"):
			line = strings.ReplaceAll(line, "input.hcl:", path+":")
		case strings.Contains(line, "input.vars:"):
			line = path + ": " + strings.ReplaceAll(line, "input.vars:", "variables:")
		default:
			line = path + unsetVariableAt(jobspec, line) + ": " + line
		}
		result.Reasons = append(result.Reasons, line)
	}
	if len(result.Reasons) == 0 {
		result.Reasons = []string{path + ": nomad refuses this jobspec"}
	}
	return result
}

var unsetVariable = regexp.MustCompile(`Unset variable "([^"]+)"`)

// unsetVariableAt is ":line,column" of the variable that a message is about,
// which Nomad leaves out.
func unsetVariableAt(jobspec Jobspec, line string) string {
	match := unsetVariable.FindStringSubmatch(line)
	if match == nil {
		return ""
	}
	blocks, err := variableBlocks(jobspec)
	if err != nil {
		return ""
	}
	start, known := blocks[match[1]]
	if !known {
		return ""
	}
	return fmt.Sprintf(":%d,%d", start.Line, start.Column)
}

// Brief is what site knows about a job beyond its jobspec.
type Brief struct {
	Site      string
	Component string
	GitSHA    string
	// Artifacts maps names to digests.
	Artifacts map[string]string
	// Secrets are the generations that the job's templates are pinned to; see Pin.
	Secrets map[string]int
	// SecretsEngine is what counts them; empty where nothing is pinned.
	SecretsEngine string
	Adopt         bool
}

// Prepared is a job ready to be registered.
type Prepared struct {
	Job     *api.Job
	Desired job.Desired
}

// Prepare sets our meta on a parsed job and computes the digest that decides a no-op.
func Prepare(parsed *api.Job, brief Brief) (*Prepared, error) {
	prepared, err := cloneJob(parsed)
	if err != nil {
		return nil, err
	}
	if prepared.ID == nil || *prepared.ID == "" {
		return nil, fmt.Errorf("component %s: the job has no id", brief.Component)
	}
	if namespace := text(prepared.Namespace); namespace != "" && namespace != api.DefaultNamespace {
		return nil, plan.WithHint(fmt.Errorf("component %s: job %s wants namespace %q", brief.Component, *prepared.ID, namespace),
			"remove the namespace from the jobspec: site runs jobs in the namespace %q", api.DefaultNamespace)
	}
	for key := range prepared.Meta {
		if strings.HasPrefix(key, "site_") {
			return nil, plan.WithHint(fmt.Errorf("component %s: job %s sets the meta key %q", brief.Component, *prepared.ID, key),
				"rename it: meta keys that begin with site_ are set by site")
		}
	}
	artifacts := brief.Artifacts
	if artifacts == nil {
		artifacts = map[string]string{}
	}
	encoded, err := json.Marshal(artifacts)
	if err != nil {
		return nil, fmt.Errorf("encode artifacts of job %s: %w", *prepared.ID, err)
	}
	if prepared.Meta == nil {
		prepared.Meta = map[string]string{}
	}
	prepared.Meta[job.MetaSite] = brief.Site
	prepared.Meta[job.MetaComponent] = brief.Component
	prepared.Meta[job.MetaGitSHA] = brief.GitSHA
	prepared.Meta[job.MetaArtifacts] = string(encoded)
	if err := markSecrets(prepared, brief.Secrets); err != nil {
		return nil, err
	}
	if brief.SecretsEngine != "" {
		prepared.Meta[job.MetaSecretsEngine] = brief.SecretsEngine
	}
	stop := false
	prepared.Stop = &stop
	nameVaultRoles(prepared)

	raw, err := json.Marshal(prepared)
	if err != nil {
		return nil, fmt.Errorf("encode job %s: %w", *prepared.ID, err)
	}
	digest, err := job.SpecDigest(raw)
	if err != nil {
		return nil, fmt.Errorf("job %s: %w", *prepared.ID, err)
	}
	prepared.Meta[job.MetaSpecDigest] = digest
	return finish(prepared, brief.Adopt)
}

// markSecrets says in the meta which generations a job's templates read. A job
// that reads none has no such key.
func markSecrets(prepared *api.Job, secrets map[string]int) error {
	if len(secrets) == 0 {
		return nil
	}
	encoded, err := json.Marshal(secrets)
	if err != nil {
		return fmt.Errorf("encode secrets of job %s: %w", *prepared.ID, err)
	}
	prepared.Meta[job.MetaSecrets] = string(encoded)
	return nil
}

// nameVaultRoles has each task that reads secrets log in as its own job: the role
// of that name is bound to the job's identity.
func nameVaultRoles(prepared *api.Job) {
	for _, group := range prepared.TaskGroups {
		for _, task := range group.Tasks {
			if task.Vault != nil && task.Vault.Role == "" {
				task.Vault.Role = *prepared.ID
			}
		}
	}
}

// PreparedFromSpec makes the spec of an older release ready to be registered
// again. Its meta stays as it was: tasks see the git sha they were built from.
func PreparedFromSpec(spec []byte) (*Prepared, error) {
	var old api.Job
	if err := json.Unmarshal(spec, &old); err != nil {
		return nil, fmt.Errorf("decode job of a release: %w", err)
	}
	if old.ID == nil || old.Meta[job.MetaSpecDigest] == "" {
		return nil, errors.New("decode job of a release: it has no id or no site_spec_digest")
	}
	delete(old.Meta, job.MetaDeployID)
	stop := false
	old.Stop = &stop
	return finish(&old, false)
}

func finish(prepared *api.Job, adopt bool) (*Prepared, error) {
	raw, err := json.Marshal(prepared)
	if err != nil {
		return nil, fmt.Errorf("encode job %s: %w", *prepared.ID, err)
	}
	spec, err := job.CanonicalJSON(raw)
	if err != nil {
		return nil, fmt.Errorf("job %s: %w", *prepared.ID, err)
	}
	return &Prepared{Job: prepared, Desired: job.Desired{
		Site:       prepared.Meta[job.MetaSite],
		Component:  prepared.Meta[job.MetaComponent],
		JobID:      *prepared.ID,
		Type:       text(prepared.Type),
		Spec:       spec,
		SpecDigest: prepared.Meta[job.MetaSpecDigest],
		Artifacts:  artifactsOf(prepared.Meta),
		Secrets:    secretsOf(prepared.Meta),
		GitSHA:     prepared.Meta[job.MetaGitSHA],
		Adopt:      adopt,
	}}, nil
}

func cloneJob(original *api.Job) (*api.Job, error) {
	raw, err := json.Marshal(original)
	if err != nil {
		return nil, fmt.Errorf("encode job: %w", err)
	}
	var clone api.Job
	if err := json.Unmarshal(raw, &clone); err != nil {
		return nil, fmt.Errorf("decode job: %w", err)
	}
	return &clone, nil
}

func artifactsOf(meta map[string]string) map[string]string {
	var artifacts map[string]string
	// Anything else there was not written by us and counts as no artifact.
	_ = json.Unmarshal([]byte(meta[job.MetaArtifacts]), &artifacts)
	return artifacts
}

func secretsOf(meta map[string]string) map[string]int {
	var secrets map[string]int
	// Anything else there was not written by us and counts as no secret.
	_ = json.Unmarshal([]byte(meta[job.MetaSecrets]), &secrets)
	return secrets
}

func text(value *string) string {
	if value == nil {
		return ""
	}
	return *value
}

func number[N int | uint64](value *N) N {
	if value == nil {
		return 0
	}
	return *value
}

func flag(value *bool) bool { return value != nil && *value }

// Registration is what Nomad made of a register request.
type Registration struct {
	JobID string
	// EvalID is empty for periodic and parameterized jobs.
	EvalID      string
	Version     uint64
	ModifyIndex uint64
	Warnings    []string
}

// ConflictError is a job that changed between plan and apply.
type ConflictError struct {
	JobID string
	// Planned is the modify index seen at plan time, 0 for a job that did not exist.
	Planned uint64
	Reason  string
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("register job %s: it changed since it was planned (%s): %s", e.JobID, job.Precondition(e.Planned), e.Reason)
}

// Hint implements plan.Hinter.
func (e *ConflictError) Hint() string {
	return "someone else changed this job meanwhile: run the command again to plan against its new state"
}

const enforceIndexPrefix = "Enforcing job modify index"

// Register registers the job if it is still as it was planned: at modifyIndex,
// or absent for 0. Where the very same spec is live already, a deploy id makes
// it a new version: Nomad starts nothing for a version whose deployment failed.
func (c *Client) Register(ctx context.Context, prepared *Prepared, modifyIndex uint64) (*Registration, error) {
	return c.register(ctx, prepared.Job, modifyIndex)
}

func (c *Client) register(ctx context.Context, submitted *api.Job, modifyIndex uint64) (*Registration, error) {
	id := *submitted.ID
	live, err := c.job(ctx, id)
	if err != nil {
		return nil, err
	}
	if live != nil && !flag(live.Stop) && live.Meta[job.MetaSpecDigest] == submitted.Meta[job.MetaSpecDigest] {
		if submitted, err = cloneJob(submitted); err != nil {
			return nil, err
		}
		nonce := make([]byte, 4)
		if _, err := rand.Read(nonce); err != nil {
			return nil, fmt.Errorf("make a deploy id: %w", err)
		}
		submitted.Meta[job.MetaDeployID] = hex.EncodeToString(nonce)
	}
	answer, _, err := c.api.Jobs().RegisterOpts(submitted, &api.RegisterOptions{EnforceIndex: true, ModifyIndex: modifyIndex}, c.write(ctx))
	if err != nil {
		var unexpected api.UnexpectedResponseError
		if errors.As(err, &unexpected) && strings.Contains(unexpected.Body(), enforceIndexPrefix) {
			_, reason, _ := strings.Cut(unexpected.Body(), enforceIndexPrefix)
			_, reason, _ = strings.Cut(reason, ": ")
			return nil, &ConflictError{JobID: id, Planned: modifyIndex, Reason: strings.TrimSpace(reason)}
		}
		return nil, describe(err, "register job %s", id)
	}
	registered := &Registration{JobID: id, EvalID: answer.EvalID, ModifyIndex: answer.JobModifyIndex}
	if answer.Warnings != "" {
		registered.Warnings = []string{strings.TrimSpace(answer.Warnings)}
	}
	version, err := c.versionAt(ctx, id, answer.JobModifyIndex)
	if err != nil {
		return nil, err
	}
	registered.Version = version
	return registered, nil
}

// versionAt finds the version of a job that a register made; the job itself
// may have moved on since.
func (c *Client) versionAt(ctx context.Context, id string, modifyIndex uint64) (uint64, error) {
	versions, _, _, err := c.api.Jobs().Versions(id, false, c.query(ctx))
	if err != nil {
		return 0, describe(err, "read versions of job %s", id)
	}
	for _, version := range versions {
		if number(version.JobModifyIndex) == modifyIndex {
			return number(version.Version), nil
		}
	}
	return 0, fmt.Errorf("job %s has no version at modify index %s", id, strconv.FormatUint(modifyIndex, 10))
}

// job reads one job; nil if there is none.
func (c *Client) job(ctx context.Context, id string) (*api.Job, error) {
	found, _, err := c.api.Jobs().Info(id, c.query(ctx))
	if statusOf(err) == http.StatusNotFound {
		return nil, nil
	}
	if err != nil {
		return nil, describe(err, "read job %s", id)
	}
	return found, nil
}

// Stop deregisters a job and keeps its history.
func (c *Client) Stop(ctx context.Context, id string) error {
	if _, _, err := c.api.Jobs().DeregisterOpts(id, &api.DeregisterOptions{}, c.write(ctx)); err != nil {
		return describe(err, "stop job %s", id)
	}
	return nil
}

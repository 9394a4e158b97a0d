package main

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

// The variables of the environment.
const (
	varSite      = "SITE_NAME"
	varListen    = "LISTEN"
	varEndpoint  = "STORE_ENDPOINT"
	varRegion    = "STORE_REGION"
	varBucket    = "STORE_BUCKET"
	varPathStyle = "STORE_PATH_STYLE"
	varKeys      = "STORE_KEYS_FILE"
	varOpenBao   = "OPENBAO_ADDR"
	varJWKS      = "NOMAD_JWKS_URL"
	varJobs      = "ALLOWED_JOBS"
)

// config is the environment, read and checked.
type config struct {
	site                     string
	listen                   netip.AddrPort
	endpoint, region, bucket string
	pathStyle                bool
	keysFile                 string
	openBao, jwks            string
	jobs                     []string
}

// readConfig reports everything that is wrong at once.
func readConfig(environment func(string) string) (config, error) {
	var missing []string
	need := func(name string) string {
		value := environment(name)
		if value == "" {
			missing = append(missing, name)
		}
		return value
	}
	or := func(name, fallback string) string {
		if value := environment(name); value != "" {
			return value
		}
		return fallback
	}
	out := config{
		site: need(varSite), endpoint: need(varEndpoint), bucket: need(varBucket), region: or(varRegion, "us-east-1"),
		keysFile: need(varKeys),
		openBao:  or(varOpenBao, "http://127.0.0.1:8200"), jwks: or(varJWKS, "http://127.0.0.1:4646/.well-known/jwks.json"),
	}
	var errs []error
	if len(missing) > 0 {
		errs = append(errs, fmt.Errorf("not set: %s", strings.Join(missing, ", ")))
	}
	var err error
	if out.pathStyle, err = strconv.ParseBool(or(varPathStyle, "true")); err != nil {
		errs = append(errs, fmt.Errorf("%s: want true or false", varPathStyle))
	}
	// There is no TLS here: who comes from elsewhere comes through something that has it.
	listen := or(varListen, fmt.Sprintf("127.0.0.1:%d", site.ObjectStoragePort))
	if out.listen, err = netip.ParseAddrPort(listen); err != nil || !out.listen.Addr().Unmap().IsLoopback() {
		errs = append(errs, fmt.Errorf("%s: %q is not a loopback address and port", varListen, listen))
	}
	for name, text := range map[string]string{varOpenBao: out.openBao, varJWKS: out.jwks} {
		if address, err := url.Parse(text); err != nil || address.Host == "" || (address.Scheme != "http" && address.Scheme != "https") {
			errs = append(errs, fmt.Errorf("%s: %q is no HTTP address", name, text))
		}
	}
	for _, job := range strings.Split(environment(varJobs), ",") {
		if job = strings.TrimSpace(job); job != "" {
			out.jobs = append(out.jobs, job)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return config{}, plan.WithHint(fmt.Errorf("configuration: %w", err), "it is what the jobspec of object-storage-service sets in its env block")
	}
	return out, nil
}

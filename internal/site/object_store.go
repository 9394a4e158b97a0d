package site

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// The object store's part of site.hcl.

type objectStoreBlock struct {
	Endpoint   string           `hcl:"endpoint,optional"`
	Region     string           `hcl:"region,optional"`
	Bucket     string           `hcl:"bucket"`
	PathStyle  *bool            `hcl:"path_style,optional"`
	ServiceURL string           `hcl:"service_url,optional"`
	Cloudflare *cloudflareBlock `hcl:"cloudflare,block"`
	Body       hcl.Body         `hcl:",body"`
	Range      hcl.Range        `hcl:",def_range"`
}

type cloudflareBlock struct {
	AccountID    string   `hcl:"account_id"`
	Jurisdiction string   `hcl:"jurisdiction,optional"`
	API          string   `hcl:"api,optional"`
	Body         hcl.Body `hcl:",body"`
}

const (
	defaultStoreRegion    = "us-east-1"
	defaultProviderRegion = "auto"
	// r2Domain is behind the account and, where there is one, the jurisdiction.
	r2Domain = "r2.cloudflarestorage.com"
)

var (
	bucketPattern    = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)
	accountIDPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)
	jurisdictions    = []string{"eu", "fedramp"}
)

// objectStore is nil where the site has none, or none that can be read.
func (b *siteBlock) objectStore(p *problems) *ObjectStore {
	block := b.Store
	if block == nil || block.Body == nil {
		return nil
	}
	store := &ObjectStore{Bucket: block.Bucket, PathStyle: true, Region: defaultStoreRegion, Range: block.Range}
	if block.PathStyle != nil {
		store.PathStyle = *block.PathStyle
	}
	if block.Cloudflare != nil && block.Cloudflare.Body != nil {
		store.Cloudflare = block.Cloudflare.cloudflare(p)
		store.Region = defaultProviderRegion
		store.Endpoint = store.Cloudflare.endpoint()
	}
	if isSet(block.Body, "region") {
		if !localePattern.MatchString(block.Region) {
			p.add(at(block.Body, "region"), "Invalid region", "%q must be 1 to 63 letters, digits, hyphens and underscores.", block.Region)
		}
		store.Region = block.Region
	}
	block.checkBucket(store, p)
	block.addresses(store, p)
	return store
}

// addresses are the URLs, without a slash at their ends.
func (b *objectStoreBlock) addresses(store *ObjectStore, p *problems) {
	switch {
	case isSet(b.Body, "endpoint"):
		endpoint, err := checkEndpoint(b.Endpoint)
		if err == nil && strings.Contains(strings.SplitN(endpoint, "://", 2)[1], "/") {
			err = fmt.Errorf("%q has a path: an endpoint is the address alone, and the bucket has an attribute of its own", b.Endpoint)
		}
		if err != nil {
			p.add(at(b.Body, "endpoint"), "Invalid endpoint", "%s.", err)
		}
		store.Endpoint = endpoint
	case !hasBlock(b.Body, "cloudflare"):
		p.add(b.Range, "Object store without an endpoint", `Set endpoint to the URL of the S3 API, such as "https://s3.eu-central-1.amazonaws.com", or add cloudflare { account_id = "…" }.`)
	}
	if isSet(b.Body, "service_url") {
		address, err := checkEndpoint(b.ServiceURL)
		if err == nil && !strings.HasPrefix(address, "https://") {
			err = fmt.Errorf("%q is not https: operators' tokens are sent there", b.ServiceURL)
		}
		if err != nil {
			p.add(at(b.Body, "service_url"), "Invalid service_url", "%s.", err)
		}
		store.ServiceURL = address
	}
}

func (b *objectStoreBlock) checkBucket(store *ObjectStore, p *problems) {
	if !isSet(b.Body, "bucket") {
		return // the decoder has said so
	}
	subject := at(b.Body, "bucket")
	_, notAddress := netip.ParseAddr(b.Bucket)
	switch {
	case len(b.Bucket) < 3 || len(b.Bucket) > 63 || !bucketPattern.MatchString(b.Bucket) || notAddress == nil:
		p.add(subject, "Invalid bucket", "%q is not a bucket's name: 3 to 63 lower-case letters, digits and hyphens, with a letter or digit at both ends.", b.Bucket)
	case strings.Contains(b.Bucket, ".") && store.Cloudflare != nil:
		p.add(subject, "Invalid bucket", "%q has a dot, which R2 takes in no bucket's name.", b.Bucket)
	case strings.Contains(b.Bucket, ".") && !store.PathStyle:
		p.add(subject, "Invalid bucket", "%q has a dot: as part of a host name no certificate would fit it. Leave path_style out, or take another bucket.", b.Bucket)
	}
}

func (b *cloudflareBlock) cloudflare(p *problems) *Cloudflare {
	c := &Cloudflare{AccountID: b.AccountID, Jurisdiction: b.Jurisdiction}
	if isSet(b.Body, "account_id") && !accountIDPattern.MatchString(b.AccountID) {
		p.add(at(b.Body, "account_id"), "Invalid account", "%q is not the id of an account: 32 lower-case hexadecimal digits, which the dashboard shows beside the account.", b.AccountID)
	}
	if isSet(b.Body, "jurisdiction") && !slices.Contains(jurisdictions, b.Jurisdiction) {
		p.add(at(b.Body, "jurisdiction"), "Invalid jurisdiction", "%q is none of %s; leave it out for a bucket without one.", b.Jurisdiction, strings.Join(jurisdictions, ", "))
	}
	if isSet(b.Body, "api") {
		address, err := checkEndpoint(b.API)
		if err != nil {
			p.add(at(b.Body, "api"), "Invalid API", "%s.", err)
		}
		c.API = address
	}
	return c
}

// endpoint is where the provider serves the account's buckets.
func (c *Cloudflare) endpoint() string {
	domain := r2Domain
	if c.Jurisdiction != "" {
		domain = c.Jurisdiction + "." + domain
	}
	return "https://" + c.AccountID + "." + domain
}

// checkEndpoint returns the URL without a slash at its end. Plain http is for labs:
// where keys and bytes cross a network that is not one's own, they are encrypted.
func checkEndpoint(text string) (string, error) {
	if err := checkURL(text); err != nil {
		return "", err
	}
	parsed, err := url.Parse(text)
	switch {
	case err != nil:
		return "", fmt.Errorf("not a URL: %w", err)
	case parsed.RawQuery != "" || parsed.Fragment != "" || parsed.ForceQuery || strings.HasSuffix(text, "#"):
		return "", fmt.Errorf("%q has a query or a fragment: give the address alone", text)
	case parsed.Hostname() == "":
		return "", fmt.Errorf("%q names no host", text)
	case parsed.Scheme == "http" && !isNear(parsed.Hostname()):
		return "", fmt.Errorf("%q is not https: plain http is only for an IP address that is private, link-local or loopback", text)
	}
	return strings.TrimRight(text, "/"), nil
}

// isNear accepts what no packet to which leaves the owner's networks.
func isNear(host string) bool {
	address, err := netip.ParseAddr(host)
	if err != nil {
		return host == "localhost"
	}
	address = address.Unmap()
	return address.IsLoopback() || address.IsPrivate() || address.IsLinkLocalUnicast()
}

// checkObjectStore insists that the store and its service come together.
func (l *loader) checkObjectStore(s *siteBlock) {
	at := slices.IndexFunc(s.Components, func(use *useBlock) bool { return use.Name == ObjectStorageComponent })
	switch {
	case s.Store != nil && at < 0:
		l.problems.add(s.Store.Range, "Object store without its service", "Nothing could be uploaded to it: add component %q {} to the site.", ObjectStorageComponent)
	case s.Store == nil && at >= 0 && !hasBlock(s.Body, "object_store"):
		l.problems.add(s.Components[at].NameAtRange, "Service without an object store", `It has no bucket: add object_store { bucket = "…" … } to the site, or take the component out.`)
	}
}

// storeVariables are given to the jobspec of the object-storage-service.
func (l *loader) storeVariables() (map[string]string, error) {
	store := ObjectStore{}
	if l.store != nil {
		store = *l.store
	}
	variables := map[string]string{}
	for name, value := range map[string]any{
		"store_endpoint": store.Endpoint, "store_region": store.Region, "store_bucket": store.Bucket, "store_path_style": store.PathStyle,
	} {
		text, err := json.Marshal(value)
		if err != nil {
			return nil, fmt.Errorf("variable %s: %w", name, err)
		}
		variables[name] = string(text)
	}
	return variables, nil
}

// giveStore fills in what follows from the site's object store: the variables, and
// who makes the keys.
func (l *loader) giveStore(c *Component, sets ...map[string]literal) error {
	if c.Name != ObjectStorageComponent {
		return nil
	}
	given, err := l.storeVariables()
	if err != nil {
		return err
	}
	for _, set := range sets {
		for name, value := range set {
			if _, taken := given[name]; taken {
				l.problems.add(value.place, "Reserved variable", "%q follows from object_store of the site and cannot be set.", name)
			}
		}
	}
	for name, value := range given {
		c.Variables[name] = value
	}
	c.Secrets = storeSecrets(c.Secrets, l.store != nil && l.store.Cloudflare != nil)
	return nil
}

// storeSecrets has a provider's keys made by its API, and leaves out the provider's
// tokens where there is no provider.
func storeSecrets(declared []Secret, provider bool) []Secret {
	var secrets []Secret
	for _, one := range declared {
		switch one.Name {
		case StoreAdminID, StoreAdminSecret, StoreProxyID, StoreProxySecret:
			if provider && one.External != nil {
				one.External, one.ProducedBy = nil, &Producer{Provider: CloudflareProvider}
			}
		case ProviderTokenA, ProviderTokenB:
			if !provider {
				continue
			}
			if one.External != nil {
				optional := *one.External
				optional.Optional = true
				one.External = &optional
			}
		}
		secrets = append(secrets, one)
	}
	return secrets
}

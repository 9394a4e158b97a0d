package site

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"golang.org/x/crypto/ssh"
)

// The shape of sites/<name>/site.hcl. sites/example/site.hcl documents it.

type siteFile struct {
	Site *siteBlock `hcl:"site,block"`
	Body hcl.Body   `hcl:",body"`
}

type siteBlock struct {
	Name        string            `hcl:"name,label"`
	Deadline    string            `hcl:"deadline,optional"`
	Keep        int               `hcl:"keep_releases,optional"`
	Datacenter  string            `hcl:"datacenter,optional"`
	Region      string            `hcl:"region,optional"`
	SSH         *sshBlock         `hcl:"ssh,block"`
	Hosts       []*hostBlock      `hcl:"host,block"`
	Operators   []*operatorBlock  `hcl:"operator,block"`
	Components  []*useBlock       `hcl:"component,block"`
	Nomad       *nomadBlock       `hcl:"nomad,block"`
	Store       *objectStoreBlock `hcl:"object_store,block"`
	Body        hcl.Body          `hcl:",body"`
	Range       hcl.Range         `hcl:",def_range"`
	NameAtRange hcl.Range         `hcl:"name,label_range"`
}

type sshBlock struct {
	ConfigFile string   `hcl:"config_file,optional"`
	Body       hcl.Body `hcl:",body"`
}

type hostBlock struct {
	Name           string    `hcl:"name,label"`
	Address        string    `hcl:"address"`
	Port           int       `hcl:"port,optional"`
	User           string    `hcl:"user,optional"`
	PrivateAddress string    `hcl:"private_address,optional"`
	Server         *bool     `hcl:"server,optional"`
	Client         *bool     `hcl:"client,optional"`
	HostKeys       []string  `hcl:"host_keys,optional"`
	IdentityFile   string    `hcl:"identity_file,optional"`
	Body           hcl.Body  `hcl:",body"`
	Range          hcl.Range `hcl:",def_range"`
	NameAtRange    hcl.Range `hcl:"name,label_range"`
}

type operatorBlock struct {
	Name          string    `hcl:"name,label"`
	PublicKey     string    `hcl:"public_key,optional"`
	PublicKeyFile string    `hcl:"public_key_file,optional"`
	Rights        string    `hcl:"rights,optional"`
	Body          hcl.Body  `hcl:",body"`
	Range         hcl.Range `hcl:",def_range"`
	NameAtRange   hcl.Range `hcl:"name,label_range"`
}

// useBlock activates a component on the site.
type useBlock struct {
	Name        string         `hcl:"name,label"`
	Variables   *hcl.Attribute `hcl:"variables,optional"`
	Range       hcl.Range      `hcl:",def_range"`
	NameAtRange hcl.Range      `hcl:"name,label_range"`
}

type nomadBlock struct {
	FingerprintDenylist []string `hcl:"fingerprint_denylist,optional"`
	Body                hcl.Body `hcl:",body"`
}

const (
	defaultDeadline     = 15 * time.Minute
	longestDeadline     = 24 * time.Hour
	defaultKeepReleases = 5
	mostKeepReleases    = 100
)

// siteFile returns nil where the file has no usable site block.
func (l *loader) siteFile(name string) (*siteBlock, error) {
	file := path.Join(sitesFolder, name, siteFileName)
	content, err := l.read(file)
	if err != nil {
		return nil, err
	}
	var decoded siteFile
	if !l.decode(content, file, &decoded) {
		return nil, nil
	}
	if decoded.Site == nil {
		if len(l.problems.decode) == 0 {
			l.problems.add(fileStart(file), "Missing site block", `The file must hold one block site %q { … }.`, name)
		}
		return nil, nil
	}
	if decoded.Site.Body == nil {
		return nil, nil
	}
	return decoded.Site, nil
}

// site turns the block into the model, without its components.
func (b *siteBlock) site(folder string, p *problems, workDir string) *Site {
	s := &Site{
		Name: b.Name, Range: b.Range,
		Deadline: defaultDeadline, KeepReleases: defaultKeepReleases,
		Datacenter: "dc1", Region: "global",
	}
	if b.Name != folder {
		p.add(b.NameAtRange, "Wrong site name", "The block is named %q but its folder is sites/%s.", b.Name, folder)
	} else if !namePattern.MatchString(b.Name) {
		p.add(b.NameAtRange, "Invalid site name", "%s", nameRule)
	}
	if isSet(b.Body, "deadline") {
		deadline, err := time.ParseDuration(b.Deadline)
		if err != nil || deadline <= 0 || deadline > longestDeadline {
			p.add(at(b.Body, "deadline"), "Invalid duration", `%q is not a duration between 1s and 24h such as "15m".`, b.Deadline)
		}
		s.Deadline = deadline
	}
	if isSet(b.Body, "keep_releases") {
		if b.Keep < 1 || b.Keep > mostKeepReleases {
			p.add(at(b.Body, "keep_releases"), "Invalid number of releases", "%d is not between 1 and %d.", b.Keep, mostKeepReleases)
		}
		s.KeepReleases = b.Keep
	}
	locale := func(name, value string, target *string) {
		if !isSet(b.Body, name) {
			return
		}
		if !localePattern.MatchString(value) {
			p.add(at(b.Body, name), "Invalid "+name, "%q must be 1 to 63 letters, digits, hyphens and underscores.", value)
		}
		*target = value
	}
	locale("datacenter", b.Datacenter, &s.Datacenter)
	locale("region", b.Region, &s.Region)
	if b.SSH != nil && isSet(b.SSH.Body, "config_file") {
		clean, err := checkRepositoryPath(b.SSH.ConfigFile)
		if err != nil {
			p.add(at(b.SSH.Body, "config_file"), "Invalid path", "%s.", err)
		}
		s.SSHConfigFile = clean
	}
	if b.Nomad != nil {
		for i, name := range b.Nomad.FingerprintDenylist {
			if !settingPattern.MatchString(name) {
				p.add(atElement(b.Nomad.Body, "fingerprint_denylist", i), "Invalid fingerprinter", "%q is not the name of a Nomad fingerprinter such as \"env_aws\".", name)
			}
		}
		s.FingerprintDenylist = b.Nomad.FingerprintDenylist
	}
	s.Hosts = b.hosts(p)
	s.Operators = b.operators(p, workDir)
	s.ObjectStore = b.objectStore(p)
	return s
}

func (b *siteBlock) hosts(p *problems) []Host {
	var hosts []Host
	names, endpoints := map[string]hcl.Range{}, map[string]string{}
	servers, clients := 0, 0
	for _, block := range b.Hosts {
		if block.Body == nil {
			continue
		}
		h := block.host(len(b.Hosts) == 1, p)
		if first, taken := names[h.Name]; taken {
			p.add(block.NameAtRange, "Duplicate host", "A host named %q is already declared at %s.", h.Name, place(first))
		} else {
			names[h.Name] = block.NameAtRange
		}
		endpoint := fmt.Sprintf("%s port %d", h.Address, h.Port)
		if other, taken := endpoints[endpoint]; taken && h.Address != "" && other != h.Name {
			p.add(at(block.Body, "address"), "Duplicate address", "Host %q has the same address and port.", other)
		} else {
			endpoints[endpoint] = h.Name
		}
		if h.Server {
			servers++
		}
		if h.Client {
			clients++
		}
		hosts = append(hosts, h)
	}
	switch {
	case len(b.Hosts) == 0:
		p.add(b.Range, "Missing host block", `A site needs at least one block host "NAME" { address = "…" }.`)
	case servers == 0:
		p.add(b.Range, "No server host", "One, three or five hosts must have server = true.")
	case !slices.Contains([]int{1, 3, 5}, servers):
		p.add(b.Range, "Wrong number of server hosts", "%d hosts are servers; a quorum needs one, three or five.", servers)
	}
	if len(b.Hosts) > 0 && clients == 0 {
		p.add(b.Range, "No client host", "Every host has client = false; nothing could run a job.")
	}
	return hosts
}

func (b *hostBlock) host(only bool, p *problems) Host {
	h := Host{
		Name: b.Name, Address: b.Address, Port: b.Port, User: b.User,
		PrivateAddress: b.PrivateAddress, IdentityFile: b.IdentityFile,
		Server: only, Client: true, Range: b.Range,
	}
	if !namePattern.MatchString(b.Name) {
		p.add(b.NameAtRange, "Invalid host name", "%s", nameRule)
	}
	if isSet(b.Body, "address") {
		if err := checkAddress(b.Address); err != nil {
			p.add(at(b.Body, "address"), "Invalid address", "%s.", err)
		}
	}
	if isSet(b.Body, "port") && (b.Port < 1 || b.Port > 65535) {
		p.add(at(b.Body, "port"), "Invalid port", "%d is not between 1 and 65535.", b.Port)
	}
	if isSet(b.Body, "user") && !loginPattern.MatchString(b.User) {
		p.add(at(b.Body, "user"), "Invalid user", "%q is not a login name.", b.User)
	}
	if isSet(b.Body, "private_address") {
		if err := checkPrivateAddress(b.PrivateAddress); err != nil {
			p.add(at(b.Body, "private_address"), "Invalid private address", "%s.", err)
		}
	}
	if isSet(b.Body, "identity_file") && (b.IdentityFile == "" || strings.ContainsAny(b.IdentityFile, "\x00\n")) {
		p.add(at(b.Body, "identity_file"), "Invalid path", "%q is not the path of a private key file.", b.IdentityFile)
	}
	if b.Server != nil {
		h.Server = *b.Server
	}
	if b.Client != nil {
		h.Client = *b.Client
	}
	if b.Server != nil && !h.Server && !h.Client {
		p.add(b.Range, "Host without a part", "Host %q is neither server nor client.", b.Name)
	}
	for i, text := range b.HostKeys {
		key, err := parsePublicKey(text)
		if err != nil {
			p.add(atElement(b.Body, "host_keys", i), "Invalid host key", "%s.", err)
			continue
		}
		h.HostKeys = append(h.HostKeys, authorizedKey(key))
	}
	return h
}

func (b *siteBlock) operators(p *problems, workDir string) []Operator {
	var operators []Operator
	b.checkRights(p)
	names, keys := map[string]hcl.Range{}, map[string]string{}
	for _, block := range b.Operators {
		if block.Body == nil {
			continue
		}
		if !operatorPattern.MatchString(block.Name) {
			p.add(block.NameAtRange, "Invalid operator name", "%q must be 1 to 63 lower-case letters, digits and the characters . _ @ -", block.Name)
		}
		if first, taken := names[block.Name]; taken {
			p.add(block.NameAtRange, "Duplicate operator", "An operator named %q is already declared at %s.", block.Name, place(first))
		} else {
			names[block.Name] = block.NameAtRange
		}
		key, attribute, ok := block.key(p, workDir)
		if !ok {
			continue
		}
		if err := checkOperatorKey(key); err != nil {
			p.add(at(block.Body, attribute), "Unsuitable key", "%s.", err)
			continue
		}
		fingerprint := ssh.FingerprintSHA256(key)
		if other, taken := keys[fingerprint]; taken {
			p.add(at(block.Body, attribute), "Duplicate key", "Operator %q has the same key; a login must name one person.", other)
			continue
		}
		keys[fingerprint] = block.Name
		operators = append(operators, Operator{Name: block.Name, PublicKey: authorizedKey(key), Rights: block.rights(), Range: block.Range})
	}
	return operators
}

// checkRights also insists that someone is left who may deploy.
func (b *siteBlock) checkRights(p *problems) {
	deploys := len(b.Operators) == 0
	for _, block := range b.Operators {
		if block.Body != nil && block.rights() != RightsDeploy && block.rights() != RightsRotate {
			p.add(at(block.Body, "rights"), "Invalid rights", "%q is neither %q nor %q.", block.Rights, RightsDeploy, RightsRotate)
		}
		// What is mistaken may have been meant so.
		deploys = deploys || block.Body == nil || block.rights() != RightsRotate
	}
	if !deploys {
		p.add(at(b.Operators[0].Body, "rights"), "Nobody can deploy", "Every operator has rights = %q: at least one must be left without it.", RightsRotate)
	}
}

func (b *operatorBlock) rights() string {
	if !isSet(b.Body, "rights") {
		return RightsDeploy
	}
	return b.Rights
}

// key reads the operator's key from the one attribute that is set.
func (b *operatorBlock) key(p *problems, workDir string) (ssh.PublicKey, string, bool) {
	inline, file := isSet(b.Body, "public_key"), isSet(b.Body, "public_key_file")
	if inline == file {
		p.add(b.Range, "Operator needs one key", "Operator %q must have either public_key or public_key_file.", b.Name)
		return nil, "", false
	}
	text, attribute := b.PublicKey, "public_key"
	if file {
		attribute = "public_key_file"
		content, err := readWorkFile(workDir, b.PublicKeyFile)
		if err != nil {
			p.add(at(b.Body, attribute), "Unreadable key file", "%s.", err)
			return nil, "", false
		}
		text = string(content)
	}
	key, err := parsePublicKey(text)
	if err != nil {
		p.add(at(b.Body, attribute), "Invalid public key", "%s.", err)
		return nil, "", false
	}
	return key, attribute, true
}

func readWorkFile(workDir, name string) ([]byte, error) {
	clean, err := checkRepositoryPath(name)
	if err != nil {
		return nil, err
	}
	if workDir == "" {
		return nil, fmt.Errorf("%s cannot be read without a work tree; use public_key", clean)
	}
	content, err := os.ReadFile(filepath.Join(workDir, filepath.FromSlash(clean)))
	if os.IsNotExist(err) {
		return nil, fmt.Errorf("%s does not exist in the work tree (a lab writes its files with `site lab up`)", clean)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", clean, err)
	}
	return content, nil
}

// authorizedKey is the key in one canonical form, without a comment.
func authorizedKey(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

// uniqueComponents leaves out and reports components that are named twice.
func (b *siteBlock) uniqueComponents(p *problems) []*useBlock {
	var unique []*useBlock
	names := map[string]hcl.Range{}
	for _, block := range b.Components {
		if first, taken := names[block.Name]; taken {
			p.add(block.NameAtRange, "Duplicate component", "Component %q is already active by %s.", block.Name, place(first))
			continue
		}
		names[block.Name] = block.NameAtRange
		unique = append(unique, block)
	}
	return unique
}

func place(r hcl.Range) string {
	return fmt.Sprintf("%s:%d,%d", r.Filename, r.Start.Line, r.Start.Column)
}

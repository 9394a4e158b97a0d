package site

import (
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// The catalogue's part of component.hcl.

type secretBlock struct {
	Name        string          `hcl:"name,label"`
	Description string          `hcl:"description,optional"`
	Generated   *generatedBlock `hcl:"generated,block"`
	External    *externalBlock  `hcl:"external,block"`
	ProducedBy  *producerBlock  `hcl:"produced_by,block"`
	Rotation    *rotationBlock  `hcl:"rotation,block"`
	Body        hcl.Body        `hcl:",body"`
	Range       hcl.Range       `hcl:",def_range"`
	NameAtRange hcl.Range       `hcl:"name,label_range"`
}

type generatedBlock struct {
	Length   int       `hcl:"length,optional"`
	Encoding string    `hcl:"encoding,optional"`
	Body     hcl.Body  `hcl:",body"`
	Range    hcl.Range `hcl:",def_range"`
}

type externalBlock struct {
	Check           []string  `hcl:"check,optional"`
	TrailingNewline string    `hcl:"trailing_newline,optional"`
	Body            hcl.Body  `hcl:",body"`
	Range           hcl.Range `hcl:",def_range"`
}

type producerBlock struct {
	Component string    `hcl:"component,optional"`
	Command   []string  `hcl:"command,optional"`
	Body      hcl.Body  `hcl:",body"`
	Range     hcl.Range `hcl:",def_range"`
}

const (
	defaultSecretLength   = 32
	shortestSecret        = 16
	longestSecret         = 1024
	defaultSecretEncoding = "base64url"
	newlineTrim           = "trim"
	newlineKeep           = "keep"
	longestSecretName     = 63
)

var (
	secretPattern   = regexp.MustCompile(`^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)?$`)
	secretEncodings = []string{defaultSecretEncoding, "base64", "hex"}
	secretSources   = []string{"generated", "external", "produced_by"}
)

// isSecretName accepts words that a dot may group: "password", "r2.admin_key".
func isSecretName(name string) bool {
	return len(name) <= longestSecretName && secretPattern.MatchString(name)
}

// fullSecretName is how a component may name a secret: its own without a prefix. One
// with a dot is always named in full, or it would be that of another component.
func fullSecretName(component, name string) string {
	if strings.Contains(name, ".") {
		return name
	}
	return component + "." + name
}

func (l *loader) secrets(c Component, blocks []*secretBlock) []Secret {
	var secrets []Secret
	names := map[string]hcl.Range{}
	for _, block := range blocks {
		if block.Body == nil {
			continue
		}
		if first, taken := names[block.Name]; taken {
			l.problems.add(block.NameAtRange, "Duplicate secret", "A secret named %q is already declared at %s; a name has one source.", block.Name, place(first))
			continue
		}
		names[block.Name] = block.NameAtRange
		secrets = append(secrets, l.secret(c, block))
	}
	return secrets
}

func (l *loader) secret(c Component, b *secretBlock) Secret {
	p := l.problems
	secret := Secret{Component: c.Name, Name: b.Name, Description: b.Description, Range: b.Range}
	if !isSecretName(b.Name) {
		p.add(b.NameAtRange, "Invalid secret name", "%q must be 1 to 63 lower-case letters, digits and underscores, with a letter first; one dot may stand between two such words.", b.Name)
	}
	if b.Generated != nil {
		secret.Generated = b.Generated.generated(p)
	}
	if b.External != nil {
		secret.External = l.external(c, b.External)
	}
	if b.ProducedBy != nil {
		secret.ProducedBy = l.producer(c, b)
	}
	if b.Rotation != nil && b.Rotation.Body != nil {
		secret.Rotation = b.rotation(secret, p)
	}
	// A block that is there twice does not decode, and is a source all the same.
	sources := slices.DeleteFunc(slices.Clone(secretSources), func(source string) bool { return !hasBlock(b.Body, source) })
	switch {
	case len(sources) == 0:
		p.add(b.Range, "Secret without a source", "Secret %q must have one of the blocks %s.", secret.FullName(), strings.Join(secretSources, ", "))
	case len(sources) > 1:
		p.add(b.Range, "Secret with several sources", "Secret %q has %s; exactly one is allowed.", secret.FullName(), strings.Join(sources, " and "))
	}
	return secret
}

func (b *generatedBlock) generated(p *problems) *Generated {
	g := &Generated{Length: defaultSecretLength, Encoding: defaultSecretEncoding}
	if isSet(b.Body, "length") {
		if b.Length < shortestSecret || b.Length > longestSecret {
			p.add(at(b.Body, "length"), "Invalid length", "%d random bytes are not between %d and %d.", b.Length, shortestSecret, longestSecret)
		}
		g.Length = b.Length
	}
	if isSet(b.Body, "encoding") {
		if !slices.Contains(secretEncodings, b.Encoding) {
			p.add(at(b.Body, "encoding"), "Invalid encoding", "%q is none of %s.", b.Encoding, strings.Join(secretEncodings, ", "))
		}
		g.Encoding = b.Encoding
	}
	return g
}

func (l *loader) external(c Component, b *externalBlock) *External {
	e := &External{Check: b.Check}
	if isSet(b.Body, "check") {
		l.checkCommand(c, b.Body, "check", b.Check)
	}
	if isSet(b.Body, "trailing_newline") {
		if b.TrailingNewline != newlineTrim && b.TrailingNewline != newlineKeep {
			l.problems.add(at(b.Body, "trailing_newline"), "Invalid trailing_newline", "%q is neither %q nor %q.", b.TrailingNewline, newlineTrim, newlineKeep)
		}
		e.KeepNewline = b.TrailingNewline == newlineKeep
	}
	return e
}

// producer leaves to the catalogue whether a producing component is active.
func (l *loader) producer(c Component, secret *secretBlock) *Producer {
	b, p := secret.ProducedBy, l.problems
	byComponent, byCommand := isSet(b.Body, "component"), isSet(b.Body, "command")
	switch {
	case byComponent == byCommand:
		p.add(b.Range, "Secret needs one producer", "Secret %q must be produced by either a component or a command.", c.Name+"."+secret.Name)
	case byCommand:
		l.checkCommand(c, b.Body, "command", b.Command)
	case b.Component == c.Name:
		p.add(at(b.Body, "component"), "Secret produced by its own component", "Component %q cannot wait for itself to produce %q; name another component, or a command.", c.Name, c.Name+"."+secret.Name)
	}
	return &Producer{Component: b.Component, Command: b.Command}
}

// checkCommand accepts the name of a program and its arguments. A program by its
// path is one of the commit, since that is where the command runs.
func (l *loader) checkCommand(c Component, body hcl.Body, attribute string, argv []string) {
	p := l.problems
	switch {
	case len(argv) == 0:
		p.add(at(body, attribute), "Empty command", "Name the program and its arguments, or leave %s out.", attribute)
		return
	case argv[0] == "":
		p.add(atElement(body, attribute, 0), "Empty command", "The first element is the program.")
		return
	}
	for i, argument := range argv {
		if strings.ContainsRune(argument, 0) {
			p.add(atElement(body, attribute, i), "Invalid argument", "An argument cannot hold a zero byte.")
		}
	}
	if !strings.Contains(argv[0], "/") || path.IsAbs(argv[0]) || c.Platform {
		return
	}
	clean, err := checkRepositoryPath(argv[0])
	if err != nil {
		p.add(atElement(body, attribute, 0), "Invalid path", "%s.", err)
		return
	}
	if info, err := fs.Stat(l.repository, clean); err != nil || info.IsDir() {
		p.add(atElement(body, attribute, 0), "Missing program", "There is no file %s in the commit.", clean)
	}
}

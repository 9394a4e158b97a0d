package site

import (
	"slices"
	"sort"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
)

// The variables that every deploy gives to a jobspec that declares them.
const (
	// ArtifactsVariable maps an artifact's name to its address: map(string).
	ArtifactsVariable = "artifacts"
	// SiteVariable is the site's name.
	SiteVariable = "site"
	// ServerVariable is the name of the first host that is a server: where the
	// platform's own jobs are placed.
	ServerVariable = "server"
)

// jobspecFacts is what can be seen in a jobspec without evaluating it. The
// truth about a jobspec is the server's own parse; this finds early, with a
// place, what the server would report late or not at all.
type jobspecFacts struct {
	path string
	jobs []*hclsyntax.Block
	// variables are the declared ones; true where a default exists.
	variables map[string]bool
	// drivers are the literal driver attributes of tasks.
	drivers []placedText
	// variableUses are the names in var.NAME, artifactUses those in var.artifacts["NAME"].
	variableUses, artifactUses []placedText
	// locals and defaults are what local.NAME and, where nothing sets it, var.NAME mean.
	locals, defaults map[string]hclsyntax.Expression
	// templates are those of the tasks, once findTemplates has read them.
	templates []taskTemplates
}

type placedText struct {
	text  string
	place hcl.Range
}

// JobspecVariables lists the variables that a jobspec declares, sorted. path
// is only for the places in the diagnostics.
func JobspecVariables(jobspec []byte, path string) ([]string, hcl.Diagnostics) {
	parsed, diags := hclsyntax.ParseConfig(jobspec, path, hcl.InitialPos)
	if diags.HasErrors() {
		return nil, diags
	}
	body, ok := parsed.Body.(*hclsyntax.Body)
	if !ok {
		return nil, diags
	}
	return readFacts(body, path).variableNames(), nil
}

// jobspecFacts parses a component's jobspec and checks what it says about itself.
func (l *loader) jobspecFacts(content []byte, c *Component) *jobspecFacts {
	body := l.parse(content, c.JobspecPath)
	if body == nil {
		return nil
	}
	facts, p := readFacts(body, c.JobspecPath), l.problems
	switch {
	case len(facts.jobs) == 0:
		p.add(fileStart(c.JobspecPath), "Missing job block", "The jobspec must hold one block job %q { … }.", c.Name)
	case len(facts.jobs) > 1:
		p.add(facts.jobs[1].DefRange(), "Duplicate job block", "A component is one job; the first is at %s.", place(facts.jobs[0].DefRange()))
	}
	for _, job := range facts.jobs[:min(1, len(facts.jobs))] {
		switch {
		case len(job.Labels) != 1:
			p.add(job.DefRange(), "Job without a name", "Write job %q { … }.", c.Name)
		case job.Labels[0] != c.Name:
			p.add(job.LabelRanges[0], "Wrong job name", "The job is named %q but its component is %q; both must be the same.", job.Labels[0], c.Name)
		}
	}
	for _, driver := range facts.drivers {
		if driver.text != "podman" {
			p.add(driver.place, "Wrong driver", "The hosts of a site run tasks with the driver \"podman\", not %q.", driver.text)
		}
	}
	return facts
}

func readFacts(body *hclsyntax.Body, path string) *jobspecFacts {
	facts := &jobspecFacts{
		path: path, variables: map[string]bool{},
		locals: map[string]hclsyntax.Expression{}, defaults: map[string]hclsyntax.Expression{},
	}
	for _, block := range body.Blocks {
		switch block.Type {
		case "job":
			facts.jobs = append(facts.jobs, block)
			facts.findDrivers(block.Body)
		case "variable":
			if len(block.Labels) == 1 {
				attr, hasDefault := block.Body.Attributes["default"]
				facts.variables[block.Labels[0]] = hasDefault
				if hasDefault {
					facts.defaults[block.Labels[0]] = attr.Expr
				}
			}
		case "variables":
			for name, attr := range block.Body.Attributes {
				facts.variables[name] = true
				facts.defaults[name] = attr.Expr
			}
		case "locals":
			for name, attr := range block.Body.Attributes {
				facts.locals[name] = attr.Expr
			}
		}
	}
	_ = hclsyntax.VisitAll(body, func(node hclsyntax.Node) hcl.Diagnostics {
		if expression, ok := node.(*hclsyntax.ScopeTraversalExpr); ok {
			facts.readTraversal(expression.Traversal)
		}
		return nil
	})
	return facts
}

func (f *jobspecFacts) findDrivers(body *hclsyntax.Body) {
	for _, block := range body.Blocks {
		switch block.Type {
		case "group":
			f.findDrivers(block.Body)
		case "task":
			attr, ok := block.Body.Attributes["driver"]
			if !ok {
				continue
			}
			// What is not a literal is left to the server.
			if value, diags := attr.Expr.Value(nil); !diags.HasErrors() && value.Type() == cty.String && value.IsKnown() && !value.IsNull() {
				f.drivers = append(f.drivers, placedText{value.AsString(), attr.Expr.Range()})
			}
		}
	}
}

func (f *jobspecFacts) readTraversal(traversal hcl.Traversal) {
	if len(traversal) < 2 || traversal.RootName() != "var" {
		return
	}
	name, ok := stepName(traversal[1])
	if !ok {
		return
	}
	f.variableUses = append(f.variableUses, placedText{name, traversal.SourceRange()})
	if name != ArtifactsVariable || len(traversal) < 3 {
		return
	}
	if artifact, ok := stepName(traversal[2]); ok {
		f.artifactUses = append(f.artifactUses, placedText{artifact, traversal.SourceRange()})
	}
}

func stepName(step hcl.Traverser) (string, bool) {
	switch step := step.(type) {
	case hcl.TraverseAttr:
		return step.Name, true
	case hcl.TraverseIndex:
		if step.Key.Type() == cty.String && step.Key.IsKnown() && !step.Key.IsNull() {
			return step.Key.AsString(), true
		}
	}
	return "", false
}

func (f *jobspecFacts) variableNames() []string {
	names := make([]string, 0, len(f.variables))
	for name := range f.variables {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// settable are the declared variables that a configuration may set.
func (f *jobspecFacts) settable() []string {
	return slices.DeleteFunc(f.variableNames(), isGiven)
}

func isGiven(name string) bool {
	return name == ArtifactsVariable || name == SiteVariable || name == ServerVariable
}

// checkVariables holds the values against the declarations.
func (f *jobspecFacts) checkVariables(c Component, use *useBlock, p *problems, values ...map[string]literal) {
	for _, set := range values {
		for name, value := range set {
			if _, declared := f.variables[name]; isGiven(name) {
				p.add(value.place, "Reserved variable", "%q is given by every deploy and cannot be set.", name)
			} else if !declared {
				p.add(value.place, "Unknown variable", "%s declares no variable %q.%s", f.path, name, didYouMean(name, f.settable(), "variables to set"))
			}
		}
	}
	for _, name := range f.settable() {
		if _, set := c.Variables[name]; !set && !f.variables[name] {
			p.add(use.Range, "Missing variable", "Variable %q of %s has no default and is set neither here nor in component.hcl.", name, f.path)
		}
	}
	for _, use := range f.variableUses {
		if _, declared := f.variables[use.text]; !declared {
			p.add(use.place, "Undeclared variable", "The jobspec declares no variable %q.%s", use.text, didYouMean(use.text, f.variableNames(), "variables"))
		}
	}
}

// checkArtifacts holds what the jobspec names against what the component declares.
func (f *jobspecFacts) checkArtifacts(c Component, p *problems) {
	var names []string
	for _, artifact := range c.Artifacts {
		names = append(names, artifact.Name)
	}
	for _, use := range f.artifactUses {
		if !slices.Contains(names, use.text) {
			p.add(use.place, "Unknown artifact", "Component %q declares no artifact %q.%s", c.Name, use.text, didYouMean(use.text, names, "artifacts"))
		}
	}
}

package site

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// catalogue is the secrets of all active components, and who reads them.
type catalogue struct {
	*loader
	siteFile string
	active   []string
	secrets  map[string]Secret
	names    []string // sorted
	// alternating are the roles that two logins take turns for, by their password.
	alternating map[string]Role
	// unclear are components whose file has errors: what they declare is not known.
	unclear map[string]bool
}

// catalogue fills in what every component reads, and holds it against what is declared.
func (l *loader) catalogue(site string, placed []placedComponent, active []string) {
	c := &catalogue{
		loader: l, siteFile: path.Join(sitesFolder, site, siteFileName), active: active,
		secrets: map[string]Secret{}, alternating: map[string]Role{}, unclear: l.unclear(placed, active),
	}
	for _, component := range placed {
		for _, secret := range component.Secrets {
			c.secrets[secret.FullName()] = secret
			c.names = append(c.names, secret.FullName())
		}
		for _, role := range component.Roles {
			if role.Alternating {
				c.alternating[role.Password] = role
			}
		}
	}
	slices.Sort(c.names)
	for i := range placed {
		c.component(&placed[i])
	}
}

// unclear are active components whose declarations are not known in full: a
// reference to one of those may be right.
func (l *loader) unclear(placed []placedComponent, active []string) map[string]bool {
	unclear := map[string]bool{}
	for _, name := range active {
		unclear[name] = true
	}
	for _, c := range placed {
		unclear[c.Name] = c.body == nil || slices.ContainsFunc(l.problems.decode, func(diag *hcl.Diagnostic) bool {
			return diag.Subject == nil || diag.Subject.Filename == c.file.Filename
		})
	}
	return unclear
}

// component checks one component's secrets and finds its reads.
func (c *catalogue) component(placed *placedComponent) {
	c.checkProducers(placed)
	c.checkStore(placed)
	reads := map[string]SecretRead{}
	listed := c.listedReads(placed, reads)
	if placed.facts != nil {
		if placed.Platform {
			for _, subject := range placed.facts.vaultBlocks() {
				c.problems.add(subject, "Platform job with a vault block", "%q runs before OpenBao holds anything, so that a secret can never be what it waits for: take the block out.", placed.Name)
			}
		}
		for _, task := range placed.facts.templates {
			c.task(placed, task, listed, reads)
		}
		c.checkUserNames(placed.facts.templates)
	}
	for _, name := range slices.Sorted(maps.Keys(reads)) {
		placed.Reads = append(placed.Reads, reads[name])
	}
}

// checkProducers insists that a producing component is active.
func (c *catalogue) checkProducers(placed *placedComponent) {
	if placed.decoded == nil {
		return
	}
	for _, block := range placed.decoded.Secrets {
		if block.Body == nil || block.ProducedBy == nil || !isSet(block.ProducedBy.Body, "component") || isSet(block.ProducedBy.Body, "command") {
			continue
		}
		name := block.ProducedBy.Component
		if name == placed.Name || slices.Contains(c.active, name) {
			continue
		}
		fix := didYouMean(name, without(c.active, placed.Name), "other components")
		if slices.Contains(c.knownComponents(), name) {
			fix = fmt.Sprintf(" Add component %q {} to %s.", name, c.siteFile)
		}
		c.problems.add(at(block.ProducedBy.Body, "component"), "Missing producer", "%s waits for %s: %s is produced by %s, which is not active.%s",
			placed.Name, name, placed.Name+"."+block.Name, name, fix)
	}
}

// checkStore says once per component that secrets need OpenBao.
func (c *catalogue) checkStore(placed *placedComponent) {
	if placed.decoded == nil || slices.Contains(c.active, OpenBaoComponent) {
		return
	}
	fix := fmt.Sprintf("add component %q {} to %s.", OpenBaoComponent, c.siteFile)
	for _, block := range placed.decoded.Secrets {
		c.problems.add(block.NameAtRange, "Secrets without OpenBao", "Component %q declares secrets: %s", placed.Name, fix)
		return
	}
	for _, block := range placed.decoded.Roles {
		if isSet(block.Body, "password") {
			c.problems.add(at(block.Body, "password"), "Password without OpenBao", "Component %q has roles with passwords, which OpenBao holds: %s", placed.Name, fix)
			return
		}
	}
}

// listedReads are those of `reads`; it returns their full names.
func (c *catalogue) listedReads(placed *placedComponent, reads map[string]SecretRead) map[string]bool {
	listed := map[string]bool{}
	if placed.decoded == nil {
		return listed
	}
	for i, name := range placed.decoded.Reads {
		subject, full := atElement(placed.body, "reads", i), fullSecretName(placed.Name, name)
		switch {
		case listed[full]:
			c.problems.add(subject, "Duplicate reference", "%q is already in reads.", name)
			continue
		case !c.exists(full) && c.secrets[placed.Name+"."+name].Name != "":
			c.problems.add(subject, "Unknown secret in reads", "No active component declares a secret %q. Did you mean %q?", full, placed.Name+"."+name)
		case !c.exists(full):
			c.problems.add(subject, "Unknown secret in reads", "%s", c.missing(full))
		default:
			reads[full] = SecretRead{Secret: full, Range: subject}
		}
		listed[full] = true
	}
	return listed
}

// exists is also true of what a file that is not understood may declare.
func (c *catalogue) exists(fullName string) bool {
	owner, _, _ := strings.Cut(fullName, ".")
	_, declared := c.secrets[fullName]
	return declared || c.unclear[owner]
}

// missing says what there is instead of a secret.
func (c *catalogue) missing(fullName string) string {
	text := fmt.Sprintf("No active component declares a secret %q.", fullName)
	if near := nearest(fullName, c.names); near != "" {
		return text + fmt.Sprintf(" Did you mean %q?", near)
	}
	owner, _, _ := strings.Cut(fullName, ".")
	if !slices.Contains(c.active, owner) {
		return text + fmt.Sprintf(" Component %q is not active on this site.", owner)
	}
	var own []string
	for _, name := range c.names {
		if strings.HasPrefix(name, owner+".") {
			own = append(own, name)
		}
	}
	if len(own) == 0 {
		return text + fmt.Sprintf(" Component %q declares none.", owner)
	}
	return text + fmt.Sprintf(" Component %q declares: %s.", owner, strings.Join(own, ", "))
}

// task checks what the templates of a task read.
func (c *catalogue) task(placed *placedComponent, task taskTemplates, listed map[string]bool, reads map[string]SecretRead) {
	asks := false
	for _, template := range task.templates {
		for _, call := range template.calls(c.problems) {
			asks = true
			full, ok := c.call(placed, call, listed)
			if !ok {
				continue
			}
			// The template that reads says more than the list that allows it.
			if first, known := reads[full]; !known || first.Range.Filename != call.place.Filename {
				reads[full] = SecretRead{Secret: full, Range: call.place}
			}
		}
	}
	switch {
	case !asks || task.hasVault:
	case placed.Platform:
		c.problems.add(task.place, "Platform job that reads a secret", "%q runs before OpenBao holds anything; task %q cannot read a secret.", placed.Name, task.task)
	default:
		c.problems.add(task.place, "Task without a vault block", "A template of task %q reads a secret, for which it needs an identity: add vault {} to the task, its group or the job.", task.task)
	}
}

// checkUserNames finds a job that reads the password of an alternating role and
// nowhere the user name, which changes with it: it could log in no more.
func (c *catalogue) checkUserNames(tasks []taskTemplates) {
	var templates []*templateText
	for _, task := range tasks {
		templates = append(templates, task.templates...)
	}
	if slices.ContainsFunc(templates, func(t *templateText) bool { return strings.Contains(t.text.String(), UsernameField) }) {
		return
	}
	for _, template := range templates {
		text := template.text.String()
		if !strings.Contains(text, ".Data.data."+SecretField) {
			continue // such as one that takes all fields
		}
		calls, _ := secretCalls(text, template.left, template.right) // an error is reported where they are checked
		for _, call := range calls {
			full, _, problem := secretOfPath(call.path)
			role, alternating := c.alternating[full]
			if problem != "" || !alternating || call.function != "secret" {
				continue
			}
			a, b := role.Logins()
			c.problems.add(template.place(call.offset, call.word), "Password without its user name", "%s is the password of the alternating role %q, for which the logins %s and %s take turns: read the user name beside it, as .Data.data.%s.",
				full, role.Name, a, b, UsernameField)
		}
	}
}

// call names the secret that a template asks for.
func (c *catalogue) call(placed *placedComponent, call secretCall, listed map[string]bool) (string, bool) {
	p := c.problems
	switch {
	case call.function != "secret":
		p.add(call.place, "Secret outside of the catalogue", "No policy lets a job use %s: read each secret as secret \"%s/data/COMPONENT/NAME\".", call.function, SecretMount)
		return "", false
	case call.writes:
		p.add(call.place, "Secret written by a template", "secret with more than a path writes, which no policy lets a template do: a producing job writes by its own request.")
		return "", false
	case !call.literal:
		p.add(call.place, "Computed path of a secret", "The path must be a literal, so that the policy can be derived from it: secret \"%s/data/COMPONENT/NAME\".", SecretMount)
		return "", false
	}
	full, _, problem := secretOfPath(call.path)
	if problem != "" {
		p.add(call.place, "Secret outside of the catalogue", "%s", problem)
		return "", false
	}
	owner, name, _ := strings.Cut(full, ".")
	if !c.exists(full) {
		text := c.missing(full)
		if near := nearest(full, c.names); near != "" {
			text = fmt.Sprintf("No active component declares a secret %q. Did you mean %q?", full, SecretMount+"/data/"+c.secrets[near].KVPath())
		}
		if owner == placed.Name && nearest(full, c.names) == "" {
			text += fmt.Sprintf(" Declare it in %s: secret %q { … }.", placed.file.Filename, name)
		}
		p.add(call.place, "Unknown secret", "%s", text)
		return "", false
	}
	if owner != placed.Name && !listed[full] && !c.unclear[placed.Name] {
		p.add(call.place, "Undeclared read", "%s belongs to component %q: %s.", full, owner, placed.howToRead(full))
	}
	return full, true
}

// howToRead is the line that permits a read.
func (c placedComponent) howToRead(fullName string) string {
	if isSet(c.body, "reads") {
		return fmt.Sprintf("add %q to reads at %s", fullName, place(at(c.body, "reads")))
	}
	return fmt.Sprintf("add reads = [%q] to %s", fullName, c.file.Filename)
}

// previousQuery behind a path asks for the generation before the active one.
const previousQuery = "version=previous"

// secretOfPath turns the path of a template into a full name and whether it asks
// for the previous generation, or says why there is none.
func secretOfPath(text string) (fullName string, previous bool, problem string) {
	clean, query, asks := strings.Cut(strings.Trim(strings.TrimSpace(text), "/"), "?")
	fullName, problem = secretOfEntry(text, clean)
	if problem == "" && asks && query != previousQuery {
		return "", false, fmt.Sprintf("%q asks for %q: the generation is chosen by each deploy. Write %q, or %q for the one before it.",
			text, "?"+query, clean, clean+"?"+previousQuery)
	}
	return fullName, asks, problem
}

// isSecretEntry accepts what can be the last part of a path. A name that nobody may
// declare is reported as one that nobody declares; dots can be a step in a path.
func isSecretEntry(name string) bool {
	return name != "" && (!strings.Contains(name, ".") || isSecretName(name))
}

// secretOfEntry is the full name of the entry that a path without its query names.
func secretOfEntry(text, clean string) (fullName, problem string) {
	const form = SecretMount + "/data/COMPONENT/NAME"
	parts := strings.Split(clean, "/")
	switch {
	case parts[0] != SecretMount:
		return "", fmt.Sprintf("No policy lets a job read %q: the secrets of a site are at %s.", text, form)
	case len(parts) == 3 && parts[1] != "data" && parts[1] != "metadata":
		return "", fmt.Sprintf("%q lacks data/ behind the mount: write %q.", text, strings.Join([]string{SecretMount, "data", parts[1], parts[2]}, "/"))
	case len(parts) != 4 || parts[1] != "data" || parts[2] == "" || strings.Contains(parts[2], ".") || !isSecretEntry(parts[3]):
		return "", fmt.Sprintf("%q is not %s.", text, form)
	}
	return parts[2] + "." + parts[3], ""
}

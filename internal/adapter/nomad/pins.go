package nomad

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

const (
	// liveItem and livePrevious begin the names of our items in the variable of a task.
	liveItem     = "site_generation:"
	livePrevious = "site_generation_previous:"
	// previousRead marks the generations of templates that ask for the one before.
	previousRead = "?version=previous"
	// newestGeneration is what the store takes for the newest one.
	newestGeneration = "0"
)

// Pins say which generation of each secret, by its full name ("shop.key"), a
// job is to read. A secret that is not in Active is not pinned.
type Pins struct {
	// Engine is what counts the generations: the same number in another one is
	// another value.
	Engine string
	Active map[string]int
	// Previous is what `?version=previous` stands for: the generation before,
	// while it is being retired, and otherwise the active one.
	Previous map[string]int
}

func (p Pins) of(fullName string, previous bool) (int, bool) {
	if previous {
		if generation, known := p.Previous[fullName]; known {
			return generation, true
		}
	}
	generation, known := p.Active[fullName]
	return generation, known
}

// PinnedJob is a parsed job whose templates name the generations that they read.
type PinnedJob struct {
	Job *api.Job
	// Engine is that of the pins, and empty where nothing was pinned.
	Engine string
	// Generations are what the templates read that restart a task, by secret. What
	// they read by `?version=previous` is there under the name with that behind it.
	Generations map[string]int
	// Live are what templates read that only signal a task, or do nothing.
	Live []LiveGenerations
}

// LiveGenerations are the generations that the templates of one task find in a
// Nomad variable: a change of it renders them again and restarts nothing.
type LiveGenerations struct {
	// Path is that of the variable, nomad/jobs/<job>/<group>/<task>, which the
	// task may read by its own identity.
	Path  string
	Items map[string]string
}

// Pin rewrites the templates of a parsed job so that each reads one generation
// of a secret; it comes before Prepare. Templates that are files of an artifact
// are not known here, and stay.
func Pin(parsed *api.Job, pins Pins) (PinnedJob, error) {
	if parsed.ID == nil {
		return PinnedJob{}, errors.New("pin secrets: the job has no id")
	}
	pinned := PinnedJob{Generations: map[string]int{}}
	var err error
	if pinned.Job, err = cloneJob(parsed); err != nil {
		return PinnedJob{}, err
	}
	for _, group := range pinned.Job.TaskGroups {
		for _, task := range group.Tasks {
			live := LiveGenerations{
				Path:  fmt.Sprintf("nomad/jobs/%s/%s/%s", *parsed.ID, text(group.Name), task.Name),
				Items: map[string]string{},
			}
			for i, template := range task.Templates {
				if err := pinned.template(template, pins, live); err != nil {
					return PinnedJob{}, fmt.Errorf("job %s, task %s, template %d: %w", *parsed.ID, task.Name, i+1, err)
				}
			}
			if len(live.Items) > 0 {
				pinned.Live = append(pinned.Live, live)
			}
		}
	}
	if len(pinned.Generations)+len(pinned.Live) > 0 {
		pinned.Engine = pins.Engine
	}
	return pinned, nil
}

// template pins one template, and notes what it reads where.
func (p *PinnedJob) template(template *api.Template, pins Pins, live LiveGenerations) error {
	if text(template.EmbeddedTmpl) == "" {
		return nil
	}
	generation := p.fixed(pins)
	if mode := text(template.ChangeMode); (mode == "signal" || mode == "noop") && !flag(template.Once) {
		generation = inVariable(pins, live)
	}
	rewritten, err := site.PinTemplate(*template.EmbeddedTmpl, text(template.LeftDelim), text(template.RightDelim), generation)
	if err != nil {
		return plan.WithHint(err, "correct the template")
	}
	template.EmbeddedTmpl = &rewritten
	return nil
}

// fixed writes generations into the template itself: another one is another job.
func (p *PinnedJob) fixed(pins Pins) func(string, bool) (site.Pinned, bool) {
	return func(fullName string, previous bool) (site.Pinned, bool) {
		generation, known := pins.of(fullName, previous)
		if !known {
			return site.Pinned{}, false
		}
		key := fullName
		if previous {
			key += previousRead
		}
		p.Generations[key] = generation
		return site.Pinned{Literal: strconv.Itoa(generation)}, true
	}
}

// inVariable has the template look generations up in the task's variable. Until
// Nomad has read the variable, the template asks for the newest one, and shows
// it to nobody: nothing is rendered before all that was asked for is there.
func inVariable(pins Pins, live LiveGenerations) func(string, bool) (site.Pinned, bool) {
	return func(fullName string, previous bool) (site.Pinned, bool) {
		generation, known := pins.of(fullName, previous)
		if !known {
			return site.Pinned{}, false
		}
		item := liveItem + fullName
		if previous {
			item = livePrevious + fullName
		}
		live.Items[item] = strconv.Itoa(generation)
		variable := fmt.Sprintf("(nomadVar %q)", live.Path)
		return site.Pinned{Expression: fmt.Sprintf("(or (and %s (index %s %q).Value) %q)", variable, variable, item, newestGeneration)}, true
	}
}

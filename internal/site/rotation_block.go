package site

import (
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
)

// What component.hcl says of a secret's rotation.

type rotationBlock struct {
	Every string    `hcl:"every,optional"`
	Drain string    `hcl:"drain,optional"`
	Body  hcl.Body  `hcl:",body"`
	Range hcl.Range `hcl:",def_range"`
}

const (
	day            = 24 * time.Hour
	mostOften      = time.Hour
	leastOften     = 10 * 365 * day
	longestDrain   = 24 * time.Hour
	rotateFromFile = "site secrets rotate %s --from-file"
)

var daysPattern = regexp.MustCompile(`^([0-9]{1,5})d(.*)$`)

func (b *secretBlock) rotation(secret Secret, p *problems) *Rotation {
	block := b.Rotation
	r := &Rotation{Drain: DefaultDrain, Range: block.Range}
	if isSet(block.Body, "every") {
		every, ok := parseDays(block.Every)
		if !ok || every < mostOften || every > leastOften {
			p.add(at(block.Body, "every"), "Invalid duration", `%q is not a duration between 1h and 3650d such as "30d" or "12h".`, block.Every)
		}
		r.Every = every
	}
	if isSet(block.Body, "drain") {
		drain, ok := parseDays(block.Drain)
		if !ok || drain < 0 || drain > longestDrain {
			p.add(at(block.Body, "drain"), "Invalid duration", `%q is not a duration between 0s and 24h such as "10m".`, block.Drain)
		}
		r.Drain = drain
	}
	// A secret with several sources, or a producer that is none, is said elsewhere.
	switch {
	case secret.ProducedBy != nil && secret.ProducedBy.Component != "":
		p.add(block.Range, "Rotation by somebody else", "%s is produced by the job %q, which also replaces it: leave rotation out.", secret.FullName(), secret.ProducedBy.Component)
	case secret.External != nil && isSet(block.Body, "every"):
		p.add(at(block.Body, "every"), "Rotation without a source", "%s comes from outside, so that nobody can make it when it is due: leave every out, and rotate it by hand with `"+rotateFromFile+"`.", secret.FullName(), secret.FullName())
	}
	return r
}

// parseDays reads a duration that may begin with days, such as "30d" or "1d12h".
func parseDays(text string) (time.Duration, bool) {
	match := daysPattern.FindStringSubmatch(text)
	if match == nil {
		duration, err := time.ParseDuration(text)
		return duration, err == nil
	}
	days, err := strconv.Atoi(match[1])
	if err != nil {
		return 0, false
	}
	duration, rest := time.Duration(days)*day, match[2]
	if rest == "" {
		return duration, true
	}
	more, err := time.ParseDuration(rest)
	if err != nil || more < 0 || more >= day || strings.HasPrefix(rest, "+") {
		return 0, false
	}
	return duration + more, true
}

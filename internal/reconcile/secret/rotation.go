package secret

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

// The keys of an entry's metadata that hold the state of its rotation. All
// others are of somebody else and stay as they are.
const (
	keyActive        = "active"
	keyLogin         = "login"
	keyCandidate     = "candidate"
	keySince         = "since"
	keyBy            = "by"
	keyRetiring      = "retiring"
	keyRetireAfter   = "retire_after"
	keyFailed        = "failed"
	keyFailedBecause = "failed_because"
	keyRotated       = "rotated"
)

// maxMetadata is the most bytes that the engine takes as one value of metadata.
const maxMetadata = 512

// Rotation is how far an entry's rotation has come, in generations. The zero
// value of a field says that there is none.
type Rotation struct {
	// Active is the generation that jobs are to read.
	Active int
	// Candidate is noted before its version is written, and only for as long
	// as it may still become the active one.
	Candidate int
	// Retiring was active before, and stays readable until RetireAfter.
	Retiring int
	// Failed is the last candidate that did not prove itself.
	Failed int
	// Login is the name that the active password logs in as; empty but for the
	// passwords of alternating roles.
	Login         string
	By            string
	FailedBecause string
	Since         time.Time
	RetireAfter   time.Time
	// Rotated is when the active generation was promoted.
	Rotated time.Time
}

// Running reports whether something of the rotation is left to do.
func (r Rotation) Running() bool { return r.Candidate > 0 || r.Retiring > 0 }

// Rotation reads the state of the entry's rotation from its metadata. Where
// that names no active generation, the newest version is it.
func (e EntryState) Rotation() Rotation {
	at := func(key string) time.Time {
		moment, _ := time.Parse(time.RFC3339, e.CustomMetadata[key])
		return moment
	}
	generation := func(key string) int {
		number, err := strconv.Atoi(e.CustomMetadata[key])
		if err != nil || number < 0 {
			return 0
		}
		return number
	}
	rotation := Rotation{
		Active: generation(keyActive), Candidate: generation(keyCandidate), Retiring: generation(keyRetiring), Failed: generation(keyFailed),
		Login: e.CustomMetadata[keyLogin], By: e.CustomMetadata[keyBy], FailedBecause: e.CustomMetadata[keyFailedBecause],
		Since: at(keySince), RetireAfter: at(keyRetireAfter), Rotated: at(keyRotated),
	}
	if rotation.Active == 0 {
		rotation.Active = e.Version
	}
	return rotation
}

// NamesActive reports whether the metadata names the active generation; where it
// does not, that is always the newest.
func (e EntryState) NamesActive() bool { return e.CustomMetadata[keyActive] != "" }

// VersionsNeeded is how many of the newest versions the engine has to keep, so
// that a candidate, and a copy of the active value after one that failed, do
// not push the active generation out. Many attempts may fail in a row.
func (r Rotation) VersionsNeeded() int {
	if r.Candidate == 0 || r.Active == 0 {
		return 0
	}
	const candidateItselfAndCopy = 2
	return r.Candidate - r.Active + candidateItselfAndCopy
}

// Metadata spells the state as metadata of the entry, next to the keys of keep
// that are not the rotation's own.
func (r Rotation) Metadata(keep map[string]string) map[string]string {
	metadata := WithoutRotation(keep)
	for key, generation := range map[string]int{keyActive: r.Active, keyCandidate: r.Candidate, keyRetiring: r.Retiring, keyFailed: r.Failed} {
		if generation > 0 {
			metadata[key] = strconv.Itoa(generation)
		}
	}
	for key, moment := range map[string]time.Time{keySince: r.Since, keyRetireAfter: r.RetireAfter, keyRotated: r.Rotated} {
		if !moment.IsZero() {
			metadata[key] = moment.UTC().Format(time.RFC3339)
		}
	}
	for key, text := range map[string]string{keyLogin: r.Login, keyBy: r.By, keyFailedBecause: r.FailedBecause} {
		if text = metadataText(text); text != "" {
			metadata[key] = text
		}
	}
	return metadata
}

// WithoutRotation is a copy of an entry's metadata without what a rotation keeps there.
func WithoutRotation(metadata map[string]string) map[string]string {
	others := map[string]string{}
	maps.Copy(others, metadata)
	for _, key := range []string{
		keyActive, keyLogin, keyCandidate, keySince, keyBy, keyRetiring, keyRetireAfter, keyFailed, keyFailedBecause, keyRotated,
	} {
		delete(others, key)
	}
	return others
}

// metadataText makes a text one that the engine takes: printable, on one line,
// and not too long.
func metadataText(text string) string {
	text = strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r) || r == unicode.ReplacementChar:
			return -1
		}
		return r
	}, text)
	text = strings.Join(strings.Fields(text), " ")
	if len(text) <= maxMetadata {
		return text
	}
	const ellipsis = "…"
	cut := maxMetadata - len(ellipsis)
	for cut > 0 && text[cut]&0xC0 == 0x80 { // within a rune
		cut--
	}
	return text[:cut] + ellipsis
}

// DueReason is why a rotation has something to do.
type DueReason string

// The reasons.
const (
	// DueByAge: the active generation is older than the secret's policy allows.
	DueByAge = DueReason("due")
	// DueUnfinished: a rotation was begun and neither promoted nor given up.
	DueUnfinished = DueReason("unfinished")
	// DueRetirement: the old generation has drained and is still there.
	DueRetirement = DueReason("to be retired")
)

// Due is a secret that a rotation has something to do for.
type Due struct {
	Name   string
	Reason DueReason
	// Since is when it became due.
	Since time.Time
}

// DueSecrets finds the secrets that a rotation has something to do for, by name.
func DueSecrets(secrets []site.Secret, states map[string]EntryState, now time.Time) []Due {
	var found []Due
	for _, one := range secrets {
		if due, is := dueSecret(one, states[one.FullName()], now); is {
			found = append(found, due)
		}
	}
	slices.SortFunc(found, func(a, b Due) int { return cmp.Compare(a.Name, b.Name) })
	return found
}

func dueSecret(one site.Secret, state EntryState, now time.Time) (Due, bool) {
	if !state.Exists {
		return Due{}, false
	}
	rotation := state.Rotation()
	due := Due{Name: one.FullName()}
	switch {
	case rotation.Candidate > 0:
		due.Reason, due.Since = DueUnfinished, rotation.Since
	case rotation.Retiring > 0:
		// A next rotation begins when this one has ended.
		due.Reason, due.Since = DueRetirement, rotation.RetireAfter
	default:
		at, has := DueAt(one, state)
		if !has {
			return Due{}, false
		}
		due.Reason, due.Since = DueByAge, at
	}
	return due, due.Reason == DueUnfinished || !due.Since.After(now)
}

// DueAt is when the secret's policy asks for its next generation; false where
// it has none, or no value. The active generation counts from its promotion, or
// from when it was written where that was later: a value that was set by hand
// since is as fresh as a rotated one.
func DueAt(one site.Secret, state EntryState) (time.Time, bool) {
	if one.Rotation == nil || one.Rotation.Every <= 0 || !state.HasValue() {
		return time.Time{}, false
	}
	made := state.Created
	if rotated := state.Rotation().Rotated; rotated.After(made) {
		made = rotated
	}
	return made.Add(one.Rotation.Every), true
}

// CannotRotate says why nobody can make the secret's next generation here; nil
// where that can be done, for an external one if its value is brought along.
func CannotRotate(s *site.Site, one site.Secret) error {
	name := one.FullName()
	if one.ProducedBy != nil && one.ProducedBy.Component != "" {
		return plan.WithHint(fmt.Errorf("secret %s is produced by component %s, which alone makes its next value", name, one.ProducedBy.Component),
			"let its job write a new value; its readers follow at the next deploy")
	}
	if one.External != nil && one.External.Optional {
		return plan.WithHint(fmt.Errorf("secret %s is one of a pair of tokens, each of which makes the other's next one", name),
			"rotate both: site provider rotate-admin-pair%s; or bring new ones: %s", siteFlag(s.Name), importPairCommand(s.Name))
	}
	if one.Generated == nil && one.External == nil && one.ProducedBy == nil {
		return plan.WithHint(fmt.Errorf("secret %s has no source", name), "declare where its value comes from")
	}
	for _, role := range s.PasswordRoles(name) {
		if !role.Alternating {
			return plan.WithHint(
				fmt.Errorf("secret %s is the password of role %q, which has one login: a new password would cut off who still has the old", name, role.Name),
				"set `alternating = true` in role %q, let templates read the name from .Data.data.username, and deploy; then rotate", role.Name)
		}
	}
	return nil
}

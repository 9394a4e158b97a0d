// Package bucket decides which of the provider's keys are a site's, and which of
// them nobody uses any more.
package bucket

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// owner begins the names of all that is ours.
const owner = "site"

// Token is a key at the provider, as its list has it.
type Token struct {
	ID, Name string
	Issued   time.Time
}

// TokenName is how a key is found again: "site/gamma/proxy/7".
func TokenName(site, role string, generation int) string {
	return fmt.Sprintf("%s%s/%d", Prefix(site), role, generation)
}

// Prefix begins the names of a site's tokens, and of no other site's.
func Prefix(site string) string { return owner + "/" + site + "/" }

// ParseTokenName is the other way; ok is false for whatever TokenName does not make.
func ParseTokenName(name string) (site, role string, generation int, ok bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 4 || parts[0] != owner || parts[1] == "" || parts[2] == "" {
		return "", "", 0, false
	}
	generation, err := strconv.Atoi(parts[3])
	if err != nil || generation < 1 || strconv.Itoa(generation) != parts[3] {
		return "", "", 0, false
	}
	return parts[1], parts[2], generation, true
}

// Orphans are the site's tokens, by their names, that are in nobody's use, the
// oldest first. What a person made, or another site, is none.
func Orphans(tokens []Token, inUse map[string]bool, site string) []Token {
	var orphans []Token
	for _, token := range tokens {
		if of, _, _, ok := ParseTokenName(token.Name); ok && of == site && !inUse[token.ID] {
			orphans = append(orphans, token)
		}
	}
	slices.SortFunc(orphans, func(a, b Token) int {
		return cmp.Or(a.Issued.Compare(b.Issued), cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	return orphans
}

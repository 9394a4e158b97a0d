package secret

import (
	"cmp"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
)

// shortest is the least that is masked: whatever is shorter keeps nothing secret,
// and would black out half of any text.
const shortest = 4

// Mask gives a function that blacks values out of what others wrote, such as a
// task's log: as they are, each of their lines, and as JSON and URLs spell them.
func Mask(values ...Value) func(text string) string {
	var pieces []string
	for _, value := range values {
		lines := strings.FieldsFunc(value.Reveal(), func(r rune) bool { return r == '\n' || r == '\r' })
		for _, piece := range append(lines, value.Reveal()) {
			if piece = strings.TrimSpace(piece); len(piece) < shortest {
				continue
			}
			quoted, _ := json.Marshal(piece) // a string always can be
			pieces = append(pieces, piece, string(quoted[1:len(quoted)-1]), url.QueryEscape(piece), url.PathEscape(piece))
		}
	}
	// The longest first: one value may be part of another.
	slices.SortFunc(pieces, func(a, b string) int { return cmp.Or(cmp.Compare(len(b), len(a)), cmp.Compare(a, b)) })
	var pairs []string
	for _, piece := range slices.Compact(pieces) {
		pairs = append(pairs, piece, redacted)
	}
	return strings.NewReplacer(pairs...).Replace
}

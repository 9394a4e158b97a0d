package role

import (
	"strconv"
	"strings"
)

// quote makes an SQL identifier of any name that Check lets pass.
func quote(name string) string {
	return `"` + strings.ReplaceAll(name, `"`, `""`) + `"`
}

// quoteGrantee is quote, but for the word that stands for everyone.
func quoteGrantee(role string) string {
	if role == Public {
		return "PUBLIC"
	}
	return quote(role)
}

// literal makes an SQL string of text, for sessions with standard_conforming_strings.
func literal(text string) string {
	return `'` + strings.ReplaceAll(text, `'`, `''`) + `'`
}

// display is a name in a sentence: as it is where it is plain, quoted where it
// might be taken for something else.
func display(name string) string {
	for _, char := range name {
		plain := char == '_' || char == '-' || char == '$' || char == '*' ||
			char >= 'a' && char <= 'z' || char >= 'A' && char <= 'Z' || char >= '0' && char <= '9'
		if !plain {
			return strconv.Quote(name)
		}
	}
	if name == "" {
		return `""`
	}
	return name
}

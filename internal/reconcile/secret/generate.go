package secret

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"

	value "github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// The bounds of a generated value's random bytes, and how many it has when
// nobody says.
const (
	minLength     = 16
	maxLength     = 1024
	defaultLength = 32
)

// Generate makes a value from the bytes of random.
func Generate(g site.Generated, random io.Reader) (value.Value, error) {
	length := g.Length
	if length == 0 {
		length = defaultLength
	}
	if length < minLength || length > maxLength {
		return value.Value{}, fmt.Errorf("a generated secret has %d to %d random bytes, not %d", minLength, maxLength, length)
	}
	var encode func([]byte) string
	switch g.Encoding {
	case "", "base64url":
		encode = base64.RawURLEncoding.EncodeToString
	case "base64":
		encode = base64.StdEncoding.EncodeToString
	case "hex":
		encode = hex.EncodeToString
	default:
		return value.Value{}, fmt.Errorf("encoding %q is none of base64url, base64 and hex", g.Encoding)
	}
	raw := make([]byte, length)
	if _, err := io.ReadFull(random, raw); err != nil {
		return value.Value{}, fmt.Errorf("generate a secret: %w", err)
	}
	return value.New(encode(raw)), nil
}

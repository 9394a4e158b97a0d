package role

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/nomad-site/site/internal/secret"
)

const (
	scramMechanism  = "SCRAM-SHA-256"
	scramIterations = 4096 // RFC 7677's least, and what the server itself uses
	scramSalt       = 16
	// mostIterations bounds what a verifier found on a server may cost us.
	mostIterations = 1 << 20
)

// CheckPassword refuses what clients and servers may normalise differently
// (RFC 4013) before they hash it: everything but printable ASCII.
func CheckPassword(password secret.Value) error {
	text := password.Reveal()
	if text == "" {
		return errors.New("it is empty")
	}
	for _, char := range []byte(text) {
		if char < ' ' || char > '~' {
			return errors.New("it holds other characters than printable ASCII, which programs normalise in different ways")
		}
	}
	return nil
}

// NewVerifier is what a server keeps of a password (RFC 5803), with a salt of its own.
func NewVerifier(password secret.Value) (secret.Value, error) {
	if err := CheckPassword(password); err != nil {
		return secret.Value{}, fmt.Errorf("password: %w", err)
	}
	salt := make([]byte, scramSalt)
	_, _ = rand.Read(salt) // never fails
	stored, server, err := scramKeys(password, salt, scramIterations)
	if err != nil {
		return secret.Value{}, err
	}
	encode := base64.StdEncoding.EncodeToString
	return secret.New(fmt.Sprintf("%s$%d:%s$%s:%s", scramMechanism, scramIterations, encode(salt), encode(stored), encode(server))), nil
}

// isScram reports whether a verifier is of the mechanism that all have to use.
func isScram(verifier secret.Value) bool {
	return strings.HasPrefix(verifier.Reveal(), scramMechanism+"$")
}

// Verify reports whether a verifier was made of the password. One that is
// missing, an MD5 hash or unreadable was not.
func Verify(verifier, password secret.Value) bool {
	parsed, ok := parseVerifier(verifier.Reveal())
	if !ok || CheckPassword(password) != nil {
		return false
	}
	stored, server, err := scramKeys(password, parsed.salt, parsed.iterations)
	if err != nil {
		return false
	}
	return subtle.ConstantTimeCompare(stored, parsed.stored)&subtle.ConstantTimeCompare(server, parsed.server) == 1
}

func scramKeys(password secret.Value, salt []byte, iterations int) (stored, server []byte, err error) {
	salted, err := pbkdf2.Key(sha256.New, password.Reveal(), salt, iterations, sha256.Size)
	if err != nil {
		return nil, nil, fmt.Errorf("derive a SCRAM key: %w", err)
	}
	keyed := func(text string) []byte {
		mac := hmac.New(sha256.New, salted)
		mac.Write([]byte(text))
		return mac.Sum(nil)
	}
	client := sha256.Sum256(keyed("Client Key"))
	return client[:], keyed("Server Key"), nil
}

type verifierParts struct {
	iterations           int
	salt, stored, server []byte
}

func parseVerifier(text string) (verifierParts, bool) {
	var parts verifierParts
	mechanism, rest, _ := strings.Cut(text, "$")
	seed, keys, found := strings.Cut(rest, "$")
	count, salt, foundSalt := strings.Cut(seed, ":")
	stored, server, foundKeys := strings.Cut(keys, ":")
	if mechanism != scramMechanism || !found || !foundSalt || !foundKeys {
		return parts, false
	}
	var errs [4]error
	parts.iterations, errs[0] = strconv.Atoi(count)
	parts.salt, errs[1] = base64.StdEncoding.DecodeString(salt)
	parts.stored, errs[2] = base64.StdEncoding.DecodeString(stored)
	parts.server, errs[3] = base64.StdEncoding.DecodeString(server)
	return parts, errors.Join(errs[:]...) == nil && parts.iterations > 0 && parts.iterations <= mostIterations &&
		len(parts.stored) == sha256.Size && len(parts.server) == sha256.Size
}

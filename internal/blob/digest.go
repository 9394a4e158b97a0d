package blob

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
)

const digestPrefix = "sha256:"

// Digest names bytes: "sha256:" and 64 lower-case hexadecimal digits.
type Digest string

// ParseDigest accepts exactly the canonical form; one digest has one spelling,
// so that it can be a file name and a map key.
func ParseDigest(text string) (Digest, error) {
	digits, found := strings.CutPrefix(text, digestPrefix)
	if !found || len(digits) != 2*sha256.Size {
		return "", fmt.Errorf("parse digest %.100q: want sha256: and 64 hexadecimal digits", text)
	}
	for _, c := range []byte(digits) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return "", fmt.Errorf("parse digest %.100q: what follows sha256: is not of 0-9 and a-f", text)
		}
	}
	return Digest(text), nil
}

// DigestOf hashes content.
func DigestOf(content []byte) Digest {
	return digestOfSum(sha256.Sum256(content))
}

// DigestReader hashes all of r and returns how long it was.
func DigestReader(r io.Reader) (Digest, int64, error) {
	hash := sha256.New()
	size, err := io.Copy(hash, r)
	if err != nil {
		return "", size, err
	}
	return digestOfSum(sum(hash.Sum(nil))), size, nil
}

// Hex returns the digits without the algorithm.
func (d Digest) Hex() string { return strings.TrimPrefix(string(d), digestPrefix) }

// Valid reports whether d has the canonical form.
func (d Digest) Valid() bool {
	_, err := ParseDigest(string(d))
	return err == nil
}

// Check returns a *MismatchError unless content hashes to d.
func (d Digest) Check(content []byte) error {
	if got := DigestOf(content); got != d {
		return &MismatchError{Want: d, Got: got}
	}
	return nil
}

// rawDigest is a digest in 32 bytes: what travels and what indexes are keyed by.
type rawDigest [sha256.Size]byte

// raw is only called on digests that were parsed.
func (d Digest) raw() rawDigest {
	var out rawDigest
	_, _ = hex.Decode(out[:], []byte(d.Hex()))
	return out
}

func (r rawDigest) digest() Digest { return digestOfSum(r) }

func digestOfSum(s rawDigest) Digest {
	return Digest(digestPrefix + hex.EncodeToString(s[:]))
}

func sum(b []byte) rawDigest {
	var out rawDigest
	copy(out[:], b)
	return out
}

package nomad

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"sort"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

// The names by which operators log in.
const (
	// Audience is what an operator's token is for.
	Audience = "site"
	// Issuer is who an operator's token says made it.
	Issuer = "site-operator"
	// operatorClaim names the operator in the token.
	operatorClaim = "operator"
	// purposeClaim says why the operator logs in.
	purposeClaim = "purpose"
)

// errKeyType lists what both SSH and JWT know.
var errKeyType = errors.New("only ssh-ed25519, ssh-rsa (2048 bits or more) and ecdsa-sha2-nistp256, -384 and -521 keys can log in")

// jwtAlgorithm maps an SSH key type to the JWT algorithm, the SSH signature
// algorithm to ask for, and for ECDSA the bytes of each half of the signature.
func jwtAlgorithm(keyType string) (algorithm, sshAlgorithm string, half int, err error) {
	switch keyType {
	case ssh.KeyAlgoED25519:
		return "EdDSA", ssh.KeyAlgoED25519, 0, nil
	case ssh.KeyAlgoRSA:
		// Without asking, an agent signs with SHA-1.
		return "RS256", ssh.KeyAlgoRSASHA256, 0, nil
	case ssh.KeyAlgoECDSA256:
		return "ES256", ssh.KeyAlgoECDSA256, 32, nil
	case ssh.KeyAlgoECDSA384:
		return "ES384", ssh.KeyAlgoECDSA384, 48, nil
	case ssh.KeyAlgoECDSA521:
		return "ES512", ssh.KeyAlgoECDSA521, 66, nil
	default:
		return "", "", 0, fmt.Errorf("ssh key type %s: %w", keyType, errKeyType)
	}
}

// SignJWT makes an operator's login token, signed by an SSH key that may live
// in an agent: both speak the same signature schemes, only packed differently.
func SignJWT(signer ssh.Signer, operator, audience string, ttl time.Duration) (secret.Value, error) {
	return signJWT(signer, operator, audience, "", ttl, time.Now())
}

// SignJWTFor says in the token what it is for, which a login keeps beside the
// token that it gives: see the purpose claim.
func SignJWTFor(signer ssh.Signer, operator, audience, purpose string, ttl time.Duration) (secret.Value, error) {
	return signJWT(signer, operator, audience, purpose, ttl, time.Now())
}

func signJWT(signer ssh.Signer, operator, audience, purpose string, ttl time.Duration, now time.Time) (secret.Value, error) {
	algorithm, sshAlgorithm, half, err := jwtAlgorithm(signer.PublicKey().Type())
	if err != nil {
		return secret.Value{}, plan.WithHint(err, "make one with: ssh-keygen -t ed25519")
	}
	nonce := make([]byte, 16)
	if _, err := rand.Read(nonce); err != nil {
		return secret.Value{}, fmt.Errorf("make a token id: %w", err)
	}
	header, err := json.Marshal(map[string]string{"alg": algorithm, "typ": "JWT", "kid": ssh.FingerprintSHA256(signer.PublicKey())})
	if err != nil {
		return secret.Value{}, fmt.Errorf("encode token header: %w", err)
	}
	content := map[string]any{
		"iss": Issuer, "sub": operator, operatorClaim: operator, "aud": []string{audience},
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(ttl).Unix(), "jti": hex.EncodeToString(nonce),
	}
	if purpose != "" {
		content[purposeClaim] = purpose
	}
	claims, err := json.Marshal(content)
	if err != nil {
		return secret.Value{}, fmt.Errorf("encode token claims: %w", err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode(header) + "." + encode(claims)
	signature, err := sshSign(signer, []byte(signed), sshAlgorithm)
	if err != nil {
		return secret.Value{}, plan.WithHint(fmt.Errorf("sign the login token of operator %s: %w", operator, err),
			"check that the agent holds the key and is unlocked: ssh-add -l")
	}
	raw := signature.Blob
	if half > 0 {
		if raw, err = joinECDSA(signature.Blob, half); err != nil {
			return secret.Value{}, err
		}
	}
	return secret.New(signed + "." + encode(raw)), nil
}

func sshSign(signer ssh.Signer, content []byte, algorithm string) (*ssh.Signature, error) {
	var signature *ssh.Signature
	var err error
	if choosing, ok := signer.(ssh.AlgorithmSigner); ok {
		signature, err = choosing.SignWithAlgorithm(rand.Reader, content, algorithm)
	} else {
		signature, err = signer.Sign(rand.Reader, content)
	}
	if err != nil {
		return nil, err
	}
	if signature.Format != algorithm {
		return nil, fmt.Errorf("the agent signed with %s, not %s", signature.Format, algorithm)
	}
	return signature, nil
}

// joinECDSA turns SSH's two big integers into JWT's halves of fixed length.
func joinECDSA(blob []byte, half int) ([]byte, error) {
	var parts struct{ R, S *big.Int }
	if err := ssh.Unmarshal(blob, &parts); err != nil {
		return nil, fmt.Errorf("read ecdsa signature: %w", err)
	}
	if parts.R.Sign() < 0 || parts.S.Sign() < 0 || parts.R.BitLen() > half*8 || parts.S.BitLen() > half*8 {
		return nil, errors.New("read ecdsa signature: out of range")
	}
	raw := make([]byte, 2*half)
	parts.R.FillBytes(raw[:half])
	parts.S.FillBytes(raw[half:])
	return raw, nil
}

// JWKS is the document that a JWKS address must serve for those of the operators
// who deploy. It is deterministic, and holds public keys only. The keys of those
// who only rotate must not be in it: a key may sign any name.
func JWKS(operators []Operator) ([]byte, error) {
	return jwks(deployers(operators))
}

// RotatorsJWKS is the same for the operators who only rotate secrets, to be
// served at RotatorsJWKSURL.
func RotatorsJWKS(operators []Operator) ([]byte, error) {
	return jwks(rotators(operators))
}

func jwks(operators []Operator) ([]byte, error) {
	keys := make([]map[string]string, 0, len(operators))
	for _, operator := range operators {
		key, err := parsePEM(operator)
		if err != nil {
			return nil, err
		}
		encode := base64.RawURLEncoding.EncodeToString
		document := map[string]string{"use": "sig"}
		switch key := key.(type) {
		case ed25519.PublicKey:
			document["kty"], document["crv"], document["alg"] = "OKP", "Ed25519", "EdDSA"
			document["x"] = encode(key)
		case *rsa.PublicKey:
			document["kty"], document["alg"] = "RSA", "RS256"
			document["n"], document["e"] = encode(key.N.Bytes()), encode(big.NewInt(int64(key.E)).Bytes())
		case *ecdsa.PublicKey:
			point, err := key.Bytes()
			if err != nil {
				return nil, fmt.Errorf("public key of operator %s: %w", operator.Name, err)
			}
			half := (len(point) - 1) / 2
			document["kty"], document["crv"] = "EC", key.Curve.Params().Name
			document["alg"] = map[int]string{32: "ES256", 48: "ES384", 66: "ES512"}[half]
			document["x"], document["y"] = encode(point[1:1+half]), encode(point[1+half:])
		default:
			return nil, fmt.Errorf("public key of operator %s: %w", operator.Name, errKeyType)
		}
		public, err := ssh.NewPublicKey(key)
		if err != nil {
			return nil, fmt.Errorf("public key of operator %s: %w", operator.Name, err)
		}
		document["kid"] = ssh.FingerprintSHA256(public)
		keys = append(keys, document)
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i]["kid"] < keys[j]["kid"] })
	encoded, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		return nil, fmt.Errorf("encode operators' keys: %w", err)
	}
	return encoded, nil
}

func parsePEM(operator Operator) (any, error) {
	block, _ := pem.Decode([]byte(operator.PublicKeyPEM))
	if block == nil {
		return nil, fmt.Errorf("public key of operator %s: not PEM", operator.Name)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("public key of operator %s: %w", operator.Name, err)
	}
	return key, nil
}

// PublicKeyPEM turns an authorized_keys line into the PKIX PEM that Nomad and
// OpenBao validate tokens with.
func PublicKeyPEM(authorizedKey string) (string, error) {
	parsed, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(authorizedKey))
	if err != nil {
		return "", fmt.Errorf("read public key: %w", err)
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return "", errors.New("read public key: more than one key")
	}
	if _, _, _, err := jwtAlgorithm(parsed.Type()); err != nil {
		return "", plan.WithHint(err, "make one with: ssh-keygen -t ed25519")
	}
	holder, ok := parsed.(ssh.CryptoPublicKey)
	if !ok {
		return "", fmt.Errorf("read public key: %w", errKeyType)
	}
	key := holder.CryptoPublicKey()
	if curve, ok := key.(*ecdsa.PublicKey); ok {
		if _, err := curve.ECDH(); err != nil {
			return "", fmt.Errorf("read public key: %w", err)
		}
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("encode public key: %w", err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), nil
}

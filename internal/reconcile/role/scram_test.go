package role

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/secret"
)

func TestKeysAreThoseOfTheExampleOfRFC7677(t *testing.T) {
	salt, err := base64.StdEncoding.DecodeString("W22ZaJ0SNY7soEsUEjb6gQ==")
	if err != nil {
		t.Fatal(err)
	}
	_, server, err := scramKeys(secret.New("pencil"), salt, 4096)
	if err != nil {
		t.Fatal(err)
	}
	nonce := "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
	mac := hmac.New(sha256.New, server)
	mac.Write([]byte("n=user,r=rOprNGfwEbeRWgbNEkqO,r=" + nonce + ",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r=" + nonce))
	if got, want := base64.StdEncoding.EncodeToString(mac.Sum(nil)), "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="; got != want {
		t.Errorf("server signature %s, want %s", got, want)
	}
}

func TestVerify(t *testing.T) {
	password := secret.New("pencil")
	verifier, err := NewVerifier(password)
	if err != nil {
		t.Fatal(err)
	}
	another, err := NewVerifier(password)
	if err != nil {
		t.Fatal(err)
	}
	if verifier.Reveal() == another.Reveal() {
		t.Error("two verifiers have one salt")
	}
	text := verifier.Reveal()
	tests := map[string]struct {
		verifier, password string
		want               bool
	}{
		"its own password":                        {text, "pencil", true},
		"another salt":                            {another.Reveal(), "pencil", true},
		"another password":                        {text, "pencil2", false},
		"no password":                             {text, "", false},
		"no verifier":                             {"", "pencil", false},
		"an MD5 hash":                             {"md5b6d5ba5e5e9ab8e2f0e8a8c0a2f1c6d2", "pencil", false},
		"another mechanism":                       {strings.Replace(text, "256", "512", 1), "pencil", false},
		"another count of iterations":             {strings.Replace(text, "4096", "4097", 1), "pencil", false},
		"a count that would take for ever":        {strings.Replace(text, "4096", "99999999999", 1), "pencil", false},
		"no iterations":                           {strings.Replace(text, "4096", "0", 1), "pencil", false},
		"a verifier that was cut off":             {text[:len(text)-4], "pencil", false},
		"a verifier whose server key was changed": {text[:strings.LastIndex(text, ":")] + another.Reveal()[strings.LastIndex(another.Reveal(), ":"):], "pencil", false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if got := Verify(secret.New(test.verifier), secret.New(test.password)); got != test.want {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func TestCheckPassword(t *testing.T) {
	for name, test := range map[string]struct {
		password string
		good     bool
	}{
		"printable ASCII":     {` !"#$%&'()*+~`, true},
		"an empty one":        {"", false},
		"a newline at an end": {"secret\n", false},
		"a tab":               {"se\tcret", false},
		"a zero":              {"se\x00cret", false},
		"an umlaut":           {"sécret", false},
	} {
		err := CheckPassword(secret.New(test.password))
		if (err == nil) != test.good {
			t.Errorf("%s: got %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "cret") {
			t.Errorf("%s: the error shows the password: %v", name, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	f.Add("SCRAM-SHA-256$1:AAAA$AAAA:AAAA", "pencil")
	f.Add("$:$:", "")
	f.Fuzz(func(_ *testing.T, verifier, password string) {
		if parts, ok := parseVerifier(verifier); ok && parts.iterations > 100 {
			return // would only take time
		}
		Verify(secret.New(verifier), secret.New(password))
	})
}

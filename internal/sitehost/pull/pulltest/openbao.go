package pulltest

import (
	"cmp"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/site"
)

// OpenBao answers what a host asks of OpenBao.
type OpenBao struct {
	*httptest.Server

	mutex  sync.Mutex
	public ed25519.PublicKey
	// Active is the generation that metadata names, 0: it names none; Newest is the
	// newest version. All that may change is changed by Set.
	Active, Newest map[string]int
	// Values are those of secrets, by "name vN"; without one it is that text itself.
	Values        map[string]string
	Logins, Asked int
	Token         string
	Sealed        bool
}

// NewOpenBao starts one that knows the host by the public half of its key, as PEM.
func NewOpenBao(t testing.TB, publicPEM string) *OpenBao {
	t.Helper()
	block, _ := pem.Decode([]byte(publicPEM))
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	must(t, err)
	b := &OpenBao{
		public: key.(ed25519.PublicKey), Active: map[string]int{},
		Newest: map[string]int{site.StoreProxyID: 1, site.StoreProxySecret: 1},
		Values: map[string]string{},
	}
	b.Server = httptest.NewServer(b)
	t.Cleanup(b.Close)
	return b
}

// ServeHTTP implements http.Handler.
func (b *OpenBao) ServeHTTP(writer http.ResponseWriter, request *http.Request) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.Asked++
	if b.Sealed {
		http.Error(writer, `{"errors":["Vault is sealed"]}`, http.StatusServiceUnavailable)
		return
	}
	path := request.URL.Path
	if path == "/v1/auth/hosts/login" {
		b.login(writer, request)
		return
	}
	name := path[strings.LastIndex(path, "/")+1:]
	switch {
	case request.Header.Get("X-Vault-Token") != b.Token:
		http.Error(writer, `{"errors":["permission denied"]}`, http.StatusForbidden)
	case b.Newest[name] == 0:
		http.Error(writer, `{"errors":[]}`, http.StatusNotFound)
	case path == "/v1/site/metadata/object-storage-service/"+name:
		custom := "null"
		if b.Active[name] > 0 {
			custom = fmt.Sprintf(`{"active":"%d","since":"x"}`, b.Active[name])
		}
		_, _ = fmt.Fprintf(writer, `{"data":{"current_version":%d,"custom_metadata":%s}}`, b.Newest[name], custom)
	case path == "/v1/site/data/object-storage-service/"+name:
		value := fmt.Sprintf("%s v%s", name, request.URL.Query().Get("version"))
		_, _ = fmt.Fprintf(writer, `{"data":{"data":{"value":%q}}}`, cmp.Or(b.Values[value], value))
	default:
		http.NotFound(writer, request)
	}
}

func (b *OpenBao) login(writer http.ResponseWriter, request *http.Request) {
	var body struct{ Role, JWT string }
	err := json.NewDecoder(request.Body).Decode(&body)
	parts := strings.Split(body.JWT, ".")
	if err != nil || len(parts) != 3 || body.Role != "host" {
		http.Error(writer, "{}", http.StatusBadRequest)
		return
	}
	signature, _ := base64.RawURLEncoding.DecodeString(parts[2])
	claims, _ := base64.RawURLEncoding.DecodeString(parts[1])
	var said struct {
		Issuer   string   `json:"iss"`
		Audience []string `json:"aud"`
		Host     string   `json:"host"`
		Expires  int64    `json:"exp"`
	}
	err = json.Unmarshal(claims, &said)
	if err != nil || !ed25519.Verify(b.public, []byte(parts[0]+"."+parts[1]), signature) || said.Issuer != "site-host" ||
		len(said.Audience) != 1 || said.Audience[0] != "site" || said.Host != "lab-1" || time.Until(time.Unix(said.Expires, 0)) <= 0 {
		http.Error(writer, "{}", http.StatusBadRequest)
		return
	}
	b.Logins++
	b.Token = fmt.Sprintf("token-%d", b.Logins)
	_, _ = fmt.Fprintf(writer, `{"auth":{"client_token":%q,"lease_duration":3600}}`, b.Token)
}

// Set changes it while requests may run.
func (b *OpenBao) Set(change func()) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	change()
}

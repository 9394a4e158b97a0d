package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/nomad-site/site/internal/plan"
)

// StoreStatus is the lab's object store. Hosts and the machine reach it at the
// same address, so that a presigned URL is good on both.
type StoreStatus struct {
	Endpoint string `json:"endpoint"`
	// Credentials is the path of a StoreCredentials file, for root only.
	Credentials string `json:"credentials"`
	Running     bool   `json:"running"`
}

// StoreCredentials is the content of store.json: the store's root account.
type StoreCredentials struct {
	Endpoint        string `json:"endpoint"`
	Region          string `json:"region"`
	AccessKeyID     string `json:"access_key_id"`
	SecretAccessKey string `json:"secret_access_key"`
}

const (
	storeRegion = "us-east-1"
	storePort   = 7070
)

func (l *Lab) storeName() string { return l.name + "-store" }
func (l *Lab) storeFile() string { return l.path("store.json") }
func (l *Lab) storeAddress(current *state) string {
	return fmt.Sprintf("%s:%d", addressOf(current.Subnet, storeNumber), storePort)
}

// storeCredentials are made once and kept.
func (l *Lab) storeCredentials(current *state) (StoreCredentials, error) {
	var found StoreCredentials
	content, err := os.ReadFile(l.storeFile())
	if err == nil {
		if err := json.Unmarshal(content, &found); err != nil {
			return found, fmt.Errorf("read %s: %w", l.storeFile(), err)
		}
		return found, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return found, fmt.Errorf("read store credentials: %w", err)
	}
	random := make([]byte, 30)
	_, _ = rand.Read(random) // never fails
	found = StoreCredentials{
		Endpoint:        "http://" + l.storeAddress(current),
		Region:          storeRegion,
		AccessKeyID:     "LAB" + hex.EncodeToString(random[:8]),
		SecretAccessKey: hex.EncodeToString(random[8:]),
	}
	if content, err = json.MarshalIndent(found, "", "  "); err != nil {
		return found, fmt.Errorf("write store credentials: %w", err)
	}
	return found, writeFile(l.storeFile(), append(content, '\n'), 0o600)
}

// startStore runs the object store with nothing but its binary.
func (l *Lab) startStore(ctx context.Context, pod *pod, current *state, now containerState) error {
	if now == stopped {
		_, err := pod.podman(ctx, "start", l.storeName())
		return err
	}
	if _, err := os.Stat(current.Versitygw); err != nil {
		return plan.WithHint(fmt.Errorf("find its program: %w", err), "bring the lab up with the path of a versitygw binary")
	}
	credentials, err := l.storeCredentials(current)
	if err != nil {
		return err
	}
	for _, folder := range []string{"root", "data", "accounts"} {
		if err := os.MkdirAll(l.path("store", folder), 0o700); err != nil {
			return fmt.Errorf("make its folders: %w", err)
		}
	}
	address := addressOf(current.Subnet, storeNumber)
	args := []string{"run", "--detach", "--name", l.storeName(), "--hostname", l.storeName(), "--label", label + "=" + l.name,
		"--cgroup-parent", l.cgroupParent(), "--log-driver", "none", "--restart", "always",
		"--network", networkName, "--ip", address.String(), "--mac-address", macOf(address), "--dns", "none",
		"--volume", current.Versitygw + ":/versitygw:ro",
		"--volume", l.path("store", "data") + ":/data", "--volume", l.path("store", "accounts") + ":/accounts",
		// Named only: the values come from the environment, not from a command line.
		"--env", "ROOT_ACCESS_KEY", "--env", "ROOT_SECRET_KEY"}
	for _, limit := range pod.limits.outer {
		args = append(args, "--ulimit", limit)
	}
	args = append(args, "--rootfs", l.path("store", "root"),
		"/versitygw", "--port", fmt.Sprintf(":%d", storePort), "--region", storeRegion, "--quiet", "--iam-dir", "/accounts", "posix", "/data")
	_, err = pod.podmanWith(ctx, []string{"ROOT_ACCESS_KEY=" + credentials.AccessKeyID, "ROOT_SECRET_KEY=" + credentials.SecretAccessKey}, args...)
	return err
}

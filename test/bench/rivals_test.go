package bench

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/retry"
)

// The rivals bring the same archive to the same host and run it there with
// plain podman. Each finds on the host what it left there the last time.
const (
	remoteFolder = "/var/lib/rival"
	// The host has no rsync and must not be changed by one: it gets the
	// program and its libraries into a folder of their own.
	remoteRsync = "env LD_LIBRARY_PATH=" + remoteFolder + "/lib " + remoteFolder + "/rsync"
)

type rival struct {
	name string
	// transfer brings app.tar to the host.
	transfer func(f *fixture) error
	// load makes an image of it, where transfer did not.
	load string
	// stored says that the transfer starts from this machine's podman.
	stored bool
}

var (
	rsync = rival{name: "rsync -z", load: "podman load -q -i " + remoteFolder + "/app.tar", transfer: func(f *fixture) error {
		_, err := f.do("rsync", "-z", "--rsync-path="+remoteRsync, "-e", "ssh -F "+f.lab.SSHConfig(), f.path("app.tar"), host+":"+remoteFolder+"/app.tar")
		return err
	}}
	scp = rival{name: "scp", load: "podman load -q -i " + remoteFolder + "/scp.tar", transfer: func(f *fixture) error {
		_, err := f.do("scp", "-q", "-F", f.lab.SSHConfig(), f.path("app.tar"), host+":"+remoteFolder+"/scp.tar")
		return err
	}}
	saveLoad = rival{name: "podman save \\| ssh podman load", load: "true", stored: true, transfer: func(f *fixture) error {
		_, err := f.do("sh", "-c", strings.Join(f.podman("save", imageTag), " ")+" | ssh -F "+f.lab.SSHConfig()+" "+host+" podman load -q")
		return err
	}}
)

// podman of this machine, with storage of its own.
func (f *fixture) podman(arguments ...string) []string {
	return append([]string{"podman", "--root", f.temp + "/podman/root", "--runroot", f.temp + "/podman/run", "--cgroup-manager", "cgroupfs"}, arguments...)
}

func (f *fixture) installRsync() error {
	script := `set -e
libraries=$(ldd "$(command -v rsync)" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | grep -v '/libc\.so')
ssh -F "$1" "$2" mkdir -p "$3/lib"
scp -q -F "$1" $libraries "$2:$3/lib/"
scp -q -F "$1" "$(command -v rsync)" "$2:$3/rsync"`
	_, err := f.do("sh", "-c", script, "sh", f.lab.SSHConfig(), host, remoteFolder)
	return err
}

// deploy measures a rival: the transfer alone, and until the container answers.
func (f *fixture) deploy(r rival) (transfer, running run, err error) {
	start := time.Now()
	if transfer, err = f.counted(func() error { return r.transfer(f) }); err != nil {
		return transfer, running, fmt.Errorf("%s: %w", r.name, err)
	}
	looking := time.Since(start).Seconds() - transfer.seconds // the counters were read
	script := r.load + fmt.Sprintf(` && podman rm -f -t 5 --ignore rival >/dev/null && podman run -d --name rival --network host -e HELLO_LISTEN=:%d %s`, rivalPort, imageTag)
	if _, err = f.do("ssh", "-F", f.lab.SSHConfig(), host, script); err != nil {
		return transfer, running, fmt.Errorf("%s: %w", r.name, err)
	}
	if err = f.answers(rivalPort); err != nil {
		return transfer, running, fmt.Errorf("%s: %w", r.name, err)
	}
	running = run{seconds: time.Since(start).Seconds() - looking, wire: transfer.wire}
	return transfer, running, nil
}

// forget ends the rivals' container and drops images that nothing uses any more.
func (f *fixture) forget() error {
	_, err := f.onHost("podman rm -f -t 5 --ignore rival >/dev/null; podman image prune -f >/dev/null")
	return err
}

func (f *fixture) answers(port int) error {
	address := fmt.Sprintf("http://%s:%d/healthz", f.address, port)
	return retry.Until(context.Background(), "the application to answer", time.Minute, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
		if err != nil {
			return err
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", address, response.Status)
		}
		return nil
	})
}

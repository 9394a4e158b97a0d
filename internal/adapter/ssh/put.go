package ssh

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"regexp"
	"strings"
	"time"
)

// The scripts need a POSIX shell and what every Debian or busybox has: mkdir,
// cat, sha256sum, chmod, mv, rm, stat, sync.
const (
	inspectScript = `LC_ALL=C; export LC_ALL
if [ -d "$1" ]; then echo "$1 is a folder" >&2; exit 66; fi
digest=-; mode=-
if [ -f "$1" ] && [ ! -L "$1" ]; then digest=$(sha256sum <"$1") || exit 1; mode=$(stat -c %a -- "$1" 2>/dev/null || echo -); fi
decode=cat; if command -v gzip >/dev/null 2>&1; then decode=gzip; fi
echo "${digest%% *} $mode $decode"`

	// The temporary file carries the shell's process id: one whose process is
	// gone was left by a cut upload. The exit trap removes our own.
	putScript = `LC_ALL=C; export LC_ALL
set -eu
target=$1 want=$2 mode=$3 decode=$4
folder=${target%/*}; [ -n "$folder" ] || folder=/
(umask 022; mkdir -p -- "$folder")
for old in "$target".put.*; do
  [ -e "$old" ] || continue
  kill -0 "${old##*.}" 2>/dev/null || rm -f -- "$old"
done
temp=$target.put.$$
trap 'rm -f -- "$temp"' EXIT
trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 141' PIPE; trap 'exit 143' TERM
umask 077
if [ "$decode" = gzip ]; then gzip -dc >"$temp"; else cat >"$temp"; fi
got=$(sha256sum <"$temp"); got=${got%% *}
if [ "$got" != "$want" ]; then echo "digest $got" >&2; exit 65; fi
chmod "$mode" "$temp"
sync "$temp" 2>/dev/null || sync
mv -f -- "$temp" "$target"
sync "$folder" 2>/dev/null || sync`

	exitWrongDigest = 65
)

// Digest is the sha256 (hex) of a file on the host; empty where there is none.
func (c *Conn) Digest(ctx context.Context, file string) (string, error) {
	found, err := c.inspect(ctx, file)
	return found.digest, err
}

type remoteFile struct{ digest, mode, decode string }

func (c *Conn) inspect(ctx context.Context, file string) (remoteFile, error) {
	facts, err := c.Facts(ctx)
	if err != nil {
		return remoteFile{}, err
	}
	output, err := c.Run(ctx, Command{Args: []string{"sh", "-c", inspectScript, "sh", file}, AsLoginUser: facts.sudoLimited})
	if err != nil {
		return remoteFile{}, fmt.Errorf("digest of %s: %w", file, err)
	}
	fields := strings.Fields(string(output))
	if len(fields) != 3 {
		return remoteFile{}, fmt.Errorf("digest of %s on %s: unexpected answer %q", file, c.host.name, output)
	}
	found := remoteFile{digest: fields[0], mode: fields[1], decode: fields[2]}
	if found.digest == "-" {
		found.digest = ""
	}
	return found, nil
}

// PutBinary puts a file on a bare host with nothing there but a shell: temporary
// file beside the target, digest proven on the host, atomic rename. digest is
// the sha256 in hex. It reports whether anything was sent; a host that has
// these bytes gets none. progress may be nil; it counts plain bytes.
func PutBinary(ctx context.Context, conn *Conn, source io.Reader, size int64, digest, target string, mode fs.FileMode,
	progress func(done, total int64),
) (sent bool, err error) {
	if !path.IsAbs(target) || path.Clean(target) != target {
		return false, fmt.Errorf("put %s on %s: not a clean absolute path", target, conn.host.name)
	}
	if !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(digest) {
		return false, fmt.Errorf("put %s on %s: %q is no sha256 digest", target, conn.host.name, digest)
	}
	there, err := conn.inspect(ctx, target)
	if err != nil {
		return false, fmt.Errorf("put %s on %s: %w", target, conn.host.name, err)
	}
	octal := fmt.Sprintf("%o", mode.Perm())
	if there.digest == digest {
		if there.mode == octal {
			return false, nil
		}
		if _, err := conn.Run(ctx, Command{Args: []string{"chmod", octal, target}}); err != nil {
			return false, fmt.Errorf("put %s on %s: %w", target, conn.host.name, err)
		}
		return false, nil
	}

	hash := sha256.New()
	counted := &counter{reader: io.TeeReader(source, hash), total: size, report: progress}
	stdin := io.Reader(counted)
	if there.decode == "gzip" {
		stdin = compressed(counted)
	}
	_, err = conn.Run(ctx, Command{
		Args:  []string{"sh", "-c", putScript, "sh", target, digest, octal, there.decode},
		Stdin: stdin,
	})
	if closer, ok := stdin.(io.Closer); ok {
		_ = closer.Close()
	}
	return true, explainPut(conn, err, counted, hash.Sum(nil), digest, target, size)
}

func explainPut(conn *Conn, err error, counted *counter, read []byte, digest, target string, size int64) error {
	if err == nil {
		return nil
	}
	var exit *ExitError
	if !errors.As(err, &exit) {
		return fmt.Errorf("put %s on %s: %w", target, conn.host.name, err)
	}
	if strings.Contains(exit.Stderr, "No space left on device") || strings.Contains(exit.Stderr, "Disk quota exceeded") {
		return &DiskFullError{Host: conn.host.name, Path: target, Size: size, Err: err}
	}
	if exit.Code == exitWrongDigest {
		got := strings.TrimPrefix(strings.TrimSpace(exit.Stderr), "digest ")
		if source := hex.EncodeToString(read); counted.ended && source != digest {
			return &DigestError{Host: conn.host.name, Path: target, Want: digest, Got: source, AtSource: true}
		}
		return &DigestError{Host: conn.host.name, Path: target, Want: digest, Got: got}
	}
	return fmt.Errorf("put %s on %s: %w", target, conn.host.name, err)
}

// counter reports how far a reader has come.
type counter struct {
	reader      io.Reader
	done, total int64
	ended       bool
	report      func(done, total int64)
}

func (c *counter) Read(buffer []byte) (int, error) {
	n, err := c.reader.Read(buffer)
	c.done += int64(n)
	if errors.Is(err, io.EOF) {
		c.ended = true
	}
	if n > 0 && c.report != nil {
		c.report(c.done, c.total)
	}
	return n, err
}

// compressed is source in gzip, at the level that a network outruns least.
// Closing it ends the compressor.
func compressed(source io.Reader) io.ReadCloser {
	reader, writer := io.Pipe()
	stream := &compressedReader{PipeReader: reader, ended: make(chan struct{})}
	go func() {
		defer close(stream.ended)
		// The compressor writes a few hundred bytes at a time: without a buffer
		// each would travel as a packet of its own.
		buffered := bufio.NewWriterSize(writer, 64<<10)
		compressor, err := gzip.NewWriterLevel(buffered, gzip.BestSpeed)
		if err == nil {
			_, err = io.Copy(compressor, source)
		}
		if err == nil {
			err = compressor.Close()
		}
		if err == nil {
			err = buffered.Flush()
		}
		_ = writer.CloseWithError(err)
	}()
	return stream
}

type compressedReader struct {
	*io.PipeReader
	ended chan struct{}
}

func (c *compressedReader) Close() error {
	err := c.PipeReader.Close()
	select {
	case <-c.ended:
	case <-time.After(inputGrace): // a source that blocks must not hold us
	}
	return err
}

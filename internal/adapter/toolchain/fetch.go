package toolchain

import (
	"archive/tar"
	"archive/zip"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// fetch downloads a pinned file, proves its digest, and takes the executable
// out of it.
func fetch(ctx context.Context, source Source, work, executable string, progress plan.Progress) error {
	downloaded := filepath.Join(work, "download")
	if err := download(ctx, source, downloaded, progress); err != nil {
		return fmt.Errorf("fetch %s: %w", source.URL, err)
	}
	if source.Member == "" {
		if err := os.Rename(downloaded, executable); err != nil {
			return err
		}
		return os.Chmod(executable, 0o755)
	}
	if err := extract(downloaded, source, executable); err != nil {
		return fmt.Errorf("take %q out of %s: %w", source.Member, source.URL, err)
	}
	return nil
}

func download(ctx context.Context, source Source, target string, progress plan.Progress) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, source.URL, nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("the server answers %s", response.Status)
	}
	file, err := os.OpenFile(target, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	hash := sha256.New()
	counted := &countingReader{reader: response.Body, what: path.Base(source.URL), total: response.ContentLength, progress: progress}
	_, err = io.Copy(io.MultiWriter(file, hash), counted)
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	if sum := hex.EncodeToString(hash.Sum(nil)); sum != source.SHA256 {
		return plan.WithHint(fmt.Errorf("sha256 is %s, pinned is %s", sum, source.SHA256),
			"the file at this address has changed, or the pin is wrong: compare with what the publisher says before changing the pin")
	}
	return nil
}

type countingReader struct {
	reader   io.Reader
	what     string
	done     int64
	total    int64
	progress plan.Progress
}

func (c *countingReader) Read(buffer []byte) (int, error) {
	count, err := c.reader.Read(buffer)
	c.done += int64(count)
	c.progress.Bytes(c.what, c.done, c.total)
	return count, err
}

func extract(archive string, source Source, executable string) error {
	if strings.HasSuffix(source.URL, ".zip") {
		return extractZip(archive, source.Member, executable)
	}
	opened, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer opened.Close()
	var plain io.Reader = opened
	if strings.HasSuffix(source.URL, ".gz") || strings.HasSuffix(source.URL, ".tgz") {
		if plain, err = gzip.NewReader(opened); err != nil {
			return err
		}
	}
	reader := tar.NewReader(plain)
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return errors.New("the archive has no such file")
		}
		if err != nil {
			return err
		}
		if path.Clean(header.Name) == path.Clean(source.Member) && header.Typeflag == tar.TypeReg {
			return writeExecutable(executable, reader)
		}
	}
}

func extractZip(archive, member, executable string) error {
	reader, err := zip.OpenReader(archive)
	if err != nil {
		return err
	}
	defer reader.Close()
	opened, err := reader.Open(path.Clean(member))
	if err != nil {
		return err
	}
	defer opened.Close()
	return writeExecutable(executable, opened)
}

func writeExecutable(executable string, content io.Reader) error {
	file, err := os.OpenFile(executable, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	return errors.Join(err, file.Close())
}
